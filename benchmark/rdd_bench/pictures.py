"""What people want to see: distilled images, and what an attack did, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor

    from rdd_bench.types import DistilledSet

PER_CLASS = 10
CLASSES = 20
"""How much of a large set is shown."""
TILE = 64
"""Pixels that a small image is enlarged to, or the multiple of its size next to it."""
GAP = 2
CAPTION = 12


@dataclass(frozen=True, slots=True)
class Examples:
    """A few attacked images of one network."""

    images: Tensor
    """(m, c, h, w), in [0, 1]."""
    candidates: Tensor
    """The same images attacked, within the budget."""
    labels: Tensor
    """True classes (m,)."""
    predictions: Tensor
    """What the network takes the attacked ones for, (m,)."""


def picture_of_set(distilled: DistilledSet, num_classes: int) -> bytes:
    """Return a PNG with a row for each class; pixels outside [0, 1] are cut off."""
    labels = distilled.hard_labels
    rows = []
    for label in range(min(num_classes, CLASSES)):
        members = (labels == label).nonzero().flatten()[:PER_CLASS]
        rows.append(list(distilled.images[members]))
    return _png(rows)


def picture_of_attack(examples: Examples, eps: float) -> bytes:
    """Return a PNG with three rows: image, attacked image, and what was added.

    Grey in the last row is no change; black and white are the largest change of the picture, or
    the budget if that is larger. Below stands the true class and what the network says.
    """
    change = examples.candidates - examples.images
    reach = max(change.abs().max().item(), min(eps, 1.0), 1e-8)
    rows = [examples.images, examples.candidates, 0.5 + change / (2 * reach)]
    pairs = zip(examples.labels.tolist(), examples.predictions.tolist(), strict=True)
    return _png([list(row) for row in rows], [f"{true}>{said}" for true, said in pairs])


def in_eight_bits(images: Tensor) -> Tensor:
    """Return images as a picture file holds them: clipped to [0, 1] and in steps of 1/255."""
    return (images.clamp(0, 1) * 255).round() / 255


def _png(rows: Sequence[Sequence[Tensor]], captions: Sequence[str] = ()) -> bytes:
    """Return a PNG of images (c, h, w) in [0, 1], row by row; rows may differ in length."""
    height, width = next(image.shape[1:] for row in rows for image in row)
    scale = max(1, -(-TILE // max(height, width)))
    step_y, step_x = height * scale + GAP, width * scale + GAP
    columns = max(len(row) for row in rows)
    size = (columns * step_x + GAP, len(rows) * step_y + GAP + (CAPTION if captions else 0))
    canvas = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            tile = Image.fromarray(_bytes(image).numpy())
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(tile, (GAP + x * step_x, GAP + y * step_y))
    pen = ImageDraw.Draw(canvas)
    for x, caption in enumerate(captions):
        pen.text((GAP + x * step_x, len(rows) * step_y), caption, fill="black")
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()


def _bytes(image: Tensor) -> Tensor:
    """Return (h, w, 3) bytes; of two channels, or more than three, the mean."""
    if image.shape[0] != 3:
        image = image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    levels = (in_eight_bits(image.detach().float().cpu()) * 255).round()
    return levels.to(torch.uint8).permute(1, 2, 0).contiguous()
