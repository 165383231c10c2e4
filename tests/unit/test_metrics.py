"""Numbers from outcomes, against arithmetic done by hand and against properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rdd_bench.metrics import (
    RANKING_METRICS,
    Estimate,
    accuracy,
    binomial_interval,
    estimate,
    rank_intervals,
    stack,
    worst_case,
)

sizes = st.tuples(st.integers(1, 3), st.integers(1, 12))
bitmaps = sizes.flatmap(lambda shape: arrays(bool, shape))
attacks = sizes.flatmap(lambda shape: st.lists(arrays(bool, shape), min_size=1, max_size=4))


def bits(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


# Worst case -----------------------------------------------------------------------------------


def test_the_worst_case_is_taken_image_by_image():
    worst = worst_case([[bits("1100"), bits("1111")], [bits("1010"), bits("0111")]])
    assert [w.tolist() for w in worst] == [bits("1000").tolist(), bits("0111").tolist()]


@given(attacks, st.data())
def test_another_attack_never_raises_the_worst_case(found, data):
    more = data.draw(arrays(bool, found[0].shape))
    before, after = worst_case(found), worst_case([*found, more])
    assert all((late <= early).all() for early, late in zip(before, after, strict=True))
    assert all((late <= new).all() for late, new in zip(after, more, strict=True))


@given(attacks, st.data())
def test_an_attack_that_breaks_nothing_new_changes_nothing(found, data):
    weaker = data.draw(arrays(bool, found[0].shape)) | np.stack(worst_case(found))
    before, after = worst_case(found), worst_case([*found, weaker])
    assert np.array_equal(np.stack(before), np.stack(after))


@given(attacks)
def test_the_order_of_attacks_does_not_matter(found):
    assert np.array_equal(np.stack(worst_case(found)), np.stack(worst_case(found[::-1])))


# What may rank --------------------------------------------------------------------------------


def all_attacks(found: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"attack-{number}": bitmaps for number, bitmaps in enumerate(found)}


ranking = pytest.mark.parametrize("metric", RANKING_METRICS, ids=lambda m: m.__name__)


@ranking
@given(found=attacks)
def test_what_ranks_is_a_fraction(metric, found):
    assert 0 <= metric(all_attacks(found)) <= 1


@ranking
@given(found=attacks, data=st.data())
def test_no_image_that_turns_right_lowers_what_ranks(metric, found, data):
    which = data.draw(st.integers(0, len(found) - 1))
    turned = data.draw(arrays(bool, found[0].shape))
    better = [*found[:which], found[which] | turned, *found[which + 1 :]]
    assert metric(all_attacks(better)) >= metric(all_attacks(found))


@ranking
@given(found=attacks, data=st.data())
def test_a_dominated_attack_does_not_change_what_ranks(metric, found, data):
    which = data.draw(st.integers(0, len(found) - 1))
    weaker = found[which] | data.draw(arrays(bool, found[0].shape))
    assert metric(all_attacks([*found, weaker])) == metric(all_attacks(found))


# Estimates ------------------------------------------------------------------------------------


def test_one_seed_has_the_normal_interval_over_images():
    scores = np.array([[1.0] * 80 + [0.0] * 20])
    e = estimate(scores)
    half = 1.959963984540054 * math.sqrt(0.8 * 0.2 / 100)
    assert e.mean == pytest.approx(0.8)
    assert (e.low, e.high) == pytest.approx((0.8 - half, 0.8 + half))
    assert math.isnan(e.std)


def test_seeds_add_their_own_interval():
    """Two seeds with 3 and 1 of 4 images right; worked out by hand."""
    e = estimate(np.array([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=float))
    assert e.mean == 0.5
    assert e.std == pytest.approx(math.sqrt(0.125))  # of 0.75 and 0.25
    over_images = 1.959963984540054 * math.sqrt(0.125 / 4)  # image means 1, .5, .5, 0
    over_seeds = 12.706204736 * math.sqrt(0.125) / math.sqrt(2)  # Student's t, one degree
    half = math.hypot(over_images, over_seeds)
    assert e.low == pytest.approx(0.5 - half)
    assert e.high == pytest.approx(0.5 + half)


def test_the_interval_over_seeds_is_students():
    scores = np.array([[1.0] * 9 + [0.0], [1.0] * 7 + [0.0] * 3, [1.0] * 8 + [0.0] * 2])
    e = estimate(np.repeat(scores, 10_000, axis=1))  # so many images that only seeds matter
    expected = stats.t.interval(0.95, 2, loc=0.8, scale=stats.sem([0.9, 0.7, 0.8]))
    assert (e.low, e.high) == pytest.approx(expected, abs=1e-3)


def test_more_seeds_and_more_images_make_it_narrower():
    generator = np.random.default_rng(0)
    scores = (generator.random((4, 400)) < 0.6).astype(float)
    few, more = accuracy(scores[:, :100]), accuracy(scores)
    assert more.high - more.low < few.high - few.low
    two = accuracy(scores[:2])
    assert more.high - more.low < two.high - two.low


@given(bitmaps)
def test_the_interval_of_an_accuracy_holds_its_mean_and_nothing_impossible(outcomes):
    e = accuracy(stack(list(outcomes)))
    assert 0 <= e.low <= e.mean <= e.high <= 1
    assert e.low < e.high


@pytest.mark.parametrize("score", [0.0, 1.0, 1 / 3, 2 / 3, 7 / 9])
@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_that_are_all_equal_are_no_certainty(score, seeds):
    """Also where averages over architectures are equal but for rounding."""
    for images in (10, 500):
        e = accuracy(np.full((seeds, images), score))
        assert e.high - e.low > 0.5 / images


@given(sizes.flatmap(lambda shape: arrays(float, shape, elements=st.floats(-1, 1))))
def test_differences_are_estimated_too(scores):
    e = estimate(scores)
    assert e.low <= e.mean <= e.high
    mirrored = estimate(-scores)
    assert mirrored.mean == pytest.approx(-e.mean, abs=1e-12)
    assert mirrored.high == pytest.approx(-e.low, abs=1e-9)


# Distillation seeds ---------------------------------------------------------------------------


def test_spread_is_split_into_training_and_sets():
    """Two sets with three networks each; percentages of 10 images right, by hand."""
    right = np.array([6, 7, 8, 2, 4, 6])
    scores = (np.arange(10) < right[:, None]).astype(float)
    e = estimate(scores, [0, 0, 0, 1, 1, 1])
    assert e.mean == pytest.approx(0.55)
    assert e.std == pytest.approx(np.std(right / 10, ddof=1))
    assert e.std_train == pytest.approx(math.sqrt((0.01 + 0.04) / 2))  # variances within sets
    assert e.std_draw == pytest.approx(0.3 / math.sqrt(2))  # of 0.7 and 0.4
    over_images = 1.959963984540054 * scores.mean(axis=0).std() / math.sqrt(10)
    over_sets = 12.706204736 * 0.3 / 2  # Student's t, one degree
    assert e.high - e.mean == pytest.approx(math.hypot(over_images, over_sets))


def test_one_set_is_as_without_sets():
    scores = np.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    one, without = estimate(scores, [3, 3, 3]), estimate(scores)
    assert one == without
    assert one.std_train == pytest.approx(one.std)
    assert math.isnan(one.std_draw)


def test_one_network_a_set_has_no_spread_of_training():
    scores = np.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    e = estimate(scores, [0, 1, 2])
    assert math.isnan(e.std_train)
    assert e.std_draw == pytest.approx(e.std)
    assert (e.low, e.high) == (estimate(scores).low, estimate(scores).high)


def test_sets_are_units_and_their_interval_covers():
    """Sets vary by 5 points, training by 2: the mean over methods' sets is covered in 95 %."""
    generator = np.random.default_rng(0)
    draws = np.repeat(np.arange(4), 5)
    covered, naive = 0, 0
    for _ in range(400):
        luck = generator.normal(0, 0.05, 4)[draws] + generator.normal(0, 0.02, 20)
        scores = (0.5 + luck)[:, None] + generator.normal(0, 0.2, 300)
        of_sets, of_seeds = estimate(scores, draws.tolist()), estimate(scores)
        covered += of_sets.low <= 0.5 <= of_sets.high
        naive += of_seeds.low <= 0.5 <= of_seeds.high
    assert covered / 400 == pytest.approx(0.96, abs=0.03)
    assert naive / 400 < 0.85  # twenty networks are not twenty sets


