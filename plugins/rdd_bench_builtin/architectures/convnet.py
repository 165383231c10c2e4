"""ConvNet, the network with which the field distils and evaluates.

Gidaris and Komodakis 2018, "Dynamic Few-Shot Visual Learning without Forgetting",
arXiv:1804.09458; in the form of Zhao, Mopuri and Bilen 2020, "Dataset Condensation with Gradient
Matching", arXiv:2006.05929. Blocks of 3x3 convolution, normalisation, activation and pooling,
then one linear layer.

Usual depths: 3 for images of 28 and 32 pixels, 4 for 64, 5 for 128; the last map is then 4x4.

Deviations: the classifier is sized by the map that is really left, so any image size works; the
wider first padding is tied to 28x28 images of one channel (in the authors' code to one channel,
where only 28x28 occurs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from rdd_bench.api import Architecture, Config, DatasetSpec, Info, NotApplicable, hookimpl

if TYPE_CHECKING:
    from torch import nn

GROUPS = 4
"""Groups of norm=group, the authors' number."""


class Options(Config):
    """Options of ``convnet``."""

    depth: int = Field(default=3, ge=1)
    """Number of blocks; each halves the map unless pooling=none."""
    width: int = Field(default=128, ge=1)
    """Channels of every block."""
    norm: Literal["instance", "batch", "layer", "group", "none"] = "instance"
    """Normalisation; 'instance' has learnt scales and no running averages, 'group' has 4 groups."""
    activation: Literal["relu", "leakyrelu", "sigmoid", "swish"] = "relu"
    """Non-linearity of every block."""
    pooling: Literal["avg", "max", "none"] = "avg"
    """How a block halves the map, 2x2 with stride 2."""

    @model_validator(mode="after")
    def _groups_divide_width(self) -> Options:
        if self.norm == "group" and self.width % GROUPS:
            raise ValueError(f"norm=group needs a width divisible by {GROUPS}, not {self.width}")
        return self


class ConvNet(Architecture[Options]):
    """Blocks of convolution, norm, activation and pooling; the field's standard network."""

    name = "convnet"
    info = Info(title="ConvNet", licence="MIT", paper="https://arxiv.org/abs/1804.09458")
    smoke: ClassVar[Mapping[str, Any]] = {"depth": 2, "width": 8}

    def build(self, spec: DatasetSpec) -> nn.Module:
        """Return a network whose ``embed`` is the last map, flattened: (n, width * h' * w').

        Raises:
            NotApplicable: If the image is too small for so many blocks.
        """
        from rdd_bench_builtin.architectures._networks import Network

        channels, height, width = spec.shape
        # Wider padding makes 32x32 maps of the small grey images, so that every depth fits them.
        first_padding = 3 if spec.shape == (1, 28, 28) else 1
        height, width = height + 2 * (first_padding - 1), width + 2 * (first_padding - 1)
        layers: list[nn.Module] = []
        for block in range(self.config.depth):
            self._check_map(height, width, block, spec)
            padding = first_padding if block == 0 else 1
            layers.append(torch.nn.Conv2d(channels, self.config.width, 3, padding=padding))
            channels = self.config.width
            layers += [*self._norm(height, width), self._activation(), *self._pooling()]
            if self.config.pooling != "none":
                height, width = height // 2, width // 2
        features = torch.nn.Sequential(*layers, torch.nn.Flatten())
        classifier = torch.nn.Linear(channels * height * width, spec.num_classes)
        return Network(features, classifier)

    def _check_map(self, height: int, width: int, block: int, spec: DatasetSpec) -> None:
        what = f"convnet with depth={self.config.depth} on {spec.shape[1]}x{spec.shape[2]} images"
        if self.config.pooling != "none" and min(height, width) < 2:
            raise NotApplicable(
                f"{what}: block {block + 1} is left with a {height}x{width} map, which cannot be "
                f"halved; use depth={block} or less, or pooling=none"
            )
        if self.config.norm == "instance" and height * width == 1:
            raise NotApplicable(
                f"{what}: instance normalisation of a 1x1 map erases it; use another norm"
            )

    def _norm(self, height: int, width: int) -> list[nn.Module]:
        channels = self.config.width
        match self.config.norm:
            case "instance":
                return [torch.nn.GroupNorm(channels, channels)]
            case "batch":
                return [torch.nn.BatchNorm2d(channels)]
            case "layer":
                return [torch.nn.LayerNorm([channels, height, width])]
            case "group":
                return [torch.nn.GroupNorm(GROUPS, channels)]
            case "none":
                return []

    def _activation(self) -> nn.Module:
        match self.config.activation:
            case "relu":
                return torch.nn.ReLU(inplace=True)
            case "leakyrelu":
                return torch.nn.LeakyReLU(0.01, inplace=True)
            case "sigmoid":
                return torch.nn.Sigmoid()
            case "swish":
                return torch.nn.SiLU()

    def _pooling(self) -> list[nn.Module]:
        match self.config.pooling:
            case "avg":
                return [torch.nn.AvgPool2d(2)]
            case "max":
                return [torch.nn.MaxPool2d(2)]
            case "none":
                return []


@hookimpl
def rdd_bench_architectures() -> list[type[Architecture[Any]]]:
    return [ConvNet]
