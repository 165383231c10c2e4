"""The commands around a run: what they show, and that they answer at once."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

import rdd_bench
from rdd_bench.protocol import names
from rdd_bench.records import DistillRecord
from rdd_bench.store import read_records

# Answering without torch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["list"], ["plugins"], ["show", "dm"], ["run", "--dry-run"]],
    ids=" ".join,
)
def test_the_command_does_not_import_torch(process, arguments):
    # --help ends the process by itself, so the answer is given on the way out.
    seen = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    command = process.command(*arguments)
    answer = process.finish([*command[:2], seen + command[2], *command[3:]])
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == "False"


def test_rendering_a_leaderboard_does_not_import_torch(tiny, out, process):
    tiny()
    answer = process("leaderboard", out, after="print('torch' in sys.modules)")
    assert answer.code == 0
    assert answer.out.splitlines()[-1] == "False"


# Help and version -----------------------------------------------------------------------------


def test_without_a_command_the_help_is_shown(cli):
    answer = cli()
    assert answer.code == 0
    assert "Usage: rdd-bench" in answer.out
    assert answer.out == cli("--help").out


def test_the_version_is_the_package_s(cli):
    assert cli("--version").out.strip() == f"rdd-bench, version {rdd_bench.__version__}"


# list, show, plugins, check -------------------------------------------------------------------


def test_list_shows_every_kind_with_its_components(cli):
    lines = cli("list").out.splitlines()
    titles = [line.strip() for line in lines]
    assert {"distillers", "architectures", "attacks", "datasets", "protocols"} <= set(titles)
    first_words = {line.split()[0] for line in lines if line.strip()}
    assert {"random", "convnet", "timm:MODEL", "pgd", "digits", "digits-v1"} <= first_words


def test_list_of_one_kind_shows_only_that(cli):
    first_words = {line.split()[0] for line in cli("list", "attacks").out.splitlines() if line}
    assert {"attacks", "pgd"} <= first_words
    assert not {"distillers", "random"} & first_words


def test_list_shows_a_planted_plugin_with_its_distribution(cli, plant):
    plant("attack", "return images")
    (line,) = [line for line in cli("list", "attacks").out.splitlines() if "planted" in line]
    assert line.split() == ["planted", "planted", "1.0", "Planted", "by", "a", "test."]


def test_show_explains_a_component_with_its_options(cli):
    out = cli("show", "pgd").out
    assert out.startswith("attack pgd: ")
    assert f"from rdd-bench {rdd_bench.__version__}, licence MIT" in out
    assert "paper https://arxiv.org/abs/1706.06083" in out
    (steps,) = [line for line in out.splitlines() if line.startswith("steps ")]
    assert steps.split()[1:3] == ["int", "20"]
    assert "Change one with --set pgd.steps=VALUE" in out


@pytest.mark.parametrize("name", ["rdd-bench/pgd", "timm:resnet18"])
def test_show_takes_every_form_of_a_name(cli, name):
    assert cli("show", name).code == 0


def test_show_prints_a_protocol_as_values(cli, protocol):
    lines = cli("show", protocol).out.splitlines()
    assert lines[0] == "protocol tiny-v1: Everything there is, in a second."
    values = dict(line.split(": ", 1) for line in lines[2:])
    assert json.loads(values["seeds"]) == [0, 1]
    assert json.loads(values["recipe"])["epochs"] == 3


@pytest.mark.parametrize("name", names())
def test_every_protocol_can_be_shown_and_planned(cli, name):
    assert cli("show", name).out.startswith(f"protocol {name}: ")
    answer = cli("run", "--protocol", name, "--dry-run")
    assert answer.code == 0, answer.err


def test_plugins_shows_what_loaded_and_what_did_not(cli, plant, install):
    plant("attack", "return images")
    install("broken", "raise ValueError('two\\nlines')")
    install("ancient", "raise SystemError", requires="rdd-bench<0.1")
    out = cli("plugins").out
    loaded, _, refused = out.partition("not loaded")
    assert "attack planted" in loaded
    assert "broken" not in loaded
    reasons = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in _rows(refused)}
    assert reasons == {
        "broken:broken": "ValueError: two lines",
        "ancient:ancient": f"needs rdd-bench<0.1; this is rdd-bench {rdd_bench.__version__}",
    }


def _rows(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[1:]  # without the header


def test_two_plugins_of_one_name_are_told_apart_by_their_distribution(tiny, plant, out):
    plant("attack", "return images", distribution="first")
    plant("attack", "return images", distribution="second")
    mistake = tiny("--attacks", "planted").mistake
    assert "offered by 2 plugins: say first/planted or second/planted" in mistake
    assert tiny("--attacks", "first/planted,second/planted").code == 0


def test_check_tells_every_rule_that_is_kept(cli, plant):
    plant("distiller", "return good_set(task)")
    answer = cli("check", "planted")
    assert answer.code == 0
    *rules, last = answer.out.splitlines()
    assert last == f"planted: {len(rules)} checks passed, 0 failed"
    assert "ok      distiller planted: gives the same set for the same seed" in rules


def test_check_tells_every_rule_that_is_broken(cli, plant):
    plant("distiller", "task.train.images.zero_()\nreturn good_set(task)")
    answer = cli("check", "planted")
    assert answer.code == 1
    failed = [line for line in answer.out.splitlines() if line.startswith("FAILED")]
    assert failed == [
        "FAILED  distiller planted: leaves the training data untouched: distiller 'planted' "
        "(planted 1.0): changed the training images in place; expected a copy"
    ]
    assert answer.out.endswith(", 1 failed\n")


def test_check_survives_whatever_a_plugin_raises(cli, plant):
    plant("distiller", "raise MemoryError")
    answer = cli("check", "planted")
    assert answer.code == 1
    assert "FAILED  distiller planted: gives the same set for the same seed: MemoryError" in (
        answer.out
    )


def test_check_of_a_plugin_that_does_not_load_says_why(cli, install):
    install("planted", "import no_such_module")
    assert "No module named 'no_such_module'" in cli("check", "planted").mistake


# leaderboard ----------------------------------------------------------------------------------


@pytest.fixture
def table(tiny, out) -> str:
    """The table that a run has written."""
    tiny("--distillers", "random,kcenter")
    text: str = (out / "leaderboard.md").read_text()
    return text


def printed(table: str) -> str:
    """Return a table as it is printed: without the charts, which are files beside it."""
    return re.sub(r"!\[.*\]\(charts/.*\)\n\n", "", table) + "\n"


def test_leaderboard_prints_the_table_of_a_run(cli, table, out):
    assert cli("leaderboard", out).out == printed(table) != table + "\n"


def test_a_table_shows_its_charts(cli, table, out):
    shown = re.findall(r"\((charts/.*\.svg)\)", table)
    assert shown
    for path in shown:
        picture = ElementTree.parse(out / path).getroot()
        assert {"random", "kcenter"} <= {text.text for text in picture.iter() if text.text}
    (out / shown[0]).write_text("another picture")
    answer = cli("leaderboard", out, "--output", out / "leaderboard.md", "--check")
    assert answer.code == 1
    assert f"{out / shown[0]} is not what its records say" in answer.out


def test_a_result_in_quarantine_is_struck_through(cli, tiny, out, tmp_path):
    tiny("--distillers", "random,kcenter")
    cli("leaderboard", out, "--publish", tmp_path / "results")
    distill = next(
        record for record in read_records([out])[0]
        if isinstance(record, DistillRecord) and record.distiller.label == "kcenter"
    )  # fmt: skip
    for folder in (out, tmp_path / "results"):
        answer = cli("quarantine", folder, distill.address[:12], "--reason", "chosen by hand")
        assert answer.out == f"quarantined distill {distill.address}: chosen by hand\n"
        text = cli("leaderboard", folder).out
        assert "| ~~kcenter~~ " in text
        assert "## Quarantined\n\n- **kcenter** (IPC 1, natural, convnet): chosen by hand" in text
    # A run that resumes keeps it.
    assert "~~kcenter~~" not in tiny("--distillers", "random,kcenter").out
    assert "~~kcenter~~" in (out / "leaderboard.md").read_text()
    findings = tmp_path / "results" / "quarantine.jsonl"
    findings.write_text(findings.read_text().rstrip("\n"))  # as an editor may leave it
    cli("quarantine", tmp_path / "results", distill.address[:12], "--reason", "and again")
    assert len(findings.read_text().splitlines()) == 2
    assert "no result" in cli("quarantine", out, "zzz", "--reason", "why").mistake
    assert "in one sentence" in cli("quarantine", out, distill.address, "--reason", " ").mistake


def test_leaderboard_writes_the_table(cli, table, out, tmp_path):
    answer = cli("leaderboard", out, "--output", tmp_path / "new" / "table.md")
    assert answer.out == f"wrote {tmp_path / 'new' / 'table.md'}\n"
    assert (tmp_path / "new" / "table.md").read_text() == table


def test_check_accepts_the_table_of_the_records(cli, table, out):
    answer = cli("leaderboard", out, "--output", out / "leaderboard.md", "--check")
    assert answer.code == 0
    assert "is what its records say" in answer.out


def test_check_finds_a_changed_number(cli, table, out):
    path = out / "leaderboard.md"
    path.write_text(table.replace("40 test images", "41 test images"))
    answer = cli("leaderboard", out, "--output", path, "--check")
    assert answer.code == 1
    assert "is not what its records say" in answer.out
    assert "41 test images" in path.read_text()


def test_check_finds_a_missing_table(cli, table, out, tmp_path):
    assert cli("leaderboard", out, "--output", tmp_path / "none.md", "--check").code == 1
    assert not (tmp_path / "none.md").exists()


def test_check_needs_a_file(cli, table, out):
    assert "--check needs --output FILE" in cli("leaderboard", out, "--check").mistake


def test_published_records_give_the_same_table(cli, table, out, tmp_path):
    published = tmp_path / "results"
    assert cli("leaderboard", out, "--publish", published).code == 0
    assert {p.name for p in published.iterdir()} == {
        "environments.jsonl",
        "kcenter.jsonl",
        "random.jsonl",
    }
    assert cli("leaderboard", published).out == printed(table)
    # Nor does it matter in which order they are named, or that a run is named beside them.
    files = sorted(published.iterdir(), reverse=True)
    assert cli("leaderboard", *files, out).out == printed(table)


def test_records_are_published_without_what_is_in_the_tensors(cli, table, out, tmp_path):
    cli("leaderboard", out, "--publish", tmp_path / "results")
    lines = (tmp_path / "results" / "random.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["kind"] for line in lines) == [
        *("attack", "attack", "distill", "train")
    ]


def test_runs_of_two_folders_share_a_table(cli, tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    tiny("--out", one)
    tiny("--out", two, "--distillers", "kcenter")
    text = cli("leaderboard", one, two).out
    assert text.count("## digits, 1 image per class") == 1
    assert "| random" in text
    assert "| kcenter" in text


def test_a_damaged_record_is_ignored_and_named(cli, table, out):
    record = next((out / "records").glob("*.json"))
    record.write_text("{")
    answer = cli("leaderboard", out)
    assert answer.code == 0
    assert f"ignored: {record}, line 1: not a complete line of JSON" in answer.err
