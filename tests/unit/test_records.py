"""Result lines and bitmaps: what is written is read back, and what is broken is told so."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_bench.errors import RddBenchError
from rdd_bench.outcomes import pack, unpack
from rdd_bench.records import (
    AttackRecord,
    Component,
    DistillRecord,
    EnvironmentRecord,
    Flag,
    QuarantineRecord,
    TrainRecord,
    from_line,
    parse_lines,
    to_line,
)
from rdd_bench.types import AdversarialTraining, Recipe

SCHEMA_1 = Path(__file__).parent.parent / "data" / "schema1.jsonl"

# Bitmaps --------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=70))
def test_bitmaps_are_read_back_image_by_image(outcomes):
    assert unpack(pack(outcomes), len(outcomes)).tolist() == outcomes


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 200))
def test_a_bitmap_of_another_length_is_refused_where_it_can_be_seen(outcomes, count):
    same_bytes = -(-count // 8) == -(-len(outcomes) // 8)
    if same_bytes and not any(outcomes[count:]):
        assert len(unpack(pack(outcomes), count)) == count
    else:
        with pytest.raises(ValueError, match="a bitmap"):
            unpack(pack(outcomes), count)


def test_bits_in_the_padding_are_refused():
    text = base64.b64encode(b"\xff").decode()
    with pytest.raises(ValueError, match="bits set after its 5 images"):
        unpack(text, 5)


@pytest.mark.parametrize("text", ["!!!!", "abc", "é"])
def test_a_text_that_is_not_base64_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        unpack(text, 8)


def test_the_first_image_is_the_first_bit():
    """Bitmaps are published, so the order of their bits never changes."""
    assert pack([True, False, False, False, False, False, False, False, True]) == "gIA="


# Records --------------------------------------------------------------------------------------

texts = st.text(max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
components = st.builds(
    Component,
    name=texts,
    label=texts,
    version=texts,
    source_sha256=texts,
    options=st.dictionaries(texts, values, max_size=3),
)
recipes = st.none() | st.just(Recipe()) | st.just(Recipe(adversarial=AdversarialTraining()))
head = {
    "address": texts, "protocol": texts, "protocol_sha256": texts, "environment": texts,
    "created": texts, "error": st.none() | texts, "architecture": components,
    "seconds": st.dictionaries(texts, numbers, max_size=2),
    "peak_bytes": st.none() | st.integers(0, 2**50),
}  # fmt: skip
statuses: st.SearchStrategy[Any] = st.sampled_from(["done", "failed", "skipped"])


@st.composite
def judged(draw: Any, /, cls: Any, **more: Any) -> Any:
    n = draw(st.integers(1, 20))
    bits = draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=3))
    common = {
        "distill": texts, "track": texts, "flags": st.lists(flags, max_size=2), "status": statuses,
    }  # fmt: skip
    return cls(
        **{name: draw(strategy) for name, strategy in {**head, **common, **more}.items()},
        seeds=list(range(len(bits))),
        n=n,
        correct=[sum(b) for b in bits],
        outcomes=[pack(b) for b in bits],
    )


flags = st.builds(Flag, name=texts, message=texts, value=st.none() | numbers)
distills = st.builds(
    DistillRecord,
    **head,
    status=statuses,
    dataset=texts,
    ipc=st.integers(0, 1000),
    role=st.sampled_from(["method", "baseline", "reference"]),
    distiller=components,
    seed=st.integers(0, 9),
    pixel_range=st.none() | st.tuples(numbers, numbers),
    flags=st.lists(flags, max_size=2),
    notes=st.dictionaries(texts, values, max_size=3),
)
trains = judged(TrainRecord, recipe=recipes, final_loss=st.lists(numbers, max_size=3))
attacks = judged(
    AttackRecord,
    train=texts,
    attack=components,
    norm=st.sampled_from(["linf", "l2"]),
    eps=numbers,
    messages=st.lists(texts, max_size=2),
    access=st.sampled_from(["white", "black", "none"]),
    median_distance=st.lists(st.none() | numbers, max_size=3),
)
environments = st.builds(
    EnvironmentRecord, address=texts, facts=st.dictionaries(texts, values, max_size=3)
)


quarantines = st.builds(QuarantineRecord, address=texts, target=texts, reason=texts, created=texts)


@given(st.one_of(distills, trains, attacks, environments, quarantines))
def test_a_record_is_one_line_that_reads_back(record):
    line = to_line(record)
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert from_line(line) == record


def test_a_line_says_its_schema_and_kind(book):
    book.cell("dm", ["1"], ["1"])
    lines = [json.loads(to_line(r)) for r in (*book.records, book.environment())]
    assert {line["schema"] for line in lines} == {1}
    assert [line["kind"] for line in lines] == ["distill", "train", "attack", "environment"]


def test_bitmaps_of_a_record_come_back_as_booleans(book):
    record = book.cell("dm", ["1011", "0110"], ["1000", "0000"])
    assert [b.tolist() for b in record.bitmaps()] == [[True, False, False, False], [False] * 4]
    assert record.bitmaps()[0].dtype == np.bool_


def test_fields_of_newer_writers_are_survived(book):
    for record in (book.cell("dm", ["1"], ["1"]), *book.records, book.environment()):
        value = {**json.loads(to_line(record)), "written_later": {"anything": 1}}
        assert from_line(json.dumps(value)) == record


def attack_line(book: Any, **changes: Any) -> str:
    value = json.loads(to_line(book.cell("dm", ["101", "110"], ["100", "000"])))
    return json.dumps({**value, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"schema 2 is newer than this rdd-bench reads \(1\); upgrade rdd-bench"),
        ({"schema": 0}, "not a record: attack.schema"),
        ({"kind": "dream"}, "not a record"),
        ({"correct": [2, 0]}, "a bitmap does not hold the 2 correct images it should"),
        ({"correct": [1]}, "seeds, correct and outcomes differ in length"),
        ({"seeds": [0]}, "seeds, correct and outcomes differ in length"),
        ({"n": 30}, "a bitmap of 8 bits for 30 images"),
        ({"outcomes": ["?", "?"]}, "not a record: attack"),
        ({"norm": "l1"}, "not a record: attack.norm"),
        ({"seeds": [], "correct": [], "outcomes": []}, "without a seed or a test image"),
        ({"n": 0, "correct": [0, 0], "outcomes": ["", ""]}, "without a seed or a test image"),
    ],
)
def test_a_wrong_line_is_told_so_in_one_sentence(book, changes, message):
    with pytest.raises(RddBenchError, match=message) as caught:
        from_line(attack_line(book, **changes))
    assert "\n" not in str(caught.value)


def test_a_failed_step_needs_no_outcomes(book):
    changes = {"status": "failed", "error": "why", "correct": [], "outcomes": [], "n": 0}
    assert from_line(attack_line(book, **changes)).status == "failed"  # type: ignore[union-attr]


@given(st.integers(0, 2000))
def test_a_truncated_line_is_told_so(length):
    line = to_line(EnvironmentRecord(address="environment-1", facts={"text": "x" * 2000}))
    with pytest.raises(RddBenchError, match="not a complete line of JSON"):
        from_line(line[:length])


foreign = ["[]", "3", "null", '"text"', "{}", '{"accuracy": 0.9}', '{"kind": "train"}', "[[[[1]]]]"]


@pytest.mark.parametrize("line", [*foreign, "9" * 5000, "[" * 100_000])
def test_foreign_json_is_told_so(line):
    with pytest.raises(RddBenchError, match="not a ") as caught:
        from_line(line)
    assert "\n" not in str(caught.value)


def test_bad_lines_are_numbered_and_the_good_ones_kept(book):
    good = to_line(book.distill("dm"))
    records, problems = parse_lines([good, "", "{", good, '{"kind": "x"}'])
    assert len(records) == 2
    assert [p.split(":")[0] for p in problems] == ["line 3", "line 5"]


# Lines that were published --------------------------------------------------------------------


def test_lines_of_schema_1_load_for_ever():
    """The file is never written again: a change that breaks this breaks published results."""
    records, problems = parse_lines(SCHEMA_1.read_text(encoding="utf-8").split("\n"))
    assert problems == []
    kinds = [(r.kind, getattr(r, "status", "")) for r in records]
    assert kinds == [
        ("environment", ""), ("distill", "done"), ("train", "done"), ("attack", "done"),
        ("attack", "failed"), ("distill", "skipped"),
    ]  # fmt: skip
    environment, distill, train, attack, failed, skipped = records
    assert isinstance(environment, EnvironmentRecord)
    assert environment.facts["packages"]["torch"] == "2.6.0"
    assert isinstance(distill, DistillRecord)
    assert distill.distiller.options == {"iterations": 500, "lr": 1.0}
    assert distill.pixel_range == (-0.25, 1.5)
    assert isinstance(train, TrainRecord)
    assert train.recipe is not None
    assert train.recipe.adversarial is not None
    assert train.recipe.adversarial.eps == 24 / 255
    assert [b.tolist() for b in train.bitmaps()][1] == [True] * 9 + [False]
    assert isinstance(attack, AttackRecord)
    assert (attack.norm, attack.eps, attack.ranked) == ("linf", 24 / 255, True)
    assert attack.correct == [2, 1]
    assert attack.flags[0].name == "budget"
    assert isinstance(failed, AttackRecord)
    assert failed.error
    assert isinstance(skipped, DistillRecord)
