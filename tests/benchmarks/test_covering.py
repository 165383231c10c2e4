"""Minimal covers: time against the number of images, and row generation against the whole program.

Random points of ten dimensions with heavy tails, which are like images in that outliers decide;
points spread evenly are much harder. With RDD_BENCH_DATA also a class of Fashion-MNIST. Run with
``-o addopts= --import-mode=importlib``. ``extra_info`` holds the programs solved and the rows of
the largest.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from rdd_bench.components import Source
from rdd_bench_builtin.datasets.torchvision import FashionMNIST
from rdd_bench_builtin.distillers._cover_program import Effort
from rdd_bench_builtin.distillers._covering import (
    Cover,
    cover_with,
    cover_within,
    distances,
    radius_of,
)

REAL = pytest.mark.skipif(
    "RDD_BENCH_DATA" not in os.environ, reason="RDD_BENCH_DATA names no folder"
)


def random_points(count: int) -> Any:
    return np.random.default_rng(0).standard_t(3, (count, 10)).astype(np.float32)


def fashion(count: int) -> Any:
    train = FashionMNIST().load(Source(Path(os.environ["RDD_BENCH_DATA"]))).train
    return train.of_class(0)[:count].flatten(1).numpy()


SIZES = [
    (random_points, 500),
    (random_points, 1000),
    (random_points, 2000),
    *(pytest.param(fashion, n, marks=[pytest.mark.data, REAL]) for n in (500, 1000, 2000, 6000)),
]


@pytest.mark.parametrize("centres", [10, 50])
@pytest.mark.parametrize(("points", "count"), SIZES)
def test_smallest_radius(benchmark, points, count, centres):
    benchmark.group = f"{centres} centres, {points.__name__}"
    pixels = points(count)
    efforts: list[Effort] = []

    def cover() -> tuple[Any, Cover]:
        efforts.append(Effort())
        matrix = distances(pixels, "l2")
        return matrix, cover_with(matrix, centres, efforts[-1])

    matrix, found = benchmark.pedantic(cover, rounds=1)
    benchmark.extra_info |= {
        "radius": found.radius,
        "proven": found.proven,
        "programs": efforts[-1].programs,
        "rows": efforts[-1].rows,
    }
    assert found.proven
    assert found.radius == radius_of(matrix, found.centres)


def rows_only(matrix: Any, radius: float) -> int:
    cover = cover_within(matrix, radius, Effort())
    assert cover.proven
    return len(cover.centres)


def all_rows(matrix: Any, radius: float) -> int:
    ones = np.ones(len(matrix))
    solved = milp(
        ones,
        integrality=ones,
        bounds=Bounds(0, 1),
        constraints=LinearConstraint((matrix <= radius).astype(float), lb=1),
        options={"mip_rel_gap": 0},
    )
    assert solved.status == 0
    fewest: float = solved.fun
    return round(fewest)


@pytest.mark.parametrize("structure", [rows_only, all_rows])
@pytest.mark.parametrize(
    ("points", "count", "radius"),
    [
        (random_points, 500, 5.0),
        (random_points, 1000, 6.0),
        pytest.param(fashion, 1000, 9.0, marks=[pytest.mark.data, REAL]),
    ],
)
def test_fewest_centres(benchmark, structure, points, count, radius):
    benchmark.group = f"radius {radius}, {count} of {points.__name__}"
    matrix = distances(points(count), "l2")
    expected = rows_only(matrix, radius)
    assert benchmark.pedantic(structure, args=(matrix, radius), rounds=1) == expected
