"""What SRe2L and GUARD share: all options, and what follows once there is a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rdd_bench.api import DistilledSet, DistillTask, Run
from rdd_bench_builtin.distillers._coreset import labels_of_classes
from rdd_bench_builtin.distillers._recover import RecoverConfig, recover
from rdd_bench_builtin.distillers._relabel import RelabelConfig, author_recipe, relabel
from rdd_bench_builtin.distillers._teacher import NOTHING, Measure, TeacherConfig, figures

if TYPE_CHECKING:
    from torch import nn


class StagesConfig(TeacherConfig, RecoverConfig, RelabelConfig):
    """Options of the three stages."""

    @property
    def uses_statistics(self) -> bool:
        """Whether images are recovered from the statistics of batch normalisation."""
        return self.r_bn > 0 and self.iterations > 0


SMOKE = {
    "teacher_epochs": 2,
    "teacher_batch": 32,
    "teacher_lr": 0.02,
    "padding": 1,
    "flip": False,
    "iterations": 5,
    # The contract's network has no batch normalisation.
    "r_bn": 0.0,
    "jitter": 1,
    "epochs": 5,
    "batch": 16,
}
"""Options for a run of seconds."""


def recover_and_relabel(
    task: DistillTask,
    run: Run,
    options: StagesConfig,
    who: str,
    images_teacher: nn.Module,
    labels_teacher: nn.Module,
    measures: Mapping[str, Measure] = NOTHING,
) -> DistilledSet:
    """Return images of one teacher with soft labels of another, or of the same one.

    ``measures`` of both teachers go into the notes.

    Raises:
        RddBenchError: If the recovery diverges, or a class is too small to begin with.
    """
    with run.phase("recover"):
        images, losses = recover(task, run, options, images_teacher, who, flip=options.flip)
    with run.phase("relabel"):
        views = relabel(
            task,
            run,
            options,
            labels_teacher,
            images,
            padding=options.padding,
            flip=options.flip,
        )
    notes = dict(losses)
    for role, teacher in (("images", images_teacher), ("labels", labels_teacher)):
        found = figures(teacher, task, run, options, measures)
        notes |= {f"{role}_teacher_{name}": value for name, value in found.items()}
    return DistilledSet(
        images=images,
        labels=labels_of_classes(task),
        recipe=author_recipe(options),
        views=views,
        notes=notes,
    )
