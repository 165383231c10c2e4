"""PGD: Madry, Makelov, Schmidt, Tsipras and Vladu 2018, 'Towards Deep Learning Models ...'.

arXiv:1706.06083, equation 2 and section 2.1: projected steps of steepest ascent on the loss
from a uniformly drawn point of the budget.

Deviations: the step is relative to the budget (2.5 * eps / steps, which the authors use where they
compare budgets), so one setting serves every eps; 20 steps as in their evaluation on CIFAR-10,
where the step is fixed at 2/255; the margin and the difference-of-logits ratio are offered beside
the cross-entropy, whose gradient vanishes on over-confident networks; the random start in L2 is
uniform in the ball.

The paper looks at the last iterate. Here an image is broken, and is not attacked any further, as
soon as **any** iterate is clearly misclassified. Every other image keeps the path, and the
verdict, that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rdd_bench.api import Attack, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._ascent import ProjectedOptions, projected_descent
from rdd_bench_builtin.attacks._gradient import Loss

if TYPE_CHECKING:
    from torch import Tensor, nn


class PGDOptions(ProjectedOptions):
    """Options of PGD."""

    loss: Loss = "ce"
    """'ce' is the paper's cross-entropy; 'margin' (largest other logit minus the true one) and
    'dlr' (the margin over the lead of the first logit over the third; three classes or more) do
    not weaken when the network is over-confident."""


class PGD(Attack[PGDOptions]):
    """Many projected gradient steps from a random start."""

    name = "pgd"
    info = Info(
        title="Projected gradient descent", licence="MIT", paper="https://arxiv.org/abs/1706.06083"
    )
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 2}
    norms = frozenset({"linf", "l2"})
    stronger_than = frozenset({"fgsm"})
    effort = "steps"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return each image's first broken point, or the last point of its last restart.

        Raises:
            NotApplicable: If the loss is 'dlr' and there are fewer than three classes.
        """
        options = self.config
        return projected_descent(
            model, images, labels, threat, run, options, options.loss, self.name
        )


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [PGD]
