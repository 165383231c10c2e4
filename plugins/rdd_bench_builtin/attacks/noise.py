"""Random noise of the size of the budget, the control of every attack.

Noise is not an attack: a network that loses to it is brittle rather than attacked, and an attack
that does no better than it found nothing. Both are worth a column beside the real attacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, Run, Threat, hookimpl, random_start
from rdd_bench_builtin.attacks._gradient import broken

if TYPE_CHECKING:
    from torch import Tensor, nn


class NoiseOptions(Config):
    """Options of the noise."""

    draws: int = Field(default=1, ge=1)
    """Draws for each image; it is broken if one of them breaks it."""


class Noise(Attack[NoiseOptions]):
    """Uniform noise within the budget: a control that real attacks must beat."""

    name = "noise"
    info = Info(title="Uniform noise", licence="MIT")
    smoke: ClassVar[Mapping[str, Any]] = {"draws": 2}
    norms = frozenset({"linf", "l2"})
    access = "none"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return each image's first draw that breaks it, or its last draw, (n, c, h, w)."""
        attacked = torch.empty_like(images)
        for batch in run.track(list(run.batches(len(images))), self.name):
            # Contiguous, because the order of random draws follows the memory layout.
            attacked[batch] = self._best(model, images[batch].contiguous(), labels[batch], threat)
        return attacked

    def _best(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        best = random_start(images, threat)
        unbroken = torch.arange(len(images), device=images.device)
        for _ in range(self.config.draws - 1):
            with torch.no_grad():
                left = broken(model(best[unbroken]), labels[unbroken])
            unbroken = unbroken[~left]
            if not len(unbroken):
                break
            # Drawn for the whole batch, so no image's noise depends on which others are broken.
            best[unbroken] = random_start(images, threat)[unbroken]
        return best


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [Noise]
