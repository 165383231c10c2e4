"""What attacks say of each other: with the noise of draws forgiven, and nothing beyond it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdd_bench.consistency import (
    Evidence,
    check_black_box,
    check_noise,
    check_strength,
    contradictions,
    evidence_of,
)
from rdd_bench.records import Flag
from rdd_bench.results import join
from rdd_bench.standings import make_tables, row_flags

IMAGES = 200


def left(label: str, *counts: int, access: Any = "white", beats: str = "") -> Evidence:
    """Return an attack that leaves the first so many of 200 images, on each network."""
    return Evidence(label, label, access, frozenset({beats} - {""}), bits(*counts))


def bits(*counts: int) -> list[Any]:
    return [np.arange(IMAGES) < count for count in counts]


# Strength -------------------------------------------------------------------------------------


def strength(strong: str, weak: str, beats: str = "pgd") -> list[Flag]:
    def given_bits(label: str, text: str, beats: str = "") -> Evidence:
        outcomes = [np.array([bit == "1" for bit in text])]
        return Evidence(label, label, "white", frozenset({beats} - {""}), outcomes)

    best = given_bits("autoattack", strong, beats)
    return check_strength(best, [best, given_bits("pgd", weak)])


def test_a_strong_attack_that_loses_is_flagged_in_words():
    (flag,) = strength("1" * 60 + "0" * 40, "1" * 50 + "0" * 50)
    assert flag.name == "weaker-than"
    assert flag.value == pytest.approx(0.1)
    assert "autoattack leaves 10.0 points more than pgd" in flag.message


@pytest.mark.parametrize(
    "outcomes",
    [
        ("1" * 50 + "0" * 50, "1" * 60 + "0" * 40),  # as it should be
        ("1" * 51 + "0" * 49, "1" * 50 + "0" * 50),  # within the noise of draws
        ("0" * 50 + "1" * 50, "1" * 50 + "0" * 50),  # as strong, on other images
    ],
)
def test_a_strong_attack_that_does_not_lose_is_not_flagged(outcomes):
    assert strength(*outcomes) == []


def test_an_attack_that_claims_nothing_is_not_flagged():
    assert strength("1" * 60 + "0" * 40, "1" * 50 + "0" * 50, beats="fgsm") == []


# Access ---------------------------------------------------------------------------------------


def test_a_black_box_is_compared_with_all_white_boxes_together():
    """Each of them alone is weaker; on every image one of them is not."""
    first, second = bits(100)[0], ~bits(100)[0]
    white = [
        Evidence("a", "a", "white", frozenset(), [first]),
        Evidence("b", "b", "white", frozenset(), [second]),
    ]
    square = left("square", 50, access="black")
    assert check_black_box(square, [*white, square]) == []
    (flag,) = check_black_box(square, [white[0], square])
    assert flag.value == pytest.approx(50 / IMAGES)


@pytest.mark.parametrize(("count", "flagged"), [(98, False), (97, True), (150, False)])
def test_a_point_between_black_and_white_is_forgiven(count, flagged):
    pgd, square = left("pgd", 100), left("square", count, access="black")
    assert bool(check_black_box(square, [pgd, square])) is flagged


def test_networks_are_averaged_before_they_are_compared():
    pgd, square = left("pgd", 100, 100), left("square", 80, 120, access="black")
    assert check_black_box(square, [pgd, square]) == []


def test_without_a_white_box_there_is_nothing_to_compare_with():
    square, noise = left("square", 0, access="black"), left("noise", 0, access="none")
    assert contradictions(square, [square, noise], bits(IMAGES)) == []
    assert contradictions(noise, [square, noise], bits(IMAGES)) == []


# Noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "noise", "attack", "flagged"),
    [
        (180, 178, 60, False),  # as it is
        (180, 100, 60, True),  # two thirds of what the attack breaks
        (180, 121, 62, False),  # just half
        (180, 150, 180, True),  # an attack that finds nothing at all
        (180, 178, 180, False),  # a robust network under a tiny budget: neither breaks anything
        (180, 178, 178, False),
        (180, 60, 1, False),  # the attack has nothing left to break
        (0, 0, 0, False),
    ],
)
def test_noise_may_break_half_of_what_gradients_break(clean, noise, attack, flagged):
    mine = left("noise", noise, access="none")
    found = check_noise(mine, [left("pgd", attack), mine], bits(clean))
    assert bool(found) is flagged
    for flag in found:
        assert flag.value == pytest.approx((clean - noise) / IMAGES)


def test_only_the_control_is_flagged_and_only_by_white_boxes():
    noise, square = left("noise", 100, access="none"), left("square", 100, access="black")
    assert check_noise(square, [square, left("pgd", 90)], bits(180)) == []
    assert check_noise(noise, [noise, square], bits(180)) == []


@given(st.lists(st.integers(0, IMAGES), min_size=3, max_size=3))
def test_an_order_as_it_should_be_is_never_flagged(counts):
    """White at most black, and noise nothing: whatever the numbers."""
    white, black, clean = sorted(counts)
    pgd, square = left("pgd", white, beats="fgsm"), left("square", black, access="black")
    noise = left("noise", clean, access="none")
    same = [pgd, square, noise, left("fgsm", black)]
    assert [f for mine in same for f in contradictions(mine, same, bits(clean))] == []


# From records ---------------------------------------------------------------------------------


def test_records_are_compared_under_their_own_threat(book):
    train = book.train(book.distill("dm"), ["1111111111" * 3])
    book.attack(train, ["1111110000" * 3], "pgd")
    book.attack(train, ["1111000000" * 3], "square", access="black")
    book.attack(train, ["0000000000" * 3], "square", access="black", eps=0.2)  # no white box there
    book.attack(train, ["1110000000" * 3], "noise", access="none")
    (row,) = make_tables(join(book.records))[0].rows
    found = {(attack and attack.attack.label, flag.name) for _, attack, flag in row_flags(row)}
    assert found == {("square", "black-box"), ("noise", "noise-control")}


def test_two_images_are_no_proof_where_there_are_few(book):
    train = book.train(book.distill("dm"), ["1" * 60])
    book.attack(train, ["1" * 30 + "0" * 30], "pgd")
    for left, flagged in ((32, False), (33, True)):
        strong = book.attack(
            train, ["1" * left + "0" * (60 - left)], "autoattack", stronger_than=["pgd"]
        )
        (row,) = make_tables(join(book.records))[0].rows
        assert bool(row_flags(row)) is flagged
        book.records.remove(strong)


def test_a_record_says_who_it_is(book):
    train = book.train(book.distill("dm"), ["11", "11"])
    record = book.attack(train, ["10", "00"], "pgd [steps=3]", stronger_than=["fgsm"])
    mine = evidence_of(record.model_copy(update={"attack": book.component("pgd slow")}))
    assert (mine.label, mine.name, mine.access) == ("pgd slow", "pgd", "white")
    assert mine.stronger_than == {"fgsm"}
    assert mine.right == 0.25


def test_flags_of_a_set_stand_on_its_row_once(book):
    flag = Flag(name="out-of-range", message="half of the pixels lie outside", value=0.5)
    distill = book.distill("dm", flags=[flag])
    for architecture in ("convnet", "mlp"):
        book.attack(book.train(distill, ["1111"], architecture), ["1000"])
    (row,) = make_tables(join(book.records))[0].rows
    assert [flag.name for _, _, flag in row_flags(row)] == ["out-of-range"]
