"""Who is compared with whom, on records written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rdd_bench.metrics import estimate
from rdd_bench.records import AnyRecord, Flag, QuarantineRecord
from rdd_bench.results import join
from rdd_bench.standings import Standing, Table, make_tables, row_flags

LINF = ("linf", 0.1)


def tables(records: list[AnyRecord]) -> list[Table]:
    return make_tables(join(records))


def only(records: list[AnyRecord]) -> Table:
    (table,) = tables(records)
    return table


def names(standings: list[Standing]) -> list[str]:
    return [s.row.label for s in standings]


def percents(standings: list[Standing]) -> list[float]:
    return [round(100 * s.worst.mean, 6) for s in standings]


def first(text: str, length: int = 40) -> str:
    """Return outcomes with the first ``text`` images right, such as '10'."""
    return ("1" * int(text)).ljust(length, "0")


# Order and ranks ------------------------------------------------------------------------------


def test_rows_are_sorted_by_the_worst_case_and_not_by_the_clean_accuracy(book):
    book.cell("clean", [first("40")], [first("5")])
    book.cell("robust", [first("20")], [first("20")])
    book.cell("middle", [first("30")], [first("12")])
    standings = only(book.records).standings(LINF)
    assert names(standings) == ["robust", "middle", "clean"]
    assert percents(standings) == [50, 30, 12.5]
    assert [round(s.clean.mean, 6) for s in standings] == [0.5, 0.75, 1.0]


def test_the_order_of_records_does_not_matter(book):
    for label, right in (("a", "5"), ("b", "30"), ("c", "5")):
        book.cell(label, [first("40")], [first(right)])
    there = only(book.records).standings(LINF)
    assert only(book.records[::-1]).standings(LINF) == there
    assert names(there) == ["b", "a", "c"]


def test_rows_whose_intervals_overlap_share_ranks(book):
    for label, right in (("best", "400"), ("second", "210"), ("third", "200")):
        book.cell(label, [first("400", 400)], [first(right, 400)])
    standings = only(book.records).standings(LINF)
    assert [s.rank for s in standings] == [(1, 1), (2, 3), (2, 3)]


def test_a_row_in_quarantine_is_shown_and_not_ranked(book):
    for label, right in (("best", "35"), ("wrong", "39"), ("control", "10")):
        book.cell(label, [first("40")], [first(right)], control=label == "control")
    wrong = next(r for r in book.records if r.kind == "train" and r.distill == "distill-003")
    book.records.append(
        QuarantineRecord(address="q", target=wrong.address, reason="a bug", created="2026")
    )
    standings = only(book.records).standings(LINF)
    assert names(standings) == ["best", "control", "wrong"]
    assert [s.rank for s in standings] == [(1, 1), (2, 2), None]
    assert standings[-1].row.quarantined() == ["a bug"]


def test_noise_is_a_column_and_ranks_nothing(book):
    train = book.train(book.distill("dm"), [first("40")])
    book.attack(train, [first("30")], "noise", access="none", standard=True)
    assert only(book.records).standings(LINF) == []
    book.attack(train, [first("35")], "pgd", standard=True)
    (standing,) = only(book.records).standings(LINF)
    assert only(book.records).ranking_attacks(LINF) == ["pgd"]
    assert standing.worst.mean == 35 / 40
    assert standing.by_attack["noise"].mean == 30 / 40


def test_nothing_is_compared_with_a_control_in_quarantine(book):
    book.cell("dm", [first("40")], [first("20")])
    attack = book.cell("random", [first("40")], [first("10")], control=True)
    assert only(book.records).standings(LINF)[0].gain is not None
    book.records.append(
        QuarantineRecord(address="q", target=attack.address, reason="a bug", created="2026")
    )
    table = only(book.records)
    assert table.standings(LINF)[0].gain is None
    assert table.control_sets(LINF) == []


def test_the_worst_case_is_over_attacks_image_by_image(book):
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1100"], "pgd")
    book.attack(train, ["0110"], "autoattack", stronger_than=["pgd"])
    table = only(book.records)
    (standing,) = table.standings(LINF)
    assert standing.worst.mean == 0.25
    assert {a: e.mean for a, e in standing.by_attack.items()} == {"pgd": 0.5, "autoattack": 0.5}
    assert table.attacks(LINF) == ["pgd", "autoattack"]  # the strongest last


def test_figures_are_means_over_architectures(book):
    distill = book.distill("dm")
    book.attack(book.train(distill, ["1111"], "convnet"), ["1111"])
    book.attack(book.train(distill, ["1100"], "mlp"), ["0000"])
    (standing,) = only(book.records).standings(LINF)
    assert standing.clean.mean == 0.75
    assert standing.worst.mean == 0.5
    assert standing.row.robust("mlp", ["pgd"], LINF).mean() == 0


def test_distillation_seeds_are_seeds_too(book):
    for seed, right in enumerate(("1111", "1100")):
        book.cell("dm", ["1111"], [right], seed=seed)
    (standing,) = only(book.records).standings(LINF)
    assert standing.worst.mean == 0.75
    assert standing.worst.std == pytest.approx(math.sqrt(0.125))


# References -----------------------------------------------------------------------------------


def reference(book: Any, label: str = "whole", right: str = "1111", **given: Any) -> Any:
    distill = book.distill(label, ipc=0, role="reference", **given)
    return book.attack(book.train(distill, ["1111"], track="reference"), [right])


def test_references_stand_in_every_table_unranked_and_at_the_end(book):
    reference(book)
    for ipc in (1, 10):
        distill = book.distill("dm", ipc=ipc)
        for track in ("natural", "author"):
            book.attack(book.train(distill, ["1111"], track=track), ["1000"])
    made = tables(book.records)
    assert [(t.ipc, t.track) for t in made] == [
        (1, "author"), (1, "natural"), (10, "author"), (10, "natural"),
    ]  # fmt: skip
    for table in made:
        standings = table.standings(LINF)
        assert [(s.row.label, s.rank) for s in standings] == [("dm", (1, 1)), ("whole", None)]


def test_references_alone_make_a_table(book):
    reference(book)
    table = only(book.records)
    assert (table.ipc, table.track, table.rows) == (0, "reference", [])
    assert names(table.standings(LINF)) == ["whole"]


# Completeness ---------------------------------------------------------------------------------


def test_a_row_that_lacks_an_attack_is_not_ranked_but_named(book):
    train = book.train(book.distill("both"), ["1111"])
    book.attack(train, ["1100"], "pgd")
    book.attack(train, ["1000"], "autoattack")
    book.cell("half", ["1111"], ["1111"])
    table = only(book.records)
    assert names(table.standings(LINF)) == ["both"]
    assert [row.label for row in table.incomplete(LINF)] == ["half"]


def test_a_row_that_lacks_an_architecture_is_not_ranked_but_named(book):
    both = book.distill("both")
    for architecture in ("convnet", "mlp"):
        book.attack(book.train(both, ["1111"], architecture), ["1100"])
    book.cell("half", ["1111"], ["1111"])
    table = only(book.records)
    assert table.architectures == ["convnet", "mlp"]
    assert names(table.standings(LINF)) == ["both"]
    assert [row.label for row in table.incomplete(LINF)] == ["half"]


def test_a_table_that_was_not_attacked_yet_ranks_nobody(book):
    """As it is when a run is interrupted: the other IPC is finished, this one is trained."""
    book.cell("dm", ["1111"], ["1100"], ipc=10)
    book.train(book.distill("dm", ipc=1), ["1111"])
    table = tables(book.records)[0]
    assert (table.ipc, table.ranked) == (1, [LINF])
    assert table.standings(LINF) == []
    assert [row.label for row in table.incomplete(LINF)] == ["dm"]


def test_architectures_trained_in_different_seeds_are_not_averaged(book):
    distill = book.distill("dm")
    book.attack(book.train(distill, ["1111"], "convnet"), ["1100"])
    book.attack(book.train(distill, ["1111"] * 3, "mlp"), ["1000"] * 3)
    table = only(book.records)
    assert table.standings(LINF) == []
    assert [row.label for row in table.incomplete(LINF)] == ["dm"]


def test_a_run_repeated_with_more_seeds_counts_once(book):
    distill = book.distill("dm")
    book.attack(book.train(distill, ["1111"]), ["1111"])
    book.attack(book.train(distill, ["1111"] * 3), ["1000"] * 3)
    (standing,) = only(book.records).standings(LINF)
    assert standing.worst.mean == 0.25
    assert standing.row.clean("convnet").shape == (3, 4)


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_versions_of_a_plugin_the_later_result_counts(book, backwards):
    for day, right in ((1, "1111"), (2, "1000")):
        created = f"2026-01-0{day}T00:00:00+00:00"
        train = book.train(book.distill("dm"), ["1111"], created=created)
        book.attack(train, [right])
    records = book.records[::-1] if backwards else book.records
    (standing,) = only(records).standings(LINF)
    assert standing.worst.mean == 0.25


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_versions_of_an_attack_the_later_result_counts(book, backwards):
    train = book.train(book.distill("dm"), ["1111"])
    for day, right in ((1, "1111"), (2, "1000")):
        book.attack(train, [right], created=f"2026-01-0{day}T00:00:00+00:00")
    records = book.records[::-1] if backwards else book.records
    (standing,) = only(records).standings(LINF)
    assert standing.worst.mean == 0.25


def test_failed_and_skipped_steps_are_no_rows(book):
    book.cell("dm", ["1111"], ["1100"])
    book.distill("broken", status="failed", error="why")
    train = book.train(book.distill("half"), ["1111"])
    book.attack(train, [], status="failed", error="why")
    table = only(book.records)
    assert names(table.standings(LINF)) == ["dm"]
    assert [row.label for row in table.incomplete(LINF)] == ["half"]


def test_a_record_whose_parent_is_missing_is_left_out(book):
    book.cell("dm", ["1111"], ["1100"])
    lost = book.cell("lost", ["1111"], ["1100"])
    records = [r for r in book.records if r.address != lost.distill]
    assert names(only(records).standings(LINF)) == ["dm"]


# Gain -----------------------------------------------------------------------------------------


def test_the_gain_is_paired_image_by_image_and_seed_by_seed(book):
    book.cell("random", ["1111"] * 2, ["1100", "1000"], control=True, role="baseline")
    book.cell("dm", ["1111"] * 2, ["1110", "1100"])
    dm, control = only(book.records).standings(LINF)
    assert control.gain is None
    assert dm.gain is not None
    assert dm.gain.mean == 0.25
    assert dm.gain.std == 0  # in both seeds one image more; the seeds themselves differ
    assert dm.worst.std > 0


def test_with_other_numbers_of_seeds_only_the_images_are_paired(book):
    book.cell("random", ["1111"], ["1000"], control=True, role="baseline")
    book.cell("dm", ["1111"] * 2, ["1100", "1111"])
    dm, _ = only(book.records).standings(LINF)
    assert dm.gain is not None
    assert dm.gain.mean == 0.5


def test_references_have_a_gain_too(book):
    book.cell("random", ["1111"], ["1000"], control=True, role="baseline")
    reference(book)
    whole = only(book.records).standings(LINF)[-1]
    assert whole.gain is not None
    assert whole.gain.mean == 0.75


def test_without_a_control_there_is_no_gain(book):
    book.cell("random", ["1111"], ["1000"], role="baseline")
    book.cell("dm", ["1111"], ["1100"])
    assert [s.gain for s in only(book.records).standings(LINF)] == [None, None]


# Gain at equal clean --------------------------------------------------------------------------


def controls(book: Any, *sizes: tuple[int, list[str], list[str]], **given: Any) -> None:
    """Write the control at several numbers of images per class."""
    for ipc, clean, robust in sizes:
        book.cell("random", clean, robust, ipc=ipc, role="baseline", control=True, **given)


def matched(book: Any, label: str = "dm") -> Any:
    """Return the gain at equal clean in the table of IPC 10."""
    table = next(t for t in tables(book.records) if t.ipc == 10)
    return next(s for s in table.standings(LINF) if s.row.label == label).matched


def test_between_two_sizes_of_the_control_the_outcomes_are_interpolated(book):
    """Clean 20 and 60 % around the row's 30 %: a quarter of the way."""
    controls(book, (1, [first("8")], [first("4")]), (10, [first("24")], [first("20")]))
    book.cell("dm", [first("12")], [first("10")])
    gain = matched(book)
    assert gain.mean == pytest.approx((10 - (0.75 * 4 + 0.25 * 20)) / 40)
    by_hand = [0.0] * 4 + [0.75] * 6 + [-0.25] * 10 + [0.0] * 20
    assert gain == estimate(np.array([by_hand]))


