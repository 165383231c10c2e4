"""Herding: real images whose features have the mean of their class.

Max Welling, "Herding Dynamical Weights to Learn", ICML 2009. As the dataset distillation
literature uses it (Zhao et al. 2021, arXiv:2006.05929): greedily, every image at most once, in
the feature space of a trained network. After i picks with the sum s, the next one is

    argmin_x || (i + 1) mean - s - phi(x) ||.

With features of equal length this is Welling's rule: argmax_x <w, phi(x)>, w = (i + 1) mean - s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._coreset import coreset, members_of_classes
from rdd_bench_builtin.distillers._features import FeatureConfig, feature_map

if TYPE_CHECKING:
    from torch import Tensor


class Herding(Distiller[FeatureConfig]):
    """Real images picked one by one so that their mean feature follows the class mean."""

    name = "herding"
    role = "baseline"
    info = Info(
        title="Herding", licence="MIT", paper="https://dl.acm.org/doi/10.1145/1553374.1553517"
    )
    smoke: ClassVar = {"epochs": 1}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class, in the order of the picks.

        Raises:
            RddBenchError: If a class has fewer images than that.
            NotApplicable: If features of a network are wanted and it offers none.
        """
        classes = members_of_classes(task, self.name, at_least=task.ipc)
        features = feature_map(task, run, self.config, self.name)
        chosen = [
            members[herd(features(members), task.ipc)] for members in run.track(classes, "picking")
        ]
        return coreset(task, chosen, self.config.augment)


def herd(features: Tensor, count: int) -> Tensor:
    """Return the rows of ``features``, (n, d), that herding picks, (count,) in order.

    One pick costs a product of the features with a vector; ties go to the first row.
    """
    mean = features.mean(dim=0)
    squares = features.square().sum(dim=1)
    wanted = mean.clone()  # (i + 1) mean - sum of the picks
    picks: list[int] = []
    for _ in range(count):
        # The squared distance to phi(x), less the square of ``wanted``, which all rows share.
        distances = squares - 2 * features @ wanted
        distances[picks] = torch.inf
        picks.append(int(distances.argmin()))
        wanted = wanted + mean - features[picks[-1]]
    return torch.tensor(picks)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [Herding]
