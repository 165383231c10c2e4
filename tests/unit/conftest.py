"""Fixtures of the host's unit tests: result records by hand, and a handful of tiny plugins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from rdd_bench.components import (
    Architecture,
    Attack,
    Component,
    Dataset,
    Distiller,
    DistillTask,
    Run,
    Source,
)
from rdd_bench.outcomes import pack
from rdd_bench.records import (
    AnyRecord,
    AttackRecord,
    DistillRecord,
    EnvironmentRecord,
    TrainRecord,
)
from rdd_bench.records import Component as ComponentRecord
from rdd_bench.registry import Offer, Registry
from rdd_bench.types import Config, DatasetSpec, DistilledSet, Info, Norm, Splits, Threat


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small networks are fastest on one thread, and sums have one order on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Result records -------------------------------------------------------------------------------


class Book:
    """Writes records as a run would. Outcomes are strings of 0 and 1, one a training seed."""

    def __init__(self) -> None:
        self.records: list[AnyRecord] = []

    def _add(self, record: Any) -> Any:
        self.records.append(record)
        return record

    @staticmethod
    def component(label: str, **options: Any) -> ComponentRecord:
        name, _, changed = label.partition(" ")
        options = options or ({"changed": changed} if changed else {})
        return ComponentRecord(
            name=f"rdd-bench/{name}", label=label, version="1.0", source_sha256="5" * 64,
            options=options,
        )  # fmt: skip

    def _head(self, kind: str, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "address": f"{kind}-{len(self.records):03}",
            "protocol": "toy-v1",
            "protocol_sha256": "a" * 64,
            "environment": "environment-1",
            "created": "2026-01-02T03:04:05+00:00",
            **given,
        }

    def environment(self, **facts: Any) -> EnvironmentRecord:
        made: EnvironmentRecord = self._add(
            EnvironmentRecord(
                address="environment-1",
                facts={"device": "a slow machine", "python": "3.11", **facts},
            )
        )
        return made

    def distill(self, label: str, ipc: int = 10, **given: Any) -> DistillRecord:
        values = {
            "role": "method", "seed": 0, "dataset": "digits", "images": 10 * ipc,
            "bytes": 2560 * ipc, "seconds": {"total": 3.0, "matching": 2.0}, **given,
        }  # fmt: skip
        made: DistillRecord = self._add(
            DistillRecord(
                **{**self._head("distill", values), **values},
                ipc=ipc,
                distiller=self.component(label),
                architecture=self.component("convnet"),
            )
        )
        return made

    def train(
        self, of: DistillRecord, clean: Sequence[str], architecture: str = "convnet", **given: Any
    ) -> TrainRecord:
        values = {"track": "natural", "seeds": list(range(len(clean))), **given}
        values.setdefault("seconds", {"train": 1.0})
        head = self._head("train", {"protocol": of.protocol, "protocol_sha256": of.protocol_sha256})
        made: TrainRecord = self._add(
            TrainRecord(
                **{**head, **values, **judged(clean)},
                distill=of.address,
                architecture=self.component(architecture),
            )
        )
        return made

    def attack(
        self, on: TrainRecord, robust: Sequence[str], label: str = "pgd", **given: Any
    ) -> AttackRecord:
        values = {"norm": "linf", "eps": 0.1, "ranked": True, **given}
        values.setdefault("seconds", {"attack": 2.0, "total": 2.5})
        head = self._head(
            "attack", {"protocol": on.protocol, "protocol_sha256": on.protocol_sha256}
        )
        made: AttackRecord = self._add(
            AttackRecord(
                **{**head, **values, **judged(robust)},
                train=on.address,
                distill=on.distill,
                track=on.track,
                seeds=on.seeds,
                architecture=on.architecture,
                attack=self.component(label),
            )
        )
        return made

    def cell(
        self, label: str, clean: Sequence[str], robust: Sequence[str], **given: Any
    ) -> AttackRecord:
        """Write all three records of one row with one network and one attack."""
        return self.attack(self.train(self.distill(label, **given), clean), robust)


def judged(outcomes: Sequence[str]) -> dict[str, Any]:
    bits = [np.array([bit == "1" for bit in text]) for text in outcomes]
    return {
        "test_sha256": "7" * 64,
        "n": len(outcomes[0]) if outcomes else 0,
        "correct": [int(b.sum()) for b in bits],
        "outcomes": [pack(b) for b in bits],
    }


@pytest.fixture
def book() -> Book:
    return Book()


# Plugins --------------------------------------------------------------------------------------


class SlowOptions(Config):
    """Options of the toy distiller."""

    steps: int = 100
    """Steps."""
    lr: float = Field(default=1.0, gt=0)
    """Rate."""


class NetOptions(Config):
    """Options of the toy network."""

    width: int = 8
    """Units."""


class PushOptions(Config):
    """Options of the toy attack."""

    steps: int = 10
    """Steps."""


class _NotRun:
    """These classes are planned with, never run."""

    info = Info(title="Toy", licence="MIT")


class Slow(_NotRun, Distiller[SlowOptions]):
    """A distiller."""

    name = "slow"

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        raise NotImplementedError


class Quick(Slow):
    """Another distiller."""

    name = "quick"
    role = "baseline"


class Everything(Slow):
    """A reference."""

    name = "everything"
    role = "reference"


class Net(_NotRun, Architecture[NetOptions]):
    """A network."""

    name = "net"

    def build(self, spec: DatasetSpec) -> nn.Module:
        raise NotImplementedError


class Push(_NotRun, Attack[PushOptions]):
    """An attack that knows both norms."""

    name = "push"
    norms = frozenset[Norm]({"linf", "l2"})

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        raise NotImplementedError


class Shove(Push):
    """An attack that knows one norm."""

    name = "shove"
    norms = frozenset[Norm]({"linf"})


class Pictures(_NotRun, Dataset[Any]):
    """A data set."""

    name = "pictures"

    def load(self, source: Source) -> Splits:
        raise NotImplementedError


@pytest.fixture
def toy_registry() -> Registry:
    """Return a registry of components that can be planned with."""
    classes: list[tuple[str, type[Component[Any]]]] = [
        ("distiller", Slow), ("distiller", Quick), ("distiller", Everything),
        ("architecture", Net), ("attack", Push), ("attack", Shove), ("dataset", Pictures),
    ]  # fmt: skip
    return Registry(
        [
            Offer(kind=kind, cls=cls, distribution="toys", version="1.0", entry_point="toys")
            for kind, cls in classes
        ]
    )
