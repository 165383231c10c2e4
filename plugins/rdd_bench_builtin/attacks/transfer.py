"""Transfer: adversarials of other networks that were trained on the same distilled set.

A distilled set is published, so whoever attacks knows the whole training set and can train
networks of the same kind on it. Their adversarials mostly fool the attacked network too (Papernot,
McDaniel and Goodfellow 2016, arXiv:1605.07277), which is asked nothing at all: neither gradients
nor answers. Where this breaks more than an attack with gradients does, those are masked.

Steps are those of PGD from the image, on the mean of the surrogates' losses. Deviations from this
package's PGD: all steps are taken, because a point just over the boundary of the surrogates need
not be over that of the network, and asking the network would be a query; there are no restarts,
among which only its answers could choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    Attack,
    Config,
    Info,
    NotApplicable,
    Run,
    Threat,
    ascend,
    hookimpl,
    project,
)
from rdd_bench_builtin.attacks._gradient import input_gradient

if TYPE_CHECKING:
    from torch import Tensor, nn


class TransferOptions(Config):
    """Options of the transfer attack."""

    surrogates: int = Field(default=3, ge=1)
    """Networks to train on the distilled set, in seeds of their own; more of them transfer better,
    because what fools them all is less peculiar to each."""
    steps: int = Field(default=20, ge=1)
    """Gradient steps."""
    relative_step: float = Field(default=2.5, gt=0)
    """Step size times steps over eps; above 2, every point of the budget can be reached."""
    loss: Literal["ce", "margin"] = "margin"
    """What to increase on the mean of the surrogates: the cross-entropy, or the largest other logit
    minus the true one, whose gradient does not vanish on over-confident networks."""


class Transfer(Attack[TransferOptions]):
    """Adversarials of other networks trained on the same set, without asking this one."""

    name = "transfer"
    info = Info(
        title="Transfer from surrogates trained on the same set",
        licence="MIT",
        paper="https://arxiv.org/abs/1605.07277",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"surrogates": 1, "steps": 2}
    norms = frozenset({"linf", "l2"})
    access = "black"
    effort = "steps"

    def perturb(
        self, _model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return the last points of the ascent on the surrogates, (n, c, h, w).

        Raises:
            NotApplicable: If the set that the network was trained on is not known.
        """
        if run.surrogates is None:
            raise NotApplicable(
                "transfer needs the distilled set that the network was trained on, to train "
                "surrogates on it, and there is none"
            )
        surrogates = run.surrogates(self.config.surrogates)
        attacked = torch.empty_like(images)
        for batch in run.track(list(run.batches(len(images))), self.name):
            attacked[batch] = self._climb(surrogates, images[batch], labels[batch], threat)
        return attacked

    def _climb(
        self, surrogates: Sequence[nn.Module], images: Tensor, labels: Tensor, threat: Threat
    ) -> Tensor:
        options = self.config
        step = options.relative_step * threat.eps / options.steps
        points = images
        for _ in range(options.steps):
            # The sum of the gradients has the direction of their mean.
            gradient = torch.zeros_like(points)
            for surrogate in surrogates:
                gradient += input_gradient(surrogate, points, labels, options.loss)
            points = project(ascend(points, gradient, threat.norm, step), images, threat)
        return points


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [Transfer]
