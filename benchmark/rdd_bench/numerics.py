"""What numbers depend on beside seeds: threads and the precision of products. Set by the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def numerical_settings(threads: int) -> Iterator[None]:
    """Set what numbers depend on, the same in every process, and restore it afterwards.

    Verdicts are made in full float32 precision: TF32 would change some of them.
    """
    before = (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    _set_numerics(threads, matmul_tf32=False, cudnn_tf32=False)
    try:
        yield
    finally:
        _set_numerics(before[0], matmul_tf32=before[1], cudnn_tf32=before[2])


def _set_numerics(threads: int, *, matmul_tf32: bool, cudnn_tf32: bool) -> None:
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32


def warm_up(device: torch.device) -> None:
    """Take one optimiser step: the first one of a process imports seconds of torch."""
    weight = torch.zeros(1, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