def test_the_sizes_next_to_the_row_are_used(book):
    controls(
        book,
        (1, [first("4")], [first("4")]),
        (5, [first("10")], [first("6")]),
        (10, [first("20")], [first("8")]),
        (50, [first("40")], [first("40")]),
    )
    book.cell("dm", [first("15")], [first("7")])
    assert matched(book).mean == pytest.approx(0)


@pytest.mark.parametrize(
    ("clean", "worst"),
    [("100", 20), ("200", 60), ("97", 20), ("203", 60), ("96", None), ("204", None)],
)
def test_beyond_the_control_one_point_is_forgiven_and_no_more(book, clean, worst):
    sizes = [("1", "100", "20"), ("10", "200", "60")]
    controls(book, *((int(i), [first(c, 300)], [first(w, 300)]) for i, c, w in sizes))
    book.cell("dm", [first(clean, 300)], [first("60", 300)])
    found = matched(book)
    assert (found and found.mean) == (worst and pytest.approx((60 - worst) / 300))


def test_the_control_and_references_are_not_matched(book):
    controls(book, (1, ["1000"], ["1000"]), (10, ["1111"], ["1100"]))
    reference(book)
    book.cell("dm", ["1110"], ["1000"])
    assert matched(book, "random") is None
    assert matched(book, "whole") is None
    assert matched(book, "dm") is not None