@given(bitmaps, st.data())
def test_the_order_of_seeds_does_not_matter(outcomes, data):
    scores = stack(list(outcomes))
    draws = data.draw(st.lists(st.integers(0, 2), min_size=len(scores), max_size=len(scores)))
    there, back = estimate(scores, draws), estimate(scores[::-1], draws[::-1])
    for name in ("mean", "std", "low", "high", "std_train", "std_draw"):
        assert getattr(there, name) == pytest.approx(getattr(back, name), nan_ok=True)


@pytest.mark.parametrize("right", [0, 3, 10])
def test_the_binomial_interval_leaves_a_fortieth_on_each_side(right):
    """What defines the interval of Clopper and Pearson; at the ends there is nothing beyond."""
    low, high = binomial_interval(right, 10)
    assert stats.binom.sf(right - 1, 10, low) == pytest.approx(0.025 if right else 1)
    assert stats.binom.cdf(right, 10, high) == pytest.approx(0.025 if right < 10 else 1)


# Ranks ----------------------------------------------------------------------------------------


def around(mean: float, half: float) -> Estimate:
    return Estimate(mean, math.nan, mean - half, mean + half)


intervals = st.lists(
    st.builds(around, st.floats(0, 1), st.floats(0, 0.3)), min_size=1, max_size=8
)  # fmt: skip


@given(intervals)
def test_a_rank_holds_the_position_by_mean(estimates):
    ordered = sorted(estimates, key=lambda e: -e.mean)
    for position, (best, worst) in enumerate(rank_intervals(ordered), start=1):
        assert 1 <= best <= position <= worst <= len(ordered)


@given(intervals)
def test_a_row_is_ahead_for_sure_only_where_intervals_are_apart(estimates):
    ranks = rank_intervals(estimates)
    for mine, (best, worst) in zip(estimates, ranks, strict=True):
        for other, (their_best, their_worst) in zip(estimates, ranks, strict=True):
            if mine.low > other.high:
                assert best < their_best
                assert worst < their_worst
            elif mine.low <= other.high and other.low <= mine.high:  # they may change places
                assert best <= their_worst
                assert their_best <= worst


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8, unique=True))
def test_rows_that_are_apart_have_ranks_of_their_own(means):
    ranks = rank_intervals([around(mean, 0.4) for mean in means])
    ordered = sorted(means, reverse=True)
    assert ranks == [(ordered.index(m) + 1, ordered.index(m) + 1) for m in means]


@given(st.integers(1, 8))
def test_rows_that_all_overlap_share_every_rank(count):
    assert rank_intervals([around(0.5, 0.1)] * count) == [(1, count)] * count


def test_touching_intervals_overlap():
    assert rank_intervals([Estimate(3, 0, 2, 4), Estimate(1, 0, 0, 2)]) == [(1, 2), (1, 2)]
