"""DSA: gradient matching of images that are augmented alike.

Bo Zhao and Hakan Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML
2021, arXiv:2102.08259. DC with three differences: in every step one augmentation of each class is
applied to its real and to its synthetic images, the networks train on augmented images, and the
images begin as real ones. The algorithm stands in ``_gradient_matching``.

Deviations are those of DC but for the recipe, which is the authors'.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Recipe, Run, hookimpl
from rdd_bench_builtin.distillers._coreset import DSA as STRATEGY
from rdd_bench_builtin.distillers._coreset import Augmentation
from rdd_bench_builtin.distillers._gradient_matching import GradientMatchingConfig, condense


class DSAConfig(GradientMatchingConfig):
    """Options of DSA."""

    init: Literal["real", "noise"] = "real"
    """Begin with random real images or with standard normal noise."""
    augment: Augmentation = STRATEGY
    """Operations, for the matching, the networks and the author track; '' for none. The authors
    leave out 'flip' for digits."""


class DSA(Distiller[DSAConfig]):
    """Match gradients as DC does, of real and synthetic images under the same augmentation."""

    name = "dsa"
    info = Info(
        title="Siamese augmentation", licence="MIT", paper="https://arxiv.org/abs/2102.08259"
    )
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
            augment=options.augment,
            recipe=Recipe(augment=options.augment),
        )


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [DSA]