def test_only_sizes_of_the_same_seeds_and_track_are_used(book):
    controls(book, (10, ["1111"] * 2, ["1100"] * 2))
    controls(book, (1, ["1000"], ["1000"]))  # one seed
    train = book.train(
        book.distill("random", ipc=2, role="baseline", control=True), ["1000"] * 2, track="author"
    )
    book.attack(train, ["1000"] * 2)
    book.cell("dm", ["1100"] * 2, ["1000"] * 2)
    assert matched(book) is None


def test_a_control_with_further_seeds_is_used_in_those_of_the_row(book):
    controls(book, (10, ["1100", "1111"], ["1000", "1111"]))
    book.cell("dm", ["1100"], ["1100"])
    assert matched(book).mean == 0.25


def test_a_control_with_other_options_is_not_mixed_in(book):
    controls(book, (10, ["1100"], ["1000"]))
    book.cell("random [augment=]", ["1111"], ["1111"], ipc=50, role="baseline", control=True)
    book.cell("dm", ["1110"], ["1000"])
    assert matched(book) is None


def test_a_size_that_only_serves_matching_is_no_table(book):
    controls(book, (10, ["1111"], ["1100"]), (50, ["1111"], ["1110"]))
    book.cell("dm", ["1111"], ["1000"])
    assert [t.ipc for t in tables(book.records)] == [10]
    assert [row.all_cells()[0].distill.ipc for row in only(book.records).controls] == [10, 50]


