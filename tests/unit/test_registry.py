"""Finding plugins, beside broken ones. The distributions here are folders made on the spot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rdd_bench import __version__
from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.registry import BLOCK_VARIABLE, Problem, Registry, class_refusal, load_plugins

GOOD = '''
from rdd_bench.api import Config, Distiller, Info, hookimpl

class {cls}(Distiller):
    """A good one."""
    name = "{name}"
    info = Info(title="Good", licence="MIT")
    def distill(self, task, run): ...

@hookimpl
def rdd_bench_distillers():
    return [{cls}]
'''

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Install]:
    """Return a function that puts a distribution with one module on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    numbers = itertools.count()

    def install(
        source: str,
        dist: str | None = None,
        requires: str | None = "rdd-bench",
        entry_point: str = "it",
        entry_points: str | None = None,
    ) -> str:
        number = next(numbers)
        module = f"toy_plugin_{tmp_path.name}_{number}".replace("-", "_")
        dist = dist or f"toy-{number}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n"
        if requires is not None:
            metadata += f"Requires-Dist: {requires}\n"
        (info / "METADATA").write_text(metadata)
        lines = entry_points if entry_points is not None else f"{entry_point} = {module}\n"
        (info / "entry_points.txt").write_text(f"[rdd_bench]\n{lines}".format(module=module))
        (info / "RECORD").write_text("")
        return dist

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("toy_plugin_"):
            del sys.modules[name]


def good(name: str = "good", cls: str = "Good") -> str:
    return GOOD.format(name=name, cls=cls)


def problem_of(dist: str, registry: Registry | None = None) -> str:
    """Return the one problem of a distribution; it is one line, as the user sees it."""
    registry = registry or load_plugins()
    reasons = [p.reason for p in registry.problems if p.plugin.split(":")[0] == dist]
    assert len(reasons) == 1, registry.problems
    assert "\n" not in reasons[0]
    assert not [o for o in registry.offers if o.distribution == dist]
    return reasons[0]


