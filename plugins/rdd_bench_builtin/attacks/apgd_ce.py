"""APGD-CE: Croce and Hein 2020, 'Reliable evaluation of adversarial robustness ...', Algorithm 1.

arXiv:2003.01690, sections 3 and 4: ascent on the cross-entropy without a step size to choose. It
is the first part of AutoAttack, here as an attack of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rdd_bench.api import Attack, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._apgd_alone import APGDOptions, apgd_alone

if TYPE_CHECKING:
    from torch import Tensor, nn


class APGDCE(Attack[APGDOptions]):
    """Auto-PGD on the cross-entropy: gradient steps that choose their own size."""

    name = "apgd-ce"
    info = Info(
        title="Auto-PGD on the cross-entropy",
        licence="MIT",
        paper="https://arxiv.org/abs/2003.01690",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"iterations": 2}
    norms = frozenset({"linf", "l2"})
    # Not than PGD, which may climb a loss that over-confidence does not flatten.
    stronger_than = frozenset({"fgsm"})
    effort = "iterations"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w); the unbroken ones as they came."""
        attacked, self.messages = apgd_alone(
            model, images, labels, threat, run, self.config, self.name, "ce"
        )
        return attacked


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [APGDCE]