def test_a_control_alone_has_its_tables(book):
    controls(book, (10, ["1111"], ["1100"]), (50, ["1111"], ["1110"]))
    assert [t.ipc for t in tables(book.records)] == [10, 50]


# Several distilled sets -----------------------------------------------------------------------


def test_training_seeds_of_one_set_are_no_evidence_about_other_sets(book):
    """Many networks on two sets know little more about the method than the two sets do."""
    for seed, right in enumerate(("20", "30")):
        book.cell("dm", [first("40")] * 5, [first(right)] * 5, seed=seed)
    (standing,) = only(book.records).standings(LINF)
    assert standing.worst.std_train == 0
    assert standing.worst.std_draw == pytest.approx(10 / 40 / math.sqrt(2))
    assert (standing.worst.low, standing.worst.high) == (0, 1)  # t = 12.7 with one degree


# What may not be mixed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"protocol": "toy-v2"}, {"protocol_sha256": "b" * 64}, {"dataset": "mnist"}]
)
def test_protocols_and_data_sets_never_share_a_table(book, other):
    book.cell("dm", ["1111"], ["1000"])
    reference(book)
    book.cell("random", ["1111"], ["1100"], **other)
    made = tables(book.records)
    assert len(made) == 2
    assert sorted(names(t.standings(LINF)) for t in made) == [["dm", "whole"], ["random"]]


def test_other_test_images_never_share_a_table(book):
    book.cell("dm", ["1111"], ["1000"])
    one = book.cell("random", ["1111"], ["1100"])
    train = next(r for r in book.records if r.address == one.train)
    moved = [r for r in book.records if r not in (one, train)]
    moved += [r.model_copy(update={"test_sha256": "8" * 64}) for r in (one, train)]
    assert len(tables(moved)) == 2


def test_options_of_the_user_are_a_row_of_their_own(book):
    book.cell("dm", ["1111"], ["1000"])
    book.cell("dm [lr=3.0]", ["1111"], ["1100"])
    assert names(only(book.records).standings(LINF)) == ["dm [lr=3.0]", "dm"]


def test_only_the_threats_that_the_protocol_ranks_rank(book):
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1100"])
    book.attack(train, ["1000"], eps=0.2, ranked=False)
    book.attack(train, ["1110"], norm="l2", eps=0.5)
    table = only(book.records)
    assert table.ranked == [("l2", 0.5), LINF]
    assert table.threats == [("l2", 0.5), LINF, ("linf", 0.2)]


# Flags ----------------------------------------------------------------------------------------


def test_flags_of_records_and_of_pairs_of_records_are_found(book):
    flag = Flag(name="budget", message="moved images too far", value=0.5)
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1000"], "pgd", flags=[flag])
    book.attack(train, ["1111"], "autoattack", stronger_than=["pgd"])
    (row,) = only(book.records).rows
    assert sorted(flag.name for _, _, flag in row_flags(row)) == ["budget", "weaker-than"]
