"""``rdd-bench run`` from end to end: what it computes, keeps, repeats and tells."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load, load_file

import rdd_bench
from rdd_bench.errors import RddBenchError

# A run and its table --------------------------------------------------------------------------


def test_a_run_leaves_records_tensors_and_a_table(tiny, out, records_of):
    answer = tiny()
    assert answer.code == 0
    assert "4 steps computed, 0 already there." in answer.out
    kinds = sorted(record.kind for record in records_of(out))
    assert kinds == ["attack", "attack", "distill", "train"]
    assert {r.status for r in records_of(out)} == {"done"}
    assert len(list((out / "sets").glob("*.safetensors"))) == 1
    assert len(list((out / "networks").glob("*.safetensors"))) == 1
    assert not (out / "errors").exists()
    table = (out / "leaderboard.md").read_text()
    assert "| random" in table
    assert "**Ranked: L∞ 16/255**" in table
    assert "40 test images" in table


def test_the_run_folder_is_named_after_the_protocol(cli, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli("run", "--protocol", protocol, "--device", "cpu", "--workers", 1, "--attacks", "fgsm")
    assert (tmp_path / "runs" / "tiny-v1" / "leaderboard.md").exists()


def test_robust_images_are_among_the_clean_ones(tiny, out, records_of):
    tiny()
    (train,) = records_of(out, "train")
    for attack in records_of(out, "attack"):
        assert attack.train == train.address
        for clean, robust in zip(train.bitmaps(), attack.bitmaps(), strict=True):
            assert not (robust & ~clean).any()


def test_a_dry_run_computes_and_writes_nothing(tiny, out):
    answer = tiny("--dry-run")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "distil random ipc 1",
        "  train convnet on random ipc 1",
        "    fgsm linf 16/255 on convnet of random ipc 1",
        "    pgd linf 16/255 on convnet of random ipc 1",
        "1 distillations, 1 trainings, 2 attacks; "
        f"0 of these are finished in {out}. Nothing was run.",
    ]
    assert not out.exists()


# Resuming -------------------------------------------------------------------------------------


def written(folder: Path) -> dict[Path, int]:
    """When each result of a run folder was written."""
    rendered = ("environment-", "tiny-v1-digits")  # charts are drawn anew as the table is
    results = [path for path in folder.glob("*/*") if not path.name.startswith(rendered)]
    return {path: path.stat().st_mtime_ns for path in results}


def test_running_again_computes_nothing(tiny, out):
    tiny()
    before, table = written(out), (out / "leaderboard.md").read_text()
    answer = tiny()
    assert answer.code == 0
    assert "0 steps computed, 4 already there." in answer.out
    assert written(out) == before
    assert (out / "leaderboard.md").read_text() == table


def test_running_again_does_not_import_torch(tiny, protocol, out, process):
    tiny()
    answer = process(
        *("run", "--protocol", protocol, "--out", out, "--device", "cpu"),
        after="print('torch' in sys.modules)",
    )
    assert answer.code == 0
    assert "0 steps computed, 4 already there." in answer.out
    assert answer.out.splitlines()[-1] == "False"


def test_one_more_distiller_computes_only_its_own_steps(tiny, out):
    tiny()
    before = written(out)
    answer = tiny("--distillers", "random,herding", "--set", "herding.epochs=1")
    assert "4 steps computed, 4 already there." in answer.out
    assert before.items() <= written(out).items()


def test_one_more_attack_uses_the_networks_that_are_there(tiny, out):
    tiny("--attacks", "fgsm")
    before = written(out)
    assert "1 steps computed, 3 already there." in tiny("--attacks", "fgsm,pgd").out
    assert before.items() <= written(out).items()


def test_fresh_computes_everything_again(tiny, out, verdicts):
    tiny()
    before = verdicts(out)
    assert "4 steps computed, 0 already there." in tiny("--fresh").out
    assert verdicts(out) == before


@pytest.mark.parametrize("left", ["", "{", '{"kind": "train"', "\x00\xff" * 9, "[]\n", "null\n"])
def test_a_damaged_record_is_computed_again(tiny, out, records_of, verdicts, left):
    tiny()
    before = verdicts(out)
    (train,) = records_of(out, "train")
    (out / "records" / f"{train.address}.json").write_text(left)
    answer = tiny()
    assert answer.code == 0
    assert "1 steps computed, 3 already there." in answer.out
    assert verdicts(out) == before


@pytest.mark.parametrize("folder", ["sets", "networks"])
@pytest.mark.parametrize("kept", [0, 5, 40, 0.5, -1])
def test_damaged_tensors_are_computed_again(tiny, out, verdicts, folder, kept):
    tiny()
    before = verdicts(out)
    (path,) = (out / folder).iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    answer = tiny()
    assert answer.code == 0, answer.err
    assert "1 steps computed, 3 already there." in answer.out
    again = load_file(path)
    assert all(torch.equal(tensor, again[name]) for name, tensor in load(data).items())
    assert verdicts(out) == before


def test_lost_tensors_are_computed_again(tiny, out):
    tiny()
    (path,) = (out / "networks").iterdir()
    path.unlink()
    assert "1 steps computed, 3 already there." in tiny().out
    assert path.exists()


def test_what_a_killed_run_was_writing_does_no_harm(tiny, out):
    tiny("--attacks", "fgsm")
    (out / "records" / ".0123.json.99.part").write_text('{"kind": "att')
    answer = tiny()
    assert answer.code == 0
    assert "1 steps computed, 3 already there." in answer.out


# The same numbers -----------------------------------------------------------------------------


def test_from_scratch_elsewhere_the_numbers_are_the_same(tiny, out, tmp_path, verdicts):
    tiny()
    tiny("--out", tmp_path / "elsewhere")
    assert verdicts(tmp_path / "elsewhere") == verdicts(out)


def test_what_else_runs_does_not_change_a_number(tiny, out, tmp_path, verdicts):
    tiny()
    more = tmp_path / "more"
    tiny("--out", more, "--distillers", "kcenter,random", "--ipc", "2,1", "--attacks", "pgd,fgsm")
    assert verdicts(out).items() < verdicts(more).items()


def test_more_workers_give_the_same_numbers(tiny, out, tmp_path, verdicts):
    tiny()
    two = tmp_path / "two"
    answer = tiny("--out", two, "--workers", 2)
    assert answer.code == 0
    assert "4 steps computed, 0 already there." in answer.out
    assert verdicts(two) == verdicts(out)


# Options --------------------------------------------------------------------------------------


def pgd_steps(records_of: Callable[..., list[Any]], out: Path) -> tuple[int, str]:
    (record,) = [r for r in records_of(out, "attack") if r.attack.name == "rdd-bench/pgd"]
    return record.attack.options["steps"], record.attack.label


def test_an_option_of_the_protocol_wins_over_the_default(tiny, out, records_of):
    tiny("--attacks", "pgd")
    assert pgd_steps(records_of, out) == (2, "pgd")


def test_an_option_of_the_config_wins_over_the_protocol(tiny, out, records_of, tmp_path):
    config = tmp_path / "options.toml"
    config.write_text("[options.pgd]\nsteps = 3\nrestarts = 2\n")
    tiny("--attacks", "pgd", "--config", config)
    assert pgd_steps(records_of, out) == (3, "pgd [steps=3, restarts=2]")


def test_an_option_that_is_set_wins_over_the_config(tiny, out, records_of, tmp_path):
    config = tmp_path / "options.toml"
    config.write_text("[options.pgd]\nsteps = 3\nrestarts = 2\n")
    tiny("--attacks", "pgd", "--config", config, "--set", "pgd.steps=4")
    assert pgd_steps(records_of, out) == (4, "pgd [steps=4, restarts=2]")


def test_the_last_of_two_settings_wins(tiny, out, records_of):
    tiny("--attacks", "pgd", "--set", "pgd.steps=4", "--set", "pgd.steps=5")
    assert pgd_steps(records_of, out) == (5, "pgd [steps=5]")


def test_the_table_says_which_option_was_changed(tiny, out):
    tiny("--set", "pgd.steps=4")
    assert "pgd [steps=4]" in (out / "leaderboard.md").read_text()


# From Python ----------------------------------------------------------------------------------


def test_run_returns_what_load_results_reads(protocol, out):
    frame = rdd_bench.run(protocol=str(protocol), out=out, device="cpu", workers=1)
    assert_frame_equal(frame, rdd_bench.load_results(out))
    # Two seeds, each clean and under two attacks.
    assert sorted(frame["attack"]) == ["fgsm", "fgsm", "none", "none", "pgd", "pgd"]
    assert (frame["accuracy"] * frame["n"]).round().tolist() == frame["correct"].tolist()


def test_run_and_the_command_line_do_the_same(tiny, protocol, out):
    frame = rdd_bench.run(
        protocol=str(protocol),
        options={"pgd": {"steps": 3}},
        seeds=[1],
        out=out,
        device="cpu",
        workers=1,
    )
    answer = tiny("--set", "pgd.steps=3", "--seeds", "1")
    assert "0 steps computed, 4 already there." in answer.out
    assert set(frame["seed"]) == {1}


def test_run_raises_for_a_wrong_name(protocol, out):
    with pytest.raises(RddBenchError, match="did you mean 'random'"):
        rdd_bench.run(protocol=str(protocol), distillers=["randm"], out=out)
    assert not out.exists()


def test_results_of_finished_steps_do_not_depend_on_the_working_folder(
    protocol, out, tmp_path, monkeypatch
):
    frame = rdd_bench.run(protocol=str(protocol), out=out, device="cpu", workers=1)
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(out)
    assert_frame_equal(frame, rdd_bench.load_results(relative))
