"""One picture of a table: clean against worst-case accuracy, as SVG. Numbers from standings only.

The line joins random real images of several numbers per class. What lies above it is more robust
than real images of the same clean accuracy; what lies further to the right is more accurate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from rdd_bench.rows import Threat
from rdd_bench.standings import Standing, Table

WIDTH, LEAST_HEIGHT = 780, 470
LEFT, TOP, RIGHT, BOTTOM = 62, 52, 560, 410
"""The plot inside the picture; the legend is to the right of it."""
LEGEND, LINE = 590, 19
"""Where the legend begins, and the height of its lines."""
LETTERS = 16
"""Of a label in the legend."""
METHOD, BASELINE, REFERENCE, INK, GRID = "#0b62a4", "#b35900", "#555555", "#222222", "#e3e3e3"

DASHED = f'fill="none" stroke="{BASELINE}" stroke-width="1.5" stroke-dasharray="5 4"'


@dataclass(frozen=True, slots=True)
class Scale:
    """From accuracies to places on the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the scale, at most ten."""
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if self.high - self.low <= 9.5 * s)
        first, last = math.ceil(self.low / step - 1e-6), math.floor(self.high / step + 1e-6)
        return [k * step for k in range(first, last + 1)]


def chart(table: Table, threat: Threat, title: str) -> str | None:
    """Return the picture of a ranked table, None where nothing is complete."""
    standings = table.standings(threat)
    if not standings:
        return None
    line = sorted(
        (float(s.clean.mean()), float(s.worst.mean()), s.ipc) for s in table.control_sets(threat)
    )
    # References and distant sizes of the control may lie outside; the legend has the references.
    seen = [s for s in standings if s.row.role != "reference"] or standings
    x = _scale([s.clean.mean for s in seen], LEFT, RIGHT)
    y = _scale([edge for s in seen for edge in (s.worst.low, s.worst.high)], BOTTOM, TOP)
    height = max(LEAST_HEIGHT, TOP + (len(standings) + 4) * LINE)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="12" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 24, title, size=15),
        *_axes(x, y),
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
        f'height="{BOTTOM - TOP}"/></clipPath>',
        '<g clip-path="url(#plot)">',
        *_control_line(line, x, y),
        # Best last, so that it lies on top.
        *(part for n, s in reversed(list(enumerate(standings, 1))) for part in _point(n, s, x, y)),
        "</g>",
        *_legend(standings, drawn=bool(line)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale around the values, with a little room."""
    room = max(0.05 * (max(values) - min(values)), 0.01)
    return Scale(max(0.0, min(values) - room), min(1.0, max(values) + room), start, end)


def _axes(x: Scale, y: Scale) -> Iterable[str]:
    for value in x.ticks():
        at = x(value)
        yield _line(at, TOP, at, BOTTOM, GRID)
        yield _text(at, BOTTOM + 17, f"{100 * value:.0f}", anchor="middle")
    for value in y.ticks():
        at = y(value)
        yield _line(LEFT, at, RIGHT, at, GRID)
        yield _text(LEFT - 8, at + 4, f"{100 * value:.0f}", anchor="end")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 40, "clean accuracy, %", anchor="middle")
    middle = (TOP + BOTTOM) / 2
    yield (
        f'<text transform="translate(18 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        "worst-case accuracy under attack, %</text>"
    )


def _control_line(points: Sequence[tuple[float, float, int]], x: Scale, y: Scale) -> Iterable[str]:
    if len(points) > 1:
        path = " ".join(f"{x(clean):.1f},{y(worst):.1f}" for clean, worst, _ in points)
        yield f'<polyline points="{path}" {DASHED}/>'
    for clean, worst, ipc in points:
        yield f'<circle cx="{x(clean):.1f}" cy="{y(worst):.1f}" r="3" fill="{BASELINE}"/>'
        yield _text(x(clean) + 5, y(worst) + 14, str(ipc), size=10, colour=BASELINE)


def _point(number: int, standing: Standing, x: Scale, y: Scale) -> Iterable[str]:
    colour = _colour(standing)
    across, up = x(standing.clean.mean), y(standing.worst.mean)
    low, high = y(standing.worst.low), y(standing.worst.high)
    yield _line(across, low, across, high, colour)
    inside = "#ffffff" if standing.row.role == "reference" else colour
    ink = colour if standing.row.role == "reference" else "#ffffff"
    yield (
        f'<circle cx="{across:.1f}" cy="{up:.1f}" r="8.5" fill="{inside}" stroke="{colour}" '
        'stroke-width="1.2"/>'
    )
    yield _text(across, up + 3.5, str(number), anchor="middle", size=10, colour=ink)


def _legend(standings: Sequence[Standing], *, drawn: bool) -> Iterable[str]:
    yield _text(LEGEND, TOP + 2, "clean / worst case", size=11, colour=REFERENCE)
    for number, standing in enumerate(standings, 1):
        place = TOP + 4 + number * LINE
        figures = f"{100 * standing.clean.mean:.0f} / {100 * standing.worst.mean:.0f}"
        colour = _colour(standing)
        yield _text(LEGEND + 14, place, str(number), anchor="end", colour=colour)
        yield _text(LEGEND + 22, place, _short(standing.row.label), colour=colour)
        yield _text(WIDTH - 20, place, figures, anchor="end")
    if drawn:
        place = TOP + 14 + (len(standings) + 1) * LINE
        yield f'<path d="M{LEGEND} {place - 4}h22" {DASHED}/>'
        yield _text(LEGEND + 30, place, "random real images,", colour=BASELINE, size=11)
        yield _text(LEGEND + 30, place + 14, "with how many a class", colour=BASELINE, size=11)


def _short(label: str) -> str:
    """Return a label as wide as the legend, with its beginning and its end."""
    return label if len(label) <= LETTERS else f"{label[:8]}…{label[-(LETTERS - 9) :]}"


def _colour(standing: Standing) -> str:
    return {"method": METHOD, "baseline": BASELINE}.get(standing.row.role, REFERENCE)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
