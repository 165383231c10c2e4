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
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Recipe, Run, hookimpl
from rdd_bench_builtin.distillers._gradient_matching import GradientMatchingConfig, condense


class DCConfig(GradientMatchingConfig):
    """Options of DC."""

    init: Literal["real", "noise"] = "noise"
    """Begin with random real images or with standard normal noise."""


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
        return condense(
            task,
            run,
            self.config,
            self.name,
            init=self.config.init,
            augment="",
            recipe=Recipe(epochs=300),
        )


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [DC]
