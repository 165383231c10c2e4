"""PGD: Madry, Makelov, Schmidt, Tsipras and Vladu 2018, 'Towards Deep Learning Models ...'.

arXiv:1706.06083, equation 2 and section 2.1: projected steps of steepest ascent on the loss
from a uniformly drawn point of the budget.

Deviations: the step is relative to the budget (2.5 * eps / steps, which the authors use where they
compare budgets), so one setting serves every eps; 20 steps as in their evaluation on CIFAR-10,
where the step is fixed at 2/255; the margin is offered beside the cross-entropy, because the
latter's gradient vanishes on over-confident networks; the random start in L2 is uniform in the
ball.

Verdicts between restarts are taken on the **last iterate** of each restart, as in the paper: an
image that was misclassified on the way and is classified correctly at the end counts as
unbroken. Broken images keep their point and are not attacked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator

from rdd_bench.api import (
    Attack,
    Config,
    Info,
    Run,
    Threat,
    ascend,
    hookimpl,
    project,
    random_start,
)
from rdd_bench_builtin.attacks._gradient import Loss, input_gradient

if TYPE_CHECKING:
    from torch import Tensor, nn


class PGDOptions(Config):
    """Options of PGD."""

    steps: int = Field(default=20, ge=1)
    """Gradient steps of each restart."""
    relative_step: float = Field(default=2.5, gt=0)
    """Step size times steps over eps; above 2, every point of the budget can be reached."""
    restarts: int = Field(default=1, ge=1)
    """Random starts; the later ones attack only what the earlier ones left unbroken."""
    random_start: bool = True
    """Whether to start from a uniform draw from the budget rather than from the image."""
    loss: Loss = "ce"
    """'ce' is the paper's cross-entropy; 'margin' (largest other logit minus the true one) does
    not weaken when the network is over-confident."""

    @model_validator(mode="after")
    def _restarts_differ(self) -> PGDOptions:
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start would all be the same")
        return self


class PGD(Attack[PGDOptions]):
    """Many projected gradient steps from a random start."""

    name = "pgd"
    info = Info(
        title="Projected gradient descent", licence="MIT", paper="https://arxiv.org/abs/1706.06083"
    )
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 2}
    norms = frozenset({"linf", "l2"})
    stronger_than = frozenset({"fgsm"})

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w): the last iterate of each one's last restart."""
        attacked = torch.empty_like(images)
        for batch in run.track(list(run.batches(len(images))), "pgd"):
            # Contiguous, because the order of random draws follows the memory layout.
            attacked[batch] = self._attack(model, images[batch].contiguous(), labels[batch], threat)
        return attacked

    def _attack(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        attacked = images.clone()
        unbroken = torch.arange(len(images), device=images.device)
        for restart in range(self.config.restarts):
            if restart:
                with torch.no_grad():
                    predicted = model(attacked[unbroken]).argmax(dim=1)
                unbroken = unbroken[predicted == labels[unbroken]]
            if not len(unbroken):
                break
            # The start is drawn for the whole batch, so no image's start depends on which others
            # are already broken.
            start = random_start(images, threat) if self.config.random_start else images
            attacked[unbroken] = self._climb(
                model, start[unbroken], images[unbroken], labels[unbroken], threat
            )
        return attacked

    def _climb(
        self, model: nn.Module, start: Tensor, images: Tensor, labels: Tensor, threat: Threat
    ) -> Tensor:
        step = self.config.relative_step * threat.eps / self.config.steps
        candidates = start
        for _ in range(self.config.steps):
            gradient = input_gradient(model, candidates, labels, self.config.loss)
            candidates = project(ascend(candidates, gradient, threat.norm, step), images, threat)
        return candidates


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [PGD]
