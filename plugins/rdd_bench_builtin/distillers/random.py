"""Random real images: the coreset that every method has to beat."""

from __future__ import annotations

from typing import Any

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._coreset import (
    CoresetConfig,
    choose_at_random,
    coreset,
    members_of_classes,
)


class Random(Distiller[CoresetConfig]):
    """Real images of every class, drawn uniformly without replacement."""

    name = "random"
    role = "baseline"
    info = Info(title="Random real images", licence="MIT")

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:  # noqa: ARG002
        """Return ``task.ipc`` images of every class.

        Raises:
            RddBenchError: If a class has fewer images than that.
        """
        classes = members_of_classes(task, self.name, at_least=task.ipc)
        chosen = [choose_at_random(members, task.ipc) for members in classes]
        return coreset(task, chosen, self.config.augment)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [Random]
