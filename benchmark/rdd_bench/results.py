"""Records joined: one set with its networks and the attacks on them. Tables are made from this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rdd_bench.hashing import digest
from rdd_bench.records import (
    AnyRecord,
    AttackRecord,
    Component,
    DistillRecord,
    EnvironmentRecord,
    QuarantineRecord,
    StepRecord,
    TrainRecord,
)

if TYPE_CHECKING:
    import pandas as pd

StepT = TypeVar("StepT", DistillRecord, TrainRecord, AttackRecord)


@dataclass
class Cell:
    """One architecture trained on one set, with every attack on it. Only steps that are done."""

    distill: DistillRecord
    train: TrainRecord
    attacks: list[AttackRecord] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    """Why somebody says that the set, the networks or an attack must not be trusted."""


@dataclass
class Results:
    """What a list of records says."""

    cells: list[Cell]
    distills: list[DistillRecord]
    """All that are done, also those without a cell."""
    not_done: list[StepRecord]
    """Failed and skipped steps."""
    environments: dict[str, dict[str, Any]]


def join(records: Sequence[AnyRecord]) -> Results:
    """Join records by their addresses; a record whose parent is missing is left out.

    Of two results of the same thing, made by two versions of a plugin's code, the newer counts.
    Components that share a label but differ in plugin or options get labels that tell them apart.
    """
    steps = [r for r in records if isinstance(r, StepRecord)]
    done = _tell_apart([r for r in steps if r.status == "done"])
    built_on = Counter(r.distill for r in done if isinstance(r, TrainRecord))
    built_on.update(r.train for r in done if isinstance(r, AttackRecord))
    distills = _newest((r for r in done if isinstance(r, DistillRecord)), built_on)
    of_these = (r for r in done if isinstance(r, TrainRecord) and r.distill in distills)
    trains = _newest(of_these, built_on)
    cells = {address: Cell(distills[r.distill], r) for address, r in trains.items()}
    on_these = (r for r in done if isinstance(r, AttackRecord) and r.train in cells)
    attacks = _newest(on_these, built_on)
    for record in attacks.values():
        cells[record.train].attacks.append(record)
    quarantines = [r for r in records if isinstance(r, QuarantineRecord)]
    for cell in cells.values():
        made_of = {r.address for r in (cell.distill, cell.train, *cell.attacks)}
        cell.quarantined = [q.reason for q in quarantines if q.target in made_of]
    return Results(
        cells=list(cells.values()),
        distills=list(distills.values()),
        not_done=_still_open(steps, distills, trains),
        environments={r.address: r.facts for r in records if isinstance(r, EnvironmentRecord)},
    )


def _newest(records: Iterable[StepT], built_on: Counter[str]) -> dict[str, StepT]:
    """Return by address one record of each thing.

    Of those made by the newest code: the one that most was built on, with most seeds, the newest.
    """
    same: dict[str, list[StepT]] = {}
    for record in records:
        same.setdefault(_thing(record), []).append(record)
    best = []
    for rivals in same.values():
        newest = max(rivals, key=lambda r: (r.created, r.address))
        of_that_code = [r for r in rivals if _code(r) == _code(newest)]
        best.append(
            max(of_that_code, key=lambda r: (built_on[r.address], _seeds(r), r.created, r.address))
        )
    return {record.address: record for record in best}


def _still_open(
    steps: Sequence[StepRecord], distills: dict[str, DistillRecord], trains: dict[str, TrainRecord]
) -> list[StepRecord]:
    """Return failed and skipped steps, less those that a newer attempt has overtaken."""
    done = {_thing(distill) for distill in distills.values()}
    done |= {_thing(train) for train in trains.values()}
    still_open: list[StepRecord] = []
    record: StepRecord
    for record in steps:
        parent = record.distill if isinstance(record, TrainRecord) else None
        parent = record.train if isinstance(record, AttackRecord) else parent
        overtaken = parent is not None and parent not in distills and parent not in trains
        if record.status != "done" and not overtaken and _thing(record) not in done:
            still_open.append(record)
    return still_open


def _seeds(record: StepRecord) -> int:
    return 1 if isinstance(record, DistillRecord) else len(record.seeds)


def _code(record: StepRecord) -> list[str]:
    """Return what changes when somebody edits the code that a record was made with."""
    components = [record.architecture, *_components(record).values()]
    return sorted({c.source_sha256 + c.version for c in components})


def _thing(record: StepRecord) -> str:
    """Say what a record is a result of, whichever code made it."""
    what: list[Any] = [record.protocol_sha256, record.kind, _identity(record.architecture)]
    if isinstance(record, DistillRecord):
        what += [record.dataset, _identity(record.distiller), record.ipc, record.seed]
    elif isinstance(record, TrainRecord):
        what += [record.distill, record.track]
    else:
        what += [record.train, _identity(record.attack), record.norm, record.eps]
    return digest(what)


def _identity(component: Component) -> list[Any]:
    return [component.name, component.options]


def _tell_apart(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Put a hash behind labels that stand for several plugins or options.

    What a distiller is called stands in the tables of one number of images per class, and
    protocols may give it other options for another.
    """
    meanings: dict[tuple[str, str, int], set[str]] = {}
    for record in records:
        for role, component in _components(record).items():
            known = meanings.setdefault((role, component.label, _scope(record)), set())
            known.add(digest(_identity(component)))
    told: list[StepRecord] = []
    for record in records:
        renamed = {
            role: component.model_copy(
                update={"label": f"{component.label} #{digest(_identity(component))[:4]}"}
            )
            for role, component in _components(record).items()
            if len(meanings[role, component.label, _scope(record)]) > 1
        }
        told.append(record.model_copy(update=renamed))
    return told


