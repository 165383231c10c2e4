"""How many images go through a network at once where that changes nothing but the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rdd_bench.api import Run

if TYPE_CHECKING:
    from torch import Tensor

CACHED_PIXELS = 2**14
"""Pixels in one pass on a CPU, 16 images of 32x32: about what its cache holds of the wide maps.
With a width of 128, one pass of 640 took 1.6 to 1.8 times as long (one core, torch 2.15)."""


def images_at_once(images: Tensor, run: Run) -> int:
    """Return the size of a pass for images (..., h, w)."""
    if images.device.type != "cpu":
        return run.batch_size
    height, width = images.shape[-2:]
    return max(1, min(run.batch_size, CACHED_PIXELS // (height * width)))
