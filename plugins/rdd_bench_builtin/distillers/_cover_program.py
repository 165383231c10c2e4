"""The integer program of covering: few columns of a table that cover all of its rows.

It goes to HiGHS by way of SciPy, on one thread, and with the same nodes every time.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 256
"""Columns that are compared with others at once."""


@dataclass
class Effort:
    """What the solver may spend on one class, and what it has spent."""

    node_limit: int = 100
    """Nodes of branch and bound in one program. Once one was given up, those after it get a
    single node: nothing can be proven any more, and the hard ones come in series."""
    time_limit: float = math.inf
    """Seconds for all programs together. What is found then depends on the machine."""
    programs: int = 0
    """Programs solved so far."""
    rows: int = 0
    """Images in the largest of them."""
    given_up: bool = False
    """Whether one of them took too long."""
    _started: float = field(default_factory=time.monotonic)

    def options(self) -> dict[str, float]:
        """Return the options of HiGHS for the next program."""
        nodes = 1 if self.given_up else self.node_limit
        options: dict[str, float] = {"node_limit": nodes}
        if math.isfinite(self.time_limit):
            left = self.time_limit - (time.monotonic() - self._started)
            options["time_limit"] = max(left, 0)
        return options


def cover_rows(
    needs: NDArray[np.bool_], at_most: int, effort: Effort, gap: float = 0.0
) -> tuple[NDArray[np.int64] | None, int, bool]:
    """Return few columns that cover all rows of ``needs``, if ``at_most`` are enough.

    Args:
        needs: Which column covers which row, (r, n).
        at_most: Columns that there may be.
        effort: What may be spent; it is added to.
        gap: The search ends when the columns are at most this share above their lower bound.

    Returns:
        The columns, or None; a lower bound for their number; whether the search came to its end.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    columns = maximal_columns(needs)
    ones = np.ones(len(columns))
    result = milp(
        ones,
        integrality=ones,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(csr_array(needs[:, columns].astype(np.float64)), lb=1),
            LinearConstraint(ones, ub=at_most),
        ],
        options=effort.options() | {"mip_rel_gap": gap},
    )
    effort.programs += 1
    effort.rows = max(effort.rows, len(needs))
    solved, infeasible = result.status == 0, result.status == 2
    if infeasible:
        return None, at_most + 1, True
    effort.given_up |= not solved
    # One that was given up may have no choice, and no bound or an infinite one.
    bound = result.mip_dual_bound
    fewest = math.ceil(bound - 1e-6) if bound is not None and math.isfinite(bound) else 1
    return None if result.x is None else columns[result.x > 0.5], max(fewest, 1), solved


def maximal_columns(needs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the columns that cover what no other covers as well; of equal ones the first.

    Few are left, and without the others HiGHS is several times as fast.
    """
    packed = np.ascontiguousarray(np.packbits(needs, axis=0).T)
    _, columns = np.unique(packed, axis=0, return_index=True)
    sizes = np.count_nonzero(needs[:, columns], axis=0)
    # From large to small: whatever contains a column comes before it, or with it.
    order = np.lexsort((columns, -sizes))
    columns, sizes = columns[order], sizes[order]
    patterns = needs[:, columns].T.astype(np.float32)
    kept = np.empty(0, dtype=np.int64)
    for start in range(0, len(columns), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(columns)))
        shared = patterns[block] @ patterns[np.concatenate([kept, block])].T
        alone = np.count_nonzero(shared == sizes[block, None], axis=1) == 1
        kept = np.concatenate([kept, block[alone]])
    return np.sort(columns[kept])
