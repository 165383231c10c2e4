"""One matching step of DC and DSA: ours against the structure of the authors' program.

Theirs takes the real images of a class in one pass, computes the gradients of every parameter
though biases and scales do not count, keeps the graphs of all classes until one backward pass at
the end, and lets that pass fill the gradients of the network, which nobody reads. The third row
also makes a graph of the real gradients and throws it away, as programs do that ask for
``create_graph`` on both sides. Run with ``-o addopts= --import-mode=importlib``.
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
from rdd_bench_builtin.distillers._gradient_matching import match, row_distance

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
        depth = 3 if side > 8 else 2
        network = ConvNet.configured({"width": width, "depth": depth}).build(spec)
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
    return match(network, real, synthetic, transforms, "ours", run)


def class_by_class(
    network: Any,
    real: Any,
    synthetic: Tensor,
    transforms: list[Transform],
    graph_of_real: bool = False,
) -> tuple[Tensor, Tensor]:
    parameters = list(network.parameters())
    leaf = synthetic.clone().requires_grad_()
    loss = torch.zeros(())
    for label, transform in enumerate(transforms):
        images, own = transform(real[label]), transform(leaf[label])
        error = nn.functional.cross_entropy(network(images), torch.full((len(images),), label))
        wanted = torch.autograd.grad(error, parameters, create_graph=graph_of_real)
        wanted = tuple(gradient.detach().clone() for gradient in wanted)
        error = nn.functional.cross_entropy(network(own), torch.full((len(own),), label))
        found = torch.autograd.grad(error, parameters, create_graph=True)
        loss = loss + row_distance(found, wanted)
    torch.autograd.backward(loss)
    network.zero_grad()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def with_the_graph(
    network: Any, real: Any, synthetic: Tensor, transforms: list[Transform]
) -> tuple[Tensor, Tensor]:
    return class_by_class(network, real, synthetic, transforms, graph_of_real=True)


STRUCTURES: list[Callable[..., tuple[Tensor, Tensor]]] = [ours, class_by_class, with_the_graph]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ipc", [1, 3])
def test_the_structures_agree_to_rounding(ipc):
    task = work(ipc, batch_real=20, side=16, width=16)
    loss, gradient = ours(*task)
    for structure in STRUCTURES[1:]:
        base_loss, base_gradient = structure(*task)
        assert loss.item() == pytest.approx(base_loss.item(), rel=1e-5)
        assert (gradient - base_gradient).norm() < 1e-3 * base_gradient.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("ipc", "batch_real", "side", "width"),
    [(1, 16, 32, 128), (10, 16, 32, 128), (1, 64, 8, 16), (10, 64, 8, 16)],
)
def test_dc_step(benchmark, structure, ipc, batch_real, side, width):
    benchmark.group = f"DC step, IPC {ipc}, {batch_real} real, {side}x{side}, width {width}"
    task = work(ipc, batch_real, side, width)
    expected = class_by_class(*task)[0].item()
    loss, _ = benchmark.pedantic(structure, args=task, rounds=3, warmup_rounds=1)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
