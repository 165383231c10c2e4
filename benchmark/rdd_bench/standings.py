"""From joined records to the rows of a table: who is compared with whom, on what. Numbers only.

One table holds one protocol, data set, IPC and track. Its rows are distillers; every row is
averaged over the same architectures, seeds and attacks, or it is not ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rdd_bench.consistency import contradictions, evidence_of
from rdd_bench.metrics import (
    Estimate,
    Scores,
    accuracy,
    estimate,
    rank_intervals,
    stack,
    worst_case,
)
from rdd_bench.records import AttackRecord, Flag
from rdd_bench.results import Cell, Results

Threat = tuple[str, float]
"""Norm and eps."""


@dataclass(frozen=True)
class Row:
    """One distiller in one table: its cells by architecture."""

    label: str
    role: str
    cells: dict[str, list[Cell]]
    """By label of the architecture; one cell a distillation seed."""

    def all_cells(self) -> list[Cell]:
        return [cell for cells in self.cells.values() for cell in cells]

    def has(self, architectures: Sequence[str], attacks: Sequence[str], threat: Threat) -> bool:
        """Whether every architecture, in the same seeds, was attacked with every attack."""
        found = [self.cells.get(name, []) for name in architectures]
        seeds = {tuple((c.distill.seed, *c.train.seeds) for c in cells) for cells in found}
        return (
            bool(attacks)
            and all(found)
            and len(seeds) == 1
            and all(find_attack(c, a, threat) for cells in found for c in cells for a in attacks)
        )

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


@dataclass(frozen=True)
class Standing:
    """A row's figures under one ranked threat, averaged over the architectures."""

    row: Row
    clean: Estimate
    by_attack: dict[str, Estimate]
    worst: Estimate
    gain: Estimate | None
    """Worst case minus that of the control row, image by image; None for the control itself."""
    rank: tuple[int, int] | None
    """None for references and for rows that lack a result."""


@dataclass(frozen=True)
class Table:
    """What may stand side by side."""

    protocol: str
    protocol_sha256: str
    dataset: str
    ipc: int
    track: str
    rows: list[Row]
    """Methods and baselines."""
    references: list[Row]
    architectures: list[str]
    threats: list[Threat]
    """All that any row was attacked under, sorted."""
    ranked: list[Threat]

    def attacks(self, threat: Threat) -> list[str]:
        """Return the labels of the attacks run under a threat, the strongest last."""
        found: dict[str, int] = {}
        for cell in self.all_cells():
            for record in cell.attacks:
                if (record.norm, record.eps) == threat:
                    found[record.attack.label] = len(record.stronger_than)
        return sorted(found, key=lambda label: (found[label], label))

    def ranking_attacks(self, threat: Threat) -> list[str]:
        """Return the attacks whose worst case ranks the table.

        Those that the protocol names, and every other one that all rows with these have: an
        attack that was tried on some rows is a column, and takes no row out of the ranking.
        """
        standard = {
            record.attack.label
            for cell in self.all_cells()
            for record in cell.attacks
            if record.standard and (record.norm, record.eps) == threat
        }
        attacks = self.attacks(threat)
        named = [label for label in attacks if label in standard]
        rows = [
            row
            for row in self.all_rows()
            if row.has(self.architectures, named, threat)
            and any((a.norm, a.eps) == threat for c in row.all_cells() for a in c.attacks)
        ]
        return [
            label
            for label in attacks
            if label in standard or all(r.has(self.architectures, [label], threat) for r in rows)
        ]

    def all_rows(self) -> list[Row]:
        return [*self.rows, *self.references]

    def all_cells(self) -> list[Cell]:
        return [cell for row in self.all_rows() for cell in row.all_cells()]

    def standings(self, threat: Threat) -> list[Standing]:
        """Return the rows that have every result, best worst case first, references after them."""
        attacks = self.ranking_attacks(threat)
        if not attacks:
            return []
        complete = [r for r in self.all_rows() if r.has(self.architectures, attacks, threat)]
        control = next((r for r in complete if is_control(r)), None)
        standings = [self._standing(row, attacks, threat, control) for row in complete]
        ranked = [s for s in standings if s.row.role != "reference"]
        ranked.sort(key=lambda s: (-s.worst.mean, s.row.label))
        intervals = rank_intervals([s.worst for s in ranked])
        ranked = [
            replace(standing, rank=interval)
            for standing, interval in zip(ranked, intervals, strict=True)
        ]
        return [*ranked, *(s for s in standings if s.row.role == "reference")]

    def incomplete(self, threat: Threat) -> list[Row]:
        """Return the rows that lack a result which the ranking needs."""
        attacks = self.ranking_attacks(threat)
        if not attacks:
            return self.all_rows()
        return [r for r in self.all_rows() if not r.has(self.architectures, attacks, threat)]

    def _standing(
        self, row: Row, attacks: Sequence[str], threat: Threat, control: Row | None
    ) -> Standing:
        worst = self._average(row, attacks, threat)
        gain = None
        if control is not None and control is not row:
            theirs = self._average(control, attacks, threat)
            # Training seeds share initial weights and batch order, so equal seeds are paired;
            # where the numbers of seeds differ only the images are.
            if theirs.shape != worst.shape:
                theirs = theirs.mean(axis=0, keepdims=True)
            gain = estimate(worst - theirs)
        return Standing(
            row=row,
            clean=accuracy(np.mean([row.clean(name) for name in self.architectures], axis=0)),
            by_attack={
                label: accuracy(self._average(row, [label], threat))
                for label in self.attacks(threat)
                if row.has(self.architectures, [label], threat)
            },
            worst=accuracy(worst),
            gain=gain,
            rank=None,
        )

    def _average(self, row: Row, attacks: Sequence[str], threat: Threat) -> Scores:
        scores: Scores = np.mean(
            [row.robust(name, attacks, threat) for name in self.architectures], axis=0
        )
        return scores


