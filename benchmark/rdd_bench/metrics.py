"""Numbers from per-image outcomes. Pure, small, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rdd_bench.outcomes import Outcomes

Scores = NDArray[np.floating]
"""(seeds, images): how right each image is, usually 0 or 1, or an average over networks."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and images as fractions, standard deviations over seeds, an interval."""

    mean: float
    std: float
    """Sample standard deviation over all seeds; nan for one seed."""
    low: float
    high: float
    std_train: float = math.nan
    """Over training seeds, pooled within the distillation seeds; nan where none has two."""
    std_draw: float = math.nan
    """Of the means of the distillation seeds; nan for one. It holds the luck of training too: the
    variance over training seeds, divided by their number."""


def estimate(scores: Scores, draws: Sequence[int] | None = None) -> Estimate:
    """Return the mean of scores (seeds, images) with a 95 % confidence interval.

    Two things vary: which images are in the test set, and how distillation and training fall out.
    The half-widths of the normal interval over images (of their mean over seeds) and of Student's t
    interval over seeds are combined as independent errors. With few seeds the second is wide, as it
    should be. Networks trained on one distilled set share its luck, so where there are several
    sets, their means are what the second interval counts; one set says nothing about others.
    Scores that are all equal get the Agresti-Coull width, since no variation is no certainty.

    Args:
        scores: How right each image is, by seed.
        draws: The distillation seed of each row of ``scores``; None where there is one.
    """
    seeds, images = scores.shape
    of_draw = np.zeros(seeds, dtype=int) if draws is None else np.asarray(draws)
    sets = [scores[of_draw == draw] for draw in np.unique(of_draw)]
    per_image = np.mean([scores_of_set.mean(axis=0) for scores_of_set in sets], axis=0)
    mean = float(per_image.mean())
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    variance = float(per_image.var()) / images
    if variance < 1e-20:  # not 0: means of equal thirds differ by rounding
        shifted = (images * abs(mean) + z**2 / 2) / (images + z**2)
        variance = max(shifted * (1 - shifted), 0.0) / (images + z**2)
    half_images = z * math.sqrt(variance)
    per_seed = scores.mean(axis=1)
    per_set = np.array([scores_of_set.mean() for scores_of_set in sets])
    units = per_seed if len(sets) == 1 else per_set
    half_seeds = 0.0
    if len(units) > 1:
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(units) - 1))
        half_seeds = quantile * _std(units) / math.sqrt(len(units))
    half = math.hypot(half_images, half_seeds)
    return Estimate(
        mean=mean,
        std=_std(per_seed),
        low=mean - half,
        high=mean + half,
        std_train=_pooled_std([scores_of_set.mean(axis=1) for scores_of_set in sets]),
        std_draw=_std(per_set),
    )


def _std(values: Scores) -> float:
    """Return the sample standard deviation; nan for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _pooled_std(groups: Sequence[Scores]) -> float:
    """Return the standard deviation within groups; nan where no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.nan
    return math.sqrt(sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / freedom)


def accuracy(scores: Scores, draws: Sequence[int] | None = None) -> Estimate:
    """Return ``estimate`` with the interval cut to what an accuracy can be."""
    e = estimate(scores, draws)
    return replace(e, low=max(e.low, 0.0), high=min(e.high, 1.0))


def stack(bitmaps: Sequence[Outcomes]) -> Scores:
    """Return bitmaps of several seeds as scores (seeds, images)."""
    return np.stack(list(bitmaps)).astype(float)


def worst_case(attacks: Sequence[Sequence[Outcomes]]) -> list[Outcomes]:
    """Return, for each seed, the images that stay right under every one of the attacks.

    Adding an attack can only lower it, and adding one that breaks nothing new changes nothing.

    Args:
        attacks: For each attack the bitmaps of the seeds, in one order of seeds.
    """
    return [np.logical_and.reduce(bitmaps) for bitmaps in zip(*attacks, strict=True)]


def worst_case_accuracy(attacks: Mapping[str, Outcomes]) -> float:
    """Return the share of outcomes (seeds, images) that stay right under every attack."""
    return float(stack(worst_case([list(bitmaps) for bitmaps in attacks.values()])).mean())


RANKING_METRICS: Sequence[Callable[[Mapping[str, Outcomes]], float]] = (worst_case_accuracy,)
"""What may rank a table, from the outcomes (seeds, images) under each attack. A metric that is
listed is held to it by tests: it lies in [0, 1], no image that turns right lowers it, and an attack
that breaks nothing new changes nothing."""


def rank_intervals(estimates: Sequence[Estimate]) -> list[tuple[int, int]]:
    """Return for each row the best and the worst rank that the intervals leave open, from 1.

    A row is surely behind another only where the intervals do not overlap.
    """
    ranks = []
    for mine in estimates:
        ahead = sum(other.low > mine.high for other in estimates)
        behind = sum(other.high < mine.low for other in estimates)
        ranks.append((1 + ahead, len(estimates) - behind))
    return ranks


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a fraction (Clopper and Pearson 1934).

    It covers the fraction for one network over images drawn at random; not the luck of training.
    """
    if not trials:
        return 0.0, 1.0
    tail = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1
    return float(low), float(high)
