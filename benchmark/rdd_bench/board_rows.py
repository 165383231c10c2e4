"""One line of each table of the leaderboard, as text by column. Never adds a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rdd_bench.board_text import (
    DASH,
    NORMS,
    gain_text,
    percent,
    points,
    rank_text,
    row_text,
    seconds_text,
    signed,
    threat_text,
)
from rdd_bench.compatibility import Suite, attack_seconds
from rdd_bench.metrics import Estimate, accuracy, binomial_interval, estimate
from rdd_bench.records import StepRecord
from rdd_bench.rows import Row, Threat
from rdd_bench.standings import Standing, Table, row_flags
from rdd_bench.types import Norm


def main_row(standing: Standing, attacks: Sequence[str]) -> dict[str, str]:
    row = standing.row
    cells = row.all_cells()
    names = sorted({flag.name for _, _, flag in row_flags(row)})
    distill_seeds = {cell.distill.seed for cell in cells}
    return {
        "Rank": rank_text(standing),
        "Distiller": row_text(row),
        "Clean": percent(standing.clean),
        **{attack: percent(standing.by_attack.get(attack), interval=False) for attack in attacks},
        "Worst case": percent(standing.worst),
        "Gain": gain_text(standing.gain),
        "Gain at equal clean": gain_text(standing.matched),
        "Images": f"{cells[0].distill.images:,}",
        "Bytes": f"{cells[0].distill.bytes:,}",
        "Seeds": f"{len(distill_seeds)}×{len(cells[0].train.seeds)}",
        "Flags": ", ".join([*["quarantined"][: len(row.quarantined())], *names]) or "none",
    }


def clean_row(row: Row, table: Table) -> dict[str, str]:
    values = {"Distiller": row.label}
    for name in table.architectures:
        values[name] = percent(_clean(row, name)) if name in row.cells else DASH
    return values


def _clean(row: Row, architecture: str) -> Estimate:
    return accuracy(row.clean(architecture), row.draws(architecture))


def architecture_row(row: Row, table: Table) -> dict[str, str]:
    values = {"Distiller": row.label}
    for name in table.architectures:
        for threat in table.ranked:
            shown = DASH
            if name in row.cells:
                shown = percent(_clean(row, name), interval=False)
                attacks = table.ranking_attacks(threat)
                if attacks and row.has([name], attacks, threat):
                    worst = accuracy(row.robust(name, attacks, threat), row.draws(name))
                    shown += f" / {percent(worst, interval=False)}"
            several = f" {NORMS[threat[0]]}" if len(table.ranked) > 1 else ""
            values[name + several] = shown
    return values


def curve_rows(table: Table) -> Iterable[dict[str, str]]:
    labels = sorted({label for threat in table.threats for label in table.attacks(threat)})
    for row in table.all_rows():
        for attack in labels:
            values = {"Distiller": row.label, "Attack": attack}
            for threat in table.threats:
                shown = DASH
                if row.has(table.architectures, [attack], threat):
                    scores = row.mean_robust(table.architectures, [attack], threat)
                    shown = points(estimate(scores, row.draws(table.architectures[0])).mean)
                values[threat_text(threat)] = shown
            yield values


def spread_row(standing: Standing, table: Table, threat: Threat) -> dict[str, str]:
    """Return the two causes of a row's standard deviation, and one network by itself."""
    network = standing.row.median_network(
        table.architectures, table.ranking_attacks(threat), threat
    )
    low, high = binomial_interval(network.right, network.images)
    several = len({draw for draw, _ in standing.row.seeds(network.architecture)}) > 1
    of_set = f" on set {network.seed[0]}" if several else ""
    return {
        "Distiller": standing.row.label,
        "Clean, training": points(standing.clean.std_train),
        "Clean, sets": points(standing.clean.std_draw),
        "Worst case, training": points(standing.worst.std_train),
        "Worst case, sets": points(standing.worst.std_draw),
        "Median network": f"{network.architecture}, seed {network.seed[1]}{of_set}: "
        f"{points(network.right / network.images)} [{points(low)}, {points(high)}]",
    }


