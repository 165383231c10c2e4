"""PGD on the margin, which papers call 'CW' or 'CW-inf' in their tables of L-inf accuracies.

The loss is f6 of Carlini and Wagner 2017 (arXiv:1608.04644), the largest other logit minus the
true one, climbed by PGD as in Madry et al. 2018 (arXiv:1706.06083), whose tables have a row 'CW'
of 30 steps. It has the budget of the threat model and reports an accuracy; the attack of the paper
itself looks for the smallest perturbation and is the plugin ``cw``.

Deviations from those tables: the step is relative to the budget; there is no confidence, since an
image leaves as soon as it is clearly misclassified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from rdd_bench.api import Attack, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._ascent import ProjectedOptions, projected_descent

if TYPE_CHECKING:
    from torch import Tensor, nn


class MarginPGDOptions(ProjectedOptions):
    """Options of PGD on the margin."""

    steps: int = Field(default=30, ge=1)
    """Gradient steps of each restart."""


class MarginPGD(Attack[MarginPGDOptions]):
    """PGD on the margin between logits, which papers call CW under L-inf."""

    name = "margin-pgd"
    info = Info(
        title="Projected gradient descent on the margin (CW-inf)",
        licence="MIT",
        paper="https://arxiv.org/abs/1608.04644",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 2}
    norms = frozenset({"linf", "l2"})
    effort = "steps"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return each image's first broken point, or the last point of its last restart."""
        return projected_descent(
            model, images, labels, threat, run, self.config, "margin", self.name
        )


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [MarginPGD]
