"""Views: the pictures that a teacher labelled and a student is trained on, from stored draws.

Soft labels belong to one crop, one mirroring and one mix. ``render`` makes the same picture for
the teacher and, later and elsewhere, for the student, so that a set is complete in itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rdd_bench.types import Views


def render(images: Tensor, views: Views, indices: Tensor) -> Tensor:
    """Return the pictures of some views, (b, c, h, w), from the stored images (n, c, h, w).

    Crops are enlarged to the size of the images, bilinearly; what lies beyond the image is black.
    ``indices`` (b,) says which views; their partners may be others.
    """
    pictures = _crop(images, views, indices)
    weight = views.mix_weight[indices].to(images)
    if not weight.any():
        return pictures
    partners = _crop(images, views, views.partner[indices])
    share = _inside(views.mix_box[indices], images) * weight.view(-1, 1, 1, 1)
    return pictures + share * (partners - pictures)


def _crop(images: Tensor, views: Views, indices: Tensor) -> Tensor:
    height, width = images.shape[2:]
    top, left, tall, wide = views.crop[indices].to(images).unbind(dim=1)
    rows = top[:, None] + _centres(height, images) * tall[:, None] / height  # (b, h), in pixels
    columns = left[:, None] + _centres(width, images) * wide[:, None] / width
    columns = torch.where(views.flip[indices].to(images.device)[:, None], columns.flip(1), columns)
    y, x = 2 * rows / height - 1, 2 * columns / width - 1  # as grid_sample counts
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3
    )
    chosen = images[views.image[indices].to(images.device)]
    return torch.nn.functional.grid_sample(chosen, grid, align_corners=False)


def _centres(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device, dtype=like.dtype) + 0.5


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """Return 1 inside the boxes (b, 4) and 0 outside, (b, 1, h, w)."""
    height, width = images.shape[2:]
    top, left, tall, wide = (edge[:, None] for edge in box.to(images.device).unbind(dim=1))
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    inside_y = (rows >= top) & (rows < top + tall)
    inside_x = (columns >= left) & (columns < left + wide)
    return (inside_y[:, None, :, None] & inside_x[:, None, None, :]).to(images)
