"""K-center: real images spread over their class.

Ozan Sener and Silvio Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set
Approach", ICLR 2018, arXiv:1708.00489: the greedy algorithm, at most twice as far from any image
as the best choice. As the dataset distillation literature uses it (Zhao et al. 2021,
arXiv:2006.05929): every class on its own, beginning with the image nearest to the class mean, in
the feature space of a trained network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rdd_bench.api import DistilledSet, Distiller, DistillTask, Info, Run, hookimpl
from rdd_bench_builtin.distillers._coreset import coreset, members_of_classes
from rdd_bench_builtin.distillers._features import FeatureConfig, feature_map

if TYPE_CHECKING:
    from torch import Tensor


class KCenter(Distiller[FeatureConfig]):
    """Real images, each the farthest from those before it, beginning near the class mean."""

    name = "kcenter"
    role = "baseline"
    info = Info(title="K-center", licence="MIT", paper="https://arxiv.org/abs/1708.00489")
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
            members[farthest_first(features(members), task.ipc)]
            for members in run.track(classes, "picking")
        ]
        return coreset(task, chosen, self.config.augment)


def farthest_first(features: Tensor, count: int) -> Tensor:
    """Return the rows of ``features``, (n, d), that k-center picks, (count,) in order.

    Only the distance of each row to its nearest pick is kept; ties go to the first row.
    """
    picks = [int((features - features.mean(dim=0)).norm(dim=1).argmin())]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype)
    while len(picks) < count:
        nearest = torch.minimum(nearest, (features - features[picks[-1]]).norm(dim=1))
        # Copies of one image have distance zero: without this mark a pick could come twice.
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [KCenter]
