"""Options from --config and --set."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_bench.errors import RddBenchError
from rdd_bench.overrides import parse_assignment, read_overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dm.iterations=500", ("dm", "iterations", 500)),
        ("dm.lr=1e-3", ("dm", "lr", 0.001)),
        ("dm@10.lr=2.0", ("dm@10", "lr", 2.0)),
        ("dm.init=noise", ("dm", "init", "noise")),
        ('dm.init="noise"', ("dm", "init", "noise")),
        ("dm.augment=", ("dm", "augment", "")),
        ("pgd.random_start=false", ("pgd", "random_start", False)),
        ("whole-at.eps=8/255", ("whole-at", "eps", "8/255")),
        ('autoattack.attacks=["fab-t"]', ("autoattack", "attacks", ["fab-t"])),
        ("x.text=a=b.c", ("x", "text", "a=b.c")),
        ("timm:resnet10t.a1_in1k.pretrained=true", ("timm:resnet10t.a1_in1k", "pretrained", True)),
        ("my-dist/dm.lr=1", ("my-dist/dm", "lr", 1)),
    ],
)
def test_an_assignment_is_name_option_and_value(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["", "dm", "dm.lr", "dm=3", ".lr=3", "dm.=3", "=3", "lr=0.5"])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(RddBenchError, match=r"expected name.option=value, such as dm.iterations"):
        parse_assignment(text)


@given(st.text("abcdefg-_0123456789", min_size=1), st.none() | st.booleans() | st.integers())
def test_every_json_value_is_read_back(name, value):
    assert parse_assignment(f"{name}.option={json.dumps(value)}") == (name, "option", value)


@pytest.fixture
def config(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


def test_an_assignment_wins_over_the_file_and_the_last_over_the_first(config):
    path = config("[options.dm]\nlr = 2.0\niterations = 7\n[options.'dm@10']\nlr = 5.0\n")
    options = read_overrides(path, ["dm.lr=3.0", "pgd.steps=1", "pgd.steps=2"])
    assert options == {
        "dm": {"lr": 3.0, "iterations": 7}, "dm@10": {"lr": 5.0}, "pgd": {"steps": 2},
    }  # fmt: skip


def test_nothing_given_is_no_option():
    assert read_overrides(None, []) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dm]\nlr = 1.0\n", "'dm' is not expected here; write options as tables such as"),
        ("[options]\ndm = 1\n", r"options.dm is not a table; write \[options.dm\]"),
        ("options = 3\n", "'options' is not expected here"),
        ("lr =\n", "is not TOML"),
    ],
)
def test_a_file_of_another_form_is_refused(config, text, message):
    with pytest.raises(RddBenchError, match=message) as caught:
        read_overrides(config(text), [])
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RddBenchError, match=r"cannot read .*none.toml: No such file"):
        read_overrides(tmp_path / "none.toml", [])
