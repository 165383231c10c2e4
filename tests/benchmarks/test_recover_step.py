"""One step of recovery and one of a regularised teacher: ours against the authors' structure.

Recovery: theirs takes one image per class at a time and lets a hook copy what enters each layer
into a matrix of channels to take its variance. Ours takes the groups of several images per class
together, each with statistics of its own. Teacher: theirs takes z from a backward pass that also
fills the gradients of the weights, and then computes the gradient at x a second time. Results are
equal to rounding. Run the timings with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.distillers._curvature import curvature
from rdd_bench_builtin.distillers._recover import losses_of

R_BN, H, WEIGHT = 0.1, 3.0, 0.5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher_of(side: int, width: int) -> tuple[nn.Module, DatasetSpec]:
    spec = DatasetSpec(
        name="noise",
        shape=(3, side, side),
        class_names=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    depth = 3 if side > 8 else 2
    options = {"width": width, "depth": depth, "norm": "batch"}
    with seeded(0):
        network = ConvNet.configured(options).build(spec)
        network(torch.randn(64, *spec.shape))
    return network.eval(), spec


# Recovery -------------------------------------------------------------------------------------


def our_recovery(teacher: nn.Module, groups: Tensor, labels: Tensor) -> Tensor:
    images = groups.detach().requires_grad_()
    error, statistics = losses_of(teacher, images, labels)
    (gradient,) = torch.autograd.grad(error + R_BN * statistics, images)
    return gradient


class Hook:
    """Keeps the distance of statistics of the last pass."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.value = torch.zeros(())
        self.handle = layer.register_forward_hook(self.look)

    def look(self, layer: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        channels = inputs[0].shape[1]
        mean = inputs[0].mean([0, 2, 3])
        matrix = inputs[0].permute(1, 0, 2, 3).contiguous().view([channels, -1])
        variance = matrix.var(1, unbiased=False)
        self.value = torch.norm(layer.running_var - variance, 2) + torch.norm(
            layer.running_mean - mean, 2
        )


def their_recovery(teacher: nn.Module, groups: Tensor, labels: Tensor) -> Tensor:
    hooks = [Hook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    gradients = []
    for group in groups:
        images = group.detach().requires_grad_()
        error = nn.functional.cross_entropy(teacher(images), labels)
        scales = [10.0, *[1.0] * (len(hooks) - 1)]
        statistics = [scale * hook.value for scale, hook in zip(scales, hooks, strict=True)]
        torch.autograd.backward(error + R_BN * torch.stack(statistics).sum())
        assert images.grad is not None
        gradients.append(images.grad)
    for hook in hooks:
        hook.handle.remove()
    return torch.stack(gradients)


RECOVERIES: list[Callable[..., Tensor]] = [our_recovery, their_recovery]


def recovery_case(ipc: int, side: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    teacher, spec = teacher_of(side, width)
    teacher.requires_grad_(False)
    with seeded(1):
        return teacher, torch.randn(ipc, 10, *spec.shape), torch.arange(10)


def test_recovery_is_the_same():
    case = recovery_case(3, 8, 8)
    ours, theirs = our_recovery(*case), their_recovery(*case)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("recover", RECOVERIES)
@pytest.mark.parametrize(
    ("ipc", "side", "width"), [(1, 8, 16), (10, 8, 16), (1, 32, 64), (10, 32, 64)]
)
def test_recovery_step(benchmark, recover, ipc, side, width):
    benchmark.group = f"recovery step, IPC {ipc}, {side}x{side}, width {width}"
    benchmark.pedantic(recover, recovery_case(ipc, side, width), rounds=5, warmup_rounds=1)


# A teacher's step -----------------------------------------------------------------------------


def our_step(network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    network.train()
    error = nn.functional.cross_entropy(network(images), labels)
    network.eval()
    loss = error + WEIGHT * curvature(network, images, labels, "gradient", H)
    network.train()
    return list(torch.autograd.grad(loss, list(network.parameters())))


def their_step(network: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    network.train()
    error = nn.functional.cross_entropy(network(images), labels)
    network.eval()
    x = images.clone().requires_grad_()
    torch.autograd.backward(nn.functional.cross_entropy(network(x), labels))
    assert x.grad is not None
    z = x.grad.detach() + 1e-7
    z = H * z / (z.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-7)
    network.zero_grad()
    x.grad = None
    rise = nn.functional.cross_entropy(network(x + z), labels)
    rise = rise - nn.functional.cross_entropy(network(x), labels)
    (change,) = torch.autograd.grad(rise, x, create_graph=True)
    regulariser = change.flatten(1).norm(dim=1).mean() * len(images) * WEIGHT
    network.train()
    torch.autograd.backward(error + regulariser)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return gradients


STEPS: list[Callable[..., list[Tensor]]] = [our_step, their_step]


def step_case(batch: int, side: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    network, spec = teacher_of(side, width)
    with seeded(1):
        return network, torch.randn(batch, *spec.shape), torch.randint(10, (batch,))


def test_a_teachers_step_is_the_same():
    ours, theirs = our_step(*step_case(16, 8, 8)), their_step(*step_case(16, 8, 8))
    first, second = (torch.cat([g.flatten() for g in of]) for of in (ours, theirs))
    # Theirs has 1e-7 in the direction, which at this length of the gradient is rounding.
    assert (first - second).norm() < 1e-3 * second.norm()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("batch", "side", "width"), [(128, 8, 16), (128, 32, 32)])
def test_teacher_step(benchmark, step, batch, side, width):
    benchmark.group = f"regularised step, batch {batch}, {side}x{side}, width {width}"
    benchmark.pedantic(step, step_case(batch, side, width), rounds=5, warmup_rounds=1)
