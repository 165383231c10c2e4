"""MTT: synthetic images on which a network takes the way of networks trained on the real ones.

George Cazenavette, Tongzhou Wang, Antonio Torralba, Alexei A. Efros and Jun-Yan Zhu, "Dataset
Distillation by Matching Training Trajectories", CVPR 2022, arXiv:2203.11932. Experts are trained
on the real images and their weights kept epoch by epoch (``_trajectories``). Then images and the
student's step size are moved along the gradient through N steps of SGD so that these make up for
M epochs of an expert (``_trajectory_matching``, with the equations).

Deviations:

* ZCA whitening, with which the authors made most of their CIFAR sets, is an option and off: images
  are normalised by mean and standard deviation. It belongs to the set's own recipe; networks of
  other tracks see the same pixels through their usual normalisation.
* The options' defaults are the authors' for CIFAR-10 with 10 images per class, whatever the data
  set; theirs differ for each data set and number of images.
* By default the gradient through the N steps is that of the adjoint, the same to rounding, with
  the memory of one step.
* The last set is returned; the authors report the best one on the test images.
* A step size that is not positive ends the distillation with an error; theirs goes on.
* The author track lowers the learned rate on one optimiser, as for DM (see ``Recipe``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._trajectories import find_or_train_experts, preprocessed
from rdd_bench_builtin.distillers._trajectory_matching import (
    SMOKE,
    MatchingConfig,
    distil_by_matching,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


class MTT(Distiller[MatchingConfig]):
    """Match the weights that training on real images reaches, with a learned step size."""

    name = "mtt"
    info = Info(
        title="Matching training trajectories",
        licence="MIT",
        paper="https://arxiv.org/abs/2203.11932",
    )
    smoke: ClassVar = SMOKE

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class; their pixels may leave [0, 1].

        Raises:
            Diverged: If the matching does, with the last good set.
            RddBenchError: If an expert diverges, a class is too small to begin with, or a kept
                expert's file is damaged.
            NotApplicable: If the network draws random numbers of its own in training.
        """
        task = preprocessed(task, run, self.config)
        experts = find_or_train_experts(task, run, self.config, self.name, natural_loss)
        return distil_by_matching(task, run, self.config, experts, self.name)


def natural_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of an expert."""
    return torch.nn.functional.cross_entropy(network(images), labels)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [MTT]
