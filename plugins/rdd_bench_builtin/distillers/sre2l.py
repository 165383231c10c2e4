"""SRe2L: images from the statistics of one teacher, with its soft labels.

Zeyuan Yin, Eric Xing and Zhiqiang Shen, "Squeeze, Recover and Relabel: Dataset Condensation at
ImageNet Scale From A New Perspective", NeurIPS 2023, arXiv:2306.13092. A teacher with batch
normalisation is trained on the real images (``_teacher``); images are moved until the teacher
knows them and they have the statistics it expects (``_recover``); the teacher answers to random
views of them (``_relabel``). Each module has its equations.

The options' defaults are those of GUARD's run of SRe2L on CIFAR-10, so that the two methods
differ in nothing but the teacher's loss.

Deviations:

* The teacher answers in eval mode. In the authors' CIFAR program it stays in train mode, takes
  the statistics of each batch, and its running ones drift.
* Views are drawn once and stored with their answers for all data sets; the authors do so for
  ImageNet, and ask the teacher during the training for CIFAR.
* An architecture with an option ``norm`` gets a teacher with norm=batch.
* The teacher of one seed is shared by all numbers of images per class.
* Groups of images that do not meet in the loss are recovered together, with the same crops and
  rolls; the authors recover one after the other.
* Images are float32; theirs are stored as JPEG.
"""

from __future__ import annotations

from typing import Any, ClassVar

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._stages import SMOKE, StagesConfig, recover_and_relabel
from rdd_bench_builtin.distillers._teacher import find_or_train_teacher, natural_loss


class SRe2L(Distiller[StagesConfig]):
    """Recover images from a teacher's batch-norm statistics, with its soft labels."""

    name = "sre2l"
    info = Info(
        title="Squeeze, recover and relabel",
        licence="MIT",
        paper="https://arxiv.org/abs/2306.13092",
    )
    smoke: ClassVar = SMOKE

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class, in [0, 1], with views.

        Raises:
            RddBenchError: If the teacher or the recovery diverges, a class is too small to begin
                with, or a kept teacher's file is damaged.
            NotApplicable: If the teacher has no batch normalisation to take statistics from.
        """
        teacher = find_or_train_teacher(
            task,
            run,
            self.config,
            self.name,
            natural_loss(task),
            needs_statistics=self.config.uses_statistics,
        )
        return recover_and_relabel(task, run, self.config, self.name, teacher, teacher)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [SRe2L]
