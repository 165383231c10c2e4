"""What attacks that look for the nearest adversarial have to say under a budget.

Their measure is the distance, not an accuracy: without a budget they break nearly everything.
Under a threat an image counts as broken if its nearest adversarial lies within eps, and the
distances themselves are reported in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rdd_bench.api import Run, Threat, distance

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
) -> tuple[Tensor, list[str]]:
    """Search batch by batch under ``name``; return the images and what there is to say.

    An image whose adversarial is missing or lies beyond the budget is returned as it came.
    """
    distances = []
    # Tensors made under inference_mode may not be saved for a backward pass; copies may.
    with torch.inference_mode(False):
        attacked = images.clone()
        for batch in run.track(list(run.batches(len(images))), name):
            clean = images[batch].clone()
            adversarials, found = search(model, clean, labels[batch].clone())
            moved = distance(adversarials, clean, threat.norm)
            reached = (found & (moved <= threat.eps)).view(-1, 1, 1, 1)
            attacked[batch] = torch.where(reached, adversarials, clean)
            distances.append(moved[found])
    return attacked, _sentences(distances, len(images))


def _sentences(distances: list[Tensor], count: int) -> list[str]:
    if not count:
        return []
    found = torch.cat(distances)
    if not len(found):
        return [f"found no adversarial for any of {count} images"]
    median = found.quantile(0.5).item()
    return [
        f"found an adversarial for {len(found)} of {count} images, "
        f"at a median L2 distance of {median:.4f}"
    ]
