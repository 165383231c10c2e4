"""What the covering methods share: covers class by class, and the set with its training.

The training is adversarial, after the idea of Chen and Selvan (arXiv:2402.05675). If image x_i has
a centre s within r, the ball of radius eps around x_i lies in the ball of radius eps + r around s,
in the same norm. With w_s the share of the images whose nearest centre is s,

    mean_i max_{|d| <= eps} loss(x_i + d)  <=  sum_s w_s max_{|d| <= eps + r} loss(s + d).

``train_eps='eps+radius'`` with ``weighted`` trains on the right-hand side. Without the weights
nothing follows for the left one, and at 1, 10 or 50 images per class r is usually larger than the
distance to other classes, so that the bound holds but says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rdd_bench.api import (
    AdversarialTraining,
    Config,
    DistilledSet,
    DistillTask,
    Eps,
    Norm,
    Recipe,
    Run,
)
from rdd_bench_builtin.distillers._coreset import coreset, members_of_classes
from rdd_bench_builtin.distillers._covering import (
    CoverNorm,
    distances,
    farthest_first,
    radius_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Find = Callable[["NDArray[np.float32]"], tuple["NDArray[np.int64]", dict[str, Any]]]
"""From the distances within a class to centres, and what to note of them."""


class CoverConfig(Config):
    """What all covering methods can be told."""

    norm: CoverNorm = "l2"
    """Metric of the covers, on pixels of [0, 1]; the default of the authors' program."""
    weighted: bool = False
    """Whether the author track weighs each image with the number of images it is nearest to."""
    train_norm: Norm = "linf"
    """Norm of the attack in the author track; our choice. No training knows l1."""
    eps: Eps = Field(default=8 / 255, gt=0)
    """Budget of the attack, in pixels of [0, 1]; the usual one, our choice."""
    steps: int = Field(default=7, ge=1)
    """Gradient steps of the attack; our choice."""
    train_eps: Literal["eps", "eps+radius"] = "eps"
    """Train with the budget eps, or with eps and the largest radius of all classes added to it."""

    @model_validator(mode="after")
    def _budgets_can_be_added(self) -> CoverConfig:
        AdversarialTraining(norm=self.train_norm, eps=self.eps)  # checks the budget
        if self.train_eps == "eps+radius" and self.train_norm != self.norm:
            raise ValueError(
                f"train_eps='eps+radius' adds a budget in {self.train_norm} to a radius in "
                f"{self.norm}; give norm and train_norm the same value, l2 or linf"
            )
        return self


@dataclass(frozen=True)
class ClassCover:
    """The images chosen from one class."""

    chosen: Tensor
    """Their numbers in the training set: as many as asked for, or more if the centres are more."""
    counts: NDArray[np.int64]
    """For each, the images within the radius that are nearest to it."""
    radius: float
    """Within it the share of the images has a chosen one."""
    facts: Mapping[str, Any]
    """What is to be noted."""


def cover_classes(
    task: DistillTask, run: Run, norm: CoverNorm, find: Find, who: str, share: float = 1.0
) -> list[ClassCover]:
    """Return covers of all classes; spare images are those farthest from the ones before.

    Raises:
        RddBenchError: If a class has fewer images than the set is to have.
    """
    classes = members_of_classes(task, who, at_least=task.ipc)
    pixels = task.train.images.cpu().flatten(1)
    covers = []
    with run.phase("covering"):
        for members in run.track(classes, "covering"):
            matrix = distances(pixels[members].numpy(), norm)
            centres, facts = find(matrix)
            rows = farthest_first(matrix, task.ipc, begin=centres)
            radius = radius_of(matrix, rows, share)
            covers.append(
                ClassCover(
                    chosen=members[torch.from_numpy(rows)],
                    counts=nearest_counts(matrix, rows, radius),
                    radius=radius,
                    facts={"centres": len(centres), "radius": radius, **facts},
                )
            )
    return covers


def nearest_counts(
    matrix: NDArray[np.float32], rows: NDArray[np.int64], radius: float
) -> NDArray[np.int64]:
    """Return how many images have each of the rows as their nearest, within the radius.

    An image with two nearest ones counts for the first.
    """
    chosen = matrix[rows]
    within = chosen.min(axis=0) <= np.float32(radius)
    return np.bincount(chosen.argmin(axis=0)[within], minlength=len(rows))


def covering_set(
    task: DistillTask, options: CoverConfig, covers: Sequence[ClassCover]
) -> DistilledSet:
    """Return the chosen images with adversarial training as their recipe.

    The notes hold the facts of all classes, name by name.
    """
    eps = options.eps
    if options.train_eps == "eps+radius":
        eps += max(cover.radius for cover in covers)
        if options.train_norm == "linf":
            eps = min(eps, 1.0)  # a larger budget allows no more, because pixels end at 0 and 1
    chosen = coreset(task, [cover.chosen for cover in covers], augment="")
    weights = None
    if options.weighted:
        counts = torch.from_numpy(np.concatenate([cover.counts for cover in covers])).double()
        weights = (counts / counts.mean()).float()
    return replace(
        chosen,
        recipe=Recipe(
            adversarial=AdversarialTraining(norm=options.train_norm, eps=eps, steps=options.steps),
            uses=("weights",) if options.weighted else None,
        ),
        notes={
            **chosen.notes,
            **{name: [cover.facts[name] for cover in covers] for name in covers[0].facts},
        },
        weights=weights,
    )
