"""The chart of a table: every row is where its figures say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_bench.chart import BOTTOM, LEFT, RIGHT, TOP, Scale, chart
from rdd_bench.results import join
from rdd_bench.standings import make_tables

LINF = ("linf", 0.1)
SVG = "{http://www.w3.org/2000/svg}"


def bits(count: int, length: int = 40) -> str:
    return ("1" * count).ljust(length, "0")


@pytest.fixture
def table(book):
    book.cell("whole", [bits(40)], [bits(30)], ipc=0, role="reference")
    for ipc, clean, robust in ((3, 20, 5), (10, 30, 15)):
        given_ = {"ipc": ipc, "role": "baseline", "control": True}
        book.cell("random", [bits(clean)], [bits(robust)], **given_)
    book.cell("a <method>", [bits(28)], [bits(20)])
    book.cell("dc", [bits(36)], [bits(12)])
    return next(t for t in make_tables(join(book.records)) if t.ipc == 10)


def drawn(table) -> ElementTree.Element:
    picture = chart(table, LINF, "A title & more")
    assert picture is not None
    return ElementTree.fromstring(picture)


def markers(picture: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Return where the numbered circles are, by number."""
    big = [c for c in picture.iter(f"{SVG}circle") if float(c.get("r", 0)) > 5]
    places = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in big]
    numbers = [
        t.text or "" for t in picture.iter(f"{SVG}text")
        if any(t.get("x") == f"{x:.1f}" and t.get("y") == f"{y + 3.5:.1f}" for x, y in places)
    ]  # fmt: skip
    return dict(zip(numbers, places, strict=True))


def test_higher_is_more_robust_and_further_right_more_accurate(table):
    found = markers(drawn(table))
    method, random, dc = (found[number] for number in "123")  # in the order of ranks
    assert method[1] < random[1] < dc[1]
    assert method[0] < random[0] < dc[0]
    # Clean accuracies 28, 30 and 36 of 40 lie on a line.
    assert (dc[0] - random[0]) / (random[0] - method[0]) == pytest.approx(3, rel=0.01)
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in (method, random, dc))


def test_rows_are_listed_with_their_figures(table):
    texts = [text.text for text in drawn(table).iter(f"{SVG}text")]
    assert "A title & more" in texts
    for label, figures in (("a <method>", "70 / 50"), ("dc", "90 / 30"), ("whole", "100 / 75")):
        assert texts[texts.index(label) + 1] == figures


def test_the_control_is_a_line_through_its_sizes(table):
    (line,) = drawn(table).iter(f"{SVG}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
    random = markers(drawn(table))["2"]
    assert len(points) == 2
    assert points[1] == pytest.approx(random, abs=0.1)  # its ten images a class are a row too
    assert points[0][0] < points[1][0]


def test_many_rows_with_long_names_fit(book):
    for number in range(24):
        book.cell(f"mfc-partial changed=eps={number:02}", [bits(30)], [bits(10)])
    (table,) = make_tables(join(book.records))
    picture = drawn(table)
    lowest = max(float(text.get("y", 0)) for text in picture.iter(f"{SVG}text"))
    assert lowest < float(picture.get("height", 0))
    labels = {text.text for text in picture.iter(f"{SVG}text") if "…" in (text.text or "")}
    assert len(labels) == 24  # cut, and still told apart


def test_a_table_without_a_ranking_has_no_chart(book):
    book.train(book.distill("dm"), [bits(40)])
    (table,) = make_tables(join(book.records))
    assert chart(table, LINF, "") is None


def test_the_same_table_gives_the_same_picture(table):
    assert chart(table, LINF, "x") == chart(table, LINF, "x")
    assert not re.search(r"nan|inf", chart(table, LINF, "x") or "")


@given(st.floats(0, 1), st.floats(0.02, 1))
def test_ticks_are_few_round_and_inside(low, width):
    scale = Scale(low, low + width, 0, 100)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 11
    assert all(low - 1e-6 <= tick <= low + width + 1e-6 for tick in ticks)
    assert all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in ticks)
