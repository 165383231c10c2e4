"""A plugin that breaks costs its own rows and nothing else, and the user learns whose fault it is.

Each test plants a plugin called 'planted' from a distribution 'planted' 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rdd_bench
from rdd_bench.errors import RddBenchError

WHO = {
    kind: f"{kind} 'planted' (planted 1.0)"
    for kind in ("distiller", "architecture", "attack", "dataset")
}


def check_failure(
    answer: Any, out: Path, records_of: Callable[..., list[Any]], message: str, sound: int
) -> None:
    """One step failed with this message; ``sound`` other steps were computed."""
    assert answer.code == 1
    assert f"failed: {message}" in answer.err
    (failed,) = [r for r in records_of(out) if r.status == "failed"]
    assert failed.error.startswith(message)
    assert "\n" not in failed.error
    trace = (out / "errors" / f"{failed.address}.txt").read_text()
    assert trace.startswith("Traceback")
    assert f"{sound} steps computed, 0 already there, 1 failed" in answer.out
    assert str(out / "errors") in answer.out
    assert "## Not finished" in (out / "leaderboard.md").read_text()
    assert sum(r.status == "done" for r in records_of(out)) == sound


# Whatever a plugin does, its steps fail and the others go on ----------------------------------

RAISES = [
    ("raise ValueError('no\\nluck')", "raised ValueError: no luck"),
    ("assert False", "raised AssertionError"),
    ("sys.exit(0)", "raised SystemExit: 0"),
    ("raise RecursionError", "raised RecursionError"),
]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *[(body, f" {message}") for body, message in RAISES],
        ("pass", ": distill returned NoneType"),
        ("return good_set(task).images", ": distill returned Tensor"),
        (
            "good = good_set(task)\nreturn DistilledSet(good.images[:, :, :4], good.labels)",
            ": images of shape (10, 1, 4, 8); expected (n, 1, 8, 8)",
        ),
        (
            "good = good_set(task)\nreturn DistilledSet(good.images * torch.nan, good.labels)",
            ": 640 pixels are NaN or infinite; expected finite pixels",
        ),
        (
            "good = good_set(task)\nreturn DistilledSet(good.images[1:], good.labels[1:])",
            ": class 0 has 0 images; expected exactly 1 images of every class",
        ),
        (
            "good = good_set(task)\nreturn DistilledSet(good.images, good.labels.float())",
            ": labels are torch.float32",
        ),
        (
            "task.train.images.zero_()\nreturn good_set(task)",
            ": changed the training data in place",
        ),
        ("task.train.images.zero_()\nraise ValueError('late')", " raised ValueError: late"),
    ],
)
def test_a_distiller_that_breaks(tiny, plant, out, tmp_path, records_of, verdicts, body, message):
    plant("distiller", body)
    answer = tiny("--distillers", "planted,random")
    check_failure(answer, out, records_of, WHO["distiller"] + message, sound=4)
    # The rows beside it are what they are without it.
    tiny("--out", tmp_path / "alone")
    done = {r.address for r in records_of(out) if r.status == "done"}
    assert verdicts(tmp_path / "alone") == {a: v for a, v in verdicts(out).items() if a in done}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *[(body, f" {message}") for body, message in RAISES],
        ("return 'a network'", ": build returned str; expected an nn.Module"),
        ("return nn.Flatten()", ": two images of shape (1, 8, 8) give (2, 64)"),
        ("return nn.Linear(3, 10)", " raised RuntimeError"),
    ],
)
def test_an_architecture_that_breaks(tiny, plant, out, records_of, body, message):
    plant("architecture", body)
    answer = tiny("--architectures", "planted,convnet")
    check_failure(answer, out, records_of, WHO["architecture"] + message, sound=4)
    assert "1 failed, 2 not tried because of that" in answer.out


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *[(body, f" {message}") for body, message in RAISES],
        ("pass", ": perturb returned NoneType"),
        ("return images[:, :, :4]", ": perturb returned ("),
        ("return images * torch.nan", ": perturb returned NaN or infinite pixels"),
        ("return images.double()", ": perturb returned torch.float64"),
    ],
)
def test_an_attack_that_breaks(tiny, plant, out, records_of, body, message):
    plant("attack", body)
    answer = tiny("--attacks", "planted,fgsm")
    check_failure(answer, out, records_of, WHO["attack"] + message, sound=3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *[(body, f" {message}") for body, message in RAISES],
        ("return good_splits().train", ": load returned LabelledImages; expected a Splits"),
        (
            "good = good_splits()\ngood.train.images.mul_(255)\nreturn good",
            ", train split: pixels span",
        ),
    ],
)
def test_a_data_set_that_breaks(tiny, plant, out, records_of, body, message):
    plant("dataset", body)
    answer = tiny("--datasets", "planted,digits")
    # The protocol takes ten images of every class, so the planted set could not run anyway.
    check_failure(answer, out, records_of, WHO["dataset"] + message, sound=4)


def test_an_attack_that_writes_into_its_images_gains_nothing(tiny, plant, out, records_of):
    # If the host compared with the images that the attack had, this would be within any budget.
    plant("attack", "return images.copy_(1 - images) if threat.eps else images")
    answer = tiny("--attacks", "planted")
    assert answer.code == 0
    (attack,) = records_of(out, "attack")
    assert "budget" in {flag.name for flag in attack.flags}


def test_a_failed_step_is_tried_again(tiny, plant, out, records_of, monkeypatch):
    plant(
        "distiller",
        "if 'NO_LUCK' in os.environ: raise RuntimeError('no luck')\nreturn good_set(task)",
    )
    monkeypatch.setenv("NO_LUCK", "1")
    assert tiny("--distillers", "random,planted").code == 1
    assert tiny("--distillers", "random,planted").code == 1
    monkeypatch.delenv("NO_LUCK")
    answer = tiny("--distillers", "random,planted")
    assert answer.code == 0
    assert "4 steps computed, 4 already there." in answer.out
    assert {r.status for r in records_of(out)} == {"done"}
    assert "## Not finished" not in (out / "leaderboard.md").read_text()


def test_run_from_python_raises_at_the_end_and_keeps_what_is_finished(
    protocol, plant, out, records_of
):
    plant("distiller", "raise ValueError('no luck')")
    with pytest.raises(RddBenchError, match=r"1 steps failed.*no luck") as caught:
        rdd_bench.run(
            protocol=str(protocol),
            distillers=["planted", "random"],
            out=out,
            device="cpu",
            workers=1,
        )
    assert "\n" not in str(caught.value)
    assert sum(r.status == "done" for r in records_of(out)) == 4


def test_a_worker_that_dies_is_a_failed_step_and_the_run_goes_on(tiny, plant, out, records_of):
    plant("distiller", "os._exit(9)")
    answer = tiny("--distillers", "planted,random", "--workers", 2)
    assert answer.code == 1
    assert "a worker process died during 'distil planted ipc 1'" in answer.err
    assert "run the same command again to retry" in answer.err
    lost = [r for r in records_of(out) if r.status == "failed"]
    assert lost
    # Whatever was beside it may have been lost with it, and is computed now.
    again = tiny("--distillers", "random", "--workers", 2)
    assert again.code == 0
    assert [r.status for r in records_of(out) if r.status == "done"] == ["done"] * 4


# What does not apply is no failure ------------------------------------------------------------


@pytest.mark.parametrize(("kind", "sound"), [("distiller", 4), ("architecture", 4), ("attack", 3)])
def test_what_does_not_apply_is_skipped_with_its_reason(tiny, plant, out, records_of, kind, sound):
    plant(kind, "raise NotApplicable('planted wants larger images')")
    names = {"distiller": "random", "architecture": "convnet", "attack": "fgsm,pgd"}
    answer = tiny(f"--{kind}s", f"{names[kind]},planted")
    assert answer.code == 0
    assert "skipped: planted wants larger images" in answer.err
    (skipped,) = [r for r in records_of(out) if r.status == "skipped"]
    assert skipped.error == "planted wants larger images"
    assert not (out / "errors").exists()
    assert "skipped, planted wants larger images" in (out / "leaderboard.md").read_text()


# Data that are not there ----------------------------------------------------------------------


def test_missing_data_are_said_with_what_to_do(tiny, out, records_of):
    answer = tiny("--datasets", "mnist")
    assert answer.code == 1
    assert "mnist needs a folder: --data-root DIR (with --download to fetch it)" in answer.err
    assert {r.status for r in records_of(out)} == {"failed"}


def test_an_empty_data_folder_is_said_with_its_name(tiny, tmp_path):
    answer = tiny("--datasets", "mnist", "--data-root", tmp_path)
    assert answer.code == 1
    assert f"no files in {tmp_path / 'MNIST' / 'raw'}" in answer.err


def test_one_missing_data_set_does_not_stop_the_other(tiny, out):
    answer = tiny("--datasets", "mnist,digits")
    assert answer.code == 1
    assert "4 steps computed, 0 already there, 1 failed" in answer.out


def test_the_same_sentence_is_said_once(tiny):
    answer = tiny("--datasets", "mnist", "--distillers", "random,herding,kcenter")
    assert answer.err.count("mnist needs a folder") == 1
