"""The rules of a table: the shipped ones hold together, and broken ones are told so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.plan import AttackStep, Selection, make_plan
from rdd_bench.protocol import DEFAULT, load_protocol, names, parse_protocol
from rdd_bench.records import StepRecord
from rdd_bench.registry import Registry, load_plugins
from rdd_bench.store import read_records
from rdd_bench.types import Threat, format_eps, parse_eps

PUBLISHED = Path(__file__).parents[2] / "leaderboard" / "results"

VALID = """
name = "mine-v1"
summary = "Mine."
datasets = ["digits"]
distillers = ["random"]
architectures = ["mlp"]
attacks = ["fgsm"]
ipc = [1]
seeds = [0]

[recipe]
epochs = 5

[[threats]]
norm = "linf"
eps = ["8/255", 0.1]
ranked = "8/255"
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a protocol file, with one replacement."""

    def write(old: str = "", new: str = "") -> str:
        assert old in VALID
        path = tmp_path / "mine.toml"
        path.write_text(VALID.replace(old, new, 1) if old else VALID + new)
        return str(path)

    return write


# The shipped ones -----------------------------------------------------------------------------


def test_the_default_is_among_the_shipped_protocols():
    assert DEFAULT in names()


@pytest.mark.parametrize("name", names())
def test_a_shipped_protocol_holds_together(name, registry):
    protocol = load_protocol(name)
    assert protocol.name == name
    plan = make_plan(protocol, Selection(), registry)
    ranked = {s.threat for s in plan.steps if isinstance(s, AttackStep) and s.ranked}
    assert len(ranked) == len(protocol.threats)
    if protocol.control:
        assert protocol.control in protocol.distillers
    assert any(step.control for step in plan.steps if hasattr(step, "control"))


@pytest.mark.parametrize("name", names())
def test_every_name_and_option_of_a_shipped_protocol_resolves(name, registry):
    """Also of components that it rules but does not run by itself."""
    protocol = load_protocol(name)
    kinds = ("distiller", "architecture", "attack", "dataset")
    for key, options in protocol.options.items():
        label = key.split("@")[0]
        text = protocol.alias.get(label, label)
        offers = [o for o in registry.offers if text.split(":")[0] in (o.name, o.qualified)]
        assert offers, f"[options.{key}] rules nothing"
        assert [o.cls.parse(options) for o in offers]
    known = {o.name for o in registry.offers if o.kind in kinds}
    assert {text.split(":")[0] for text in protocol.alias.values()} <= known
    assert set(protocol.ranked_only) <= known | set(protocol.alias)
    assert set(protocol.test_sha256) <= set(protocol.datasets)


# Errors ---------------------------------------------------------------------------------------


def refusal(path: str) -> str:
    with pytest.raises(RddBenchError) as caught:
        load_protocol(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_valid_file_is_valid(write):
    protocol = load_protocol(write())
    assert protocol.threats[0].eps == [8 / 255, 0.1]
    assert protocol.is_ranked(Threat("linf", 8 / 255))
    assert not protocol.is_ranked(Threat("linf", 0.1))
    assert not protocol.is_ranked(Threat("l2", 8 / 255))


def test_an_unknown_protocol_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"did you mean 'digits-v1'.*must end in .toml"):
        load_protocol("digit-v1")


def test_a_missing_file_is_named(tmp_path):
    assert refusal(str(tmp_path / "no.toml")).endswith("no.toml: No such file or directory")


def test_a_file_that_is_not_toml_is_told_so(write, tmp_path):
    assert "mine.toml is not TOML: " in refusal(write('name = "mine-v1"', "name = mine"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml is not TOML: " in refusal(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds =", "seed =", "seeds: field required; seed: extra inputs are not permitted"),
        ("epochs = 5", "epoch = 5", "recipe.epoch: extra inputs"),
        ("epochs = 5", 'augment = "flop"', "unknown augmentation"),
        ('ranked = "8/255"', "ranked = 0.2", "ranked eps 0.2 is not among the eps"),
        ('norm = "linf"', 'norm = "l1"', "threats.0.norm: input should be 'linf' or 'l2'"),
        ("ipc = [1]", 'ipc = ["x"]', "ipc.0: "),
        ("seeds = [0]", 'seeds = [0]\ntracks = ["autor"]', "unknown track 'autor'; known: natural"),
    ],
)
def test_a_broken_rule_is_named(write, old, new, message):
    found = refusal(write(old, new))
    assert message in found
    assert "mine.toml" in found


@pytest.mark.parametrize("eps", ['"8 levels"', '"1/2/3"', '"1/0"', "[1]", "{ a = 1 }", '"nan"'])
def test_a_budget_that_is_none_is_an_error_in_words(write, eps):
    assert refusal(write('ranked = "8/255"', f"ranked = {eps}"))


# Budgets --------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_fraction_is_exactly_that_fraction(a, b):
    assert parse_eps(f"{a}/{b}") == a / b
    assert parse_eps(f" {a} / {b} ") == a / b


@given(st.floats(0, 1, allow_nan=False))
def test_a_number_is_that_number_as_text_too(value):
    assert parse_eps(value) == value
    assert parse_eps(repr(value)) == value


@given(st.text())
def test_any_other_text_is_refused_in_words(text):
    try:
        value = parse_eps(text)
    except RddBenchError as error:
        assert str(error).endswith("is not a budget; write 0.1 or 8/255")  # noqa: PT017
    else:
        assert isinstance(value, float)


@given(st.integers(1, 254))
def test_grey_levels_survive_being_written_and_read(levels):
    assert format_eps(levels / 255) == f"{levels}/255"
    assert parse_eps(format_eps(levels / 255)) == levels / 255


@given(st.floats(1e-4, 1))
def test_any_budget_is_read_back_to_four_digits(eps):
    assert math.isclose(parse_eps(format_eps(eps)), eps, rel_tol=1e-3)


def test_grey_levels_instead_of_pixels_are_refused_with_a_hint():
    with pytest.raises(RddBenchError, match=r"larger than .* \[0, 1\]; write 8/255 if you meant 8"):
        Threat("linf", 8.0)
    assert Threat("l2", 8.0).eps == 8  # a long way in L2 is no mistake
    assert Threat("linf", 1.0).eps == 1
    with pytest.raises(RddBenchError, match="negative"):
        Threat("l2", -0.1)


# Identity -------------------------------------------------------------------------------------


def values(**changes: Any) -> dict[str, Any]:
    return {**load_protocol(DEFAULT).model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    "selection",
    [
        {"distillers": ["random"]}, {"architectures": ["mlp"]}, {"attacks": ["fgsm"]},
        {"ipc": [3]}, {"references": []}, {"summary": "Other words."}, {"options": {}},
        {"test_sha256": {}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_is_run_does_not_change_the_protocol(selection):
    changed = parse_protocol(values(**selection), "changed")
    assert changed.sha256 == load_protocol(DEFAULT).sha256


@pytest.mark.parametrize(
    "rule",
    [
        {"recipe": {"epochs": 299}}, {"batch_size": 1}, {"subset": {"test_per_class": 7}},
        {"control": "dm"}, {"name": "digits-v2"},
        {"threats": [{"norm": "linf", "eps": [0.1], "ranked": 0.1}]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_decides_numbers_changes_the_protocol(rule):
    changed = parse_protocol(values(**rule), "changed")
    assert changed.sha256 != load_protocol(DEFAULT).sha256


@pytest.mark.parametrize(
    "path",
    sorted(p for p in PUBLISHED.glob("*/*.jsonl") if p.stem != "environments"),
    ids=lambda p: p.stem,
)
def test_published_records_obey_the_protocol_that_is_shipped(path):
    records, problems = read_records([path])
    assert problems == []
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert steps
    assert {record.protocol_sha256 for record in steps} == {load_protocol(path.parent.name).sha256}
