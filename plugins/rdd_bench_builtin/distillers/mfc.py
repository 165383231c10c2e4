"""MFC: of every class the real images that cover it with the smallest radius.

Tong Chen and Raghavendra Selvan, "Is Adversarial Training with Compressed Datasets Effective?",
SCIA 2025, arXiv:2402.05675: minimal finite covering. Of a class T and a radius r,

    min |S|  over S in T  such that every x in T has an s in S with |x - s| <= r,

an integer program; or of a number k the smallest r that k images allow. Here k is the number of
images per class, or, with the option ``radius``, r is given and the rest of the k images are the
farthest from those before them. Then a network is trained adversarially on S (``_cover_set``).

Written from the abstract and from what the published programs do. Not known to us, and our
choices: the data, norms, budgets and training of the paper's experiments, and whether its budget
is eps, the radius, or their sum. The result is therefore no reproduction of the paper's numbers.

Deviations from the published programs:

* The optimum is exact among all distances, and proven; they bisect the radius to 0.001 and take
  whatever exceeds a time limit for impossible. Here a program that is given up makes the cover
  unproven, and the notes hold a lower bound.
* HiGHS by way of SciPy in place of Gurobi, SCIP or CBC, with row generation (``_covering``).
* Without the restriction of the centres to the support of a linear relaxation, which may miss the
  optimum.
* No common radius for all classes: it would not give all of them the same number of images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from rdd_bench.api import (
    DistilledSet,
    Distiller,
    DistillTask,
    Info,
    RddBenchError,
    Run,
    hookimpl,
)
from rdd_bench_builtin.distillers._cover_program import Effort
from rdd_bench_builtin.distillers._cover_set import (
    ClassCover,
    CoverConfig,
    cover_classes,
    covering_set,
)
from rdd_bench_builtin.distillers._covering import cover_with, cover_within

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class MFCConfig(CoverConfig):
    """Options of MFC."""

    radius: float | None = Field(default=None, gt=0)
    """Cover with this radius by as few images as possible; if not given, the smallest radius is
    sought for the number of images per class."""
    node_limit: int = Field(default=100, ge=1)
    """Nodes of branch and bound in one integer program, after which the cover is not proven; a
    single node in those after that."""
    time_limit: float | None = Field(default=60.0, gt=0)
    """Seconds for the integer programs of a class, after which the best cover so far is taken and
    marked as not proven: only there does a set depend on the machine. None for no limit. Most
    classes take seconds; the digit 8 of MNIST with 10 centres was not done after minutes."""


class MFC(Distiller[MFCConfig]):
    """Cover every class by balls around real images, with the smallest radius; proven."""

    name = "mfc"
    info = Info(
        title="Minimal finite covering",
        licence="MIT",
        paper="https://arxiv.org/abs/2402.05675",
        origin="written from the abstract and the published programs; see the docstring",
    )

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class.

        The notes say for every class: ``centres``, the images that the cover needs; its
        ``radius``; the ``lower_bound`` of the radius, or of the number of centres if the radius
        was given; whether the cover is ``proven`` to be minimal; the integer ``programs`` solved
        and the ``rows`` of the largest.

        Raises:
            RddBenchError: If a class has too few images, or needs more centres than the set is
                to have.
        """
        options = self.config

        def find(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int64], dict[str, Any]]:
            effort = Effort(options.node_limit, options.time_limit or math.inf)
            if options.radius is None:
                cover = cover_with(matrix, task.ipc, effort)
            else:
                cover = cover_within(matrix, options.radius, effort)
            return cover.centres, {
                "lower_bound": cover.bound,
                "proven": cover.proven,
                "programs": effort.programs,
                "rows": effort.rows,
            }

        covers = cover_classes(task, run, options.norm, find, self.name)
        if options.radius is not None:
            _check_sizes(covers, task, options.radius)
        return covering_set(task, options, covers)


def _check_sizes(covers: Sequence[ClassCover], task: DistillTask, radius: float) -> None:
    """Refuse the radius if a cover is too large."""
    sizes = [len(cover.chosen) for cover in covers]
    needed = max(sizes)
    if needed > task.ipc:
        label = sizes.index(needed)
        least = "" if covers[label].facts["proven"] else "at most "
        raise RddBenchError(
            f"{MFC.name}: class '{task.spec.class_names[label]}' of {task.spec.name} needs "
            f"{least}{needed} images for radius={radius:g}, but the set has {task.ipc} per class; "
            f"ask for {needed}, or for a larger radius"
        )


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [MFC]
