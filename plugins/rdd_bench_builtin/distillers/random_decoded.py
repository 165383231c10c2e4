"""Random real images through the decoder of factorised sets: their control.

IDM and BACON store several small images in one and enlarge them before training. That alone takes
away high frequencies, and with them features that an attacker could use; so what such a set gains
has to be measured against real images that went through the same: made smaller by averaging, and
enlarged bilinearly as ``rdd_bench.api.unfold`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from rdd_bench.api import (
    DistilledSet,
    Distiller,
    DistillTask,
    Info,
    RddBenchError,
    Run,
    hookimpl,
    unfold,
)
from rdd_bench_builtin.distillers._coreset import (
    CoresetConfig,
    choose_at_random,
    coreset,
    members_of_classes,
)


class RandomDecodedConfig(CoresetConfig):
    """Options of random real images through a decoder."""

    factor: int = Field(default=2, ge=2)
    """Small images along each side of a stored one: 2 for IDM and BACON."""


class RandomDecoded(Distiller[RandomDecodedConfig]):
    """Random real images at the resolution of sets that store several images in one."""

    name = "random-decoded"
    role = "baseline"
    info = Info(title="Random real images through a decoder", licence="MIT")

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:  # noqa: ARG002
        """Return ``task.ipc`` images of every class, counted as they are trained on.

        Raises:
            RddBenchError: If a class has fewer images than that, or their size cannot be divided.
        """
        factor = self.config.factor
        height, width = task.spec.shape[1:]
        if height % factor or width % factor:
            raise RddBenchError(
                f"{self.name}: images of {height}x{width} have no {factor}x{factor} parts; "
                "choose another factor"
            )
        classes = members_of_classes(task, self.name, at_least=task.ipc)
        chosen = [choose_at_random(members, task.ipc) for members in classes]
        made = coreset(task, chosen, self.config.augment)
        small = torch.nn.functional.avg_pool2d(made.images, factor)
        # One stored image with the small one in all its parts decodes to so many equal images.
        decoded = unfold(small.repeat(1, 1, factor, factor), factor)[:: factor**2]
        return DistilledSet(decoded, made.labels, made.recipe, made.notes)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [RandomDecoded]
