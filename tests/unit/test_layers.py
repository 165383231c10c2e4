"""Who may import whom, read from the source: the arrows of docs and design, kept by a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rdd_bench
import rdd_bench_builtin
from rdd_bench.registry import load_plugins

HOST = Path(rdd_bench.__file__).parent
PLUGINS = Path(rdd_bench_builtin.__file__).parent

LAYERS = """
errors hashing seeding outcomes lazy measure environment
types
components threats augment records protocol checks networks views pictures metrics numerics
hookspecs data counted consistency
artifacts
foreign
api registry overrides results
training audit store
plan probes rows
matched robustness
standings
board_text comparison compatibility chart
board_rows step_records
steps leaderboard display recall lint checkpoint
executors trials
runner
terminal testing
session cli_compare cli_quarantine
cli_judge
cli
"""
ORDER = [line.split() for line in LAYERS.strip().splitlines()]
LEVEL = {module: level for level, modules in enumerate(ORDER) for module in modules}
MODULES = sorted(path.stem for path in HOST.glob("*.py") if path.stem != "__init__")

# Small programs that a user waits for; torch costs seconds.
WITHOUT_TORCH = """
import sys
import rdd_bench.cli, rdd_bench.registry, rdd_bench.leaderboard, rdd_bench.store, rdd_bench.plan
assert "torch" not in sys.modules, "torch was imported"
"""


def run_time_imports(path: Path, *, in_functions: bool = True) -> Iterator[str]:
    """Yield the absolute names of what a module imports, for example 'rdd_bench.types'."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ignored = {
        id(node)
        for branch in ast.walk(tree)
        if (isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING"))
        or (not in_functions and isinstance(branch, ast.FunctionDef))
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def host_imports(module: str, *, in_functions: bool = True) -> set[str]:
    """Return the host modules that one of them imports."""
    names = run_time_imports(HOST / f"{module}.py", in_functions=in_functions)
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "rdd_bench" and part[1] != "__version__"}


def test_every_module_has_its_layer():
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_above_it(module):
    imported = host_imports(module, in_functions=module != "cli")
    below = {name for name in imported if LEVEL[name] >= LEVEL[module]}
    assert not below, f"{module} imports {below}"


def test_the_package_itself_imports_nothing_until_asked():
    top = set(run_time_imports(HOST / "__init__.py", in_functions=False))
    assert not {name for name in top if not name.startswith(("__future__", "typing"))}


@pytest.mark.parametrize("path", sorted(PLUGINS.rglob("*.py")), ids=lambda p: p.stem)
def test_plugins_import_only_the_api(path):
    imported = {name for name in run_time_imports(path) if name.split(".")[0] == "rdd_bench"}
    assert {name for name in imported if not name.startswith("rdd_bench.api")} == set()


@pytest.mark.parametrize("module", MODULES)
def test_the_host_knows_no_plugin_module(module):
    names = run_time_imports(HOST / f"{module}.py")
    assert not [name for name in names if name.startswith("rdd_bench_builtin")]


def test_the_commands_that_need_no_tensor_do_not_import_torch():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, timeout=60)


@pytest.mark.parametrize("package", [HOST, PLUGINS], ids=lambda p: p.name)
def test_a_source_root_holds_one_package_and_nothing_else_to_import(package):
    for path in package.parent.iterdir():
        if path.name in (package.name, "__pycache__") or path.name.startswith("."):
            continue
        assert path.suffix != ".py", f"{path} would be importable"
        assert not list(path.glob("*.py")), f"{path} would be importable"


def test_the_host_names_no_built_in_method():
    """What the host says about one method it would not do for somebody else's."""
    offers = load_plugins().offers
    names = {o.name for o in offers if o.kind in ("distiller", "attack")}
    assert len(names) > 5
    found = []
    for module in MODULES:
        if module == "environment":  # versions of packages; AutoAttack's is called so too
            continue
        for node in ast.walk(ast.parse((HOST / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{module}:{node.lineno}: {node.value}")
    assert found == []
