"""Scores of other benchmarks, computed from these records. Shown when asked for; they rank nothing.

BEARD (arXiv:2411.09265) scores robustness relative to the strongest attack and the time of attacks;
DD-Ranking (arXiv:2505.13300) scores clean accuracy relative to random images and to all data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rdd_bench.records import AttackRecord
from rdd_bench.rows import Row, Threat, find_attack, is_control
from rdd_bench.standings import Table

Scores = dict[str, float | None]
"""Fractions by column; None where the records lack what a column needs."""


# Formulas -------------------------------------------------------------------------------------


def robustness_ratio(clean: float, attacked: Sequence[float]) -> float | None:
    """Return BEARD's RR: 1 - (clean - mean) / (clean - min) of the accuracies under attacks.

    A stronger attack on the same row can raise it: the minimum falls by more than the mean.
    """
    if clean == min(attacked):
        return None
    return 1 - (clean - sum(attacked) / len(attacked)) / (clean - min(attacked))


def attack_efficiency(seconds: Sequence[float], clean_seconds: float = 0.0) -> float | None:
    """Return BEARD's AE: (mean - clean) / (max - clean) of the times that attacks take.

    Half of what it ranks by is thus the clock of the slowest attack. The published tables leave out
    the clean time; 2.4 s reproduces all three of BACON's rows (25.24, 25.94 and 24.10), and 0 s is
    at most 0.12 points off. These records do not time the clean pass, so it counts as 0.
    """
    if max(seconds) == clean_seconds:
        return None
    return (sum(seconds) / len(seconds) - clean_seconds) / (max(seconds) - clean_seconds)


def label_robust_score(
    real_hard: float, syn_hard: float, syn_any: float, random_any: float, weight: float = 0.5
) -> float:
    """Return DD-Ranking's LRS in [0, 1] from clean accuracies as fractions.

    It weighs the improvement over random images, by the method's own way of training, against what
    is lost to the whole data with hard labels.
    """
    return _normalised(weight * (syn_any - random_any) - (1 - weight) * (real_hard - syn_hard))


def augmentation_robust_score(
    syn_with: float, random_with: float, syn_without: float, random_without: float,
    weight: float = 0.5,
) -> float:  # fmt: skip
    """Return DD-Ranking's ARS in [0, 1] from clean accuracies with and without augmentation."""
    gain_with, gain_without = syn_with - random_with, syn_without - random_without
    return _normalised(weight * gain_with + (1 - weight) * gain_without)


def _normalised(balance: float) -> float:
    """Return what [-1, 1] becomes between 0 and 1: (e^a - e^-1) / (e - e^-1)."""
    return (math.exp(balance) - math.exp(-1)) / (math.e - math.exp(-1))


# From tables ----------------------------------------------------------------------------------


def beard(row: Row, table: Table) -> Scores:
    """Return RR, AE and their mean CREI under each ranked threat, over the attacks that rank."""
    scores: Scores = {}
    for threat in table.ranked:
        which = f" {threat[0]}" if len(table.ranked) > 1 else ""
        rr, ae = _beard_under(row, table, threat)
        crei = (rr + ae) / 2 if rr is not None and ae is not None else None
        scores |= {f"RR{which}": rr, f"AE{which}": ae, f"CREI{which}": crei}
    return scores


def _beard_under(row: Row, table: Table, threat: Threat) -> tuple[float | None, float | None]:
    names, attacks = table.architectures, table.ranking_attacks(threat)
    if not row.has(names, attacks, threat):
        return None, None
    clean = float(row.mean_clean(names).mean())
    attacked = [float(row.mean_robust(names, [label], threat).mean()) for label in attacks]
    seconds = [_attack_seconds(row, table, label, threat) for label in attacks]
    known = [s for s in seconds if s is not None]
    ae = attack_efficiency(known) if len(known) == len(seconds) else None
    return robustness_ratio(clean, attacked), ae


def _attack_seconds(row: Row, table: Table, label: str, threat: Threat) -> float | None:
    """Return the time of an attack on all networks; None where a record lacks it."""
    total = 0.0
    for cell in (cell for name in table.architectures for cell in row.cells[name]):
        record = find_attack(cell, label, threat)
        seconds = attack_seconds(record) if record else None
        if seconds is None:
            return None
        total += seconds
    return total


