"""The space in which herding and k-center measure distances.

Zhao et al. (2021, arXiv:2006.05929) choose coresets by the features of a network trained on the
whole training set. They do not say how long; here the training is short, without augmentation,
and its options are open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from rdd_bench.api import DistillTask, Run, embedding_of
from rdd_bench_builtin.distillers._coreset import CoresetConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


class FeatureConfig(CoresetConfig):
    """Options of the coresets that look at features."""

    features: Literal["network", "pixels"] = "network"
    """Distances between features of a network trained on the real images, or between pixels."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training set for the network."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of the network; SGD with momentum 0.9 and weight decay 5e-4."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step of the network's training."""


def feature_map(
    task: DistillTask, run: Run, options: FeatureConfig, who: str
) -> Callable[[Tensor], Tensor]:
    """Return the map from indices of training images (n,) to float64 features (n, d) on the CPU.

    Double precision makes the sums over a class exact enough for the order of the pick not to
    hang on rounding.

    Raises:
        NotApplicable: If the architecture offers no features.
    """
    if options.features == "pixels":
        return lambda indices: task.train.images[indices].flatten(1).cpu().double()

    network = task.build_network(run.device)
    embed = embedding_of(network, who)
    with run.phase("features"):
        _train(network, task, run, options)

    def features(indices: Tensor) -> Tensor:
        parts = []
        with torch.no_grad():
            for part in run.batches(len(indices)):
                images = task.train.images[indices[part]].to(run.device)
                parts.append(embed(task.normalise(images)).flatten(1).cpu().double())
        return torch.cat(parts)

    return features


def _train(network: nn.Module, task: DistillTask, run: Run, options: FeatureConfig) -> None:
    """Train on the real images and leave the network in eval mode."""
    images = task.normalise(task.train.images.to(run.device))
    labels = task.train.labels.to(run.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4
    )
    network.train()
    for _ in run.track(range(options.epochs), "features"):
        for batch in torch.split(torch.randperm(len(labels)).to(run.device), options.batch_size):
            if len(batch) == 1:
                continue  # Batch normalisation cannot be computed from a single vector.
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
    network.eval()
