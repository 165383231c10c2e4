"""Two rows of one table, image by image: which is better, and could it be chance?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rdd_bench.metrics import CONFIDENCE, Estimate, Scores, estimate
from rdd_bench.rows import Row, Seed, Threat
from rdd_bench.standings import Table

RESAMPLES = 10_000
SEED = 0
"""Of the bootstrap, so that the same records give the same interval."""
BLOCK = 1_000_000
"""Outcomes that the bootstrap holds at once, for the sake of memory."""
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class McNemar:
    """The exact test of McNemar (1947), of every pair of networks by itself.

    The outcomes of one image on several networks are not independent, so images are never pooled
    over networks. Each pair (one architecture, one seed) gets a test of its own, and the median of
    their p-values sums them up: twice the median is a p-value of them all, however they depend on
    each other (Meinshausen, Meier and Buehlmann 2009).
    """

    only_first: int
    """Outcomes that only the first row has right, summed over the networks."""
    only_second: int
    median_p: float
    """Two-sided, of a single pair of networks."""
    significant: int
    """How many pairs have p < 0.05."""
    networks: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The first row minus the second, as fractions."""

    estimate: Estimate
    """With the interval of the table's gain: Student's t over seeds."""
    bootstrap: tuple[float, float]
    """95 % interval of ``bootstrap_interval``."""
    mcnemar: McNemar


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two rows under one ranked threat, in the seeds that both have."""

    seeds: list[Seed]
    clean: Difference
    worst: Difference


def compare(table: Table, threat: Threat, first: Row, second: Row) -> Comparison | None:
    """Compare two rows; None where one lacks a result or they share no seed."""
    names, attacks = table.architectures, table.ranking_attacks(threat)
    if not all(row.has(names, attacks, threat) for row in (first, second)):
        return None
    theirs = set(second.seeds(names[0]))
    seeds = [seed for seed in first.seeds(names[0]) if seed in theirs]
    if not seeds:
        return None

    def clean(row: Row, name: str) -> Scores:
        return row.clean(name)[[row.seeds(name).index(seed) for seed in seeds]]

    def worst(row: Row, name: str) -> Scores:
        scores = row.robust(name, attacks, threat)
        return scores[[row.seeds(name).index(seed) for seed in seeds]]

    draws = [draw for draw, _ in seeds]
    of_clean, of_worst = (
        difference([scores(first, n) for n in names], [scores(second, n) for n in names], draws)
        for scores in (clean, worst)
    )
    return Comparison(seeds, of_clean, of_worst)


def difference(
    first: Sequence[Scores], second: Sequence[Scores], draws: Sequence[int]
) -> Difference:
    """Compare outcomes of two rows on the same images.

    Args:
        first: Of each architecture the outcomes (seeds, images), 0 or 1.
        second: The same of the other row, in the same seeds.
        draws: The distillation seed of each of the seeds.
    """
    apart: Scores = np.mean([a - b for a, b in zip(first, second, strict=True)], axis=0)
    pairs = [
        (int((a > b).sum()), int((b > a).sum()))
        for mine, theirs in zip(first, second, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    ps = [mcnemar_p(b, c) for b, c in pairs]
    test = McNemar(
        only_first=sum(b for b, _ in pairs),
        only_second=sum(c for _, c in pairs),
        median_p=float(np.median(ps)),
        significant=sum(p < SIGNIFICANT for p in ps),
        networks=len(ps),
    )
    return Difference(estimate(apart, draws), bootstrap_interval(apart, draws), test)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of McNemar's test.

    If two networks are as good as each other, each image that only one has right is as likely to
    be either's: the count is binomial with probability 1/2.
    """
    fewer = min(only_first, only_second)
    return min(1.0, 2 * float(stats.binom.cdf(fewer, only_first + only_second, 0.5)))


def bootstrap_interval(scores: Scores, draws: Sequence[int] | None = None) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean, by resampling seeds and images.

    Rows and columns are resampled independently; where there are several distilled sets, whole
    sets are. With few seeds it is too narrow (three values can vary by sqrt(2/3) of what they
    should), which Student's t interval corrects for.

    Args:
        scores: Differences (seeds, images).
        draws: The distillation seed of each row; None where there is one.
    """
    of_draw = np.zeros(len(scores), dtype=int) if draws is None else np.asarray(draws)
    sets = [scores[of_draw == draw] for draw in np.unique(of_draw)]
    units = scores if len(sets) == 1 else np.array([one.mean(axis=0) for one in sets])
    generator = np.random.default_rng(SEED)
    count, images = units.shape
    block = max(1, BLOCK // images)
    means = []
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        weights = generator.multinomial(count, [1 / count] * count, size=size) / count
        columns = generator.integers(images, size=(size, images), dtype=np.int32)
        means.append(np.take_along_axis(weights @ units, columns, axis=1).mean(axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
