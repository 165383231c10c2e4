"""Two rows image by image: the exact test, the bootstrap, and what is paired with what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rdd_bench.cli_compare import compare as command
from rdd_bench.comparison import bootstrap_interval, compare, difference, mcnemar_p
from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.metrics import estimate
from rdd_bench.records import to_line
from rdd_bench.results import join
from rdd_bench.standings import make_tables

LINF = ("linf", 0.1)

# McNemar --------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_images_that_differ(b, c):
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_p(b, c) == pytest.approx(expected)
    assert mcnemar_p(c, b) == mcnemar_p(b, c)


def test_mcnemar_by_hand():
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar_p(2, 8) == pytest.approx(2 * tail)
    assert mcnemar_p(0, 6) == pytest.approx(2 / 2**6)


def test_mcnemar_keeps_its_level():
    """Networks that are as good as each other differ significantly in at most 5 % of cases."""
    generator = np.random.default_rng(0)
    counts = generator.binomial(40, 0.5, 2000)
    assert np.mean([mcnemar_p(int(b), 40 - int(b)) < 0.05 for b in counts]) < 0.05


# Bootstrap ------------------------------------------------------------------------------------


def plain_bootstrap(scores: np.ndarray, count: int) -> tuple[float, float]:
    """Resample rows and columns one after the other, as one would write it first."""
    generator = np.random.default_rng(1)
    seeds, images = scores.shape
    means = [
        scores[
            np.ix_(generator.integers(seeds, size=seeds), generator.integers(images, size=images))
        ].mean()
        for _ in range(count)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_the_bootstrap_is_that_of_rows_and_columns():
    generator = np.random.default_rng(0)
    scores = generator.integers(-1, 2, (5, 80)) + generator.integers(0, 2, (5, 1)) * 1.0
    assert bootstrap_interval(scores) == pytest.approx(plain_bootstrap(scores, 6000), abs=0.02)


@pytest.mark.parametrize("seeds", [1, 30])
def test_the_bootstrap_agrees_with_the_normal_interval(seeds):
    generator = np.random.default_rng(0)
    luck = generator.normal(0, 0.1, (seeds, 1)) * (seeds > 1)
    scores = generator.choice([-1.0, 0, 1], p=[0.1, 0.6, 0.3], size=(seeds, 500)) + luck
    e = estimate(scores)
    low, high = bootstrap_interval(scores)
    assert (low, high) == pytest.approx((e.low, e.high), abs=0.15 * (e.high - e.low))


def test_the_bootstrap_covers_what_it_should():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        scores = generator.choice([-1.0, 0, 1], p=[0.1, 0.6, 0.3], size=(1, 150))
        low, high = bootstrap_interval(scores)
        covered += low <= 0.2 <= high
    assert 89 <= covered <= 100  # 95 expected, with a deviation of 2.2


def test_whole_sets_are_resampled():
    """Ten networks on two sets that differ: the interval is that of two values."""
    scores = np.repeat([[0.0] * 50, [1.0] * 50], 5, axis=0)
    assert bootstrap_interval(scores, [0] * 5 + [1] * 5) == (0.0, 1.0)
    low, high = bootstrap_interval(scores)
    assert 0.1 < low < high < 0.9


def test_the_bootstrap_of_the_same_scores_is_the_same_interval():
    scores = np.random.default_rng(0).integers(-3, 4, (5, 300)) / 3
    np.random.seed(1)
    first = bootstrap_interval(scores)
    np.random.seed(2)
    assert bootstrap_interval(scores) == first


def test_many_images_are_resampled_in_blocks():
    """Of 166 draws, the last one smaller."""
    low, high = bootstrap_interval(np.tile([[0.0, 1.0]], (1, 3000)))
    half = 1.96 * 0.5 / math.sqrt(6000)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.1 * half)


# Rows -----------------------------------------------------------------------------------------


def bits(*texts: str) -> np.ndarray:
    return np.array([[float(bit) for bit in text] for text in texts])


def test_every_pair_of_networks_has_a_test_of_its_own():
    first = [bits("11111111", "11110000"), bits("11110000", "10101010")]
    second = [bits("00000000", "11111000"), bits("11110000", "01010101")]
    found = difference(first, second, [0, 0])
    assert (found.mcnemar.only_first, found.mcnemar.only_second) == (8 + 4, 1 + 4)
    ps = [mcnemar_p(8, 0), mcnemar_p(0, 1), 1.0, mcnemar_p(4, 4)]
    assert found.mcnemar.median_p == np.median(ps)
    assert (found.mcnemar.significant, found.mcnemar.networks) == (1, 4)
    apart = (first[0] - second[0] + first[1] - second[1]) / 2
    assert found.estimate == estimate(apart, [0, 0])


@pytest.fixture
def pair(book: Any) -> Any:
    """The control and a method, in three and two seeds, under two attacks."""
    for label, clean, pgd, strong in (
        ("random", ["1110"] * 3, ["1100", "1000", "0000"], ["1100", "0000", "0000"]),
        ("dm", ["1111"] * 2, ["1110", "1100"], ["1010", "1100"]),
    ):
        control = label == "random"
        distill = book.distill(label, role="baseline" if control else "method", control=control)
        train = book.train(distill, clean)
        book.attack(train, pgd, "pgd")
        book.attack(train, strong, "autoattack")
    return book


def compared(book: Any, first: str, second: str) -> Any:
    (table,) = make_tables(join(book.records))
    rows = {row.label: row for row in table.all_rows()}
    return compare(table, LINF, rows[first], rows[second])


def test_rows_are_compared_in_the_seeds_that_both_have(pair):
    found = compared(pair, "dm", "random")
    assert found.seeds == [(0, 0), (0, 1)]
    assert found.clean.estimate.mean == 0.25
    assert found.worst.estimate == estimate(bits("1010", "1100") - bits("1100", "0000"))
    assert (found.worst.mcnemar.only_first, found.worst.mcnemar.only_second) == (1 + 2, 1)


def test_the_other_way_round_everything_is_mirrored(pair):
    there, back = compared(pair, "dm", "random"), compared(pair, "random", "dm")
    assert back.worst.estimate.mean == -there.worst.estimate.mean
    assert back.worst.mcnemar.only_first == there.worst.mcnemar.only_second
    assert back.worst.mcnemar.median_p == there.worst.mcnemar.median_p


def test_with_equal_seeds_it_is_the_gain_of_the_table(book):
    book.cell("random", ["1111"] * 2, ["1100", "1000"], control=True, role="baseline")
    book.cell("dm", ["1111"] * 2, ["1110", "1100"])
    (table,) = make_tables(join(book.records))
    gain = next(s.gain for s in table.standings(LINF) if s.row.label == "dm")
    assert compared(book, "dm", "random").worst.estimate == gain


def test_a_row_that_lacks_a_result_or_every_seed_is_not_compared(pair):
    pair.cell("half", ["1111"], ["1111"])
    assert compared(pair, "dm", "half") is None
    train = pair.train(pair.distill("late"), ["1111"], seeds=[7])
    for attack in ("pgd", "autoattack"):
        pair.attack(train, ["1100"], attack)
    assert compared(pair, "dm", "late") is None


# The command ----------------------------------------------------------------------------------


def run(book: Any, folder: Path, *arguments: str) -> Result:
    path = folder / "results.jsonl"
    path.write_text("".join(to_line(record) for record in book.records), encoding="utf-8")
    return CliRunner().invoke(command, [str(path), *arguments])


def test_the_command_prints_every_table_that_holds_both(pair, tmp_path):
    pair.cell("dm", ["1111"], ["1100"], ipc=1)
    answer = run(pair, tmp_path, "dm", "random")
    assert answer.exit_code == 0
    assert (
        "toy-v1, digits, 10 images per class, natural track, L∞ 0.1: dm minus random, 2 seeds"
        in (answer.output)
    )
    assert "1 image per class" not in answer.output  # the control has no such size
    clean, worst = [line.split() for line in answer.output.splitlines()[2:4]]
    assert clean[:2] == ["clean", "+25.0"]
    assert worst[:3] == ["worst", "case", "+25.0"]
    assert worst[-6:-4] == ["3", "1"]


def test_the_command_says_what_it_could_not_compare(pair, tmp_path):
    pair.cell("half", ["1111"], ["1111"])
    answer = run(pair, tmp_path, "dm", "half")
    assert "not compared, because results or common seeds are missing" in answer.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["dm", "rnadom"], "did you mean 'random'"),
        (["dm", "mat"], "not the name of a row"),
        (["dm", "random", "--protocol", "toy-v2"], "did you mean 'toy-v1'"),
    ],
)
def test_names_that_nothing_answers_to_are_refused(pair, tmp_path, arguments, sentence):
    error = run(pair, tmp_path, *arguments).exception
    assert isinstance(error, UnknownNameError)
    assert sentence in str(error)


def test_rows_that_never_meet_are_refused(pair, tmp_path):
    pair.cell("alone", ["1111"], ["1100"], ipc=1)
    error = run(pair, tmp_path, "dm", "alone").exception
    assert isinstance(error, RddBenchError)
    assert str(error) == "no table holds both 'dm' and 'alone'; nothing to compare"