# Each way to be broken, and what the user is told.
BROKEN = {
    "raises at import": ("import no_such_module_anywhere", "ModuleNotFoundError: No module"),
    "raises two lines": ("raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
    "is no Python": ("def (:", "SyntaxError"),
    "exits at import": ("raise SystemExit('bye')", "SystemExit: bye"),
    "raises in the hook": (
        good().replace("return [Good]", "return [1 / 0]"),
        "rdd_bench_distillers raised ZeroDivisionError: division by zero",
    ),
    "returns nothing from the hook": (
        good().replace("return [Good]", "pass"),
        "rdd_bench_distillers raised TypeError: 'NoneType'",
    ),
    "mistypes the hook": (
        good().replace("rdd_bench_distillers", "rdd_bench_distilers"),
        "unknown hook 'rdd_bench_distilers'; the hooks are rdd_bench_distillers, ",
    ),
    "takes an argument in the hook": (
        good().replace("distillers()", "distillers(registry)"),
        "PluginValidationError",
    ),
    "returns an instance": (
        good().replace("[Good]", "[Good()]"),
        "which is not a subclass of Distiller",
    ),
    "returns another kind": (
        good().replace("rdd_bench_distillers()", "rdd_bench_attacks()"),
        "rdd_bench_attacks returned",
    ),
    "returns an abstract class": (
        good().replace("def distill(", "def distil("),
        "Good does not implement distill",
    ),
    "has a bad name": (good("Good One"), "Good.name is 'Good One'; expected lower-case"),
    "has no name": (good().replace('name = "good"', ""), "Good.name is None"),
    "has no info": (good().replace("info = Info", "inf = Info"), "Good has no info; expected"),
    "has no docstring": (good().replace('"""A good one."""', ""), "Good has no docstring"),
    "has an option without docstring": (
        good()
        .replace("class Good(Distiller)", "class Good(Distiller[Options])")
        .replace("class Good", "class Options(Config):\n    steps: int = 3\n\nclass Good"),
        "Good: option 'steps' needs a default and a docstring under it",
    ),
    "has an option without default": (
        good()
        .replace("class Good(Distiller)", "class Good(Distiller[Options])")
        .replace(
            "class Good", 'class Options(Config):\n    steps: int\n    """S."""\n\nclass Good'
        ),
        "Good: option 'steps' needs a default and a docstring under it",
    ),
    "is an attack without norms": (
        good()
        .replace("Distiller", "Attack")
        .replace("distillers", "attacks")
        .replace("distill(", "perturb("),
        "Good names no norms; expected norms = frozenset({'linf'})",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_costs_one_line(install, how):
    source, expected = BROKEN[how]
    assert expected in problem_of(install(source))


def test_the_good_ones_load_beside_all_the_broken_ones(install):
    for source, _ in BROKEN.values():
        install(source)
    install(good("fine"), dist="fine-one")
    registry = load_plugins()
    assert registry.find("distiller", "fine").qualified == "fine-one/fine"
    assert len(registry.problems) >= len(BROKEN)
    assert {"dm", "random"} <= {o.name for o in registry.of_kind("distiller")}


def test_the_good_classes_of_a_plugin_load_beside_its_broken_ones(install):
    two = good("one", "One") + good("Bad", "Bad").replace("[Bad]", "[One, Bad]")
    dist = install(two)
    registry = load_plugins()
    assert [o.name for o in registry.offers if o.distribution == dist] == ["one"]
    assert [p.plugin for p in registry.problems] == [f"{dist}:it"]


def test_a_plugin_for_a_later_host_is_never_imported(install, tmp_path):
    marker = tmp_path / "imported"
    dist = install(f"open({str(marker)!r}, 'w').close()\n" + good(), requires="rdd-bench>=2")
    assert problem_of(dist) == f"needs rdd-bench>=2; this is rdd-bench {__version__}"
    assert not marker.exists()


def test_a_plugin_that_does_not_declare_the_host_is_never_imported(install, tmp_path):
    marker = tmp_path / "imported"
    dist = install(f"open({str(marker)!r}, 'w').close()\n" + good(), requires=None)
    assert problem_of(dist).startswith("does not declare a dependency on rdd-bench; add ")
    assert not marker.exists()


@pytest.mark.parametrize("requires", ["RDD_Bench>=0", f"rdd.bench=={__version__}"])
def test_a_requirement_is_read_however_the_host_is_spelt(install, requires):
    install(good("fine"), requires=requires)
    assert load_plugins().find("distiller", "fine")


def test_two_distributions_may_offer_one_name(install):
    first, second = install(good("twin"), dist="first"), install(good("twin"), dist="second")
    registry = load_plugins()
    with pytest.raises(RddBenchError, match="offered by 2 plugins: say first/twin or second/twin"):
        registry.find("distiller", "twin")
    for dist in (first, second):
        assert registry.find("distiller", f"{dist}/twin").distribution == dist


def test_one_distribution_may_not_offer_a_name_twice(install):
    """Nobody could say which of the two is meant."""
    dist = install(good("twin", "One") + good("twin", "Two").replace("[Two]", "[One, Two]"))
    registry = load_plugins()
    assert registry.find("distiller", "twin").cls.__name__ == "One"
    (problem,) = [p for p in registry.problems if p.plugin == f"{dist}:it"]
    assert "Two" in problem.reason
    assert "twin" in problem.reason


@pytest.mark.parametrize("blocked", ["toy-a", "toy-a:mine", "mine", "other,toy-a"])
def test_a_plugin_can_be_blocked(install, monkeypatch, blocked):
    install("raise RuntimeError('imported')", dist="toy-a", entry_point="mine")
    monkeypatch.setenv(BLOCK_VARIABLE, blocked)
    assert problem_of("toy-a") == "blocked by RDD_BENCH_BLOCK"


def test_an_unknown_name_gets_a_suggestion_and_the_plugins_that_did_not_load(install):
    install("import no_such_module_anywhere", dist="mine")
    install(good("gradient-match"))
    with pytest.raises(UnknownNameError) as caught:
        load_plugins().find("distiller", "gradient-mach")
    message = str(caught.value)
    assert "'gradient-mach' is not the name of a distiller" in message
    assert "did you mean 'gradient-match'?" in message
    assert "Not loaded: mine:it (see 'rdd-bench plugins')" in message
    assert "\n" not in message


def test_an_argument_for_a_component_that_takes_none_is_refused(install):
    install(good("plain"), dist="toy")
    with pytest.raises(RddBenchError, match=r"distiller 'plain' \(toy 1.0\) takes no ':x'; say"):
        load_plugins().find("distiller", "plain:x")


def test_an_argument_sets_the_option_that_takes_it(install):
    source = (
        good("parts")
        .replace("class Good(Distiller)", "class Good(Distiller[Options])")
        .replace("    name =", '    argument = "model"\n    name =')
        .replace(
            "class Good", 'class Options(Config):\n    model: str = ""\n    """M."""\n\nclass Good'
        )
    )
    install(source)
    made = load_plugins().build("distiller", "parts:some.thing:1", {})
    assert made.config.model == "some.thing:1"


def test_a_shadowed_distribution_counts_once(install, tmp_path, monkeypatch):
    """As for imports, the first one on the path wins."""
    install(good("once"), dist="same")
    shadow = tmp_path / "later"
    (shadow / "same-0.9.dist-info").mkdir(parents=True)
    (shadow / "same-0.9.dist-info" / "METADATA").write_text("Name: Same\nVersion: 0.9\n")
    (shadow / "same-0.9.dist-info" / "entry_points.txt").write_text("[rdd_bench]\nit = nowhere\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadow)])
    registry = load_plugins()
    assert registry.find("distiller", "once").version == "1.0"
    assert registry.problems == []


def test_an_entry_point_may_have_any_name(install):
    install(good("fine"), entry_point="my:plugin", dist="toy")
    assert load_plugins().find("distiller", "fine").entry_point == "my:plugin"


@pytest.mark.parametrize("lines", ["nothing here\n", "it = not a module!\n", "it =\n"])
def test_a_malformed_entry_point_hides_nobody(install, lines):
    install(good(), dist="malformed", entry_points=lines)
    install(good("fine"))
    registry = load_plugins()
    assert registry.find("distiller", "fine")
    assert problem_of("malformed", registry)


def test_a_folder_that_only_looks_like_a_distribution_hides_nobody(install, tmp_path):
    install(good("fine"))
    (tmp_path / "hollow-1.0.dist-info").mkdir()
    assert load_plugins().find("distiller", "fine")


def test_an_edited_plugin_has_another_hash(install, tmp_path):
    install(good("fine"))
    offer = load_plugins().find("distiller", "fine")
    before = offer.source_sha256
    assert offer.source_sha256 == before
    (tmp_path / f"{offer.cls.__module__}.py").write_text(good("fine") + "# edited\n")
    edited = offer.source_sha256
    assert edited != before
    (tmp_path / "_shared.py").write_text("# what it may import\n")
    assert offer.source_sha256 not in (before, edited)


def test_every_built_in_fulfils_the_contract():
    registry = load_plugins()
    mine = [p for p in registry.problems if p.plugin.startswith("rdd-bench:")]
    assert mine == []
    assert all(class_refusal(offer.kind, offer.cls) is None for offer in registry.offers)


def test_a_problem_names_plugin_and_reason():
    assert str(Problem("toy:it", "raised")) == "toy:it: raised"


def test_files_of_the_fixture_lie_in_the_temporary_folder(install, tmp_path):
    install(good("fine"))
    module = load_plugins().find("distiller", "fine").cls.__module__
    assert Path(str(sys.modules[module].__file__)).parent == tmp_path
