"""The small pieces of text that tables are made of: figures, threats, Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from rdd_bench.metrics import Estimate
from rdd_bench.rows import Row, Threat
from rdd_bench.standings import Standing, Table
from rdd_bench.types import format_eps

NORMS = {"linf": "L∞", "l2": "L2"}
DASH = "–"

_LEFT = {"Distiller", "Flags", "Attack", "Label", "Plugin", "Options"}


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return rows as a Markdown table; nothing for no rows."""
    if not rows:
        return ""
    frame = pd.DataFrame(rows)
    align = ["left" if column in _LEFT else "right" for column in frame.columns]
    text: str = frame.to_markdown(index=False, colalign=align, disable_numparse=True)
    return text


def percent(e: Estimate | None, *, interval: bool = True) -> str:
    """Return mean ± standard deviation [interval] in percent."""
    if e is None:
        return DASH
    text = f"{100 * e.mean:.1f}"
    if not math.isnan(e.std):
        text += f" ± {100 * e.std:.1f}"
    if interval:
        text += f" [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    return text


def points(fraction: float) -> str:
    """Return a fraction in percent, a dash for nan."""
    return DASH if math.isnan(fraction) else f"{100 * fraction:.1f}"


def gain_text(e: Estimate | None) -> str:
    """Return a difference with its sign and interval, in points."""
    return DASH if e is None else f"{signed(e.mean)} {signed_interval(e.low, e.high)}"


def signed_interval(low: float, high: float) -> str:
    return f"[{signed(low)}, {signed(high)}]"


def signed(fraction: float) -> str:
    """Return a difference in points with its sign; what rounds to zero is +0.0."""
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"


def row_text(row: Row) -> str:
    """Return a row's label: references in italics, what is in quarantine struck through."""
    if row.quarantined():
        return f"~~{row.label}~~"
    return f"*{row.label}*" if row.role == "reference" else row.label


def rank_text(standing: Standing) -> str:
    if standing.rank is None:
        return "ref" if standing.row.role == "reference" else DASH
    best, worst = standing.rank
    return str(best) if best == worst else f"{best}–{worst}"


def threat_text(threat: Threat) -> str:
    return f"{NORMS.get(threat[0], threat[0])} {format_eps(threat[1])}"


def seconds_text(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def heading(table: Table) -> str:
    """Return what a table is about: data set, size and track."""
    ipc = (
        f"{table.ipc} image{'s' if table.ipc != 1 else ''} per class" if table.ipc else "references"
    )
    track = "" if table.track == "reference" else f", {table.track} track"
    return f"{table.dataset}, {ipc}{track}"
