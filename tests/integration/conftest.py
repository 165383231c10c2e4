"""A protocol of a second, the command line in this process, and plugins made on the spot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_bench.cli import main
from rdd_bench.records import AnyRecord, EnvironmentRecord
from rdd_bench.store import read_records

torch.set_num_threads(1)

PROTOCOL = """\
name = "tiny-v1"
summary = "Everything there is, in a second."
datasets = ["digits"]
distillers = ["random"]
control = "random"
architectures = ["convnet"]
attacks = ["fgsm", "pgd"]
ipc = [1]
seeds = [0, 1]

[subset]
train_per_class = 10
test_per_class = 4

[recipe]
epochs = 3

[[threats]]
norm = "linf"
eps = ["16/255"]
ranked = "16/255"

[options.convnet]
depth = 1
width = 4

[options.pgd]
steps = 2
"""
"""One distiller: 4 steps, that is a distillation, a training and two attacks."""


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """The one line that tells the user of a mistake."""
        assert self.code == 2, self
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("rdd-bench: ")
        return self.err.strip()


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., Answer]:
    """``rdd-bench`` with these arguments, in this process."""

    def call(*arguments: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["rdd-bench", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(PROTOCOL)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The run folder."""
    return tmp_path / "run"


@pytest.fixture
def tiny(cli, protocol, out) -> Callable[..., Answer]:
    """``rdd-bench run`` of the tiny protocol; later arguments win over these."""
    return lambda *more: cli(
        "run", "--protocol", protocol, "--out", out, "--device", "cpu", "--workers", 1, *more
    )


@dataclass(frozen=True)
class Process:
    """``rdd-bench`` in processes of its own."""

    folder: Path

    def command(self, *arguments: Any, after: str = "") -> list[str]:
        # A shell without job control starts what is in its background with Ctrl-C ignored.
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += f"from rdd_bench.cli import main; main(); {after}"
        return [sys.executable, "-c", code, *map(str, arguments)]

    def environment(self, **more: str) -> dict[str, str]:
        paths = [path for path in sys.path if path]  # with the planted plugins
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", **more}

    def start(self, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
        """Start it in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(**environment),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: Any, after: str = "") -> Answer:
        """Run it to its end, then the Python statement ``after`` in the same process."""
        return self.finish(self.command(*arguments, after=after))

    def finish(self, command: list[str]) -> Answer:
        done = subprocess.run(
            command,
            env=self.environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def process(tmp_path) -> Process:
    return Process(tmp_path)


# Plugins --------------------------------------------------------------------------------------

_HEAD = '''\
"""Planted by a test."""

import os, sys, time

import torch
from torch import nn

from rdd_bench.api import *

def good_set(task):
    labels = torch.arange(task.spec.num_classes).repeat_interleave(task.ipc)
    images = [task.train.of_class(k)[: task.ipc] for k in range(task.spec.num_classes)]
    return DistilledSet(torch.cat(images), labels)

def good_network(spec):
    inputs = spec.shape[0] * spec.shape[1] * spec.shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, spec.num_classes))

def good_splits():
    images = torch.rand(40, 1, 8, 8)
    part = LabelledImages(images, torch.arange(10).repeat_interleave(4))
    names = tuple("abcdefghij")
    spec = DatasetSpec(name="p", shape=(1, 8, 8), class_names=names, mean=(0.5,), std=(0.5,))
    return Splits(spec, part, part)

'''
_METHODS = {
    "distiller": "distill(self, task, run)",
    "architecture": "build(self, spec)",
    "attack": "perturb(self, model, images, labels, threat, run)",
    "dataset": "load(self, source)",
}


def plugin(kind: str, body: str, name: str) -> str:
    """Return the source of a plugin with one component, whose one method is ``body``."""
    lines = "\n".join(f"        {line}" for line in body.strip().splitlines())
    return f'''{_HEAD}
class Planted({kind.capitalize()}[NoOptions]):
    """Planted by a test."""

    name = "{name}"
    info = Info(title="Planted", licence="MIT")
    norms = frozenset({{"linf"}})

    def {_METHODS[kind]}:
{lines}

@hookimpl
def rdd_bench_{kind}s():
    return [Planted]
'''


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[..., None]]:
    """Install a module as a distribution with one plugin, for the time of a test."""
    installed = []

    def put(distribution: str, source: str, requires: str = "rdd-bench>=0.1") -> None:
        site = tmp_path / f"site-{distribution}"
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{distribution}.py").write_text(source)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
            f"Requires-Dist: {requires}\n"
        )
        (info / "entry_points.txt").write_text(f"[rdd_bench]\n{distribution} = {distribution}\n")
        monkeypatch.syspath_prepend(str(site))
        installed.append(distribution)

    yield put
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def plant(install) -> Callable[..., None]:
    """Install a distribution with one component, given its method."""

    def put(kind: str, body: str, distribution: str = "planted", name: str = "planted") -> None:
        install(distribution, plugin(kind, body, name))

    return put


# Reading a run folder -------------------------------------------------------------------------


@pytest.fixture
def records_of() -> Callable[..., list[Any]]:
    """The step records of a run folder, by kind if one is given."""

    def read(folder: Path, kind: str | None = None) -> list[AnyRecord]:
        records, problems = read_records([folder])
        assert problems == []
        steps = [r for r in records if not isinstance(r, EnvironmentRecord)]
        return [r for r in steps if kind in (None, r.kind)]

    return read


@pytest.fixture
def verdicts(records_of) -> Callable[[Path], dict[str, Any]]:
    """What must be the same whenever it is computed: sets, and outcomes of every image."""

    def read(folder: Path) -> dict[str, Any]:
        return {
            r.address: r.set_sha256 if r.kind == "distill" else r.outcomes
            for r in records_of(folder)
        }

    return read
