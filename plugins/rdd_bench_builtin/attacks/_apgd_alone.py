"""APGD outside of the ensemble: what ``apgd-ce`` and ``apgd-t`` share.

With the same seed and batch size the verdict of every image is that of the authors' class, which
does more work for it (see ``_apgd``). As in AutoAttack, all batches have the same random starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from rdd_bench.api import Config, Run, Threat
from rdd_bench_builtin.attacks._apgd import APGD, Loss

if TYPE_CHECKING:
    from torch import Tensor, nn


class APGDOptions(Config):
    """Options of APGD, whatever its loss."""

    iterations: int = Field(default=100, ge=1)
    """Gradient steps from each start."""
    restarts: int = Field(default=1, ge=1)
    """Random starts; the later ones attack only what the earlier ones left unbroken."""


def apgd_alone(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    run: Run,
    options: APGDOptions,
    name: str,
    loss: Loss,
    targets: int = 1,
) -> tuple[Tensor, list[str]]:
    """Attack batch by batch under ``name`` with a seed that is drawn from the host's generator.

    Returns:
        The images, (n, c, h, w), the unbroken ones as they came; and what there is to say.
    """
    silent = _ZeroGradients()
    apgd = APGD(
        model=model,
        norm=threat.norm,
        eps=threat.eps,
        loss=loss,
        iterations=options.iterations,
        restarts=options.restarts,
        targets=targets,
        seed=int(torch.randint(2**31, ())),
        max_rows=run.batch_size,
        check=silent.count,
    )
    # Tensors made under inference_mode may not be saved for a backward pass; copies may.
    with torch.inference_mode(False):
        attacked = images.clone(memory_format=torch.contiguous_format)
        for batch in run.track(list(run.batches(len(images))), name):
            attacked[batch] = apgd.perturb(attacked[batch], labels[batch].clone())
    return attacked, silent.in_words()


class _ZeroGradients:
    """Counts the starts at which there is no gradient to follow."""

    def __init__(self) -> None:
        self.starts = self.zero = 0

    def count(self, lengths: Tensor) -> None:
        self.starts += len(lengths)
        self.zero += int((lengths == 0).sum())

    def in_words(self) -> list[str]:
        if not self.zero:
            return []
        return [
            f"the gradient is zero at {self.zero} of {self.starts} random starts: it may be masked"
        ]