def is_control(row: Row) -> bool:
    """Whether the protocol compares everybody with this row."""
    return any(cell.distill.control for cell in row.all_cells())


def find_attack(cell: Cell, label: str, threat: Threat) -> AttackRecord | None:
    """Return the record of one attack on a cell."""
    for record in cell.attacks:
        if record.attack.label == label and (record.norm, record.eps) == threat:
            return record
    return None


def make_tables(results: Results) -> list[Table]:
    """Sort cells into tables; references join every table of their protocol and data set."""
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}
    for cell in results.cells:
        key = (
            cell.train.protocol,
            cell.train.protocol_sha256,
            cell.distill.dataset,
            cell.train.test_sha256,
        )
        groups.setdefault(key, []).append(cell)
    tables = []
    for (protocol, sha256, dataset, _), cells in sorted(groups.items()):
        references = _rows([c for c in cells if c.distill.role == "reference"])
        others = [c for c in cells if c.distill.role != "reference"]
        # Only references: they make a table of their own.
        kinds = sorted({(c.distill.ipc, c.train.track) for c in others}) or [(0, "reference")]
        for ipc, track in kinds:
            mine = [c for c in others if (c.distill.ipc, c.train.track) == (ipc, track)]
            threats = {(a.norm, a.eps): a.ranked for c in cells for a in c.attacks}
            tables.append(
                Table(
                    protocol=protocol,
                    protocol_sha256=sha256,
                    dataset=dataset,
                    ipc=ipc,
                    track=track,
                    rows=_rows(mine),
                    references=references,
                    architectures=sorted({c.train.architecture.label for c in mine or cells}),
                    threats=sorted(threats),
                    ranked=sorted(threat for threat, ranked in threats.items() if ranked),
                )
            )
    return tables


def _rows(cells: Sequence[Cell]) -> list[Row]:
    rows: dict[str, Row] = {}
    for cell in sorted(cells, key=lambda c: (c.distill.distiller.label, c.distill.seed)):
        label = cell.distill.distiller.label
        row = rows.setdefault(label, Row(label, cell.distill.role, {}))
        row.cells.setdefault(cell.train.architecture.label, []).append(cell)
    return list(rows.values())


def row_flags(row: Row) -> list[tuple[Cell, AttackRecord | None, Flag]]:
    """Return every flag of a row: of its sets, its networks, its attacks and pairs of attacks.

    A set is in the cells of several architectures; its flags come with the first of them.
    """
    found: list[tuple[Cell, AttackRecord | None, Flag]] = []
    sets: set[str] = set()
    for cell in row.all_cells():
        if cell.distill.address not in sets:
            found += [(cell, None, flag) for flag in cell.distill.flags]
        sets.add(cell.distill.address)
        found += [(cell, None, flag) for flag in cell.train.flags]
        evidence = [(record, evidence_of(record)) for record in cell.attacks]
        for record, mine in evidence:
            threat = (record.norm, record.eps)
            same = [other for a, other in evidence if (a.norm, a.eps) == threat]
            flags = [*record.flags, *contradictions(mine, same, cell.train.bitmaps())]
            found += [(cell, record, flag) for flag in flags]
    return found
