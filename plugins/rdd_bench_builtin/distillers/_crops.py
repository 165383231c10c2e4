"""Random crops, shifts and mirrorings of images, for all three stages of SRe2L."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

TRIES = 10
"""Draws of a crop before the whole image is taken, as in torchvision."""


def random_boxes(count: int, size: tuple[int, int], smallest: float) -> Tensor:
    """Return crops as top, left, height and width in pixels, (count, 4) int64.

    The area is uniform between ``smallest`` and 1 of the image, the logarithm of the ratio of the
    sides between those of 3:4 and 4:3 (Szegedy et al. 2015).
    """
    height, width = size
    area = height * width * torch.empty(count, TRIES).uniform_(smallest, 1)
    ratio = torch.empty(count, TRIES).uniform_(-1, 1).mul(torch.tensor(4 / 3).log()).exp()
    wide = (area * ratio).sqrt().round().long()
    tall = (area / ratio).sqrt().round().long()
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    wide = torch.where(found, wide.gather(1, first).squeeze(1), width)
    tall = torch.where(found, tall.gather(1, first).squeeze(1), height)
    top = (torch.rand(count) * (height - tall + 1)).long()
    left = (torch.rand(count) * (width - wide + 1)).long()
    return torch.stack([top, left, tall, wide], dim=1)


def shifted(images: Tensor, padding: int) -> Tensor:
    """Return each image moved by up to ``padding`` pixels along each axis, black moving in."""
    count, _, height, width = images.shape
    down, right = torch.randint(2 * padding + 1, (2, count, 1)).to(images.device)
    padded = torch.nn.functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    rows = torch.arange(height, device=images.device) + down  # (n, h), in the padded image
    columns = torch.arange(width, device=images.device) + right
    sample = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirrored(images: Tensor) -> Tensor:
    """Return the images, each with probability one half mirrored."""
    chosen = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    return torch.where(chosen, images.flip(3), images)
