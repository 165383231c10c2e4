"""MLP, the field's network without convolutions.

Zhao, Mopuri and Bilen 2020, "Dataset Condensation with Gradient Matching", arXiv:2006.05929:
three linear layers, the hidden ones of 128 units with ReLU.

Deviation: the first layer is sized by the image; the authors' code knows two sizes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Architecture, Config, DatasetSpec, Info, hookimpl

if TYPE_CHECKING:
    from torch import nn


class Options(Config):
    """Options of ``mlp``."""

    depth: int = Field(default=3, ge=1)
    """Linear layers, the classifier included; 1 is logistic regression."""
    width: int = Field(default=128, ge=1)
    """Units of every hidden layer."""


class MLP(Architecture[Options]):
    """Linear layers with ReLU between them."""

    name = "mlp"
    info = Info(
        title="Multilayer perceptron", licence="MIT", paper="https://arxiv.org/abs/2006.05929"
    )
    smoke: ClassVar[Mapping[str, Any]] = {"width": 16}

    def build(self, spec: DatasetSpec) -> nn.Module:
        """Return a network whose ``embed`` is the last hidden layer, (n, width).

        At depth=1 nothing is hidden, and it is the pixels.
        """
        from rdd_bench_builtin.architectures._networks import Network

        units = prod(spec.shape)
        layers: list[nn.Module] = [torch.nn.Flatten()]
        for _ in range(self.config.depth - 1):
            layers += [torch.nn.Linear(units, self.config.width), torch.nn.ReLU(inplace=True)]
            units = self.config.width
        return Network(torch.nn.Sequential(*layers), torch.nn.Linear(units, spec.num_classes))


@hookimpl
def rdd_bench_architectures() -> list[type[Architecture[Any]]]:
    return [MLP]
