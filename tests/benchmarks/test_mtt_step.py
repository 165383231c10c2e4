"""One iteration of MTT: the adjoint against the unrolled graph, in time and in memory.

Both give the same gradient. The adjoint computes each step of the student twice and keeps the
graph of one step at a time, so what autograd has saved at its peak does not grow with the number
of steps. Run the timings with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.distillers._trajectory_matching import (
    Student,
    draw_steps,
    match_by_adjoint,
    match_by_unrolling,
)

Match = Callable[..., tuple[Tensor, Tensor, Tensor]]
MATCHES: list[Match] = [match_by_adjoint, match_by_unrolling]


def work(ipc: int, steps: int, side: int, width: int, depth: int = 3) -> dict[str, Any]:
    """The field's ConvNet, ten classes of synthetic images, and the steps of a student."""
    spec = DatasetSpec(
        name="noise",
        shape=(3, side, side),
        class_names=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    with seeded(0):
        student = Student(ConvNet.configured({"width": width, "depth": depth}).build(spec))
        start = torch.nn.utils.parameters_to_vector(student.network.parameters()).detach()
        strategy = "color_crop_cutout_flip_scale_rotate"
        return {
            "student": student,
            "start": start,
            "target": start + 0.01 * torch.randn_like(start),
            "images": torch.randn(10 * ipc, *spec.shape),
            "labels": torch.arange(10).repeat_interleave(ipc),
            "step_size": torch.tensor(0.01),
            "steps": draw_steps(steps, 10 * ipc, None, strategy, (side, side)),
        }


class _Saved:
    """A tensor that autograd keeps; it counts as long as it lives."""

    def __init__(self, tensor: Tensor, counter: SavedBytes) -> None:
        self.tensor = tensor
        self.counter = counter
        counter.add(tensor.nbytes)

    def __del__(self) -> None:
        self.counter.add(-self.tensor.nbytes)


class SavedBytes:
    """Counts the bytes of what the graphs made within it keep, and the peak of it."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)

    def of(self, match: Match, case: dict[str, Any]) -> int:
        def pack(tensor: Tensor) -> _Saved:
            return _Saved(tensor, self)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            match(**case)
        return self.peak


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_saved_bytes_do_not_grow_with_the_steps_of_the_adjoint():
    peaks = {
        match: [SavedBytes().of(match, work(1, n, 16, 8, depth=2)) for n in (2, 4, 16)]
        for match in MATCHES
    }
    few, more, many = peaks[match_by_adjoint]
    assert max(few, more, many) < 1.05 * min(few, more, many)  # augmentations differ
    few, more, many = peaks[match_by_unrolling]
    assert more > 1.8 * few
    assert many > 7 * few
    assert peaks[match_by_adjoint][2] < few


def test_the_modes_agree_to_rounding():
    case = work(1, 5, 16, 16, depth=2)
    for ours, base in zip(match_by_adjoint(**case), match_by_unrolling(**case), strict=True):
        assert (ours - base).norm() < 1e-3 * base.norm()


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize(
    ("ipc", "steps", "side", "width", "depth"),
    [(1, 10, 32, 128, 3), (10, 5, 32, 128, 3), (1, 10, 8, 16, 2), (10, 10, 8, 16, 2)],
)
def test_mtt_iteration(benchmark, match, ipc, steps, side, width, depth):
    benchmark.group = f"MTT iteration, IPC {ipc}, {steps} steps, {side}x{side}, width {width}"
    case = work(ipc, steps, side, width, depth)
    benchmark.extra_info["saved_mib"] = round(SavedBytes().of(match, case) / 2**20, 1)
    loss, _, _ = benchmark.pedantic(match, kwargs=case, rounds=3, warmup_rounds=1)
    assert loss.item() == pytest.approx(match_by_adjoint(**case)[0].item(), rel=1e-4)
