"""One iteration of DM: ours against the structure of the authors' program, on the same work.

Theirs takes the classes one by one: 2 k passes forward and one backward through k graphs. Theirs
freezes the network, so that no graph of the real side is made; programs that forget to do so pay
for one that is thrown away, the third row. Run with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.augment import Transform, draw
from rdd_bench.components import Run
from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.distillers.dm import match

CLASSES = 10


def work(ipc: int, batch_real: int, side: int, width: int) -> tuple[nn.Module, Any, Tensor, Any]:
    """The field's ConvNet, real and synthetic images, and an augmentation for every class."""
    spec = DatasetSpec(
        name="noise",
        shape=(3, side, side),
        class_names=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    with seeded(0):
        network = ConvNet.configured({"width": width}).build(spec)
        real = torch.split(torch.randn(CLASSES * batch_real, *spec.shape), batch_real)
        synthetic = torch.randn(CLASSES, ipc, *spec.shape)
        strategy = "color_crop_cutout_flip_scale_rotate"
        transforms = [draw(strategy, 1, (side, side)) for _ in range(CLASSES)]
    return network.train(), real, synthetic, transforms


def ours(
    network: Any, real: Any, synthetic: Tensor, transforms: list[Transform]
) -> tuple[Tensor, Tensor]:
    run = Run(
        device=torch.device("cpu"),
        scratch=Path(),
        phase=lambda name: contextlib.nullcontext(),
        report=lambda what, done, total: None,
    )
    network.requires_grad_(False)
    return match(network, real, synthetic, transforms, run)


def class_by_class(
    network: Any,
    real: Any,
    synthetic: Tensor,
    transforms: list[Transform],
    frozen: bool = True,
) -> tuple[Tensor, Tensor]:
    network.requires_grad_(not frozen)
    leaf = synthetic.clone().requires_grad_()
    loss = torch.zeros(())
    for transform, images, own in zip(transforms, real, leaf, strict=True):
        target = network.embed(transform(images)).detach().mean(dim=0)
        loss = loss + (target - network.embed(transform(own)).mean(dim=0)).square().sum()
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def with_the_graph(
    network: Any, real: Any, synthetic: Tensor, transforms: list[Transform]
) -> tuple[Tensor, Tensor]:
    return class_by_class(network, real, synthetic, transforms, frozen=False)


STRUCTURES: list[Callable[..., tuple[Tensor, Tensor]]] = [ours, class_by_class, with_the_graph]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ipc", [1, 3])
def test_the_structures_agree_to_rounding(ipc):
    task = work(ipc, batch_real=7, side=16, width=16)
    loss, gradient = ours(*task)
    for structure in STRUCTURES[1:]:
        base_loss, base_gradient = structure(*task)
        assert loss.item() == pytest.approx(base_loss.item(), rel=1e-5)
        assert (gradient - base_gradient).norm() < 1e-4 * base_gradient.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("ipc", "batch_real", "side", "width"),
    [(1, 64, 32, 128), (10, 64, 32, 128), (1, 128, 8, 32), (10, 128, 8, 32)],
)
def test_dm_iteration(benchmark, structure, ipc, batch_real, side, width):
    benchmark.group = f"DM iteration, IPC {ipc}, {batch_real} real, {side}x{side}, width {width}"
    task = work(ipc, batch_real, side, width)
    expected = class_by_class(*task)[0].item()
    loss, _ = benchmark.pedantic(structure, args=task, rounds=5, warmup_rounds=1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
