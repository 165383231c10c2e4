"""What attacks that look for the nearest adversarial have to say under a budget.

Their measure is the distance, not an accuracy: without a budget they break nearly everything.
Under a threat an image counts as broken if its nearest adversarial lies within eps. The search
knows no budget, so it is done once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rdd_bench.api import Run, Threat, distance
from rdd_bench_builtin.attacks._memory import kept

if TYPE_CHECKING:
    from torch import Tensor, nn

Search = Callable[["nn.Module", "Tensor", "Tensor"], "tuple[Tensor, Tensor]"]
"""From a model, images and labels to the adversarials, (n, c, h, w), and which were found, (n,)."""


def nearest_within(
    search: Search,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    run: Run,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Search batch by batch under ``name``, or take what an earlier call on these images found.

    Returns:
        The images, (n, c, h, w): those without an adversarial within the budget as they came. And
        how far the nearest adversarial of each is in L2, (n,), infinite where none was found.
    """

    def search_all() -> tuple[Tensor, Tensor]:
        nearest, distances = images.clone(), images.new_empty(len(images))
        for batch in run.track(list(run.batches(len(images))), name):
            clean = images[batch].clone()
            nearest[batch], found = search(model, clean, labels[batch].clone())
            moved = distance(nearest[batch], clean, "l2")
            distances[batch] = moved.masked_fill(~found, torch.inf)
        return nearest, distances

    # Tensors made under inference_mode may not be saved for a backward pass; copies may.
    with torch.inference_mode(False):
        nearest, distances = kept(run, images, labels, search_all)
        reached = (distances <= threat.eps).view(-1, 1, 1, 1)
        return torch.where(reached, nearest, images), distances


def in_words(distances: Tensor) -> list[str]:
    """Return how many of the distances, (n,), are finite, and their median, as a sentence."""
    if not len(distances):
        return []
    found = distances[distances.isfinite()]
    if not len(found):
        return [f"found no adversarial for any of {len(distances)} images"]
    median = found.quantile(0.5).item()
    return [
        f"found an adversarial for {len(found)} of {len(distances)} images, "
        f"at a median L2 distance of {median:.4f}"
    ]
