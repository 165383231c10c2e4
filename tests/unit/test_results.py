"""Joining records: one result of each thing, and no two things under one label."""

from __future__ import annotations

from rdd_bench.results import join


def test_a_result_of_newer_code_replaces_the_older_one(book):
    old = book.cell("dm", ["1100"], ["1000"])
    new = book.cell("dm", ["1111"], ["1110"], created="2026-02-02T00:00:00+00:00")
    results = join(book.records)
    assert [cell.distill.address for cell in results.cells] == [new.distill]
    assert old.distill not in {distill.address for distill in results.distills}


def test_more_seeds_count_before_newer_ones(book):
    distill = book.distill("dm")
    several = book.train(distill, ["1100", "1110"])
    book.train(distill, ["1111"], created="2026-02-02T00:00:00+00:00")
    assert [cell.train.address for cell in join(book.records).cells] == [several.address]


def test_another_option_another_seed_and_another_size_are_other_things(book):
    for given in ({}, {"seed": 1}, {"ipc": 1}):
        book.train(book.distill("dm", **given), ["1100"])
    changed = book.component("dm", iterations=5)
    book.records.append(
        book.distill("dm").model_copy(update={"distiller": changed, "address": "x"})
    )
    assert len(join(book.records).distills) == 4


def test_one_label_for_two_sets_of_options_is_told_apart(book):
    first = book.distill("dm")
    other = book.component("dm", iterations=5)
    book.records.append(first.model_copy(update={"distiller": other, "address": "other"}))
    labels = {distill.distiller.label for distill in join(book.records).distills}
    assert len(labels) == 2
    assert all(label.startswith("dm #") for label in labels)


def test_other_options_at_another_size_need_no_other_label(book):
    book.distill("dm", ipc=1)
    second = book.distill("dm", ipc=10)
    other = book.component("dm", iterations=5)
    book.records[-1] = second.model_copy(update={"distiller": other})
    assert {distill.distiller.label for distill in join(book.records).distills} == {"dm"}


def test_a_record_without_its_parent_is_left_out(book):
    book.cell("dm", ["1100"], ["1000"])
    orphans = [record for record in book.records if record.kind != "distill"]
    assert join(orphans).cells == []
