"""FGSM: Goodfellow, Shlens and Szegedy 2015, 'Explaining and Harnessing Adversarial Examples'.

arXiv:1412.6572, section 4: x + eps * sign(grad_x J(x, y)), with the cross-entropy as J.

Deviations: the paper has L-inf only; for L2 the same step goes along the gradient itself, as
far as the budget allows (what libraries call the fast gradient method). Pixels are kept in
[0, 1]. On networks with saturated softmax the gradient vanishes and the attack looks weaker
than it should; that is a property of the attack, which is why it is a diagnostic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rdd_bench.api import (
    Attack,
    Info,
    NoOptions,
    Run,
    Threat,
    ascend,
    hookimpl,
    project,
)
from rdd_bench_builtin.attacks._gradient import input_gradient
from rdd_bench_builtin.attacks._memory import kept

if TYPE_CHECKING:
    from torch import Tensor, nn


class FGSM(Attack[NoOptions]):
    """One step of the size of the whole budget along the gradient."""

    name = "fgsm"
    info = Info(
        title="Fast gradient sign method", licence="MIT", paper="https://arxiv.org/abs/1412.6572"
    )
    norms = frozenset({"linf", "l2"})

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return the images one step further, (n, c, h, w)."""

        def gradients() -> Tensor:
            found = torch.empty_like(images)
            for batch in run.track(list(run.batches(len(images))), self.name):
                found[batch] = input_gradient(model, images[batch], labels[batch], "ce")
            return found

        gradient = kept(run, images, labels, gradients)
        return project(ascend(images, gradient, threat.norm, threat.eps), images, threat)


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [FGSM]
