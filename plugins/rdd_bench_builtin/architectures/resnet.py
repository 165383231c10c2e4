"""ResNet-18 for small images.

He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385,
made of torchvision's residual blocks and initialised like torchvision's ResNet.

Deviations: the first convolution is 3x3 with stride 1 and no pooling follows it, as is usual for
images of 32 pixels, so the four stages see the whole, a half, a quarter and an eighth of the
image; the width can be changed; normalisation can be per image, with learnt scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, gcd
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import Architecture, Config, DatasetSpec, Info, NotApplicable, hookimpl

if TYPE_CHECKING:
    from torch import nn

BLOCKS = (2, 2, 2, 2)
"""Residual blocks of each stage; they make it an 18."""


class Options(Config):
    """Options of ``resnet18``."""

    width: int = Field(default=64, ge=1)
    """Channels of the first stage; each later stage has twice as many."""
    norm: Literal["batch", "instance", "group"] = "batch"
    """Normalisation; 'group' has 32 groups (Wu and He 2018), or as many as divide the channels."""


class ResNet18(Architecture[Options]):
    """Residual network of 18 layers with a stem for small images."""

    name = "resnet18"
    info = Info(
        title="ResNet-18 for small images",
        licence="MIT",
        paper="https://arxiv.org/abs/1512.03385",
        origin="written from the paper, with the residual blocks of torchvision (BSD-3-Clause)",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"width": 8}

    def build(self, spec: DatasetSpec) -> nn.Module:
        """Return a network whose ``embed`` is the pooled last map, (n, 8 * width).

        Raises:
            NotApplicable: If normalisation per image would erase the last map.
        """
        from rdd_bench_builtin.architectures._networks import Network

        self._check_last_map(spec)
        width = self.config.width
        stem = torch.nn.Conv2d(spec.shape[0], width, 3, padding=1, bias=False)
        layers = [stem, self._norm(width), torch.nn.ReLU(inplace=True)]
        channels = width
        for stage, blocks in enumerate(BLOCKS):
            layers.append(self._stage(channels, width * 2**stage, blocks, 1 if stage == 0 else 2))
            channels = width * 2**stage
        features = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        _initialise(features)
        return Network(features, torch.nn.Linear(channels, spec.num_classes))

    def _check_last_map(self, spec: DatasetSpec) -> None:
        height, width = (ceil(side / 8) for side in spec.shape[1:])
        channels = 8 * self.config.width
        groups = self._groups(channels)
        if groups is not None and channels // groups * height * width == 1:
            raise NotApplicable(
                f"resnet18 with norm={self.config.norm} on {spec.shape[1]}x{spec.shape[2]} images: "
                f"the last map is 1x1, and normalising single values erases them; use norm=batch"
            )

    def _stage(self, before: int, channels: int, blocks: int, stride: int) -> nn.Module:
        from torchvision.models.resnet import BasicBlock

        shortcut = None
        if stride != 1 or before != channels:
            projection = torch.nn.Conv2d(before, channels, 1, stride=stride, bias=False)
            shortcut = torch.nn.Sequential(projection, self._norm(channels))
        first = BasicBlock(before, channels, stride, shortcut, norm_layer=self._norm)
        rest = [BasicBlock(channels, channels, norm_layer=self._norm) for _ in range(blocks - 1)]
        return torch.nn.Sequential(first, *rest)

    def _groups(self, channels: int) -> int | None:
        match self.config.norm:
            case "batch":
                return None
            case "instance":
                return channels
            case "group":
                return gcd(32, channels)

    def _norm(self, channels: int) -> nn.Module:
        groups = self._groups(channels)
        if groups is None:
            return torch.nn.BatchNorm2d(channels)
        return torch.nn.GroupNorm(groups, channels)


def _initialise(features: nn.Module) -> None:
    """Draw the convolutions as He et al. 2015 (arXiv:1502.01852) do, by their fan-out."""
    for module in features.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@hookimpl
def rdd_bench_architectures() -> list[type[Architecture[Any]]]:
    return [ResNet18]
