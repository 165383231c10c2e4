"""APGD-T: Croce and Hein 2020, 'Reliable evaluation of adversarial robustness ...', section 4.

arXiv:2003.01690, equation 7: ascent without a step size to choose on the targeted difference of
logits ratio, for one target class after the other, the likeliest first. It is the second part of
AutoAttack, here as an attack of its own; over-confidence does not hide from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Info, NotApplicable, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._apgd_alone import APGDOptions, apgd_alone

if TYPE_CHECKING:
    from torch import Tensor, nn


class APGDTOptions(APGDOptions):
    """Options of APGD-T."""

    targets: int = Field(default=9, ge=1)
    """Classes to aim at, or all others where there are fewer."""


class APGDT(Attack[APGDTOptions]):
    """Auto-PGD towards one class after the other, on the difference of logits ratio."""

    name = "apgd-t"
    info = Info(
        title="Targeted Auto-PGD on the difference of logits ratio",
        licence="MIT",
        paper="https://arxiv.org/abs/2003.01690",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"iterations": 2}
    norms = frozenset({"linf", "l2"})
    stronger_than = frozenset({"fgsm"})
    effort = "iterations"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w); the unbroken ones as they came.

        Raises:
            NotApplicable: If there are fewer than four classes.
        """
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        if classes < 4:
            instead = "apgd-ce, or autoattack with attacks=apgd-dlr" if classes == 3 else "apgd-ce"
            raise NotApplicable(
                f"apgd-t: the targeted difference of logits ratio needs four classes and the "
                f"network has {classes}; use {instead}"
            )
        attacked, self.messages = apgd_alone(
            model,
            images,
            labels,
            threat,
            run,
            self.config,
            self.name,
            "dlr-targeted",
            targets=min(self.config.targets, classes - 1),
        )
        return attacked


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [APGDT]
