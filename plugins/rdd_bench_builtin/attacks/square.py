"""Square: Andriushchenko, Croce, Flammarion and Hein 2020, 'Square Attack'.

arXiv:1912.00049. Random search over squares of shrinking size that asks the network for logits
only, so it also breaks networks that merely hide their gradients.

The numbers come from the class that AutoAttack runs, in the authors' package or its repackaging.
The settings are AutoAttack's (5,000 queries, the first square covers 0.8 of the image) where the
paper chooses the size by data set, with one difference: the schedule of sizes, written for 10,000
queries, is compressed to the number of queries, without which a short run never reaches small
squares.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, NotApplicable, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._autoattack_adapter import (
    NORM_NAMES,
    package_name,
    provenance,
    square_tiles,
)
from rdd_bench_builtin.attacks._undisturbed import undisturbed

if TYPE_CHECKING:
    from torch import Tensor, nn


class SquareOptions(Config):
    """Options of Square."""

    queries: int = Field(default=5000, ge=1)
    """Forward passes for each image and restart; it leaves when it is broken."""
    restarts: int = Field(default=1, ge=1)
    """Runs from new draws; the later ones attack only what the earlier ones left unbroken."""
    first_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the image that the first square covers (the paper's p)."""


class Square(Attack[SquareOptions]):
    """Random squares, judged by the logits alone: the black-box attack of AutoAttack."""

    name = "square"
    info = Info(
        title="Square attack",
        licence="MIT",
        paper="https://arxiv.org/abs/1912.00049",
        origin="calls the package autoattack or pyautoattack (MIT), code of fra31/auto-attack",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"queries": 5}
    norms = frozenset({"linf", "l2"})
    access = "black"
    effort = "queries"

    def provenance(self) -> dict[str, str]:
        """Return which package runs: its name, version and, from git, its commit."""
        return provenance()

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w); the unbroken ones as they came.

        Raises:
            NotApplicable: If the threat is L2 and the images have a shape that cannot be tiled.
        """
        height, width = images.shape[2:]
        if threat.norm == "l2" and not square_tiles(height, width):
            raise NotApplicable(f"square: {height}x{width} images cannot be tiled in L2; use linf")
        package = importlib.import_module(f"{package_name()}.square")
        attacked = torch.empty_like(images)
        for batch in run.track(list(run.batches(len(images))), self.name):
            # The package reseeds the generators with what it is given.
            seed = int(torch.randint(2**31, ()))
            with undisturbed(model):
                adversary = package.SquareAttack(
                    model,
                    norm=NORM_NAMES[threat.norm],
                    eps=threat.eps,
                    n_queries=self.config.queries,
                    n_restarts=self.config.restarts,
                    p_init=self.config.first_share,
                    resc_schedule=True,
                    seed=seed,
                    device=images.device,
                )
                clean = images[batch].detach().clone(memory_format=torch.contiguous_format)
                found = adversary.perturb(clean, labels[batch].clone())
            attacked[batch] = found
        return attacked


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [Square]
