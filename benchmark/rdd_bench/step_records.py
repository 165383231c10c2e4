"""The fields of records: what a step is, and what can be read off its result."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from torch import Tensor

from rdd_bench import audit
from rdd_bench.artifacts import set_hash
from rdd_bench.outcomes import pack
from rdd_bench.plan import AttackStep, DistillStep, Step, TrainStep
from rdd_bench.records import AttackRecord, DistillRecord, StepRecord, TrainRecord
from rdd_bench.types import DatasetSpec, DistilledSet, Splits


def head(step: Step, protocol: tuple[str, str], environment: str) -> dict[str, Any]:
    """Return what the record of any step begins with.

    Args:
        step: What was carried out.
        protocol: Name and hash of the rules.
        environment: Address of the environment record.
    """
    return {
        "address": step.address,
        "protocol": protocol[0],
        "protocol_sha256": protocol[1],
        "environment": environment,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def failure(step: Step, begun: dict[str, Any], status: str, error: str) -> StepRecord:
    """Return the record of a step that failed or was skipped: its head, and one sentence why."""
    begun = {**begun, "status": status, "error": error}
    if isinstance(step, DistillStep):
        return DistillRecord(**begun, **distill_facts(step))
    if isinstance(step, TrainStep):
        return TrainRecord(**begun, **train_facts(step))
    return AttackRecord(**begun, **attack_facts(step))


def distill_facts(step: DistillStep) -> dict[str, Any]:
    return {
        "dataset": step.dataset.component.label,
        "ipc": step.ipc,
        "role": step.role,
        "control": step.control,
        "distiller": step.distiller.component,
        "architecture": step.architecture.component,
        "seed": step.seed,
    }


def train_facts(step: TrainStep) -> dict[str, Any]:
    return {
        "distill": step.distill.address,
        "architecture": step.architecture.component,
        "track": step.track,
        "seeds": list(step.seeds),
    }


def attack_facts(step: AttackStep) -> dict[str, Any]:
    return {
        **train_facts(step.train),
        "train": step.train.address,
        "attack": step.attack.component,
        "norm": step.threat.norm,
        "eps": step.threat.eps,
        "ranked": step.ranked,
        "standard": step.standard,
    }


def set_facts(distilled: DistilledSet, spec: DatasetSpec, role: str) -> dict[str, Any]:
    """Return what can be read off a set, with its flags."""
    images = distilled.images
    outside = ((images < 0) | (images > 1)).float().mean().item()
    flags = audit.check_out_of_range(images) + audit.check_selection(distilled.notes)
    if role != "reference":  # which are as balanced as the data set is
        flags += audit.check_class_balance(distilled.hard_labels, spec.num_classes)
    return {
        "train_sha256": spec.train_sha256,
        "num_classes": spec.num_classes,
        "set_sha256": set_hash(distilled),
        "images": len(distilled),
        "bytes": distilled.num_bytes,
        "labels": _kind_of_labels(distilled),
        "pixel_range": (images.min().item(), images.max().item()),
        "out_of_range": outside,
        "own_recipe": distilled.recipe is not None,
        "flags": flags,
        "notes": dict(distilled.notes),
    }


def outcome_facts(outcomes: Sequence[Tensor], splits: Splits) -> dict[str, Any]:
    return {
        "test_sha256": splits.spec.test_sha256,
        "n": len(splits.test),
        "correct": [int(outcome.sum()) for outcome in outcomes],
        "outcomes": [pack(outcome.cpu().numpy()) for outcome in outcomes],
    }


def _kind_of_labels(distilled: DistilledSet) -> Literal["hard", "soft", "views"]:
    if distilled.views is not None:
        return "views"
    return "hard" if distilled.labels.ndim == 1 else "soft"
