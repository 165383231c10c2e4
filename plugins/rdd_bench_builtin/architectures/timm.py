"""Every model of timm, untrained.

Wightman 2019, "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models. The
paper of a model is named by the module of timm that defines it.

Models are built for the channels, classes and, where they depend on it, the size of the images.
Their stems are those for ImageNet: many reduce an image of 32 pixels to a single value per
channel. Pretrained weights are never used, for a set distilled with a network that has seen
other images is not comparable.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rdd_bench.api import (
    Architecture,
    Config,
    DatasetSpec,
    Info,
    NotApplicable,
    RddBenchError,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import nn

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""How models of timm say, at various depths, that an image does not suit them."""


class Options(Config):
    """Options of ``timm``."""

    model: str = "resnet18"
    """Name of the model, without a tag for weights; timm.list_models() has them all."""


class Timm(Architecture[Options]):
    """Any model of timm, by name: timm:resnet18."""

    name = "timm"
    info = Info(
        title="PyTorch Image Models",
        licence="MIT",
        paper="https://github.com/huggingface/pytorch-image-models",
        origin="models from the package timm (Apache-2.0)",
    )
    argument = "model"
    smoke: ClassVar[Mapping[str, Any]] = {"model": "test_resnet"}

    def build(self, spec: DatasetSpec) -> nn.Module:
        """Return a network whose ``embed`` is what the model's classifier sees, (n, d).

        Raises:
            RddBenchError: If timm has no such model.
            NotApplicable: If the model cannot be built for these images or cannot take them.
        """
        from rdd_bench_builtin.architectures._networks import TimmNetwork

        self._check_name()
        try:
            network = TimmNetwork(self._create(spec))
            network.eval()
            with torch.no_grad():
                images = torch.zeros(2, *spec.shape)
                network(images), network.embed(images)
        except REFUSALS as error:
            shape = "x".join(map(str, spec.shape))
            reason = " ".join(str(error).split()) or f"{type(error).__name__} without a reason"
            raise NotApplicable(
                f"timm:{self.config.model} cannot take images of {shape}: {reason}"
            ) from error
        return network.train()

    def _check_name(self) -> None:
        import timm

        name = self.config.model
        known = timm.list_models()
        if name in known:
            return
        bare, _, tag = name.partition(".")
        if tag and bare in known:
            raise RddBenchError(
                f"timm:{name} asks for the weights '{tag}', but networks start untrained here; "
                f"say timm:{bare}"
            )
        near = difflib.get_close_matches(name, known, n=3)
        did_you_mean = f"did you mean {' or '.join(near)}? All " if near else "the "
        raise RddBenchError(
            f"timm {timm.__version__} has no model '{name}'; {did_you_mean}{len(known)} names "
            f"are in timm.list_models()"
        )

    def _create(self, spec: DatasetSpec) -> nn.Module:
        import timm

        def create(**size: Any) -> nn.Module:
            model: nn.Module = timm.create_model(
                self.config.model,
                pretrained=False,
                num_classes=spec.num_classes,
                in_chans=spec.shape[0],
                **size,
            )
            return model

        # Nothing in timm tells which models take the image size, so it is offered to each.
        try:
            return create(img_size=spec.shape[1:])
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return create()


@hookimpl
def rdd_bench_architectures() -> list[type[Architecture[Any]]]:
    return [Timm]
