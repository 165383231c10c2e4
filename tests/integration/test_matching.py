"""Matching methods as a user runs them: tracks, shared experts, and what goes wrong on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rdd_bench.artifacts import networks_from_bytes, set_from_bytes
from rdd_bench.components import Architecture, Dataset, Source
from rdd_bench.data import load_splits
from rdd_bench.networks import Whiten
from rdd_bench.registry import load_plugins
from rdd_bench.training import new_classifier

QUICK = (
    "num_experts=2", "expert_epochs_total=2", "expert_epochs=1", "max_start_epoch=2",
    "expert_batch=32", "iterations=3", "syn_steps=3", "lr_img=1", "lr_lr=1e-7", "init_lr=0.01",
)  # fmt: skip


def quick(method: str, *more: str) -> list[str]:
    return [word for it in (*QUICK, *more) for word in ("--set", f"{method}.{it}")]


def the_failure(answer: Any, out: Path, records_of: Any) -> str:
    """Return the sentence of the one step that failed, beside which another row was finished."""
    assert answer.code == 1
    (failed,) = [r for r in records_of(out) if r.status == "failed"]
    assert failed.error in answer.err
    assert "\n" not in failed.error
    finished = {r.distiller.name for r in records_of(out, "distill") if r.status == "done"}
    assert finished == {"rdd-bench/random"}
    assert "## Not finished" in (out / "leaderboard.md").read_text()
    return str(failed.error)


@pytest.mark.parametrize("method", ["dm", "dsa", "mtt", "mat"])
def test_more_images_than_a_class_has_is_one_sentence(tiny, out, records_of, method):
    # What every one of them begins with is real images.
    options = [] if method in ("dm", "dsa") else quick(method)
    answer = tiny("--distillers", method, "--ipc", 11, "--attacks", "fgsm", *options)
    (failed,) = [r for r in records_of(out) if r.status == "failed"]
    assert answer.code == 1
    assert failed.error.startswith(f"{method}: class '0' of digits has 10 training images, but 11")
    assert failed.error.endswith("ask for at most 10 images per class")


def test_too_few_epochs_of_the_experts_are_found_before_anything_runs(tiny, out):
    answer = tiny("--distillers", "mtt", *quick("mtt", "max_start_epoch=3"))
    assert "expert_epochs_total=2 is too short" in answer.mistake
    assert "need 3" in answer.mistake
    assert not out.exists()


def test_an_architecture_without_features_is_skipped_with_the_reason(tiny, plant, out, records_of):
    plant("architecture", "return good_network(spec)")
    protocol = out.parent / "tiny.toml"
    protocol.write_text('distill_architecture = "planted"\n' + protocol.read_text())
    tiny("--distillers", "dm,random", "--attacks", "fgsm")
    (skipped,) = [r for r in records_of(out) if r.status == "skipped"]
    assert skipped.error == "dm needs an architecture with embed(); Sequential has none"


def test_a_set_that_diverges_keeps_its_last_good_images(tiny, out, records_of):
    answer = tiny("--distillers", "random,mtt", *quick("mtt", "lr_lr=1e6"))
    sentence = the_failure(answer, out, records_of)
    assert sentence.startswith("mtt: in iteration ")
    assert "the learned step size goes from " in sentence
    assert "lower the options lr_lr or lr_img" in sentence
    (kept,) = (out / "sets").glob("*.last-good.safetensors")
    assert str(kept.relative_to(out)) in sentence
    made = set_from_bytes(kept.read_bytes(), "kept")
    assert made.images.shape == (10, 1, 8, 8)
    assert torch.isfinite(made.images).all()
    # Another attempt goes on with the experts that are there.
    before = {path: path.stat().st_mtime_ns for path in (out / "artefacts").rglob("*.safetensors")}
    assert tiny("--distillers", "random,mtt", *quick("mtt")).code == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "artefacts").rglob("*.safetensors")}
    assert len(before) == 2
    assert before == after


def test_a_damaged_expert_is_named_and_stops_its_method_only(tiny, out, records_of):
    tiny("--distillers", "mtt", "--attacks", "fgsm", *quick("mtt"))
    expert = sorted((out / "artefacts").rglob("*.safetensors"))[1]
    expert.write_bytes(expert.read_bytes()[:-7])
    answer = tiny("--attacks", "fgsm", "--distillers", "random,mtt", *quick("mtt", "iterations=4"))
    assert answer.code == 1
    (failed,) = [r for r in records_of(out) if r.status == "failed"]
    assert f"{expert} is truncated" in failed.error
    assert "delete it and run again" in failed.error
    expert.unlink()
    answer = tiny("--attacks", "fgsm", "--distillers", "random,mtt", *quick("mtt", "iterations=4"))
    assert answer.code == 0


def test_each_track_trains_in_its_own_way(tiny, out, records_of):
    protocol = out.parent / "tiny.toml"
    protocol.write_text(
        protocol.read_text() + '\n[adversarial]\neps = "16/255"\nsteps = 2\nrestarts = 2\n'
    )
    tracks = "natural,author,adversarial"
    tiny("--distillers", "random,mtt", "--tracks", tracks, *quick("mtt", "zca=true"))
    trained = {(r.distiller, r.track): r for r in labelled(records_of(out))}
    own = trained["mtt", "author"].recipe
    assert own.uses == ("whitening",)
    assert own.lr != 0.01
    assert trained["mtt", "natural"].recipe == trained["random", "natural"].recipe
    assert trained["mtt", "natural"].recipe.adversarial is None
    hardened = trained["mtt", "adversarial"].recipe
    assert hardened == trained["random", "adversarial"].recipe
    assert hardened.adversarial.steps == 2
    assert hardened.adversarial.restarts == 2
    assert hardened.model_copy(update={"adversarial": None}) == trained["mtt", "natural"].recipe
    table = (out / "leaderboard.md").read_text()
    assert all(track in table for track in tracks.split(","))


def labelled(records: list[Any]) -> list[Any]:
    """Return the training records with the name of their distiller."""
    names = {r.address: r.distiller.label.split(" ")[0] for r in records if r.kind == "distill"}
    return [
        r.model_copy(update={"distiller": names[r.distill]}) for r in records if r.kind == "train"
    ]


def test_a_whitened_network_comes_back_with_its_whitening(tiny, out, records_of):
    tiny(
        "--distillers", "mtt", "--tracks", "author", "--attacks", "fgsm", *quick("mtt", "zca=true")
    )
    (record,) = records_of(out, "train")
    (path,) = (out / "networks").glob("*.safetensors")
    registry = load_plugins()
    dataset = cast("Dataset[Any]", registry.build("dataset", "digits", {}))
    splits = load_splits(dataset, "digits", Source(None), (10, 4))
    options = {"depth": 1, "width": 4}
    architecture = cast("Architecture[Any]", registry.build("architecture", "convnet", options))
    fresh = [new_classifier(architecture, splits.spec, seed) for seed in record.seeds]
    models = networks_from_bytes(path.read_bytes(), fresh, "networks")
    assert all(isinstance(model.preprocess, Whiten) for model in models)
    right = [int((m(splits.test.images).argmax(1) == splits.test.labels).sum()) for m in models]
    assert right == record.correct


@pytest.mark.parametrize("method", ["mtt", "sre2l", "guard"])
def test_the_passes_of_every_network_are_counted(tiny, out, records_of, method):
    options = quick("mtt") if method == "mtt" else smoke_options(method)
    tiny("--distillers", method, "--attacks", "fgsm", *options)
    (record,) = [r for r in records_of(out, "distill") if method in r.distiller.name]
    assert record.forward > 100
    assert record.backward > 100


def smoke_options(method: str) -> list[str]:
    smoke = load_plugins().find("distiller", method).cls.smoke
    return [word for name, value in smoke.items() for word in ("--set", f"{method}.{name}={value}")]


def test_a_last_good_set_that_cannot_be_kept_does_not_end_the_run(tiny, plant, out, records_of):
    plant("distiller", "raise Diverged('it ran away', None)")
    answer = tiny("--distillers", "planted,random", "--attacks", "fgsm")
    sentence = the_failure(answer, out, records_of)
    assert sentence.startswith("it ran away. The last good set could not be kept")


def test_a_track_that_the_protocol_does_not_describe_is_refused(tiny, out):
    answer = tiny("--tracks", "adversarial")
    assert "protocol tiny-v1 has no section [adversarial]" in answer.mistake
    assert not out.exists()