def distance_rows(table: Table) -> list[dict[str, str]]:
    """Return how far the nearest adversarials are; nothing where no attack looks for them."""
    attacks = [attack for cell in table.all_cells() for attack in cell.attacks]
    found = sorted({(a.attack.label, a.norm) for a in attacks if a.median_distance})
    return [
        {
            "Distiller": row.label,
            **{
                f"{label}, {NORMS[norm]}": _mean_distance(row, table, label, norm)
                for label, norm in found
            },
        }
        for row in (table.all_rows() if found else [])
    ]


def _mean_distance(row: Row, table: Table, label: str, norm: Norm) -> str:
    """Return the mean over networks; a dash where one has none, which would flatter the others."""
    if not row.is_trained(table.architectures):
        return DASH
    distances: list[float | None] = []
    for cell in (cell for name in table.architectures for cell in row.cells[name]):
        measured = [a for a in cell.attacks if (a.attack.label, a.norm) == (label, norm)]
        # Under every budget they are the same.
        distances += next((a.median_distance for a in measured if a.median_distance), [None])
    known = [distance for distance in distances if distance is not None]
    return f"{sum(known) / len(known):.3f}" if len(known) == len(distances) else DASH


def suite_rows(suite: Suite, table: Table, tables: Sequence[Table]) -> list[dict[str, str]]:
    """Return the scores of another benchmark, in percent."""
    return [
        {
            "Distiller": row.label,
            **{
                name: DASH if score is None else f"{100 * score:.2f}"
                for name, score in suite.scores(row, table, tables).items()
            },
        }
        for row in table.all_rows()
    ]


def cost_row(row: Row) -> dict[str, str]:
    cells = row.all_cells()
    distills = {cell.distill.address: cell.distill for cell in cells}.values()
    attacks = [attack for cell in cells for attack in cell.attacks]
    phases: dict[str, float] = {}
    for record in distills:
        for name, seconds in record.seconds.items():
            phases[name] = phases.get(name, 0.0) + seconds / len(distills)
    total = phases.pop("total", 0.0)
    detail = ", ".join(f"{name} {seconds_text(s)}" for name, s in sorted(phases.items()))
    networks = sum(len(cell.train.seeds) for cell in cells)
    training = sum(cell.train.seconds.get("train", 0) for cell in cells)
    attacking = sum(attack_seconds(attack) or 0 for attack in attacks)
    peaks = [r.peak_bytes for r in (*distills, *(c.train for c in cells), *attacks) if r.peak_bytes]
    return {
        "Distiller": row.label,
        "Distil s a set": seconds_text(total) + (f" ({detail})" if detail else ""),
        "Train s a network": seconds_text(training / networks),
        "Attack s a network": seconds_text(attacking / networks),
        "Distil passes": _passes(list(distills), len(distills)),
        "Train passes": _passes([cell.train for cell in cells], networks),
        "Attack passes": _passes(attacks, networks),
        "Peak MiB": f"{max(peaks) / 2**20:,.0f}" if peaks else DASH,
    }


def _passes(records: Sequence[StepRecord], parts: int) -> str:
    """Return thousands of images forward / backward, of each part."""
    counts = (sum(r.forward for r in records), sum(r.backward for r in records))
    return " / ".join(f"{count / parts / 1000:,.1f}" for count in counts)


def short_row(standing: Standing, attacks: Sequence[str]) -> dict[str, str]:
    """Return what fits on a terminal; the Markdown has the intervals and the rest."""
    flags = sorted({flag.name for _, _, flag in row_flags(standing.row)})
    by_attack = {label: standing.by_attack.get(label) for label in attacks}
    return {
        "Rank": rank_text(standing),
        "Distiller": standing.row.label,
        "Clean": percent(standing.clean, interval=False),
        **{name: f"{100 * e.mean:.1f}" if e else DASH for name, e in by_attack.items()},
        "Worst case": percent(standing.worst, interval=False),
        "Gain": signed(standing.gain.mean) if standing.gain else DASH,
        "Flags": ", ".join(flags) or DASH,
    }
