"""AutoAttack: Croce and Hein 2020, 'Reliable evaluation of adversarial robustness ...'.

arXiv:2003.01690. The standard version: APGD on the cross-entropy, targeted APGD on the DLR loss,
targeted FAB and Square, each on the images that the ones before left unbroken.

FAB and Square are the authors' code (see ``_autoattack_adapter``). So is APGD with the engine
'package'; the engine 'fast' has its own (see ``_apgd``), which gives the same verdict for every
image in less time. Only the points it returns for broken images are others.

Deviations: with fewer than ten classes as many targets as there are; with three classes untargeted
DLR for the targeted one, which needs four, and with two classes no DLR; the images that the model
gets wrong never reach this attack, which changes no random draw and no verdict, but makes 'Square
lowered the accuracy' a share of the correctly classified images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._autoattack_adapter import Settings, provenance, run_autoattack

if TYPE_CHECKING:
    from torch import Tensor, nn

SubAttack = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]


class AutoAttackOptions(Config):
    """Options of AutoAttack."""

    version: Literal["standard", "plus", "rand"] = "standard"
    """The authors' ensembles; 'rand' averages gradients for networks that draw at random."""
    attacks: tuple[SubAttack, ...] | None = Field(default=None, min_length=1)
    """The sub-attacks in their order, for development; None for the version's own."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of the package's draws; None draws it from the host's generator."""
    iterations: int = Field(default=100, ge=1)
    """Steps of APGD and FAB."""
    square_queries: int = Field(default=5000, ge=1)
    """Queries of Square for each image."""
    engine: Literal["fast", "package"] = "fast"
    """Who computes APGD: 'fast' lets broken images leave and runs targets side by side, with the
    verdicts of the package; 'package' calls the package for everything, as 'rand' always does."""


class AutoAttack(Attack[AutoAttackOptions]):
    """The authors' ensemble of APGD, FAB and Square; the benchmark's measure."""

    name = "autoattack"
    info = Info(
        title="AutoAttack",
        licence="MIT",
        paper="https://arxiv.org/abs/2003.01690",
        origin="APGD written from the paper; for the rest calls the package autoattack or "
        "pyautoattack (MIT), code of fra31/auto-attack",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"iterations": 2, "square_queries": 5}
    norms = frozenset({"linf", "l2"})
    stronger_than = frozenset({"fgsm", "pgd", "margin-pgd", "mim", "apgd-ce", "apgd-t"})
    # No effort is named: to try twice as many iterations would cost more than the attack itself.

    def __init__(self, config: AutoAttackOptions | None = None) -> None:
        super().__init__(config)
        self.messages: list[str] = []
        """What the package flagged in the last call: randomised, dynamic or masked gradients,
        outputs that are no logits, or an ensemble changed for the number of classes."""

    def provenance(self) -> dict[str, str]:
        """Return which package runs (name, version and, from git, commit) and which engine."""
        return {**provenance(), "engine": self.config.engine}

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w); the unbroken ones as they came.

        Raises:
            RddBenchError: If the images are not float32 pixels in [0, 1].
            NotApplicable: If no sub-attack fits the number of classes or the shape.
        """
        self.messages = []
        if not len(images):
            # The packages divide by the number of images.
            return images.clone()
        seed = self.config.seed
        settings = Settings(
            norm=threat.norm,
            eps=threat.eps,
            version=self.config.version,
            attacks=self.config.attacks,
            seed=int(torch.randint(2**31, ())) if seed is None else seed,
            iterations=self.config.iterations,
            square_queries=self.config.square_queries,
            batch_size=run.batch_size,
            engine=self.config.engine,
        )
        attacked, self.messages = run_autoattack(model, images, labels, settings, run.report)
        return attacked


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [AutoAttack]
