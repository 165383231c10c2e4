"""What the documents say is true: their plugin runs, their names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_bench import audit, consistency, testing
from rdd_bench.checks import check_distilled_set
from rdd_bench.components import DistillTask
from rdd_bench.plan import Selection, make_plan
from rdd_bench.protocol import load_protocol, names
from rdd_bench.registry import class_refusal, load_plugins

ROOT = Path(__file__).parents[2]


def test_the_plugin_of_the_readme_works(tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names_made: dict[str, Any] = {"__name__": "readme"}
    exec(code, names_made)
    (cls,) = names_made["rdd_bench_distillers"]()
    assert class_refusal("distiller", cls) is None
    task = DistillTask(
        spec=testing.small_spec(), train=testing.small_images(), ipc=2,
        architecture=testing.SmallArchitecture(), seed=0,
    )  # fmt: skip
    made = cls().distill(task, testing.small_run(tmp_path))
    check_distilled_set(made, task.spec, 2, "readme")
    assert torch.isfinite(made.images).all()


def test_every_protocol_is_documented():
    text = (ROOT / "docs/protocols.md").read_text()
    for name in names():
        assert f"## {name}\n" in text


def test_every_flag_is_documented():
    text = (ROOT / "docs/results.md").read_text()
    flags = {
        value
        for module in (audit, consistency)
        for key, value in vars(module).items()
        if key.isupper() and isinstance(value, str)
    }
    for flag in flags:
        assert f"`{flag}`" in text


def test_every_built_in_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for offer in load_plugins().offers:
        if offer.distribution == "rdd-bench":
            assert f"`{offer.name}" in text, offer.name


@pytest.mark.parametrize(
    "command", re.findall(r"rdd-bench run (--[^#\n`]*)", (ROOT / "README.md").read_text())
)
def test_the_run_commands_of_the_readme_can_be_planned(command):
    """Names in them exist; a method that readers are told to write is left out."""
    words = command.split()
    given = {words[i][2:]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    listed: dict[str, Any] = {
        key: [n for n in given[key].split(",") if n != "class-means"]
        for key in ("distillers", "architectures", "attacks", "tracks")
        if key in given
    }
    protocol = load_protocol(given.get("protocol", "digits-v1"))
    assert make_plan(protocol, Selection(**listed), load_plugins()).steps
