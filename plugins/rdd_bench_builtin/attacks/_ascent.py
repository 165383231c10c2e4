"""Steps of projected ascent in which an image leaves as soon as it is broken.

Networks trained on distilled sets lose most images in the first steps; what comes after would be
work on images whose verdict is known. Random starts are drawn for the whole batch, so no image's
path depends on which others have left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator

from rdd_bench.api import Config, Run, Threat, ascend, project, random_start
from rdd_bench_builtin.attacks._gradient import Loss, broken, logits_and_gradient

if TYPE_CHECKING:
    from torch import Tensor, nn

Direction = Callable[["Tensor", "Tensor"], "Tensor"]
"""From the gradients of some images, and which images of the batch these are, to the direction
in which each of them moves."""


class ProjectedOptions(Config):
    """Options of projected gradient descent, whatever its loss."""

    steps: int = Field(default=20, ge=1)
    """Gradient steps of each restart."""
    relative_step: float = Field(default=2.5, gt=0)
    """Step size times steps over eps; above 2, every point of the budget can be reached."""
    restarts: int = Field(default=1, ge=1)
    """Random starts; the later ones attack only what the earlier ones left unbroken."""
    random_start: bool = True
    """Whether to start from a uniform draw from the budget rather than from the image."""

    @model_validator(mode="after")
    def _restarts_differ(self) -> ProjectedOptions:
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start would all be the same")
        return self


def projected_descent(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    run: Run,
    options: ProjectedOptions,
    loss: Loss,
    name: str,
) -> Tensor:
    """Attack all images, batch by batch under ``name``, and return them, (n, c, h, w)."""
    attacked = torch.empty_like(images)
    for batch in run.track(list(run.batches(len(images))), name):
        # Contiguous, because the order of random draws follows the memory layout.
        clean = images[batch].contiguous()
        attacked[batch] = _restarted(model, clean, labels[batch], threat, options, loss)
    return attacked


def _restarted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    options: ProjectedOptions,
    loss: Loss,
) -> Tensor:
    attacked = images.clone()
    unbroken = torch.arange(len(images), device=images.device)
    for restart in range(options.restarts):
        if restart:
            with torch.no_grad():
                left = broken(model(attacked[unbroken]), labels[unbroken])
            unbroken = unbroken[~left]
        if not len(unbroken):
            break
        start = random_start(images, threat) if options.random_start else images
        attacked[unbroken], climbing = climb(
            model,
            start[unbroken],
            images[unbroken],
            labels[unbroken],
            threat,
            steps=options.steps,
            relative_step=options.relative_step,
            loss=loss,
        )
        unbroken = unbroken[climbing]
    return attacked


def climb(
    model: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    steps: int,
    relative_step: float,
    loss: Loss,
    direction: Direction = lambda gradient, _: gradient,
) -> tuple[Tensor, Tensor]:
    """Return the first broken point on each image's path, or its last point, (n, c, h, w).

    The second result is which images went to the end; whether their last points are broken is
    not known.

    Args:
        model: Pixels of [0, 1] to logits (n, k).
        start: Where each path begins, (n, c, h, w).
        images: The centres of the budget, (n, c, h, w).
        labels: True classes (n,).
        threat: Norm and budget.
        steps: How many steps a path has at most.
        relative_step: Step size times steps over eps.
        loss: What to increase.
        direction: Where to go given the gradients; along them unless told otherwise.
    """
    step = relative_step * threat.eps / steps
    points = start.clone()
    active = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        logits, gradient = logits_and_gradient(model, points[active], labels[active], loss)
        staying = ~broken(logits, labels[active])
        active, gradient = active[staying], gradient[staying]
        if not len(active):
            break
        moved = ascend(points[active], direction(gradient, active), threat.norm, step)
        points[active] = project(moved, images[active], threat)
    return points, active
