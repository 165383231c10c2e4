"""One distiller in one table: its networks and what was done to them. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdd_bench.metrics import Scores, stack, worst_case
from rdd_bench.records import AttackRecord
from rdd_bench.results import Cell

Threat = tuple[str, float]
"""Norm and eps."""

Seed = tuple[int, int]
"""Distillation seed and training seed of a network."""


@dataclass(frozen=True, slots=True)
class NetworkCount:
    """How many test images one network gets right under attack."""

    architecture: str
    seed: Seed
    right: int
    images: int


@dataclass(frozen=True)
class Row:
    """One distiller in one table: its cells by architecture."""

    label: str
    role: str
    cells: dict[str, list[Cell]]
    """By label of the architecture; one cell a distillation seed."""

    def all_cells(self) -> list[Cell]:
        return [cell for cells in self.cells.values() for cell in cells]

    def quarantined(self) -> list[str]:
        """Return why this row must not be trusted; nothing where nobody says so."""
        reasons = (reason for cell in self.all_cells() for reason in cell.quarantined)
        return list(dict.fromkeys(reasons))

    def has(self, architectures: Sequence[str], attacks: Sequence[str], threat: Threat) -> bool:
        """Whether every architecture, in the same seeds, was attacked with every attack."""
        return (
            bool(attacks)
            and self.is_trained(architectures)
            and all(
                find_attack(cell, attack, threat)
                for name in architectures
                for cell in self.cells[name]
                for attack in attacks
            )
        )

    def is_trained(self, architectures: Sequence[str]) -> bool:
        """Whether there are networks of every architecture, in the same seeds."""
        return (
            all(self.cells.get(name) for name in architectures)
            and len({tuple(self.seeds(name)) for name in architectures}) == 1
        )

    def seeds(self, architecture: str) -> list[Seed]:
        """Return the seeds of the networks, in the order of ``clean`` and ``robust``."""
        return [(c.distill.seed, seed) for c in self.cells[architecture] for seed in c.train.seeds]

    def draws(self, architecture: str) -> list[int]:
        """Return the distillation seed of each network."""
        return [distill_seed for distill_seed, _ in self.seeds(architecture)]

    def clean(self, architecture: str) -> Scores:
        """Return clean outcomes (distillation and training seeds, images)."""
        return stack([b for cell in self.cells[architecture] for b in cell.train.bitmaps()])

    def robust(self, architecture: str, attacks: Sequence[str], threat: Threat) -> Scores:
        """Return outcomes under the worst of the attacks on each image (seeds, images)."""
        bitmaps = []
        for cell in self.cells[architecture]:
            found = [find_attack(cell, attack, threat) for attack in attacks]
            bitmaps += worst_case([record.bitmaps() for record in found if record])
        return stack(bitmaps)

    def mean_clean(self, architectures: Sequence[str]) -> Scores:
        """Return ``clean`` averaged over architectures."""
        scores: Scores = np.mean([self.clean(name) for name in architectures], axis=0)
        return scores

    def mean_robust(
        self, architectures: Sequence[str], attacks: Sequence[str], threat: Threat
    ) -> Scores:
        """Return ``robust`` averaged over architectures."""
        scores: Scores = np.mean(
            [self.robust(name, attacks, threat) for name in architectures], axis=0
        )
        return scores

    def median_network(
        self, architectures: Sequence[str], attacks: Sequence[str], threat: Threat
    ) -> NetworkCount:
        """Return the network in the middle by worst case; of an even number the lower one."""
        counts = [
            NetworkCount(name, seed, int(scores.sum()), len(scores))
            for name in architectures
            for seed, scores in zip(
                self.seeds(name), self.robust(name, attacks, threat), strict=True
            )
        ]
        counts.sort(key=lambda count: count.right)
        return counts[(len(counts) - 1) // 2]


def find_attack(cell: Cell, label: str, threat: Threat) -> AttackRecord | None:
    """Return the record of one attack on a cell."""
    for record in cell.attacks:
        if record.attack.label == label and (record.norm, record.eps) == threat:
            return record
    return None


def is_control(row: Row) -> bool:
    """Whether the protocol compares everybody with this row."""
    return any(cell.distill.control for cell in row.all_cells())


def make_rows(cells: Sequence[Cell]) -> list[Row]:
    """Return one row a distiller, sorted by label, and its cells by distillation seed."""
    rows: dict[str, Row] = {}
    for cell in sorted(cells, key=lambda c: (c.distill.distiller.label, c.distill.seed)):
        label = cell.distill.distiller.label
        row = rows.setdefault(label, Row(label, cell.distill.role, {}))
        row.cells.setdefault(cell.train.architecture.label, []).append(cell)
    return list(rows.values())
