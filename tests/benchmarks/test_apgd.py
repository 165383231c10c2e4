"""APGD-CE and APGD-T, AutoAttack's first two parts: our engine against the package's.

Seconds and passes of both are in ``extra_info``, and the verdicts must be equal. Networks are the
ConvNet and the MLP on digits; a small budget leaves nearly all images unbroken, a large one
few. Run with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.components import Architecture, Run, Source
from rdd_bench.data import load_splits
from rdd_bench.seeding import seeded
from rdd_bench.training import fit
from rdd_bench.types import DistilledSet, Recipe, Threat
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.architectures.mlp import MLP
from rdd_bench_builtin.attacks.autoattack import AutoAttack
from rdd_bench_builtin.datasets.digits import Digits

LITE = {"attacks": ("apgd-ce", "apgd-t"), "seed": 0}
EPS = {"strong": 8 / 255, "weak": 48 / 255}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Networks trained on 200 digits, with the test images that they get right."""
    splits = load_splits(Digits(), "digits", Source(None), (0, 30))
    made: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    convnet = ConvNet.configured({"depth": 2, "width": 16})
    architectures: dict[str, Architecture[Any]] = {"convnet": convnet, "mlp": MLP()}
    for name, architecture in architectures.items():
        with seeded(0):
            chosen = torch.randperm(len(splits.train))[:200]
        few = splits.train.subset(chosen)
        networks = fit(
            DistilledSet(few.images, few.labels),
            Recipe(epochs=100),
            architecture,
            splits.spec,
            [0],
            device=torch.device("cpu"),
            report=lambda *_: None,
        )
        network = networks.models[0].eval().requires_grad_(requires_grad=False)
        right = network(splits.test.images).argmax(1) == splits.test.labels
        made[name] = (network, splits.test.images[right], splits.test.labels[right])
    return made


def measured(
    task: tuple[nn.Module, Tensor, Tensor], eps: float, engine: str
) -> tuple[Tensor, dict[str, Any]]:
    """Return which images withstand, with the seconds and the passes."""
    network, images, labels = task
    run = Run(
        device=torch.device("cpu"),
        scratch=Path(),
        phase=lambda name: contextlib.nullcontext(),
        report=lambda what, done, total: None,
    )
    sizes: list[int] = []
    handle = network.register_forward_hook(lambda _m, _i, logits: sizes.append(len(logits)))
    start = time.process_time()
    attack = AutoAttack.configured({**LITE, "engine": engine})
    attacked = attack.perturb(network, images, labels, Threat("linf", eps), run)
    seconds = time.process_time() - start
    handle.remove()
    passes = {"seconds": seconds, "passes": len(sizes), "images": sum(sizes)}
    return network(attacked).argmax(1) == labels, passes


@pytest.mark.parametrize("robust", EPS)
@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_lite(benchmark, trained, name, robust):
    benchmark.group = f"AutoAttack-lite, {name}, {robust}ly robust"
    eps = EPS[robust]
    expected, package = measured(trained[name], eps, "package")
    right, fast = benchmark.pedantic(measured, args=(trained[name], eps, "fast"), rounds=2)
    assert torch.equal(right, expected)
    assert fast["images"] <= 1.05 * package["images"]
    benchmark.extra_info |= {
        "robust": f"{int(right.sum())} of {len(right)}",
        "ratio": round(package["seconds"] / fast["seconds"], 2),
        "package": package,
        "fast": fast,
    }
