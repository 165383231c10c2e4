"""The whole training set: what distillation is compared with.

``whole`` trains on it as it is, ``whole-at`` adversarially: Aleksander Madry, Aleksandar Makelov,
Ludwig Schmidt, Dimitris Tsipras, Adrian Vladu, "Towards Deep Learning Models Resistant to
Adversarial Attacks", ICLR 2018, arXiv:1706.06083. Both are references and no distilled sets: they
return the images as they are, whatever the IPC, with a recipe of their own.

Deviation from Madry et al.: the networks and the recipe are this field's small ones.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rdd_bench.api import (
    AdversarialTraining,
    Config,
    DistilledSet,
    Distiller,
    DistillTask,
    Eps,
    Info,
    Norm,
    Recipe,
    Run,
    hookimpl,
)
from rdd_bench_builtin.distillers._coreset import DSA, Augmentation


class WholeConfig(Config):
    """How a network is trained on the whole training set."""

    epochs: int = Field(default=60, ge=1)
    """Passes over the training set."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule."""
    lr: float = Field(default=0.05, gt=0)
    """Learning rate at the start."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """How the learning rate falls; see the recipe."""
    augment: Augmentation = DSA
    """Operations of DSA joined by '_'; '' for none."""


class WholeAtConfig(WholeConfig):
    """The same, with the attack of the inner maximisation."""

    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: Eps = Field(default=8 / 255, gt=0, le=1)
    """Budget in pixels of [0, 1]."""
    steps: int = Field(default=7, ge=1)
    """Gradient steps of the attack."""


class Whole(Distiller[WholeConfig]):
    """The whole training set, with a recipe for real data."""

    name = "whole"
    role = "reference"
    info = Info(title="Whole training set", licence="MIT")
    smoke: ClassVar = {"epochs": 1}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:  # noqa: ARG002
        """Return the training set itself; ``task.ipc`` has no meaning here."""
        return _whole_set(task, _recipe(self.config))


class WholeAt(Distiller[WholeAtConfig]):
    """The whole training set, trained on adversarially (Madry et al. 2018)."""

    name = "whole-at"
    role = "reference"
    info = Info(
        title="Whole training set, adversarial training",
        licence="MIT",
        paper="https://arxiv.org/abs/1706.06083",
    )
    smoke: ClassVar = {"epochs": 1, "steps": 1}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:  # noqa: ARG002
        """Return the training set itself; ``task.ipc`` has no meaning here."""
        options = self.config
        attack = AdversarialTraining(norm=options.norm, eps=options.eps, steps=options.steps)
        return _whole_set(task, _recipe(options, attack))


def _recipe(options: WholeConfig, attack: AdversarialTraining | None = None) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        lr=options.lr,
        schedule=options.schedule,
        augment=options.augment,
        adversarial=attack,
    )


def _whole_set(task: DistillTask, recipe: Recipe) -> DistilledSet:
    return DistilledSet(task.train.images, task.train.labels, recipe)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [Whole, WholeAt]
