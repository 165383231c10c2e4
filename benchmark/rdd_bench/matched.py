"""Real images that make a network as accurate on clean images as a row's: how robust is that one?

A network that knows little may look robust because of that. So a row is also compared with random
real images of another number per class, at which their clean accuracy is the row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rdd_bench.metrics import Scores
from rdd_bench.rows import Seed

TOLERANCE = 0.01
"""How far beyond the accuracies of the control a row may lie; then the nearest end counts."""


@dataclass(frozen=True)
class ControlSet:
    """The control at one number of images per class, averaged over architectures."""

    ipc: int
    seeds: list[Seed]
    clean: Scores
    """(seeds, images)."""
    worst: Scores
    """(seeds, images), under the worst of the attacks that rank."""

    def in_seeds(self, seeds: Sequence[Seed]) -> ControlSet | None:
        """Return the networks of these seeds, in their order; None where one is missing."""
        if not set(seeds) <= set(self.seeds):
            return None
        places = [self.seeds.index(seed) for seed in seeds]
        return ControlSet(self.ipc, list(seeds), self.clean[places], self.worst[places])


def matched_worst(
    clean: Scores, seeds: Sequence[Seed], sets: Sequence[ControlSet]
) -> Scores | None:
    """Return the outcomes under attack of real images of a row's clean accuracy.

    They are interpolated, image by image and with the same weights for all images, between the two
    sizes of the control whose clean accuracies lie around the row's.

    Args:
        clean: Clean outcomes of the row (seeds, images).
        seeds: Its seeds; only sets that have them all are used.
        sets: The control at every number of images per class.

    Returns:
        Scores (seeds, images); None where no real subset is as accurate.
    """
    usable = [found for one in sets if (found := one.in_seeds(seeds))]
    usable.sort(key=lambda one: (one.clean.mean(), one.ipc))
    if not usable:
        return None
    wanted = float(clean.mean())
    accuracies = [float(one.clean.mean()) for one in usable]
    slack = TOLERANCE + 1e-9  # what lies at the limit counts, however it is rounded
    if not accuracies[0] - slack <= wanted <= accuracies[-1] + slack:
        return None
    above = int(np.searchsorted(accuracies, wanted))
    if above == 0:
        return usable[0].worst
    if above == len(usable):
        return usable[-1].worst
    low, high = accuracies[above - 1 : above + 1]
    weight = (wanted - low) / (high - low)  # searchsorted: low < wanted <= high
    mixed: Scores = (1 - weight) * usable[above - 1].worst + weight * usable[above].worst
    return mixed
