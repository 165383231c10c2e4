"""From a record back to the command that makes it, and to the same number made again."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rdd_bench.errors import RddBenchError
from rdd_bench.plan import AttackStep, Plan, Selection, make_plan
from rdd_bench.protocol import Options, Protocol
from rdd_bench.records import (
    AnyRecord,
    AttackRecord,
    Component,
    DistillRecord,
    StepRecord,
    TrainRecord,
)
from rdd_bench.registry import Registry
from rdd_bench.types import format_eps


@dataclass(frozen=True, slots=True)
class Cell:
    """One attacked cell with the records that it builds on."""

    distill: DistillRecord
    train: TrainRecord
    attack: AttackRecord

    def __str__(self) -> str:
        ipc = f" ipc {self.distill.ipc}" if self.distill.ipc else ""
        track = "" if self.train.track in ("natural", "reference") else f" ({self.train.track})"
        return (
            f"{self.attack.attack.label} {self.attack.norm} {format_eps(self.attack.eps)} on "
            f"{self.train.architecture.label} of {self.distill.distiller.label}{ipc}{track}"
        )


def cells_of(records: Sequence[AnyRecord]) -> list[Cell]:
    """Return the finished cells of a run, in the order of their addresses."""
    known = {record.address: record for record in records}
    cells = []
    for record in sorted(records, key=lambda r: r.address):
        if isinstance(record, AttackRecord) and record.status == "done":
            train, distill = known.get(record.train), known.get(record.distill)
            if isinstance(train, TrainRecord) and isinstance(distill, DistillRecord):
                cells.append(Cell(distill, train, record))
    return cells


def find_cell(cells: Sequence[Cell], address: str) -> Cell:
    """Return the cell whose address begins so, or that builds on the one that does.

    Raises:
        RddBenchError: If there is none, or if several attacks would fit.
    """
    exact = [cell for cell in cells if cell.attack.address.startswith(address)]
    if len(exact) == 1:
        return exact[0]
    if exact:
        raise RddBenchError(f"'{address}' begins {len(exact)} addresses; give more of it")
    below = [
        cell
        for cell in cells
        if cell.train.address.startswith(address) or cell.distill.address.startswith(address)
    ]
    if below:
        return next((cell for cell in below if cell.attack.ranked), below[0])
    raise RddBenchError(
        f"no finished cell has an address that begins with '{address}'; addresses are in the "
        "names of records and pictures"
    )


def choose_cells(cells: Sequence[Cell], count: int, seed: int) -> list[Cell]:
    """Return a random sample, the same for the same seed."""
    return random.Random(seed).sample(list(cells), min(count, len(cells)))


def selection_of(cell: Cell, protocol: Protocol, registry: Registry) -> Selection:
    """Return what a user would ask for to get this one cell.

    Raises:
        RddBenchError: If the protocol is not the one of the record, or a plugin is missing.
    """
    if protocol.sha256 != cell.attack.protocol_sha256:
        raise RddBenchError(
            f"the record was made under protocol {cell.attack.protocol} with other rules "
            f"({cell.attack.protocol_sha256[:12]}, not {protocol.sha256[:12]}); name the file "
            "with --protocol"
        )
    selection = Selection(
        distillers=[_name(cell.distill.distiller)],
        architectures=[_name(cell.train.architecture)],
        attacks=[_name(cell.attack.attack)],
        datasets=[cell.distill.dataset.split(" [")[0]],
        ipc=[cell.distill.ipc or protocol.ipc[0]],
        seeds=cell.train.seeds,
        distill_seeds=[cell.distill.seed],
        tracks=None if cell.train.track == "reference" else [cell.train.track],
    )
    step = matching_step(cell, make_plan(protocol, selection, registry))
    options: Options = {}
    for recorded, planned in (
        (cell.distill.distiller, step.train.distill.distiller.component),
        (cell.distill.architecture, step.train.distill.architecture.component),
        (cell.train.architecture, step.train.architecture.component),
        (cell.attack.attack, step.attack.component),
    ):
        changed = {
            key: value
            for key, value in recorded.options.items()
            if planned.options.get(key) != value
        }
        if changed:
            options[_name(recorded)] = options.get(_name(recorded), {}) | changed
    return replace(selection, options=options)


def matching_step(cell: Cell, plan: Plan) -> AttackStep:
    """Return the step of a plan that makes the cell; its options may differ."""
    for step in plan.steps:
        if (
            isinstance(step, AttackStep)
            and (step.threat.norm, step.threat.eps) == (cell.attack.norm, cell.attack.eps)
            and step.train.distill.distiller.component.name == cell.distill.distiller.name
            and step.train.distill.ipc == cell.distill.ipc
        ):
            return step
    raise RddBenchError(f"the protocol has no budget {cell.attack.norm} {cell.attack.eps:g}")


def only(plan: Plan, step: AttackStep) -> Plan:
    """Return the plan of one step and those that it builds on."""
    return replace(plan, steps=(step.train.distill, step.train, step))


def command_of(selection: Selection, protocol: str) -> str:
    """Return the command line of a selection."""
    words = ["rdd-bench", "run", "--protocol", protocol]
    for name in ("distillers", "architectures", "attacks", "datasets"):
        words += [f"--{name}", ",".join(getattr(selection, name))]
    words += ["--ipc", ",".join(map(str, selection.ipc or ()))]
    words += ["--seeds", ",".join(map(str, selection.seeds or ()))]
    words += ["--distill-seeds", ",".join(map(str, selection.distill_seeds or ()))]
    if selection.tracks:
        words += ["--tracks", ",".join(selection.tracks)]
    for name, options in selection.options.items():
        for option, value in options.items():
            text = value if isinstance(value, str) else json.dumps(value)
            words += ["--set", f"{name}.{option}={text}"]
    return shlex.join(words)


def _name(component: Component) -> str:
    """Return what the user called a component: the label without the options behind it."""
    return component.label.split(" [")[0]


def differences(recorded: Cell, again: Sequence[AnyRecord]) -> list[str]:
    """Compare a cell with the records of the same cell made again, image by image."""
    found = []
    made = {type(record): record for record in again}
    distill = made.get(DistillRecord)
    if isinstance(distill, DistillRecord) and distill.set_sha256 != recorded.distill.set_sha256:
        found.append("the distilled set has other bits")
    for kind, before in ((TrainRecord, recorded.train), (AttackRecord, recorded.attack)):
        now = made.get(kind)
        if not isinstance(now, TrainRecord | AttackRecord) or now.status != "done":
            found.append(f"the {before.kind} step did not finish: {getattr(now, 'error', 'lost')}")
            continue
        changed = sum(
            int((a != b).sum()) for a, b in zip(before.bitmaps(), now.bitmaps(), strict=True)
        )
        if changed:
            total = before.n * len(before.seeds)
            found.append(f"{changed} of {total} verdicts of the {before.kind} step differ")
    return found


def protocol_path(given: str | None, records: Sequence[AnyRecord]) -> str:
    """Return the protocol to load: the one named, or the one that the records name."""
    if given is not None:
        return given
    names = {record.protocol for record in records if isinstance(record, StepRecord)}
    if len(names) != 1:
        raise RddBenchError(f"the records are of {len(names)} protocols; name one with --protocol")
    return names.pop()
