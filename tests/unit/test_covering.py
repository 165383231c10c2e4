"""Covers of point sets: against all choices, against other programs, and known optima."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn.datasets import load_digits

from rdd_bench.components import Source
from rdd_bench_builtin.datasets.torchvision import FashionMNIST
from rdd_bench_builtin.distillers._cover_program import Effort, cover_rows, maximal_columns
from rdd_bench_builtin.distillers._covering import (
    cover_most,
    cover_with,
    cover_within,
    distances,
    farthest_first,
    greedy,
    radius_of,
    without_spare,
)

NORMS = {"l1": 1, "l2": 2, "linf": np.inf}


def naive_distances(points: Any, norm: str) -> Any:
    points = points.astype(np.float64)
    return np.linalg.norm(points[:, None] - points[None], ord=NORMS[norm], axis=2)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    points = (data.data / 16).astype(np.float32)
    return {
        norm: [distances(points[data.target == label], norm) for label in range(10)]
        for norm in ("l2", "linf")
    }


def tiny_sets() -> Iterator[tuple[Any, Any]]:
    """Points on a coarse grid, where many distances are equal and some points coincide."""
    generator = np.random.default_rng(7)
    for trial in range(40):
        points = generator.integers(0, 4, size=(int(generator.integers(2, 10)), 2)) / 4
        yield points.astype(np.float32), list(NORMS)[trial % 3]


def best_radius(matrix: Any, count: int) -> float:
    choices = itertools.combinations(range(len(matrix)), min(count, len(matrix)))
    return min(float(matrix[list(choice)].min(axis=0).max()) for choice in choices)


def smallest_size(near: Any) -> int:
    for size in range(1, len(near) + 1):
        for choice in itertools.combinations(range(len(near)), size):
            if near[list(choice)].any(axis=0).all():
                return size
    raise AssertionError("all points cover all points")


def one_or_two(size: int, chance: float) -> Any:
    """Distances of 1 and 2 at random: whatever they are, they keep the triangle inequality."""
    upper = np.triu(np.random.default_rng(0).random((size, size)) < chance, 1)
    matrix = np.where(upper | upper.T, 1, 2).astype(np.float32)
    np.fill_diagonal(matrix, 0)
    return matrix


def whole_program(near: Any) -> int:
    """The integer program of all rows at once."""
    ones = np.ones(len(near))
    solved = milp(
        ones,
        integrality=ones,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(near.astype(float), lb=1),
        options={"mip_rel_gap": 0},
    )
    assert solved.status == 0
    fewest: float = solved.fun
    return round(fewest)


# Distances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_distances_are_those_of_the_definition_across_blocks(norm):
    points = np.random.default_rng(0).random((300, 5)).astype(np.float32)
    points[290] = points[3]
    matrix = distances(points, norm)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, naive_distances(points, norm), rtol=1e-6, atol=1e-7)
    assert (matrix == matrix.T).all()
    assert not matrix.diagonal().any()
    assert matrix[3, 290] == 0


def test_the_smallest_step_of_eight_bits_is_no_copy():
    points = np.full((2, 3072), 1, dtype=np.float32)
    points[1, 0] = 254 / 255
    assert distances(points, "l2")[0, 1] == pytest.approx(1 / 255, rel=1e-5)


def test_the_radius_of_a_share_leaves_the_farthest_out():
    line = distances(np.arange(10, dtype=np.float32)[:, None], "l2")
    centres = np.array([0])
    assert radius_of(line, centres) == 9
    assert radius_of(line, centres, 0.9) == 8
    assert radius_of(line, centres, 0.7) == 6  # 0.7 * 10 is a little more than 7 in floating point
    assert radius_of(line, centres, 0.01) == 0


# Against all choices --------------------------------------------------------------------------


def test_both_ways_find_the_best_of_all_choices():
    for points, norm in tiny_sets():
        matrix = distances(points, norm)
        for count in range(1, len(points) + 1):
            cover = cover_with(matrix, count, Effort())
            assert cover.proven
            assert cover.radius == cover.bound == best_radius(matrix, count)
            assert cover.radius == radius_of(matrix, cover.centres)
            assert len(set(cover.centres.tolist())) == len(cover.centres) <= count
        for radius in (0.0, 0.25, 0.5, 0.75):
            cover = cover_within(matrix, radius, Effort())
            assert cover.proven
            assert len(cover.centres) == cover.bound == smallest_size(matrix <= radius + 1e-6)
            assert matrix[cover.centres].min(axis=0).max() <= radius + 1e-6


def test_the_program_of_some_rows_finds_the_best_of_all_choices():
    generator = np.random.default_rng(1)
    for _ in range(20):
        needs = generator.random((6, 8)) < 0.35
        needs[np.arange(6), generator.integers(0, 8, 6)] = True
        best = next(
            size
            for size in range(1, 7)
            if any(
                needs[:, list(choice)].any(axis=1).all()
                for choice in itertools.combinations(range(8), size)
            )
        )
        columns, fewest, solved = cover_rows(needs, 6, Effort())
        assert columns is not None
        assert (len(columns), fewest, solved) == (best, best, True)
        assert needs[:, columns].any(axis=1).all()
        assert cover_rows(needs, best - 1, Effort()) == (None, best, True)


def test_maximal_columns_are_those_that_no_other_contains():
    generator = np.random.default_rng(2)
    needs = generator.random((5, 700)) < 0.3  # of 32 patterns, so most come many times
    wide = generator.random((12, 700)) < 0.5
    for table in (needs, wide):
        sets = [frozenset(column.nonzero()[0].tolist()) for column in table.T]
        first = {pattern: sets.index(pattern) for pattern in set(sets)}
        expected = [i for s, i in first.items() if not any(s < other for other in first)]
        assert maximal_columns(table).tolist() == sorted(expected)


# Known optima ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "radius", "optimum"),
    [
        ("l2", 1.0, 1206), ("l2", 1.25, 617), ("l2", 1.5, 285), ("l2", 2.0, 72),
        ("linf", 0.5, 531), ("linf", 0.625, 209), ("linf", 0.75, 82), ("linf", 0.875, 39),
    ],
)  # fmt: skip
def test_the_optima_of_the_digits(digits, norm, radius, optimum):
    quick, found = 0, 0
    for matrix in digits[norm]:
        cover = cover_within(matrix, radius, Effort())
        assert cover.proven
        assert (matrix[cover.centres] <= radius).any(axis=0).all()
        quick += len(greedy(matrix <= radius, len(matrix)))
        found += len(cover.centres)
    assert found == optimum
    assert found < quick  # the greedy choice is 0.6 to 26 % larger


@pytest.mark.parametrize(("label", "count"), [(0, 3), (1, 10), (6, 10)])
def test_row_generation_agrees_with_the_whole_program_over_all_distances(digits, label, count):
    matrix = digits["l2"][label]
    candidates = np.unique(matrix)
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if whole_program(matrix <= candidates[middle]) <= count:
            high = middle
        else:
            low = middle + 1
    cover = cover_with(matrix, count, Effort())
    assert cover.proven
    assert cover.radius == candidates[high]


def test_one_centre_is_the_one_whose_farthest_image_is_nearest(digits):
    for matrix in digits["l2"]:
        cover = cover_with(matrix, 1, Effort())
        assert cover.centres.tolist() == [int(matrix.max(axis=1).argmin())]
        assert cover.radius == cover.bound == matrix.max(axis=1).min()
        assert cover.proven


def test_the_radius_falls_with_the_number_of_centres_and_other_choices_are_worse(digits):
    matrix = digits["l2"][3]
    before = math.inf
    for count in (1, 2, 3, 5, 8, 13, 21, 40):
        exact = cover_with(matrix, count, Effort()).radius
        spread = radius_of(matrix, farthest_first(matrix, count))
        quick = radius_of(matrix, cover_most(matrix, count, 1.0))
        assert exact < before
        assert exact <= quick
        assert exact <= spread <= 2 * exact
        before = exact


@pytest.mark.data
@pytest.mark.skipif("RDD_BENCH_DATA" not in os.environ, reason="RDD_BENCH_DATA names no folder")
def test_the_radii_of_fashion_mnist():
    train = FashionMNIST().load(Source(Path(os.environ["RDD_BENCH_DATA"]))).train
    matrix = distances(train.of_class(0).flatten(1).numpy(), "l2")
    for count, radius in ((10, 10.22), (50, 8.35)):
        cover = cover_with(matrix, count, Effort())
        assert cover.proven
        assert cover.radius == pytest.approx(radius, abs=0.005)
        assert (matrix[cover.centres] <= cover.radius).any(axis=0).all()


# Copies and ties ------------------------------------------------------------------------------


def test_copies_are_chosen_after_all_others():
    points = np.array([0, 0, 0, 5, 5, 9], dtype=np.float32)[:, None]
    matrix = distances(points, "l2")
    order = farthest_first(matrix, 6).tolist()
    assert sorted(order) == [0, 1, 2, 3, 4, 5]
    assert sorted(points[order[:3], 0].tolist()) == [0, 5, 9]
    for count, distinct in ((2, 2), (3, 3), (5, 3)):
        cover = cover_with(matrix, count, Effort())
        assert len({float(points[i, 0]) for i in cover.centres}) == len(cover.centres) == distinct


def test_ties_go_to_the_first():
    matrix = np.ones((5, 5), dtype=np.float32) - np.eye(5, dtype=np.float32)
    assert farthest_first(matrix, 3).tolist() == [0, 1, 2]
    assert greedy(matrix < 1, 5).tolist() == [0, 1, 2, 3, 4]
    assert cover_with(matrix, 1, Effort()).centres.tolist() == [0]
    assert cover_within(matrix, 1, Effort()).centres.tolist() == [0]


def test_the_same_cover_every_time(digits):
    for matrix in digits["linf"][:3]:
        first, second = (cover_with(matrix, 7, Effort()).centres.tolist() for _ in range(2))
        assert first == second


def test_no_centre_that_is_kept_can_be_spared(digits):
    near = digits["l2"][1] <= 1.5
    kept = without_spare(near, np.arange(len(near)))
    assert near[kept].any(axis=0).all()
    for centre in kept:
        assert not near[kept[kept != centre]].any(axis=0).all()


# Limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", [{"node_limit": 1}, {"time_limit": 1e-9}])
def test_a_program_that_is_given_up_leaves_a_cover_and_a_bound(effort):
    matrix = one_or_two(60, 0.1)
    optimum = 11
    cover = cover_within(matrix, 1, Effort(**effort))
    assert (matrix[cover.centres] <= 1).any(axis=0).all()
    assert cover.bound <= optimum <= len(cover.centres)
    assert not cover.proven


def test_the_optimum_that_was_given_up_for():
    cover = cover_within(one_or_two(60, 0.1), 1, Effort())
    assert len(cover.centres) == 11
    assert cover.proven


def test_a_radius_that_was_given_up_is_not_taken_for_impossible():
    matrix = one_or_two(60, 0.1)
    given_up = cover_with(matrix, 11, Effort(time_limit=1e-9))
    assert (given_up.radius, given_up.bound, given_up.proven) == (2, 1, False)
    solved = cover_with(matrix, 11, Effort())
    assert (solved.radius, solved.bound, solved.proven) == (1, 1, True)


def test_the_effort_is_counted(digits):
    effort = Effort()
    cover_with(digits["l2"][1], 10, effort)
    assert effort.programs > 1
    assert 11 <= effort.rows < len(digits["l2"][1])


# A share --------------------------------------------------------------------------------------


def test_one_greedy_centre_of_a_share_is_the_best(digits):
    for matrix in digits["l2"]:
        need = math.ceil(0.8 * len(matrix))
        centre = cover_most(matrix, 1, 0.8)
        assert radius_of(matrix, centre, 0.8) == np.sort(matrix, axis=1)[:, need - 1].min()


def test_a_share_ignores_the_outlier_that_a_whole_cover_serves():
    points = np.append(np.linspace(0, 1, 19), 50).astype(np.float32)[:, None]
    matrix = distances(points, "l2")
    whole = cover_with(matrix, 2, Effort())
    most = cover_most(matrix, 2, 0.95)
    assert 19 in whole.centres
    assert 19 not in most
    assert radius_of(matrix, most, 0.95) < whole.radius


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_share_is_covered_by_no_more_centres_than_asked_for(digits, share):
    for matrix in digits["linf"]:
        centres = cover_most(matrix, 6, share)
        radius = radius_of(matrix, centres, share)
        assert len(set(centres.tolist())) == len(centres) <= 6
        assert (matrix[centres].min(axis=0) <= radius).mean() >= share
