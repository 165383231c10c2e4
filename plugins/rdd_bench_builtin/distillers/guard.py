"""GUARD: SRe2L with a teacher whose loss is flat in the neighbourhood of the real images.

Eric Xue, Yijiang Li, Haoyang Liu, Peiran Wang, Yifan Shen and Haohan Wang, "Towards Adversarially
Robust Dataset Distillation by Curvature Regularization", AAAI 2025, arXiv:2403.10045. The teacher
is trained on

    CE(f(x), y) + w R(x),    R one of the three forms of ``_curvature``,

with R in eval mode, so that batch normalisation uses its running statistics and R leaves them
alone. Recovery and labels are those of SRe2L; the student is trained on clean images.

The released programs differ: for CIFAR R is the change of the gradient, not squared; for ImageNet
it is the change of the loss (curvature_form=loss) with w = 1e-4. The paper's equation squares the
norm.

Deviations:

* The gradient of each image is that of its own loss. In the authors' program it is that of the
  mean of a batch of 128, so their weight of 100 is 100/128 here, at any batch size.
* The direction z is the gradient over its length. Theirs has 1e-7 added to both, which for images
  that the teacher is sure of makes z another direction, many times as long as h.
* The pass that gives z serves for the comparison too; theirs is repeated.
* Images and labels may come from different teachers, and from an adversarially trained one, which
  is the control that the paper's tables lack. Its attack is one in pixels, within [0, 1].
* ``curvature_eval_share`` is ours, and off by default.

Besides, see the deviations of SRe2L.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    DistilledSet,
    Distiller,
    DistillTask,
    Eps,
    Info,
    Run,
    Threat,
    ascend,
    hookimpl,
    project,
    random_start,
)
from rdd_bench_builtin.distillers._curvature import CurvatureConfig, loss_and_curvature
from rdd_bench_builtin.distillers._stages import SMOKE, StagesConfig, recover_and_relabel
from rdd_bench_builtin.distillers._teacher import (
    Objective,
    find_or_train_teacher,
    natural_loss,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["curvature", "plain", "adversarial"]

RELATIVE_STEP = 2.5
"""Step size of the attack times its steps over eps."""


class GUARDConfig(StagesConfig, CurvatureConfig):
    """Options of SRe2L and of the teachers."""

    curvature: float = Field(default=100 / 128, ge=0)
    """Weight of the regulariser; 0 makes the plain teacher."""
    curvature_unit: Literal["normalised", "pixels"] = "normalised"
    """Where the step and the gradients are measured. With one standard deviation s, a step of h
    between normalised images is one of h s in pixels, where gradients are 1/s as long: the same
    regulariser has s times the weight in pixels (squared: s^2; loss: 1)."""
    curvature_warmup: int = Field(default=0, ge=0)
    """Epochs in which the weight grows from zero, along a straight line."""
    curvature_eval_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the cross-entropy that is taken in eval mode, as the regulariser is. With none, as
    published, nothing but the running statistics binds what is flattened to what is fitted, and
    strong regularisers make the network that is used later flat at the cost of its accuracy."""
    images_from: Kind = "curvature"
    """The teacher of the images; 'plain' is that of SRe2L."""
    labels_from: Kind = "curvature"
    """The teacher of the soft labels."""
    adversarial_eps: Eps = Field(default=8 / 255, gt=0, le=1)
    """Budget of the adversarial teacher, in pixels of [0, 1], in the maximum norm."""
    adversarial_steps: int = Field(default=7, ge=1)
    """Gradient steps of its attack."""


class GUARD(Distiller[GUARDConfig]):
    """SRe2L with a teacher regularised to a flat loss."""

    name = "guard"
    info = Info(
        title="Distillation with curvature regularisation",
        licence="MIT",
        paper="https://arxiv.org/abs/2403.10045",
    )
    smoke: ClassVar = SMOKE

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class, in [0, 1], with views.

        Raises:
            RddBenchError: If a teacher or the recovery diverges, a class is too small to begin
                with, or a kept teacher's file is damaged.
            NotApplicable: If the teacher has no batch normalisation to take statistics from.
        """
        options = self.config
        teachers: dict[Kind, nn.Module] = {}
        for kind in (options.images_from, options.labels_from):
            if kind not in teachers:
                objective, decisive = objective_of(kind, task, options)
                teachers[kind] = find_or_train_teacher(
                    task,
                    run,
                    options,
                    self.name,
                    objective,
                    decisive,
                    needs_statistics=options.uses_statistics,
                )
        images_teacher, labels_teacher = (
            teachers[options.images_from],
            teachers[options.labels_from],
        )
        return recover_and_relabel(
            task,
            run,
            options,
            self.name,
            images_teacher,
            labels_teacher,
            measures={"regulariser": lambda *of: regularise(task, options, *of)[1]},
        )


def objective_of(
    kind: Kind, task: DistillTask, options: GUARDConfig
) -> tuple[Objective, Mapping[str, Any]]:
    """Return the loss of a teacher, and what decides it beside the cross-entropy."""
    if kind == "adversarial":
        prefix, objective = "adversarial_", adversarial_loss(task, options)
    elif kind == "curvature" and options.curvature:
        prefix, objective = "curvature", regularised_loss(task, options)
    else:
        return natural_loss(task), {}
    every = options.model_dump(mode="json")
    return objective, {name: every[name] for name in every if name.startswith(prefix)}


def regularised_loss(task: DistillTask, options: GUARDConfig) -> Objective:
    """Return the cross-entropy with the weighted curvature at the same images."""
    warm_up, in_eval = options.curvature_warmup, options.curvature_eval_share

    def loss(network: nn.Module, pixels: Tensor, labels: Tensor, epoch: int) -> Tensor:
        # The only pass in train mode, so the only one that updates running statistics.
        error = torch.nn.functional.cross_entropy(network(task.normalise(pixels)), labels)
        share = min(1.0, epoch / warm_up) if warm_up else 1.0
        if share == 0:
            return error
        network.eval()
        eval_error, regulariser = regularise(task, options, network, pixels, labels)
        network.train()
        if in_eval:
            error = (1 - in_eval) * error + in_eval * eval_error
        return error + options.curvature * share * regulariser

    return loss


def regularise(
    task: DistillTask, options: GUARDConfig, network: nn.Module, pixels: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and R, without its weight, of a network in eval mode."""
    form, h = options.curvature_form, options.curvature_h
    if options.curvature_unit == "normalised":
        return loss_and_curvature(network, task.normalise(pixels), labels, form, h)
    return loss_and_curvature(lambda p: network(task.normalise(p)), pixels, labels, form, h)


def adversarial_loss(task: DistillTask, options: GUARDConfig) -> Objective:
    """Return the cross-entropy at adversarial examples (Madry et al. 2018)."""
    threat = Threat("linf", options.adversarial_eps)
    step = RELATIVE_STEP * threat.eps / options.adversarial_steps

    def loss(network: nn.Module, pixels: Tensor, labels: Tensor, _epoch: int) -> Tensor:
        # The attacker meets the network as one does at test time.
        network.eval()
        attacked = random_start(pixels, threat)
        for _ in range(options.adversarial_steps):
            leaf = attacked.detach().requires_grad_()
            error = torch.nn.functional.cross_entropy(network(task.normalise(leaf)), labels)
            (gradient,) = torch.autograd.grad(error, leaf)
            attacked = project(ascend(attacked, gradient, "linf", step), pixels, threat)
        network.train()
        return torch.nn.functional.cross_entropy(network(task.normalise(attacked)), labels)

    return loss


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [GUARD]
