"""Gradients of the loss of images of one class with respect to a network, for gradient matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from rdd_bench.api import Run
from rdd_bench_builtin.distillers._passes import images_at_once

if TYPE_CHECKING:
    from torch import Tensor, nn

ClassLoss = Callable[["nn.Module", "Tensor", int], "Tensor"]
"""The sum of the losses of images of one class: network, normalised images, label."""


def cross_entropy(network: nn.Module, images: Tensor, label: int) -> Tensor:
    """Return the sum of the losses of images of one class."""
    labels = torch.full((len(images),), label, device=images.device)
    return torch.nn.functional.cross_entropy(network(images), labels, reduction="sum")


def real_gradients(
    network: nn.Module,
    images: Tensor,
    label: int,
    parameters: Sequence[nn.Parameter],
    run: Run,
    loss: ClassLoss,
) -> list[Tensor]:
    """Return the gradients of the mean loss, added up over passes of bounded size."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in torch.split(images, images_at_once(images, run)):
        error = loss(network, part, label) / len(images)
        gradients = torch.autograd.grad(
            error, parameters, allow_unused=True, materialize_grads=True
        )
        for summed, gradient in zip(total, gradients, strict=True):
            summed += gradient
    return total
