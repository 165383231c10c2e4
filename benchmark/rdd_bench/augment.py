"""Differentiable Siamese augmentation, DSA (Zhao and Bilen 2021, arXiv:2102.08259).

One operation is drawn for a whole batch. Drawn with ``count=1`` its parameters are shared by all
images, and the same draw can be applied to a real and to a synthetic batch (the Siamese mode of
DSA and DM)::

    transform = draw("color_crop_cutout", count=1, size=(32, 32))
    transform(real), transform(synthetic)

Drawn with one set of parameters an image (``count=len(images)``), it is the mode in which
networks are trained. Operations act on **normalised** images, as in the authors' code, where
zero is the mean colour. Every operation is differentiable with respect to its input.

Parameters are drawn from torch's global CPU generator, so a draw does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rdd_bench.errors import RddBenchError

if TYPE_CHECKING:
    from torch import Tensor

Transform = Callable[["Tensor"], "Tensor"]

BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5
CROP = 0.125
CUTOUT = 0.5
SCALE = 1.2
ROTATE = 15.0
"""Strengths of the authors' code: the crop and the cutout in parts of the image, degrees."""


def draw(strategy: str, count: int, size: tuple[int, int]) -> Transform:
    """Draw one operation of ``strategy`` and its parameters.

    Args:
        strategy: Names joined by '_' (see ``types.AUGMENTATIONS``); '' gives the identity.
        count: 1 for parameters shared by a batch of any size, else the size of the batch.
        size: Height and width of the images.

    Raises:
        RddBenchError: If the strategy names an operation that there is not.
    """
    names = [name for name in strategy.split("_") if name]
    if not names:
        return lambda images: images
    unknown = [name for name in names if name not in _OPERATIONS]
    if unknown:
        raise RddBenchError(
            f"unknown augmentation '{unknown[0]}' in '{strategy}'; known: {', '.join(_OPERATIONS)}"
        )
    name = names[int(torch.randint(len(names), ()))]
    return _OPERATIONS[name](count, size)


def _uniform(count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1)


def _color(count: int, _size: tuple[int, int]) -> Transform:
    shift = _uniform(count, -BRIGHTNESS / 2, BRIGHTNESS / 2)
    saturation = _uniform(count, 0, SATURATION)
    contrast = _uniform(count, CONTRAST, 1 + CONTRAST)

    def apply(images: Tensor) -> Tensor:
        images = images + shift.to(images)
        grey = images.mean(dim=1, keepdim=True)
        images = (images - grey) * saturation.to(images) + grey
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return (images - mean) * contrast.to(images) + mean

    return apply


def _crop(count: int, size: tuple[int, int]) -> Transform:
    height, width = size
    reach_y, reach_x = int(height * CROP + 0.5), int(width * CROP + 0.5)
    down = torch.randint(-reach_y, reach_y + 1, (count, 1))
    right = torch.randint(-reach_x, reach_x + 1, (count, 1))
    rows = torch.arange(height) + down + reach_y  # (count, h), in the padded image
    columns = torch.arange(width) + right + reach_x

    def apply(images: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(images, (reach_x, reach_x, reach_y, reach_y))
        y, x = rows.to(images.device), columns.to(images.device)
        if count == 1:
            return padded[:, :, y[0]][:, :, :, x[0]]
        sample = torch.arange(count, device=images.device).view(-1, 1, 1)
        moved = padded.permute(0, 2, 3, 1)[sample, y[:, :, None], x[:, None, :]]  # (n, h, w, c)
        return moved.permute(0, 3, 1, 2)

    return apply


def _cutout(count: int, size: tuple[int, int]) -> Transform:
    height, width = size
    side_y, side_x = int(height * CUTOUT + 0.5), int(width * CUTOUT + 0.5)
    # The authors draw the centre in [0, size] or [0, size - 1] for odd and even squares.
    top = torch.randint(0, height + 1 - side_y % 2, (count, 1)) - side_y // 2
    left = torch.randint(0, width + 1 - side_x % 2, (count, 1)) - side_x // 2
    inside_y = (torch.arange(height) >= top) & (torch.arange(height) < top + side_y)
    inside_x = (torch.arange(width) >= left) & (torch.arange(width) < left + side_x)
    kept = ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])  # (count, 1, h, w)
    return lambda images: images * kept.to(images)


def _flip(count: int, _size: tuple[int, int]) -> Transform:
    flipped = torch.rand(count, 1, 1, 1) < 0.5
    return lambda images: torch.where(flipped.to(images.device), images.flip(3), images)


def _scale(count: int, _size: tuple[int, int]) -> Transform:
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = _uniform(count, 1 / SCALE, SCALE).flatten()
    theta[:, 1, 1] = _uniform(count, 1 / SCALE, SCALE).flatten()
    return _affine(theta)


def _rotate(count: int, _size: tuple[int, int]) -> Transform:
    angle = _uniform(count, -ROTATE, ROTATE).flatten().deg2rad()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos(), -angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin(), angle.cos()
    return _affine(theta)


def _affine(theta: Tensor) -> Transform:
    def apply(images: Tensor) -> Tensor:
        shape = list(images.shape)
        # The authors' code predates align_corners=False; True is what their numbers were made with.
        grid = torch.nn.functional.affine_grid(
            theta.to(images), [len(theta), *shape[1:]], align_corners=True
        )
        return torch.nn.functional.grid_sample(
            images, grid.expand(shape[0], -1, -1, -1), align_corners=True
        )

    return apply


_OPERATIONS: dict[str, Callable[[int, tuple[int, int]], Transform]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
