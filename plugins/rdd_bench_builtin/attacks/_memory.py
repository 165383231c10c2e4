"""Work that neither a budget nor a random draw decides, kept for the call under the next budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rdd_bench.api import Run

Work = TypeVar("Work")


def kept(run: Run, images: Tensor, labels: Tensor, work: Callable[[], Work]) -> Work:
    """Return what ``work`` gave in an earlier call of this run; do it where there was none.

    The memo belongs to one attack on one network. It is believed only if it is about the very same
    images and labels, which a copy of both decides.
    """
    memo = run.memo
    known = "work" in memo and all(
        torch.equal(memo[name], now) for name, now in (("images", images), ("labels", labels))
    )
    if not known:
        memo.update(images=images.clone(), labels=labels.clone(), work=work())
    found: Work = memo["work"]
    return found
