"""Records to Markdown: what a reader is shown, word for word where it matters."""

from __future__ import annotations

import re

import pytest

from rdd_bench.errors import UnknownNameError
from rdd_bench.leaderboard import publish, render, summary_rows
from rdd_bench.records import Flag, parse_lines
from rdd_bench.results import join, results_frame
from rdd_bench.standings import make_tables


@pytest.fixture
def finished(book):
    """Two methods, a baseline that is the control, and a reference, at two IPC."""
    book.environment(packages={"torch": "2.6.0"}, cpu_threads=1)
    whole = book.distill("whole", ipc=0, role="reference", images=1297)
    book.attack(book.train(whole, ["1111"] * 2, track="reference"), ["1110"] * 2)
    for ipc in (1, 10):
        book.cell("random", ["1100"] * 2, ["1000"] * 2, ipc=ipc, role="baseline", control=True)
        book.cell("dm", ["1110"] * 2, ["1100"] * 2, ipc=ipc)
    return book


def section(text: str, heading: str) -> str:
    assert f"\n## {heading}\n" in text, text
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the first Markdown table in a text, without its heading."""
    lines = re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def heading(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("|"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rendering_twice_gives_the_same_text(finished):
    first = render(finished.records)
    assert render(finished.records) == first
    assert first.endswith("\n")


def test_every_table_has_its_rows_and_the_references(finished):
    text = render(finished.records)
    for heading in (
        "digits, 1 image per class, natural track",
        "digits, 10 images per class, natural track",
    ):
        rows = table_rows(section(text, heading))
        assert [row[:2] for row in rows] == [["1–2", "dm"], ["1–2", "random"], ["ref", "*whole*"]]


def test_a_row_says_what_was_measured(finished):
    text = render(finished.records)
    dm, random, whole = table_rows(section(text, "digits, 10 images per class, natural track"))
    assert dm[2].startswith("75.0 ± 0.0 [")
    assert dm[3] == "50.0 ± 0.0"
    assert dm[4].startswith("50.0 ± 0.0 [")
    assert dm[5].startswith("+25.0 [")
    assert random[5] == "–"
    assert whole[5].startswith("+50.0 [")
    assert dm[6] == "–"  # no number of random images is as accurate as dm
    assert dm[7:] == ["100", "25,600", "1×2", "none"]
    assert whole[7] == "1,297"


def test_a_table_says_what_it_rests_on(finished):
    text = section(render(finished.records), "digits, 1 image per class, natural track")
    assert "Protocol toy-v1 (`aaaaaaaaaaaa`), 4 test images (`777777777777`)" in text
    assert "architectures convnet, training seeds 0, 1, on a slow machine, " in text
    assert "gain at equal clean from random at IPC 1, 10." in text
    assert "**Ranked: L∞ 0.1**" in text


def test_flags_are_said_in_words_and_named_in_the_row(book):
    flag = Flag(name="budget", message="moved images by up to 0.5 (linf); eps is 0.1", value=0.5)
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1000"], "pgd", flags=[flag])
    book.attack(train, ["1111"], "autoattack", stronger_than=["pgd"])
    text = render(book.records)
    assert table_rows(text)[0][-1] == "budget, weaker-than"
    flags = section(text, "Flags")
    where = "dm, IPC 10, natural, convnet"
    assert f"- **budget** ({where}, pgd L∞ 0.1): moved images by up to 0.5 (linf)" in flags
    assert f"- **weaker-than** ({where}, autoattack L∞ 0.1): autoattack leaves 75.0" in flags


def test_without_flags_it_says_so(finished):
    assert "No check of the audit failed." in section(render(finished.records), "Flags")


def test_steps_that_failed_are_listed_with_their_reason(finished):
    finished.distill("broken", status="failed", error="it raised ValueError")
    finished.train(finished.distill("half"), [], status="skipped", error="no recipe of its own")
    lines = section(render(finished.records), "Not finished")
    assert "- broken, IPC 10: failed, it raised ValueError" in lines
    assert "- convnet, natural track: skipped, no recipe of its own" in lines


def test_rows_that_lack_results_are_named_and_still_shown(book):
    train = book.train(book.distill("both"), ["1111"])
    for attack in ("pgd", "autoattack"):
        book.attack(train, ["1100"], attack)
    book.cell("half", ["1111"], ["1111"])
    text = render(book.records)
    assert "Not ranked, because results are missing: half." in text
    assert [row[1] for row in table_rows(text)] == ["both"]
    by_architecture = text.split("By architecture: clean / worst case %")[1]
    assert ["half", "100.0"] in table_rows(by_architecture)


def test_a_table_that_is_trained_but_not_attacked_yet_renders(book):
    book.cell("dm", ["1111"], ["1100"], ipc=10)
    book.train(book.distill("dm", ipc=1), ["1111"])
    text = section(render(book.records), "digits, 1 image per class, natural track")
    assert "Not ranked, because results are missing: dm." in text


def test_architectures_of_different_seeds_render_without_a_rank(book):
    distill = book.distill("dm")
    book.attack(book.train(distill, ["1111"], "convnet"), ["1100"])
    book.attack(book.train(distill, ["1111"] * 3, "mlp"), ["1000"] * 3)
    assert "Not ranked, because results are missing: dm." in render(book.records)


def test_networks_without_any_attack_show_their_clean_accuracy(book):
    book.train(book.distill("dm"), ["1110"])
    rows = table_rows(render(book.records))
    assert rows[0][0] == "dm"
    assert rows[0][1].startswith("75.0 [")


@pytest.mark.parametrize("what", ["nothing", "an environment", "a set", "a failure"])
def test_records_without_a_network_say_so(book, what):
    if what == "an environment":
        book.environment()
    elif what == "a set":
        book.distill("dm")
    elif what == "a failure":
        book.distill("dm", status="failed", error="why")
    assert "No finished results yet." in render(book.records)


def test_records_without_times_render(book):
    train = book.train(book.distill("dm", seconds={}), ["1111"], seconds={})
    book.attack(train, ["1100"], seconds={})
    assert "Cost" in render(book.records)


def test_costs_are_per_set_and_per_network(finished):
    text = section(render(finished.records), "digits, 10 images per class, natural track")
    costs = text.split("\nCost")[1]
    dm = dict(zip(heading(costs), table_rows(costs)[0], strict=True))
    assert dm["Distiller"] == "dm"
    assert dm["Distil s a set"] == "3.00 (matching 2.00)"
    assert dm["Train s a network"] == "0.50"  # one second for two of them
    assert dm["Attack s a network"] == "1.00"


def test_versions_say_every_plugin_and_option(finished):
    text = section(render(finished.records), "Versions")
    for label in ("convnet", "dm", "pgd", "random", "whole"):
        assert re.search(rf"\| {label} +\| rdd-bench/{label} 1.0 \(`55555555`\)", text)
    assert "`environment-1`: a slow machine" in text
    assert "torch 2.6.0" in text


# Further tables -------------------------------------------------------------------------------


def cells_under(text: str, title: str, distiller: str) -> dict[str, str]:
    """Return the cells of one row of the table that follows a title."""
    table = text.split(title)[1]
    row = next(r for r in table_rows(table) if r[0] == distiller)
    return dict(zip(heading(table), row, strict=True))


def test_the_gain_at_equal_clean_has_a_column(book):
    for ipc, clean, robust in ((1, "1000", "0000"), (10, "1110", "1100")):
        book.cell("random", [clean], [robust], ipc=ipc, role="baseline", control=True)
    book.cell("dm", ["1010"], ["1010"], ipc=10)
    text = section(render(book.records), "digits, 10 images per class, natural track")
    dm = dict(zip(heading(text), table_rows(text)[0], strict=True))
    # Half of one random image and half of another: 25 % right under attack where dm has 50 %.
    assert dm["Gain at equal clean"].startswith("+25.0 [")
    assert "gain at equal clean from random at IPC 1, 10." in text


def test_an_ipc_that_only_serves_matching_has_no_section_but_its_flags_are_said(book):
    flag = Flag(name="budget", message="moved images too far", value=0.5)
    train = book.train(
        book.distill("random", ipc=50, role="baseline", control=True), ["1111"], flags=[flag]
    )
    book.attack(train, ["1100"])
    book.cell("dm", ["1110"], ["1100"], ipc=10)
    text = render(book.records)
    assert "50 images per class" not in text
    assert "- **budget** (random, IPC 50, natural, convnet): moved images too far" in text


def test_the_spread_tells_training_from_sets(book):
    for seed, outcomes in enumerate((["1111", "1110"], ["1100", "1000"])):
        book.cell("dm", ["1111"] * 2, outcomes, seed=seed)
    dm = cells_under(render(book.records), "Spread under L∞ 0.1", "dm")
    assert dm["Worst case, training"] == "17.7"  # of 100 and 75, and of 50 and 25
    assert dm["Worst case, sets"] == "35.4"  # of 87.5 and 37.5
    assert dm["Clean, sets"] == "0.0"
    # Of 25, 50, 75 and 100 % the lower of the two in the middle; 2 of 4 by Clopper and Pearson.
    assert dm["Median network"] == "convnet, seed 0 on set 1: 50.0 [6.8, 93.2]"


def test_one_set_has_no_spread_over_sets(finished):
    dm = cells_under(render(finished.records), "Spread under L∞ 0.1", "dm")
    assert dm["Worst case, sets"] == "–"
    assert dm["Median network"].startswith("convnet, seed 0: 50.0 [")


def test_median_distances_are_means_over_networks(book):
    for label, distances in (("dm", [0.5, 0.25]), ("mat", [0.5, None])):
        train = book.train(book.distill(label), ["1111"] * 2)
        for eps, ranked in ((0.5, True), (1.0, False)):
            given = {"norm": "l2", "eps": eps, "ranked": ranked}
            book.attack(train, ["1100"] * 2, "cw", median_distance=distances, **given)
    book.cell("dc", ["1111"] * 2, ["1100"] * 2)
    text = render(book.records)
    shown = [
        cells_under(text, "Nearest adversarials", label)["cw, L2"] for label in ("dm", "mat", "dc")
    ]
    assert shown == ["0.375", "–", "–"]


def test_without_distances_there_is_no_such_table(finished):
    assert "Nearest adversarials" not in render(finished.records)


def test_scores_of_other_benchmarks_are_shown_when_asked_for(finished):
    text = render(finished.records, ["beard", "dd-ranking"])
    assert cells_under(text, "BEARD's scores", "dm") == {
        "Distiller": "dm", "RR": "0.00", "AE": "100.00", "CREI": "50.00",
    }  # fmt: skip
    assert cells_under(text, "DD-Ranking's scores", "whole")["LRS"] == "–"
    assert "BEARD" not in render(finished.records)


def test_a_benchmark_that_is_not_known_is_refused(finished):
    with pytest.raises(UnknownNameError, match="did you mean 'beard'"):
        render(finished.records, ["bear"])


def test_the_short_tables_of_a_run_have_the_same_rows(finished):
    (table, *_) = make_tables(join(finished.records))
    ((title, rows),) = summary_rows(table)
    assert title == "digits, IPC 1, natural track, L∞ 0.1, %"
    assert [row["Distiller"] for row in rows] == ["dm", "random", "whole"]


# Publishing -----------------------------------------------------------------------------------


def test_published_files_hold_every_record_and_give_the_same_page(finished):
    files = publish(finished.records)
    assert list(files) == ["dm.jsonl", "environments.jsonl", "random.jsonl", "whole.jsonl"]
    records, problems = parse_lines("".join(files.values()).split("\n"))
    assert problems == []
    by_address = {r.address: r for r in finished.records}
    assert {r.address: r for r in records} == by_address
    assert render(sorted(records, key=lambda r: r.address)) == render(
        sorted(finished.records, key=lambda r: r.address)
    )


def test_publishing_does_not_depend_on_the_order_of_records(finished):
    assert publish(finished.records[::-1]) == publish(finished.records)


# As a table for programs ----------------------------------------------------------------------


def test_the_frame_has_a_row_for_every_network_and_budget(finished):
    frame = results_frame(finished.records)
    assert len(frame) == 5 * 2 * 2
    dm = frame.query("distiller == 'dm' and ipc == 1 and attack == 'pgd'")
    assert dm["accuracy"].tolist() == [0.5, 0.5]
    assert dm["seed"].tolist() == [0, 1]
    assert dm["attack_seconds"].tolist() == [1.0, 1.0]
    clean = frame.query("attack == 'none' and distiller == 'whole'")
    assert clean["accuracy"].tolist() == [1.0, 1.0]


def test_the_frame_of_nothing_is_empty(book):
    assert len(results_frame([])) == 0
    assert len(results_frame([book.environment()])) == 0