def attack_seconds(record: AttackRecord) -> float | None:
    """Return the time of an attack with that of training its surrogates; None if not recorded."""
    if "attack" not in record.seconds:
        return None
    return record.seconds["attack"] + record.seconds.get("surrogates", 0.0)


def dd_ranking(row: Row, table: Table, tables: Sequence[Table]) -> Scores:
    """Return LRS and ARS.

    LRS needs the natural track, which trains on every set with hard labels, the control and exactly
    one reference without adversarial training. ARS needs two tracks, of which one trains the row
    and the control with the same augmentation and the other trains both with none.
    """
    lrs = None
    whole = [r for r in table.references if _is_plain(r)]
    if table.track == "natural" and row.role != "reference" and len(whole) == 1:
        mine, random = _clean(row, table), _clean(_control(table), table)
        real = _clean(whole[0], table)
        if mine is not None and random is not None and real is not None:
            lrs = label_robust_score(real, mine, mine, random)
    return {"LRS": lrs, "ARS": _augmentation_score(row, table, tables)}


def _augmentation_score(row: Row, table: Table, tables: Sequence[Table]) -> float | None:
    pairs: dict[bool, tuple[float, float]] = {}
    for other in _same_sets(table, tables):
        mine = next((r for r in other.rows if r.label == row.label), None)
        random = _control(other)
        ours, theirs = _clean(mine, other), _clean(random, other)
        if mine is None or random is None or ours is None or theirs is None:
            continue
        augmentations = _augmentations(mine) | _augmentations(random)
        if len(augmentations) == 1:
            pairs[augmentations != {""}] = (ours, theirs)
    if len(pairs) < 2:
        return None
    return augmentation_robust_score(*pairs[True], *pairs[False])


def _same_sets(table: Table, tables: Sequence[Table]) -> list[Table]:
    """Return the tables of the natural and the author track about the sets of one table."""

    def about(one: Table) -> tuple[str, str, int, str]:
        test = one.all_cells()[0].train.test_sha256
        return one.protocol_sha256, one.dataset, one.ipc, test

    return [t for t in tables if about(t) == about(table) and t.track in ("natural", "author")]


def _control(table: Table) -> Row | None:
    return next((row for row in table.rows if is_control(row)), None)


def _clean(row: Row | None, table: Table) -> float | None:
    """Return the mean clean accuracy over the architectures of a table."""
    if row is None or not row.is_trained(table.architectures):
        return None
    return float(row.mean_clean(table.architectures).mean())


def _is_plain(row: Row) -> bool:
    recipes = [cell.train.recipe for cell in row.all_cells()]
    return all(recipe is not None and recipe.adversarial is None for recipe in recipes)


def _augmentations(row: Row) -> set[str | None]:
    recipes = [cell.train.recipe for cell in row.all_cells()]
    return {recipe.augment if recipe is not None else None for recipe in recipes}


@dataclass(frozen=True, slots=True)
class Suite:
    """Another benchmark's scores."""

    about: str
    """What they measure, in a sentence or two."""
    scores: Callable[[Row, Table, Sequence[Table]], Scores]
    """Of a row in a table; the third argument is every table there is."""


SUITES: Mapping[str, Suite] = {
    "beard": Suite(
        "BEARD's scores, %; they do not rank here. RR = 1 − (clean − mean) / (clean − min) over "
        "the attacks rises when the strongest attack gets stronger; AE = mean / max of the "
        "attacks' seconds (the clean pass counts as 0 s) measures the clock of the slowest attack; "
        "CREI is the mean of both.",
        lambda row, table, _: beard(row, table),
    ),
    "dd-ranking": Suite(
        "DD-Ranking's scores, %, of clean accuracy; they do not rank here. LRS: improvement over "
        "random images and loss to all data, both with hard labels by the protocol's recipe. ARS: "
        "improvement over random images with and without augmentation, from the natural and the "
        "author track. Their learning rates are tuned for every set and these are not.",
        dd_ranking,
    ),
}
