"""The example of a third party's plugin: its metadata, its contract, and a run with it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tomllib
from pathlib import Path

import pytest

from rdd_bench.testing import checks_of

DISTRIBUTION = "rdd-bench-example"
EXAMPLE = Path(__file__).parents[2] / "examples" / DISTRIBUTION


def installed() -> bool:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def example(tmp_path, monkeypatch) -> None:
    """The example as its own installer left it, or else as its pyproject.toml describes it."""
    if installed():
        return
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"rdd_bench_example-{project['version']}.dist-info"
    info.mkdir(parents=True)
    requires = "".join(f"Requires-Dist: {line}\n" for line in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    entries = project["entry-points"]["rdd_bench"].items()
    (info / "entry_points.txt").write_text(
        "[rdd_bench]\n" + "".join(f"{name} = {module}\n" for name, module in entries)
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    monkeypatch.delitem(sys.modules, "rdd_bench_example", raising=False)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="only CI must have it installed")
def test_the_example_is_installed():
    assert installed(), f"install it: uv pip install -e examples/{DISTRIBUTION}"


@pytest.mark.usefixtures("example")
def test_the_example_keeps_the_contract():
    checks = list(checks_of(DISTRIBUTION))
    assert {str(check.offer.kind) for check in checks} == {"distiller"}
    for check in checks:
        check.run()


@pytest.mark.usefixtures("example")
def test_the_example_stands_in_the_table_beside_a_built_in_method(tiny, out):
    # The command of its README.
    answer = tiny("--distillers", "example-mean,random")
    assert answer.code == 0, answer.err
    assert "| example-mean" in (out / "leaderboard.md").read_text()


@pytest.mark.usefixtures("example")
def test_another_option_of_the_example_computes_only_what_it_changes(tiny):
    tiny("--distillers", "example-mean,random")
    answer = tiny("--distillers", "example-mean,random", "--set", "example-mean.averaged=2")
    assert "4 steps computed, 4 already there." in answer.out


def test_the_commands_of_its_readme_are_the_tested_ones():
    readme = (EXAMPLE / "README.md").read_text()
    assert "rdd-bench run --distillers example-mean,random" in readme
    assert f"rdd-bench check {DISTRIBUTION}" in readme
    assert f"examples/{DISTRIBUTION}" in readme
