"""DC: synthetic images whose gradients are those of the real ones, all along a training.

Bo Zhao, Konda Reddy Mopuri and Hakan Bilen, "Dataset Condensation with Gradient Matching",
ICLR 2021, arXiv:2006.05929. The algorithm stands in ``_gradient_matching``.

Deviations:

* Any number of images per class; the authors' program stops at those it has no loop counts for.
* The author track trains for 300 epochs without augmentation on every data set; the authors crop,
  scale and rotate MNIST, and train 1000 epochs there.
* The gradients of large real batches are added up over passes of bounded size, and each class is
  differentiated by itself. Neither changes the mathematics.
* Networks and batches come from generators that the host seeds; theirs from the clock.
* A class with fewer than ``batch_real`` images gives all of them.

The option ``curvature`` adds GUARD's regulariser (Xue et al. 2025, arXiv:2403.10045) to the loss of
the real images, and so to the gradients that the synthetic ones shall have; networks are trained on
these as ever. GUARD's tables have it, its program does not: form and weight are not known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Recipe, Run, hookimpl
from rdd_bench_builtin.distillers._class_gradients import ClassLoss
from rdd_bench_builtin.distillers._curvature import CurvatureConfig, loss_and_curvature
from rdd_bench_builtin.distillers._gradient_matching import GradientMatchingConfig, condense

if TYPE_CHECKING:
    from torch import Tensor, nn


class DCConfig(GradientMatchingConfig, CurvatureConfig):
    """Options of DC."""

    init: Literal["real", "noise"] = "noise"
    """Begin with random real images or with standard normal noise."""
    curvature: float = Field(default=0.0, ge=0)
    """Weight of GUARD's regulariser in the loss of the real images; 0 leaves it out."""


class DC(Distiller[DCConfig]):
    """Match the gradients of real and synthetic images while networks train on the latter."""

    name = "dc"
    info = Info(title="Gradient matching", licence="MIT", paper="https://arxiv.org/abs/2006.05929")
    smoke: ClassVar = {"iterations": 2, "outer": 2, "inner": 1, "batch_real": 32}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class; their pixels may leave [0, 1].

        Raises:
            Diverged: If the loss is no number, with the last good set.
            RddBenchError: If a class is too small to begin with.
        """
        options = self.config
        return condense(
            task,
            run,
            options,
            self.name,
            init=options.init,
            augment="",
            real_loss=regularised_loss(options) if options.curvature else None,
            recipe=Recipe(epochs=300),
        )


def regularised_loss(options: DCConfig) -> ClassLoss:
    """Return the cross-entropy of images of one class with the weighted curvature, summed."""

    def loss(network: nn.Module, images: Tensor, label: int) -> Tensor:
        labels = torch.full((len(images),), label, device=images.device)
        form, h = options.curvature_form, options.curvature_h
        error, regulariser = loss_and_curvature(network, images, labels, form, h)
        return (error + options.curvature * regulariser) * len(images)

    return loss


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [DC]
