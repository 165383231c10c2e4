"""PGD-20 with images that leave when they are broken, against all steps on all images.

Networks trained on distilled sets lose most images in the first steps. The verdicts are compared
image by image; the share of images left and the ratio of image passes are in ``extra_info``.
Run with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import Run, Threat, ascend, project, random_start
from rdd_bench.seeding import seeded
from rdd_bench_builtin.attacks._gradient import input_gradient
from rdd_bench_builtin.attacks.pgd import PGD

STEPS = 20
THREAT = Threat("linf", 24 / 255)
RUN = Run(
    device=torch.device("cpu"),
    scratch=Path(),
    phase=lambda name: contextlib.nullcontext(),
    report=lambda what, done, total: None,
)


class Counted(nn.Module):
    """A network that counts the images it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        logits: Tensor = self.network(pixels)
        return logits


def ours(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with seeded(1):
        return PGD.configured({"steps": STEPS}).perturb(model, images, labels, THREAT, RUN)


def all_steps(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with seeded(1):
        points = random_start(images, THREAT)
    for _ in range(STEPS):
        gradient = input_gradient(model, points, labels, "ce")
        moved = ascend(points, gradient, THREAT.norm, 2.5 * THREAT.eps / STEPS)
        points = project(moved, images, THREAT)
    return points


@pytest.fixture(scope="module", params=["weak", "robust"])
def victim(request):
    """A network trained on ten images a class, or adversarially on all, and what it gets right."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    count, steps = (100, 150) if request.param == "weak" else (1400, 300)
    with seeded(0):
        network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip
        for _ in range(steps):
            batch = torch.randint(count, (64,))
            pixels = images[batch]
            if request.param == "robust":
                attack = PGD.configured({"steps": 5})
                pixels = attack.perturb(network, pixels, labels[batch], THREAT, RUN)
            loss = nn.functional.cross_entropy(network(pixels), labels[batch])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter.sub_(0.1 * gradient)
    network.eval().requires_grad_(False)
    correct = 1400 + (network(images[1400:]).argmax(1) == labels[1400:]).nonzero().flatten()
    return request.param, network, images[correct], labels[correct]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


STRUCTURES: list[Callable[..., Tensor]] = [ours, all_steps]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pgd_20(benchmark: Any, structure: Callable[..., Tensor], victim: Any) -> None:
    kind, network, images, labels = victim
    benchmark.group = f"PGD-20, {kind} network, {len(images)} images"
    attacked = benchmark.pedantic(
        structure, args=(network, images, labels), rounds=5, warmup_rounds=1
    )
    unbroken = network(attacked).argmax(1) == labels
    assert torch.equal(unbroken, network(all_steps(network, images, labels)).argmax(1) == labels)

    counted = Counted(network)
    structure(counted, images, labels)
    benchmark.extra_info["robust"] = unbroken.float().mean().item()
    benchmark.extra_info["ratio"] = STEPS * len(images) / counted.seen
