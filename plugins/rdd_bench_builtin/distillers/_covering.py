"""Finite covers of the images of one class: greedy ones, and minimal ones.

A cover of radius r is a choice of the class's own images, the centres, such that every image has
a centre within r. All works on the matrix of distances D, (n, n), and names images by its rows.

* ``cover_within``: the fewest centres for a radius. With A = [D <= r] this is the integer program
  min sum(s) subject to A s >= 1, s binary.
* ``cover_with``: the smallest radius for k centres. The fewest centres for r change only where r
  is one of the distances, so bisection over these is exact.
* ``cover_most``: the same for a share of the images, but by the greedy choice only.

Where few centres cover much, the program of all n images is out of reach. It is solved by row
generation: at first only some images have to be covered; as long as the best choice for them
misses others, some of those are added, far from each other. The optimum for some images is a
lower bound for all, and once it covers all it is the optimum for all.

The programs are in ``_cover_program``. Ties go to the image with the smallest row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rdd_bench_builtin.distillers._cover_program import Effort, cover_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

CoverNorm = Literal["l2", "l1", "linf"]

SLACK = 1e-6
"""How far beyond a radius that is asked for an image may be: distances are rounded to float32."""

COPY = 1e-5
"""In l2, images closer than this are copies: it is above what rounding makes of a zero, and below
any difference of images with 8 bits."""

BLOCK = 256
"""Rows of the distances that are computed at once."""

GAP = 0.5
"""How far from its bound a choice may be where a number of centres is enough, not the fewest."""

ROWS_AT_ONCE = 10
"""Images added to a program that was too small; a tenth of its rows if that is more. Few keep the
programs small: on 6,000 images of Fashion-MNIST all that were missed at once took twice as long."""


@dataclass(frozen=True)
class Cover:
    """Centres, and how good they are."""

    centres: NDArray[np.int64]
    radius: float
    """The largest distance of an image to its nearest centre."""
    bound: float
    """No cover is smaller. A number of centres from ``cover_within``, a radius from
    ``cover_with``."""
    proven: bool
    """Whether this one reaches the bound."""


def distances(points: NDArray[Any], norm: CoverNorm) -> NDArray[np.float32]:
    """Return the distances between the rows of ``points``, (n, n): symmetric, zero for copies."""
    from scipy.spatial.distance import cdist

    points = points.astype(np.float64)
    squares = np.einsum("ij,ij->i", points, points)
    matrix = np.empty((len(points), len(points)), dtype=np.float32)
    for start in range(0, len(points), BLOCK):
        rows, others = slice(start, start + BLOCK), slice(start, len(points))
        if norm == "l2":
            part = squares[rows, None] + squares[None, others] - 2 * points[rows] @ points[others].T
            part[part < COPY**2] = 0
            np.sqrt(part, out=part)
        else:
            metric = {"l1": "cityblock", "linf": "chebyshev"}[norm]
            part = cdist(points[rows], points[others], metric)
        # A matrix product may round (i, j) and (j, i) differently.
        square = part[:, : len(part)]
        square[:] = np.maximum(square, square.T)
        matrix[rows, others] = part
        matrix[others, rows] = part.T
    return matrix


def radius_of(matrix: NDArray[np.float32], centres: NDArray[np.int64], share: float = 1.0) -> float:
    """Return the smallest radius within which a share of the images has a centre."""
    nearest = matrix[centres].min(axis=0)
    return float(np.sort(nearest)[images_in(share, len(matrix)) - 1])


def images_in(share: float, count: int) -> int:
    """Return how many images are at least a share of them, rounding of the product aside."""
    return math.ceil(share * count - 1e-9)


# Covers that are found quickly ------------------------------------------------------------------


def farthest_first(
    matrix: NDArray[np.float32],
    count: int,
    begin: NDArray[np.int64] | None = None,
    beyond: float = -1.0,
) -> NDArray[np.int64]:
    """Return the images of ``begin`` and then, one by one, the one farthest from all before it.

    Without ``begin`` the first is the best single centre. Ends at ``count`` images, or when all
    others are within ``beyond``. None comes twice, and a copy of one only after all others.
    """
    chosen = [int(matrix.max(axis=1).argmin())] if begin is None else begin.tolist()
    nearest = matrix[chosen].min(axis=0)
    nearest[chosen] = -1
    while len(chosen) < min(count, len(matrix)):
        farthest = int(nearest.argmax())
        if nearest[farthest] <= beyond:
            break
        chosen.append(farthest)
        np.minimum(nearest, matrix[farthest], out=nearest)
        nearest[farthest] = -1
    return np.array(chosen, dtype=np.int64)


def greedy(
    near: NDArray[np.bool_], at_most: int, begin: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return ``begin`` and then, one by one, the image near the most that are not yet covered.

    Ends when all are covered, or at ``at_most`` centres. ``near`` is symmetric, (n, n).
    """
    chosen = [] if begin is None else begin.tolist()
    covered = near[chosen].any(axis=0)
    gains = np.count_nonzero(near[~covered], axis=0)
    while len(chosen) < at_most and not covered.all():
        best = int(gains.argmax())
        newly = near[best] & ~covered
        chosen.append(best)
        covered |= newly
        gains -= np.count_nonzero(near[newly], axis=0)
    return np.array(chosen, dtype=np.int64)


