"""From joined records to the rows of a table: who is compared with whom, on what. Numbers only.

One table holds one protocol, data set, IPC and track. Its rows are distillers; every row is
averaged over the same architectures, seeds and attacks, or it is not ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdd_bench.consistency import NON_DETERMINISTIC, contradictions, evidence_of
from rdd_bench.matched import ControlSet, matched_worst
from rdd_bench.metrics import Estimate, accuracy, estimate, rank_intervals
from rdd_bench.records import AttackRecord, Flag
from rdd_bench.results import Cell, Results
from rdd_bench.rows import Row, Threat, is_control, make_rows


@dataclass(frozen=True)
class Standing:
    """A row's figures under one ranked threat, averaged over the architectures."""

    row: Row
    clean: Estimate
    by_attack: dict[str, Estimate]
    worst: Estimate
    gain: Estimate | None
    """Worst case minus that of the control row, image by image; None for the control itself."""
    matched: Estimate | None
    """Worst case minus that of real images of the same clean accuracy; None where there are none,
    for references and for the control itself."""
    rank: tuple[int, int] | None
    """None for references and for rows that must not be ranked; see ``may_be_ranked``."""


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
    controls: list[Row]
    """The control at every number of images per class, in this track."""
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
        attack that was tried on some rows is a column, and takes no row out of the ranking. Noise
        and what else needs nothing of the network is a control and ranks nothing.
        """
        records = [
            record
            for cell in self.all_cells()
            for record in cell.attacks
            if (record.norm, record.eps) == threat and record.access != "none"
        ]
        standard = {record.attack.label for record in records if record.standard}
        real = {record.attack.label for record in records}
        attacks = [label for label in self.attacks(threat) if label in real]
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
        """Return the rows that have every result, best worst case first.

        Those that must not be ranked come after them, and then the references.
        """
        attacks = self.ranking_attacks(threat)
        if not attacks:
            return []
        complete = [r for r in self.all_rows() if r.has(self.architectures, attacks, threat)]
        control = next((r for r in complete if is_control(r) and not r.quarantined()), None)
        sets = self.control_sets(threat)
        standings = [self._standing(row, attacks, threat, control, sets) for row in complete]
        references = [s for s in standings if s.row.role == "reference"]
        others = [s for s in standings if s.row.role != "reference"]
        others.sort(key=lambda s: (-s.worst.mean, s.row.label))
        ranked: list[Standing] = []
        unranked: list[Standing] = []
        for standing in others:
            (ranked if may_be_ranked(standing.row) else unranked).append(standing)
        intervals = rank_intervals([s.worst for s in ranked])
        ranked = [
            replace(standing, rank=interval)
            for standing, interval in zip(ranked, intervals, strict=True)
        ]
        return [*ranked, *unranked, *references]

    def incomplete(self, threat: Threat) -> list[Row]:
        """Return the rows that lack a result which the ranking needs."""
        attacks = self.ranking_attacks(threat)
        if not attacks:
            return self.all_rows()
        return [r for r in self.all_rows() if not r.has(self.architectures, attacks, threat)]

    def control_sets(self, threat: Threat) -> list[ControlSet]:
        """Return the control at every number of images per class that was attacked in full."""
        names, attacks = self.architectures, self.ranking_attacks(threat)
        return [
            ControlSet(
                ipc=row.all_cells()[0].distill.ipc,
                seeds=row.seeds(names[0]),
                clean=row.mean_clean(names),
                worst=row.mean_robust(names, attacks, threat),
            )
            for row in self.controls
            if row.has(names, attacks, threat) and not row.quarantined()
        ]

    def _standing(
        self,
        row: Row,
        attacks: Sequence[str],
        threat: Threat,
        control: Row | None,
        sets: Sequence[ControlSet],
    ) -> Standing:
        names = self.architectures
        seeds, draws = row.seeds(names[0]), row.draws(names[0])
        clean = row.mean_clean(names)
        worst = row.mean_robust(names, attacks, threat)
        gain = matched = None
        if control is not None and control is not row:
            theirs = control.mean_robust(names, attacks, threat)
            # Training seeds share initial weights and batch order, so equal seeds are paired;
            # where the seeds differ only the images are.
            if control.seeds(names[0]) != seeds:
                theirs = theirs.mean(axis=0, keepdims=True)
            gain = estimate(worst - theirs, draws)
        if row.role != "reference" and not is_control(row):
            real = matched_worst(clean, seeds, sets)
            matched = None if real is None else estimate(worst - real, draws)
        return Standing(
            row=row,
            clean=accuracy(clean, draws),
            by_attack={
                label: accuracy(row.mean_robust(names, [label], threat), draws)
                for label in self.attacks(threat)
                if row.has(names, [label], threat)
            },
            worst=accuracy(worst, draws),
            gain=gain,
            matched=matched,
            rank=None,
        )


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
        references = make_rows([c for c in cells if c.distill.role == "reference"])
        others = [c for c in cells if c.distill.role != "reference"]
        for ipc, track in _kinds(others):
            mine = [c for c in others if (c.distill.ipc, c.train.track) == (ipc, track)]
            threats = {(a.norm, a.eps): a.ranked for c in cells for a in c.attacks}
            tables.append(
                Table(
                    protocol=protocol,
                    protocol_sha256=sha256,
                    dataset=dataset,
                    ipc=ipc,
                    track=track,
                    rows=make_rows(mine),
                    references=references,
                    controls=_controls([c for c in others if c.train.track == track]),
                    architectures=sorted({c.train.architecture.label for c in mine or cells}),
                    threats=sorted(threats),
                    ranked=sorted(threat for threat, ranked in threats.items() if ranked),
                )
            )
    return tables


def _kinds(cells: Sequence[Cell]) -> list[tuple[int, str]]:
    """Return IPC and track of every table to make of the cells that are no references.

    What holds nothing but the control serves the matching of other tables, where there are any.
    """
    kinds = {(c.distill.ipc, c.train.track) for c in cells}
    judged = {(c.distill.ipc, c.train.track) for c in cells if not c.distill.control}
    # Only references: they make a table of their own.
    return sorted(judged or kinds) or [(0, "reference")]


def _controls(cells: Sequence[Cell]) -> list[Row]:
    """Return the control at every number of images per class.

    Of several with other options the first by label, with which the gain is computed too.
    """
    controls = [c for c in cells if c.distill.control]
    label = min((c.distill.distiller.label for c in controls), default="")
    mine = [c for c in controls if c.distill.distiller.label == label]
    sizes = sorted({c.distill.ipc for c in mine})
    return [row for ipc in sizes for row in make_rows([c for c in mine if c.distill.ipc == ipc])]


def may_be_ranked(row: Row) -> bool:
    """Whether nobody put the row in quarantine and its networks answer the same twice."""
    flags = (flag.name for _, _, flag in row_flags(row))
    return not row.quarantined() and NON_DETERMINISTIC not in flags


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
