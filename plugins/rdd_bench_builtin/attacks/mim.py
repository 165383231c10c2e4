"""MIM: Dong, Liao, Pang, Su, Zhu, Hu and Li 2018, 'Boosting Adversarial Attacks with Momentum'.

arXiv:1710.06081, algorithm 1 (MI-FGSM) and equation 9 for L2: each gradient is divided by its L1
norm and added to the decayed sum of those before, and the image follows that sum.

Equation 6 normalises **image by image**. Some programs divide by the norm of the whole batch, and
then how much an image's gradients of different steps count depends on its neighbours.

Deviation: as in this package's PGD, an image leaves as soon as it is clearly misclassified, and
pixels stay in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._ascent import climb

if TYPE_CHECKING:
    from torch import Tensor, nn


class MIMOptions(Config):
    """Options of MIM."""

    steps: int = Field(default=10, ge=1)
    """Gradient steps."""
    relative_step: float = Field(default=1.0, gt=0)
    """Step size times steps over eps; with 1 the steps just reach the rim of the budget."""
    decay: float = Field(default=1.0, ge=0)
    """Share of the sum of gradients that is kept at each step; 0 for none (I-FGSM)."""


class MIM(Attack[MIMOptions]):
    """Gradient steps with momentum, the iterative FGSM that transfers."""

    name = "mim"
    info = Info(
        title="Momentum iterative method", licence="MIT", paper="https://arxiv.org/abs/1710.06081"
    )
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 2}
    norms = frozenset({"linf", "l2"})
    stronger_than = frozenset({"fgsm"})
    effort = "steps"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return each image's first broken point, or its last point, (n, c, h, w)."""
        options = self.config
        attacked = torch.empty_like(images)
        for batch in run.track(list(run.batches(len(images))), self.name):
            clean = images[batch]
            attacked[batch], _ = climb(
                model,
                clean,
                clean,
                labels[batch],
                threat,
                steps=options.steps,
                relative_step=options.relative_step,
                loss="ce",
                direction=_Momentum(torch.zeros_like(clean), options.decay),
            )
        return attacked


class _Momentum:
    """The decayed sum of every image's normalised gradients."""

    def __init__(self, total: Tensor, decay: float) -> None:
        self.total = total
        self.decay = decay

    def __call__(self, gradient: Tensor, active: Tensor) -> Tensor:
        """Add the gradients of the active images and return their sums."""
        length = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        # Gradients of a saturated softmax are small numbers, which are wanted; only 0/0 is not.
        unit = gradient / length.clamp_min(torch.finfo(length.dtype).tiny)
        self.total[active] = self.decay * self.total[active] + unit
        return self.total[active]


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [MIM]