def without_spare(near: NDArray[np.bool_], centres: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the centres less those, from the last to the first, that the others make up for."""
    times = np.count_nonzero(near[centres], axis=0)
    kept = []
    for centre in centres[::-1]:
        if (times[near[centre]] > 1).all():
            times -= near[centre]
        else:
            kept.append(centre)
    return np.array(kept[::-1], dtype=np.int64)


def cover_most(matrix: NDArray[np.float32], count: int, share: float) -> NDArray[np.int64]:
    """Return at most ``count`` centres that cover a share of the images, by the greedy choice.

    They belong to the smallest radius that bisection finds. What the greedy choice covers need
    not grow with the radius, so a smaller one may exist.
    """
    best = farthest_first(matrix, count)
    between = matrix[matrix <= radius_of(matrix, best, share)]
    while between.size:
        middle = _median(between)
        centres = greedy(matrix <= middle, count)
        radius = radius_of(matrix, centres, share)
        if radius <= middle:
            best = centres
            between = between[between < radius]
        else:
            between = between[between > middle]
    return best


def _median(values: NDArray[np.float32]) -> np.float32:
    """Return one of the values in the middle; they are reordered, which saves a copy."""
    values.partition(len(values) // 2)
    middle: np.float32 = values[len(values) // 2]
    return middle


# Minimal covers ---------------------------------------------------------------------------------


def cover_within(matrix: NDArray[np.float32], radius: float, effort: Effort) -> Cover:
    """Return a cover of the radius with as few centres as possible."""
    reach = np.float32(radius + SLACK)
    rows = farthest_first(matrix, len(matrix), beyond=float(reach))
    centres, bound, _ = _fewest(matrix, reach, rows, effort)
    return Cover(centres, radius_of(matrix, centres), bound, proven=len(centres) == bound)


def cover_with(matrix: NDArray[np.float32], count: int, effort: Effort) -> Cover:
    """Return a cover of at most ``count`` centres with a radius as small as possible."""
    rows = farthest_first(matrix, count + 1)
    radius = radius_of(matrix, rows[:count])
    centres = without_spare(matrix <= np.float32(radius), rows[:count])
    if count == 1:
        return Cover(centres, radius, radius, proven=True)
    # The count + 1 images in ``rows`` are that far apart, and two of them share a centre. So no
    # radius is below the half of it.
    between = matrix[(matrix >= radius / 2) & (matrix < radius)]
    bound = float(between.min(initial=radius))
    while between.size:
        middle = _median(between)
        found, fewest, rows = _fewest(matrix, middle, rows, effort, enough=count)
        if len(found) <= count:
            centres, radius = found, radius_of(matrix, found)
            between = between[between < radius]
        else:
            between = between[between > middle]
            # From a program that was given up nothing follows, and the bound stays.
            if fewest > count:
                bound = float(between.min(initial=radius))
    return Cover(centres, radius, bound, proven=bound == radius)


def _fewest(
    matrix: NDArray[np.float32],
    radius: np.float32,
    rows: NDArray[np.int64],
    effort: Effort,
    enough: int | None = None,
) -> tuple[NDArray[np.int64], int, NDArray[np.int64]]:
    """Return a small cover, a lower bound for the size of all, and the images that prove it.

    Row generation, beginning with the images in ``rows``. It ends with a cover that is minimal,
    or has ``enough`` centres; when it is sure that none has; or when a program is given up.
    """
    near = matrix <= radius
    best = without_spare(near, greedy(near, len(near)))
    bound, solved = 1, True
    goal = enough or len(best) - 1
    while bound <= goal < len(best) and solved:
        choice, fewest, solved = cover_rows(near[rows], goal, effort, GAP if enough else 0.0)
        bound = max(bound, fewest)
        if choice is None:
            break
        repaired = without_spare(near, greedy(near, len(near), begin=choice))
        best = min(best, repaired, key=len)
        goal = enough or len(best) - 1
        more = max(ROWS_AT_ONCE, len(rows) // 10)
        missed = farthest_first(matrix, len(choice) + more, choice, beyond=float(radius))
        rows = np.concatenate([rows, missed[len(choice) :]])
    return best, bound, rows
