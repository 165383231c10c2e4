"""AutoAttack as the benchmark runs it, against the package called as its documentation says.

All four parts of the standard version on a ConvNet, with a budget that leaves most images unbroken
and one that leaves few. Seconds of both and their ratio are in ``extra_info``, and the verdicts
must be equal. FAB and Square are the package's in both, so the ratio falls with the queries of
Square; the published number of them is slow. Run with ``-o addopts= --import-mode=importlib``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import Run, Source, Threat, seeded
from rdd_bench.data import load_splits
from rdd_bench.training import fit
from rdd_bench.types import DistilledSet, Recipe
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.attacks.autoattack import AutoAttack
from rdd_bench_builtin.datasets.digits import Digits

EPS = {"strong": 8 / 255, "weak": 30 / 255}
QUERIES = {"few queries": 500, "published": 5000}
RUN = Run(
    device=torch.device("cpu"),
    scratch=Path(),
    phase=lambda name: contextlib.nullcontext(),
    report=lambda what, done, total: None,
)
Task = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> Task:
    """A network trained on 200 digits, with 60 test images that it gets right."""
    splits = load_splits(Digits(), "digits", Source(None), (0, 10))
    with seeded(0):
        few = splits.train.subset(torch.randperm(len(splits.train))[:200])
    (network,) = fit(
        DistilledSet(few.images, few.labels),
        Recipe(epochs=100),
        ConvNet.configured({"depth": 2, "width": 16}),
        splits.spec,
        [0],
        device=torch.device("cpu"),
        report=lambda *_: None,
    ).models
    right = (network(splits.test.images).argmax(1) == splits.test.labels).nonzero().flatten()[:60]
    return network, splits.test.images[right], splits.test.labels[right]


def ours(task: Task, eps: float, queries: int) -> Tensor:
    attack = AutoAttack.configured({"square_queries": queries, "seed": 0})
    return attack.perturb(*task, Threat("linf", eps), RUN)


def package(task: Task, eps: float, queries: int) -> Tensor:
    network, images, labels = task
    logging.getLogger("auto-attack").disabled = True
    adversary = pyautoattack.AutoAttack(network, norm="Linf", eps=eps, seed=0, device="cpu")
    adversary.square.n_queries = queries
    attacked: Tensor = adversary.run_standard_evaluation(images, labels, batch_size=500)[0]
    return attacked


def timed(call: Callable[..., Tensor], *given: Any) -> tuple[Tensor, float]:
    start = time.process_time()
    with seeded(0):
        attacked = call(*given)
    return attacked, time.process_time() - start


@pytest.mark.parametrize(
    "queries", ["few queries", pytest.param("published", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("robust", EPS)
def test_standard(benchmark, task, robust, queries):
    benchmark.group = f"AutoAttack, {robust}ly robust, {queries}"
    network, _, labels = task
    given = (task, EPS[robust], QUERIES[queries])
    expected, theirs = timed(package, *given)
    attacked, mine = benchmark.pedantic(timed, args=(ours, *given), rounds=1)
    right = network(attacked).argmax(1) == labels
    assert torch.equal(right, network(expected).argmax(1) == labels)
    benchmark.extra_info |= {
        "robust": f"{int(right.sum())} of {len(right)}",
        "package": round(theirs, 2),
        "ours": round(mine, 2),
        "ratio": round(theirs / mine, 2),
    }
