"""Numbers from per-image outcomes. Pure, small, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    """A mean over seeds and images as fractions, its standard deviation over seeds, an interval."""

    mean: float
    std: float
    """Sample standard deviation over seeds; nan for one seed."""
    low: float
    high: float


def estimate(scores: Scores) -> Estimate:
    """Return the mean of scores (seeds, images) with a 95 % confidence interval.

    Two things vary: which images are in the test set, and how training falls out. The half-widths
    of the normal interval over images (of their mean over seeds) and of Student's t interval over
    seeds are combined as independent errors. With few seeds the second is wide, as it should be.
    Scores that are all equal get the Agresti-Coull width, since no variation is no certainty.
    """
    seeds, images = scores.shape
    per_seed, per_image = scores.mean(axis=1), scores.mean(axis=0)
    mean = float(per_image.mean())
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    variance = float(per_image.var()) / images
    if variance < 1e-20:  # not 0: means of equal thirds differ by rounding
        shifted = (images * abs(mean) + z**2 / 2) / (images + z**2)
        variance = max(shifted * (1 - shifted), 0.0) / (images + z**2)
    half_images = z * math.sqrt(variance)
    std, half_seeds = math.nan, 0.0
    if seeds > 1:
        std = float(per_seed.std(ddof=1))
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))
        half_seeds = quantile * std / math.sqrt(seeds)
    half = math.hypot(half_images, half_seeds)
    return Estimate(mean, std, mean - half, mean + half)


def accuracy(scores: Scores) -> Estimate:
    """Return ``estimate`` with the interval cut to what an accuracy can be."""
    e = estimate(scores)
    return Estimate(e.mean, e.std, max(e.low, 0.0), min(e.high, 1.0))


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