def _scope(record: StepRecord) -> int:
    return record.ipc if isinstance(record, DistillRecord) else 0


def _components(record: StepRecord) -> dict[str, Component]:
    """Return the components of a record that tables name, by the field that holds them."""
    if isinstance(record, DistillRecord):
        return {"distiller": record.distiller}
    if isinstance(record, TrainRecord):
        return {"architecture": record.architecture}
    return {"architecture": record.architecture, "attack": record.attack}


def results_frame(records: Sequence[AnyRecord]) -> pd.DataFrame:
    """Return one row a network, attack and budget; see ``load_results``."""
    import pandas as pd

    results = join(records)
    rows = []
    for cell in results.cells:
        for judged in (cell.train, *cell.attacks):
            attack = judged if isinstance(judged, AttackRecord) else None
            for seed, correct in zip(judged.seeds, judged.correct, strict=True):
                rows.append(
                    {
                        "protocol": judged.protocol,
                        "dataset": cell.distill.dataset,
                        "role": cell.distill.role,
                        "distiller": cell.distill.distiller.label,
                        "ipc": cell.distill.ipc,
                        "distill_seed": cell.distill.seed,
                        "track": cell.train.track,
                        "architecture": cell.train.architecture.label,
                        "seed": seed,
                        "attack": attack.attack.label if attack else "none",
                        "norm": attack.norm if attack else "",
                        "eps": attack.eps if attack else 0.0,
                        "ranked": attack.ranked if attack else False,
                        "n": judged.n,
                        "correct": correct,
                        "accuracy": correct / judged.n,
                        "images": cell.distill.images,
                        "bytes": cell.distill.bytes,
                        "distill_seconds": cell.distill.seconds.get("total"),
                        # A cell is timed as a whole; its seeds share the cost evenly.
                        "train_seconds": cell.train.seconds.get("train", 0.0) / len(judged.seeds),
                        "attack_seconds": attack.seconds.get("attack", 0.0) / len(judged.seeds)
                        if attack
                        else 0.0,
                        "flags": ", ".join(flag.name for flag in judged.flags),
                        "quarantined": "; ".join(cell.quarantined),
                        "device": results.environments.get(judged.environment, {}).get("device"),
                        "distiller_version": cell.distill.distiller.version,
                    }
                )
    columns = list(rows[0]) if rows else ["distiller", "architecture", "attack", "accuracy"]
    order = ["dataset", "ipc", "distiller", "distill_seed", "track", "architecture"]
    order += ["norm", "eps", "attack", "seed"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(order, ignore_index=True) if rows else frame
