"""Means of real images, as a distiller for rdd-bench: copy this file and write your own method.

Every synthetic image is the mean of a few random real images of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Config, DistilledSet, Distiller, DistillTask, Info, Run, hookimpl


class Options(Config):
    """What ``--set example-mean.NAME=VALUE`` can change."""

    averaged: int = Field(default=10, ge=1)
    """Real images behind one synthetic image; of a class with fewer, all."""


class ExampleMean(Distiller[Options]):
    """Means of random real images of a class."""

    name = "example-mean"
    info = Info(title="Means of real images", licence="MIT", origin="written for this example")
    smoke: ClassVar[Mapping[str, Any]] = {"averaged": 3}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` means of every class."""
        images, labels = [], []
        for label in run.track(range(task.spec.num_classes), "averaging"):
            real = task.train.of_class(label)
            for _ in range(task.ipc):
                # The host has seeded torch, so the same seed draws the same images.
                drawn = torch.randperm(len(real))[: self.config.averaged]
                images.append(real[drawn].mean(dim=0))
                labels.append(label)
        return DistilledSet(torch.stack(images), torch.tensor(labels))


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [ExampleMean]
