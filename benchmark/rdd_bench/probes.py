"""An attack run once more on a few images, under conditions in which its outcome is known.

Nothing of this is the attack whose outcome counts: it has draws of its own, no memory of other
budgets, and its time is not booked as the attack's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rdd_bench import audit
from rdd_bench.checks import check_candidates
from rdd_bench.components import Attack, Run
from rdd_bench.errors import RddBenchError
from rdd_bench.hashing import derive
from rdd_bench.networks import predict
from rdd_bench.records import Flag
from rdd_bench.seeding import seeded
from rdd_bench.threats import project
from rdd_bench.types import LabelledImages, Threat

NULL_IMAGES = 32
"""Images of the null-attack control."""
IMAGES = 64
"""Images of the other probes."""


@dataclass(frozen=True)
class Probe:
    """An attack on one network, and how to run it again."""

    model: nn.Module
    attack: Attack[Any]
    threat: Threat
    seed: int
    """Training seed of the network."""
    run: Run
    who: str

    def null_attack(self, right: LabelledImages) -> list[Flag]:
        """Run it with a budget of zero on a few images.

        It runs with the plugin's smoke options: the control is about the pixels it hands over, not
        about its strength, and AutoAttack is slowest where nothing breaks.
        """
        few = spread(right, NULL_IMAGES)
        nothing = Threat(self.threat.norm, 0.0)
        seed = draws_of(self.attack, nothing, 0)
        candidates = self._again(few, nothing, self.attack.smoke, seed)
        batch_size = self.run.batch_size
        return [
            *audit.check_null_attack(self.model, few.images, few.labels, candidates, batch_size),
            *audit.check_budget(candidates, few.images, nothing),
        ]

    def more_steps(self, left: LabelledImages, total: int) -> list[Flag]:
        """Run it for twice as long on images that it left right, of ``total`` test images.

        It is run for as long as before too, with the same draws: other random starts break some
        images whatever its length.

        Raises:
            RddBenchError: If the attack's ``effort`` is no option that can be doubled.
        """
        effort = self.attack.effort
        if effort is None or not len(left):
            return []
        length = getattr(self.attack.config, effort, None)
        if not isinstance(length, int):
            raise RddBenchError(
                f"{self.who}: effort names '{effort}', which is {length!r}; expected an option "
                "that is a whole number"
            )
        few = spread(left, IMAGES)
        seed = draws_of(self.attack, self.threat, self.seed, audit.MORE_STEPS)
        again = self._right_after(few, self.threat, {}, seed)
        longer = self._right_after(few, self.threat, {effort: 2 * length}, seed)
        return audit.check_more_steps(
            self.attack.name, effort, again - longer, len(few), len(left), total
        )

    def large_budget(self, right: LabelledImages) -> list[Flag]:
        """Run it on right images with a budget in which all of them may become the same grey."""
        if self.attack.effort is None or self.attack.access != "white" or not len(right):
            return []
        norm = self.threat.norm
        eps = 0.5 if norm == "linf" else 0.5 * math.sqrt(right.images[0].numel())
        few = spread(right, IMAGES)
        seed = draws_of(self.attack, self.threat, self.seed, audit.LARGE_BUDGET)
        stayed = self._right_after(few, Threat(norm, eps), {}, seed)
        return audit.check_large_budget(self.attack.name, few.labels, stayed)

    def _right_after(
        self, few: LabelledImages, threat: Threat, options: Mapping[str, Any], seed: int
    ) -> int:
        candidates = self._again(few, threat, options, seed)
        within = project(candidates, few.images, threat)
        return int((predict(self.model, within, self.run.batch_size) == few.labels).sum())

    def _again(
        self, few: LabelledImages, threat: Threat, options: Mapping[str, Any], seed: int
    ) -> Tensor:
        """Return what it makes of a few images with some options changed, as it returns it."""
        other = type(self.attack).configured({**self.attack.config.model_dump(), **options})
        quiet = dataclasses.replace(
            self.run,
            report=lambda *_: None,
            phase=lambda _: contextlib.nullcontext(),
            memo={},
        )
        with seeded(seed):
            candidates = other.perturb(
                self.model, few.images.clone(), few.labels.clone(), threat, quiet
            )
        self.model.eval()
        return check_candidates(candidates, few.images, self.who)


def draws_of(attack: Attack[Any], threat: Threat, seed: int, *what: str) -> int:
    """Return the seed of an attack's draws on the network of one training seed."""
    return derive("attack", attack.name, threat.norm, threat.eps, seed, *what)


def spread(part: LabelledImages, most: int) -> LabelledImages:
    """Return a few images, evenly from the whole: test images may be sorted by class."""
    count = min(most, len(part))
    return part.subset(torch.arange(count) * len(part) // count)
