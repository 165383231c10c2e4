"""MFC-partial: real images that cover most of their class; outliers are left out.

After Tong Chen and Raghavendra Selvan, "Is Adversarial Training with Compressed Datasets
Effective?", SCIA 2025, arXiv:2402.05675, but not the paper's method: a cover of all images spends
its centres on the farthest ones, and networks trained on few such images are worse than on random
ones. Here only a share q of each class has to be covered, as in k-center with outliers.

The greedy choice of k centres, each the one that covers the most images not yet covered, is made
for radii that bisection narrows down, and the smallest that covers the share is kept. Centres that
are left over are the images farthest from those before. The radius is not proven to be minimal.

The bound of ``_cover_set`` then holds for the covered images, whose counts are the weights; the
others add at most 1 - q times the largest loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._cover_set import CoverConfig, cover_classes, covering_set
from rdd_bench_builtin.distillers._covering import cover_most

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MFCPartialConfig(CoverConfig):
    """Options of MFC-partial."""

    cover: float = Field(default=0.9, gt=0, le=1)
    """Share of the images of a class that has to be covered; our choice, not tuned."""


class MFCPartial(Distiller[MFCPartialConfig]):
    """Cover most of every class by balls around real images, greedily; outliers are left out."""

    name = "mfc-partial"
    info = Info(
        title="Minimal finite covering of a share",
        licence="MIT",
        paper="https://arxiv.org/abs/2402.05675",
        origin="a variant of our own; see the docstring",
    )

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class.

        The notes say for every class: the ``centres`` of the greedy choice, the ``radius`` that
        covers the share, and that it is not ``proven`` to be minimal.

        Raises:
            RddBenchError: If a class has too few images.
        """
        share = self.config.cover

        def find(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[str, Any]]:
            return cover_most(matrix, task.ipc, share), {"proven": False}

        covers = cover_classes(task, run, self.config.norm, find, self.name, share)
        return covering_set(task, self.config, covers)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [MFCPartial]
