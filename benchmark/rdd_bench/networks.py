"""A network as it is evaluated: pixels in, logits out, the preprocessing inside.

Attacks and the host see only this. It is what makes a budget in pixels mean what it says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rdd_bench.errors import RddBenchError

if TYPE_CHECKING:
    from rdd_bench.types import DatasetSpec, Whitening


class Normalise(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def inverse(self, normalised: Tensor) -> Tensor:
        """Return the pixels of normalised images."""
        return normalised * self.std + self.mean


class Whiten(nn.Module):
    """Whiten pixels by a linear transform, instead of normalising them channel by channel."""

    mean: Tensor
    matrix: Tensor
    _inverse: Tensor

    def __init__(self, whitening: Whitening) -> None:
        super().__init__()
        self.register_buffer("mean", whitening.mean)
        self.register_buffer("matrix", whitening.matrix)
        self.register_buffer("_inverse", whitening.inverse, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        flat = (pixels.flatten(1) - self.mean) @ self.matrix
        return flat.view_as(pixels)

    def inverse(self, whitened: Tensor) -> Tensor:
        """Return the pixels of whitened images."""
        flat = whitened.flatten(1) @ self._inverse + self.mean
        return flat.view_as(whitened)


class Classifier(nn.Module):
    """Pixels of [0, 1] to logits."""

    preprocess: Normalise | Whiten
    network: nn.Module

    def __init__(self, preprocess: Normalise | Whiten, network: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(self.preprocess(pixels))
        return logits


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Return the predicted classes, (n,) on the device of the images.

    Raises:
        RddBenchError: If an answer is no number, of which there is no largest.
    """
    if not len(images):
        return torch.empty(0, dtype=torch.long, device=images.device)
    logits = torch.cat([model(part) for part in torch.split(images, batch_size)])
    lost = int((~torch.isfinite(logits)).any(dim=1).sum())
    if lost:
        raise RddBenchError(f"the network answers {lost} of {len(images)} images with NaN or inf")
    return logits.argmax(dim=1)
