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
    Estimate,
    accuracy,
    check_strength,
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


# Strength -------------------------------------------------------------------------------------


def strength(book, strong: str, weak: str, stronger_than=("pgd",), label="pgd"):
    train = book.train(book.distill("dm"), ["1" * len(strong)])
    best = book.attack(train, [strong], "autoattack", stronger_than=list(stronger_than))
    return check_strength(best, [best, book.attack(train, [weak], label)])


def test_a_strong_attack_that_loses_is_flagged_in_words(book):
    (flag,) = strength(book, "1" * 60 + "0" * 40, "1" * 50 + "0" * 50)
    assert flag.name == "weaker-than"
    assert flag.value == pytest.approx(0.1)
    assert "autoattack leaves 10.0 points more than pgd" in flag.message


@pytest.mark.parametrize(
    "outcomes",
    [
        ("1" * 50 + "0" * 50, "1" * 60 + "0" * 40),  # as it should be
        ("1" * 51 + "0" * 49, "1" * 50 + "0" * 50),  # within the noise of draws
        ("0" * 50 + "1" * 50, "1" * 50 + "0" * 50),  # as strong, on other images
    ],
)
def test_a_strong_attack_that_does_not_lose_is_not_flagged(book, outcomes):
    assert strength(book, *outcomes) == []


def test_only_attacks_that_it_names_are_compared(book):
    assert strength(book, "1111", "0000", stronger_than=()) == []
    assert strength(book, "1111", "0000", label="other") == []
