"""Records joined: one set with its networks and the attacks on them. Tables are made from this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rdd_bench.records import (
    AnyRecord,
    AttackRecord,
    DistillRecord,
    EnvironmentRecord,
    StepRecord,
    TrainRecord,
)

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Cell:
    """One architecture trained on one set, with every attack on it. Only steps that are done."""

    distill: DistillRecord
    train: TrainRecord
    attacks: list[AttackRecord] = field(default_factory=list)


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
    """Join records by their addresses; a record whose parent is missing is left out."""
    done = [r for r in records if not isinstance(r, EnvironmentRecord) and r.status == "done"]
    distills = {r.address: r for r in done if isinstance(r, DistillRecord)}
    cells = {
        r.address: Cell(distills[r.distill], r)
        for r in done
        if isinstance(r, TrainRecord) and r.distill in distills
    }
    for record in done:
        if isinstance(record, AttackRecord) and record.train in cells:
            cells[record.train].attacks.append(record)
    not_done: list[StepRecord] = [
        r for r in records if not isinstance(r, EnvironmentRecord) and r.status != "done"
    ]
    return Results(
        cells=list(cells.values()),
        distills=list(distills.values()),
        not_done=not_done,
        environments={r.address: r.facts for r in records if isinstance(r, EnvironmentRecord)},
    )


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
                        "device": results.environments.get(judged.environment, {}).get("device"),
                        "distiller_version": cell.distill.distiller.version,
                    }
                )
    columns = list(rows[0]) if rows else ["distiller", "architecture", "attack", "accuracy"]
    order = ["dataset", "ipc", "distiller", "distill_seed", "track", "architecture"]
    order += ["norm", "eps", "attack", "seed"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(order, ignore_index=True) if rows else frame
