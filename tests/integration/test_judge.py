"""evaluate, attack, lint, explain and verify, as a user runs them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rdd_bench.artifacts import networks_from_bytes, set_from_bytes
from rdd_bench.components import Architecture, Dataset, Source
from rdd_bench.data import load_splits
from rdd_bench.outcomes import unpack
from rdd_bench.registry import load_plugins
from rdd_bench.training import new_classifier
from rdd_bench_builtin.distillers.file import FileConfig, content_hash


@pytest.fixture
def splits():
    dataset = cast("Dataset[Any]", load_plugins().build("dataset", "digits", {}))
    return load_splits(dataset, "digits", Source(None), (10, 4))


@pytest.fixture
def foreign(tmp_path: Path, splits: Any) -> Path:
    """What DC's program would save of two real digits a class, normalised."""
    spec, train = splits.spec, splits.train
    images = torch.cat([train.of_class(label)[:2] for label in range(10)])
    path = tmp_path / "res_DC_digits.pt"
    normalised = (images - spec.mean[0]) / spec.std[0]
    torch.save({"data": [[normalised, torch.arange(10).repeat_interleave(2)]]}, path)
    return path


# evaluate -------------------------------------------------------------------------------------


def test_a_set_made_elsewhere_stands_beside_random_images(
    cli, protocol, out, foreign, records_of, splits
):
    answer = cli(
        "evaluate", foreign, "--protocol", protocol, "--out", out, "--attacks", "fgsm",
        "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    assert answer.code == 0, answer
    assert "a result file of DC, DSA or DM, 2 images per class" in answer.err
    assert f"file:{foreign}" in (out / "leaderboard.md").read_text()
    records = {r.distiller.name: r for r in records_of(out, "distill")}
    assert set(records) == {"rdd-bench/file", "rdd-bench/random"}
    mine = records["rdd-bench/file"]
    assert mine.ipc == 2
    assert mine.notes["stored_as"] == "normalised"
    # The pixels are back.
    path = out / "sets" / f"{mine.address}.safetensors"
    made = set_from_bytes(path.read_bytes(), "set")
    expected = torch.cat([splits.train.of_class(label)[:2] for label in range(10)])
    assert torch.allclose(made.images, expected, atol=1e-6)


def test_a_changed_file_is_another_set(cli, protocol, out, foreign, records_of):
    arguments = (
        "evaluate", foreign, "--protocol", protocol, "--out", out, "--attacks", "fgsm",
        "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    cli(*arguments)
    assert "0 steps computed" in cli(*arguments).out
    content = torch.load(foreign, weights_only=True)  # noqa: TID251
    content["data"][0][0] += 0.1
    torch.save(content, foreign)
    assert "3 steps computed" in cli(*arguments).out


def test_several_images_in_one_count_as_many(cli, protocol, out, foreign, records_of):
    answer = cli(
        "evaluate", foreign, "--protocol", protocol, "--out", out, "--attacks", "fgsm",
        "--factor", 2, "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    assert answer.code == 0, answer
    (mine,) = [r for r in records_of(out, "distill") if r.distiller.name == "rdd-bench/file"]
    assert (mine.ipc, mine.images, mine.notes["stored_images"]) == (8, 80, 20)


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        ((1, 9, 9), torch.arange(20) % 10, "has images of 9x9 with 1 channel; digits has 8x8"),
        ((3, 8, 8), torch.arange(20) % 10, "has images of 8x8 with 3 channels; digits has 8x8"),
        ((1, 8, 8), torch.arange(20) % 5, "has 5 classes; digits has 10"),
        ((1, 8, 8), torch.arange(20) % 10 + 5, "has 0 images of class 0"),
    ],
)
def test_a_set_for_other_data_is_refused_before_anything_runs(
    cli, protocol, out, tmp_path, images, labels, says
):
    images = torch.rand(20, *images)
    torch.save([images, labels], tmp_path / "set.pt")
    answer = cli(
        "evaluate", tmp_path / "set.pt", "--protocol", protocol, "--out", out, "--attacks",
        "fgsm", "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    assert says in answer.mistake
    assert not out.exists()


def test_an_unbalanced_set_is_refused_before_anything_runs(cli, protocol, out, tmp_path):
    torch.save([torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 1])], tmp_path / "set.pt")
    answer = cli("evaluate", tmp_path / "set.pt", "--protocol", protocol, "--out", out)
    assert "1 images of class 0 and up to 2 of others" in answer.mistake
    assert not out.exists()


def folders(path: Path, names: list[str]) -> Path:
    for k, name in enumerate(names):
        (path / name).mkdir(parents=True)
        Image.new("L", (8, 8), 20 * k).save(path / name / "0.png")
    return path


def test_folders_are_classes_by_name_or_by_number(cli, protocol, out, tmp_path, records_of):
    arguments = ("--protocol", protocol, "--out", out, "--attacks", "fgsm", "--device", "cpu")
    numbers = folders(tmp_path / "numbers", [str(k) for k in range(10)])
    assert cli("evaluate", numbers, *arguments, "--workers", 1).code == 0
    names = folders(tmp_path / "names", [f"class {k}" for k in range(10)])
    answer = cli("evaluate", names, *arguments, "--workers", 1)
    assert answer.code == 1
    assert "the folders class 0, class 1, class 2 are no classes of digits" in answer.err


def test_a_renamed_folder_is_another_set(tmp_path):
    before = content_hash(folders(tmp_path / "a", ["0", "1"]))
    assert content_hash(folders(tmp_path / "b", ["0", "1"])) == before
    assert content_hash(folders(tmp_path / "c", ["0", "2"])) != before


def test_a_file_that_changes_after_planning_is_refused(foreign):
    planned = FileConfig(path=str(foreign))
    assert FileConfig(**planned.model_dump()) == planned
    foreign.write_bytes(foreign.read_bytes() + b"x")
    with pytest.raises(ValueError, match="has changed since the run was planned"):
        FileConfig(**planned.model_dump())


def test_options_that_would_do_nothing_are_refused(cli, tiny, out, protocol, tmp_path):
    tiny("--attacks", "fgsm")
    (path,) = (out / "sets").glob("*.safetensors")
    answer = cli(
        "evaluate", path, "--protocol", protocol, "--out", tmp_path / "b", "--lr", 0.1,
        "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    assert answer.code == 1
    assert "says itself what it is; leave out lr" in answer.err


def test_a_choice_by_test_images_and_pixels_out_of_range_are_flagged_on_the_row(
    cli, protocol, out, tmp_path, records_of, splits
):
    images = torch.cat([splits.train.of_class(label)[:2] for label in range(10)])
    pool = tmp_path / "pool"
    pool.mkdir()
    torch.save(3 * images, pool / "images_best.pt")
    torch.save(torch.arange(10).repeat_interleave(2), pool / "labels_best.pt")
    answer = cli(
        "evaluate", pool, "--protocol", protocol, "--out", out, "--attacks", "fgsm",
        "--space", "pixels", "--device", "cpu", "--workers", 1,
    )  # fmt: skip
    assert answer.code == 0, answer
    flags = {r.distiller.name: [f.name for f in r.flags] for r in records_of(out, "distill")}
    assert flags == {
        "rdd-bench/file": ["out-of-range", "test-selection"],
        "rdd-bench/random": [],
    }
    board = (out / "leaderboard.md").read_text()
    assert "its makers chose it by accuracy on the test images" in board


# What a run audits ----------------------------------------------------------------------------

LAZY = """
from rdd_bench.api import *

class Options(Config):
    steps: int = 1
    \"""How long.\"""

class Lazy(Attack[Options]):
    \"""Searches only when asked to search for longer.\"""

    name = "lazy"
    info = Info(title="Lazy", licence="MIT")
    norms = frozenset({"linf"})
    effort = "steps"

    def perturb(self, model, images, labels, threat, run):
        if self.config.steps < 2:
            return images
        noise = torch.rand_like(images).round() * 2 - 1
        return (images + threat.eps * noise).clamp(0, 1)

@hookimpl
def rdd_bench_attacks():
    return [Lazy]
"""


def test_only_ranked_threats_are_probed(cli, install, protocol, out, records_of):
    install("lazy", "import torch" + LAZY)
    text = protocol.read_text().replace('eps = ["16/255"]', 'eps = ["16/255", "240/255"]')
    # Long enough for the network to know more than one class.
    text = text.replace("epochs = 3", "epochs = 200").replace("width = 4", "width = 16")
    protocol.write_text(text.replace('ranked = "16/255"', 'ranked = "240/255"'))
    answer = cli(
        "run", "--protocol", protocol, "--out", out, "--device", "cpu", "--workers", 1,
        "--attacks", "lazy",
    )  # fmt: skip
    assert answer.code == 0, answer
    flags = {r.ranked: {f.name for f in r.flags} for r in records_of(out, "attack")}
    assert flags == {False: set(), True: {"more-steps", "large-budget"}}
    assert "with twice the steps breaks" in (out / "leaderboard.md").read_text()


def test_a_network_without_gradients_is_flagged_where_it_was_trained(
    cli, plant, tiny, records_of, out
):
    plant(
        "architecture",
        """
class Certain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = good_network(spec)
    def forward(self, images):
        logits = self.inner(images)
        return logits if self.training else 1e6 * logits
return Certain()
""",
    )
    answer = tiny("--architectures", "planted", "--attacks", "fgsm")
    assert answer.code == 0, answer
    (record,) = records_of(out, "train")
    assert [flag.name for flag in record.flags] == ["saturated-gradient"]
    assert "saturated-gradient" in (out / "leaderboard.md").read_text()


# attack ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny, out, records_of, splits) -> dict[str, torch.Tensor]:
    """The state_dict of a network of the tiny run."""
    tiny("--seeds", "0")
    (record,) = records_of(out, "train")
    path = out / "networks" / f"{record.address}.safetensors"
    options = {"depth": 1, "width": 4}
    built = load_plugins().build("architecture", "convnet", options)
    fresh = new_classifier(cast("Architecture[Any]", built), splits.spec, 0)
    (model,) = networks_from_bytes(path.read_bytes(), [fresh], "networks")
    return model.network.state_dict()


def attack(cli: Any, path: Path, *more: Any) -> Any:
    return cli(
        "attack", path, "--architecture", "convnet", "--dataset", "digits", "--attacks",
        "fgsm,pgd", "--eps", "16/255,0.5", "--set", "convnet.depth=1", "--set", "convnet.width=4",
        "--device", "cpu", *more,
    )  # fmt: skip


def test_a_network_is_judged_as_in_a_run(cli, trained, out, records_of, tmp_path, splits):
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.items()}}, tmp_path / "net.pt")
    target = tmp_path / "verdict.json"
    answer = attack(cli, tmp_path / "net.pt", "--output", target)
    assert answer.code == 0, answer
    verdicts = {(v["attack"], v["eps"]): v for v in json.loads(target.read_text())["verdicts"]}
    assert len(verdicts) == 5
    everything = verdicts["clean", None]
    assert everything["n"] == 500  # all test images; the tiny protocol takes 40 of them
    clean = unpack(everything["outcomes"], 500)
    for key, verdict in verdicts.items():
        assert not (unpack(verdict["outcomes"], 500) & ~clean).any(), key
    assert verdicts["pgd", 0.5]["correct"] <= verdicts["fgsm", 16 / 255]["correct"]
    assert "worst case" in answer.out
    assert "linf 16/255" in answer.out
    # FGSM draws nothing, so on the images of the tiny protocol its verdicts are those of the run.
    (recorded,) = [r for r in records_of(out, "attack") if r.attack.name == "rdd-bench/fgsm"]
    dataset = cast("Dataset[Any]", load_plugins().build("dataset", "digits", {}))
    whole = load_splits(dataset, "digits", Source(None), (0, 0)).test.images
    places = [int((whole == image).flatten(1).all(1).nonzero()[0]) for image in splits.test.images]
    mine = unpack(verdicts["fgsm", 16 / 255]["outcomes"], 500)[places]
    assert mine.tolist() == recorded.bitmaps()[0].tolist()


def test_networks_of_a_run_and_safetensors_are_read_too(cli, trained, out, tmp_path):
    torch.save(trained, tmp_path / "net.pt")
    expected = attack(cli, tmp_path / "net.pt").out.partition(" on ")[2]
    save_file(trained, tmp_path / "net.safetensors")
    (of_run,) = (out / "networks").glob("*.safetensors")
    for path in (tmp_path / "net.safetensors", of_run):
        assert attack(cli, path).out.partition(" on ")[2].split() == expected.split()
    assert "leave --mean and --std out" in attack(cli, of_run, "--mean", "0.3").mistake
    (tmp_path / "net.safetensors").write_bytes(of_run.read_bytes()[:-9])
    assert "truncated or no safetensors file" in attack(cli, tmp_path / "net.safetensors").mistake


def test_only_some_images_are_attacked_on_request(cli, trained, tmp_path):
    torch.save(trained, tmp_path / "net.pt")
    answer = attack(cli, tmp_path / "net.pt", "--limit", 30)
    assert "on 30 test images" in answer.out


def test_an_attack_that_fails_does_not_lose_the_others(cli, install, trained, tmp_path):
    install(
        "faulty", "import torch" + LAZY.replace("return images\n", "raise MemoryError('much')\n")
    )
    torch.save(trained, tmp_path / "net.pt")
    target = tmp_path / "verdict.json"
    answer = cli(
        "attack", tmp_path / "net.pt", "--architecture", "convnet", "--dataset", "digits",
        "--attacks", "lazy,fgsm", "--eps", "16/255", "--limit", 20, "--set", "convnet.depth=1",
        "--set", "convnet.width=4", "--device", "cpu", "--output", target,
    )  # fmt: skip
    assert answer.code == 1
    assert "attack 'lazy' raised MemoryError: much" in " ".join(answer.out.split())
    clean, lazy, fgsm = json.loads(target.read_text())["verdicts"]
    assert lazy["error"] == "attack 'lazy' raised MemoryError: much"
    assert fgsm["n"] == clean["n"] == 20


def test_a_verdict_says_with_what_it_was_made(cli, trained, tmp_path):
    torch.save(trained, tmp_path / "net.pt")
    target = tmp_path / "verdict.json"
    attack(cli, tmp_path / "net.pt", "--limit", 20, "--set", "pgd.steps=3", "--output", target)
    clean, fgsm, pgd, *_ = json.loads(target.read_text())["verdicts"]
    assert "options" not in clean
    assert (fgsm["name"], fgsm["options"]) == ("fgsm", {})
    assert pgd["options"]["steps"] == 3
    assert pgd["provenance"] == {}


def test_the_normalisation_it_was_trained_with_counts(cli, trained, tmp_path, splits):
    torch.save(trained, tmp_path / "net.pt")
    spec = splits.spec
    given = attack(cli, tmp_path / "net.pt", "--mean", spec.mean[0], "--std", spec.std[0])
    assert given.out == attack(cli, tmp_path / "net.pt").out
    assert attack(cli, tmp_path / "net.pt", "--mean", 5).out != given.out
    answer = attack(cli, tmp_path / "net.pt", "--mean", "0.1,0.2")
    assert "--mean has 2 numbers; digits has 1 channels" in answer.mistake


def test_a_network_from_elsewhere_is_audited_as_those_of_a_run(cli, install, trained, tmp_path):
    install("lazy", "import torch" + LAZY)
    certain = {k: 1e6 * v if k.startswith("classifier") else v for k, v in trained.items()}
    torch.save(certain, tmp_path / "net.pt")
    target = tmp_path / "verdict.json"
    answer = cli(
        "attack", tmp_path / "net.pt", "--architecture", "convnet", "--dataset", "digits",
        "--attacks", "lazy,fgsm", "--eps", "200/255,240/255", "--limit", 100,
        "--set", "convnet.depth=1", "--set", "convnet.width=4", "--device", "cpu",
        "--output", target,
    )  # fmt: skip
    assert answer.code == 0, answer
    verdicts = json.loads(target.read_text())["verdicts"]
    flags = {(v["attack"], v["eps"]): {f["name"] for f in v["flags"]} for v in verdicts}
    assert flags["clean", None] == {"saturated-gradient"}
    # Every budget is probed.
    for eps in (200 / 255, 240 / 255):
        assert flags["lazy", eps] == {"more-steps"}
    assert "has no gradient at 100 % of the right images" in answer.out
    assert "with twice the steps breaks" in answer.out


SECRETIVE = """
class Probe(Attack[NoOptions]):
    \"""Breaks what its access lets it, and keeps count over its budgets.\"""

    info = Info(title="Probe", licence="MIT")
    norms = frozenset({"linf"})

    def perturb(self, model, images, labels, threat, run):
        if not threat.eps:
            return images
        self.messages = [f"call {len(run.memo) + 1} of {self.name}"]
        run.memo[threat.eps] = True
        return images if self.access == "white" else (1 - images - threat.eps).clamp(0, 1)

class Open(Probe):
    \"""Sees gradients.\"""
    name = "open"

class Closed(Probe):
    \"""Sees none.\"""
    name, access = "closed", "black"

@hookimpl
def rdd_bench_attacks():
    return [Open, Closed]
"""


def test_attacks_on_a_network_from_elsewhere_are_compared_and_have_a_memory_each(
    cli, install, trained, tmp_path
):
    install("secretive", "from rdd_bench.api import *" + SECRETIVE)
    torch.save(trained, tmp_path / "net.pt")
    target = tmp_path / "verdict.json"
    answer = cli(
        "attack", tmp_path / "net.pt", "--architecture", "convnet", "--dataset", "digits",
        "--attacks", "open,closed", "--eps", "0.6,0.9", "--limit", 100,
        "--set", "convnet.depth=1", "--set", "convnet.width=4", "--device", "cpu",
        "--output", target,
    )  # fmt: skip
    assert answer.code == 0, answer
    verdicts = json.loads(target.read_text())["verdicts"][1:]
    assert [v["messages"] for v in verdicts] == [
        ["call 1 of open"], ["call 1 of closed"], ["call 2 of open"], ["call 2 of closed"],
    ]  # fmt: skip
    for verdict in verdicts:
        names = {flag["name"] for flag in verdict["flags"]}
        assert ("black-box" in names) is (verdict["attack"] == "closed")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if "bias" not in k}, "it lacks "),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, "it has unknown extra.weight"),
        (lambda s: {k: v[:2] for k, v in s.items()}, "and not (4, 1, 3, 3)"),
        (lambda s: [1, 2], "holds list; expected a state_dict"),
        (lambda s: {"epoch": 3}, "is no state_dict: it holds epoch"),
        (lambda s: {k: v * torch.nan for k, v in s.items()}, "has NaN or infinite numbers in "),
    ],
)
def test_a_file_that_does_not_fit_says_why(cli, trained, tmp_path, change, says):
    torch.save(change(trained), tmp_path / "net.pt")
    answer = attack(cli, tmp_path / "net.pt")
    assert says in answer.mistake


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--eps", "8"), "write 8/255 if you meant 8 grey levels"),
        (("--eps", "eight"), "'eight' is not a budget"),
        (("--eps", "nan"), "'nan' is not a budget"),
        (("--attacks", "fgms"), "did you mean 'fgsm'?"),
        (("--set", "dm.lr=1"), "--set names 'dm', which is not used here"),
    ],
)
def test_a_mistake_is_found_before_the_network_is_read(cli, tmp_path, arguments, says):
    (tmp_path / "net.pt").write_bytes(b"")
    assert says in attack(cli, tmp_path / "net.pt", *arguments).mistake


# lint -----------------------------------------------------------------------------------------


def test_lint_says_what_a_set_is(cli, tiny, out, records_of):
    tiny("--attacks", "fgsm")
    (path,) = (out / "sets").glob("*.safetensors")
    answer = cli("lint", path)
    (record,) = records_of(out, "distill")
    assert answer.code == 0
    for text in ("10 of 8x8, 1 channel", "10, 1 images each", record.set_sha256, "[0, 1]"):
        assert text in answer.out
    assert f"{record.bytes:,}" in answer.out


def test_lint_minds_what_is_to_be_minded(cli, tmp_path):
    images = torch.rand(4, 1, 8, 8)
    torch.save([images, torch.tensor([0, 0, 0, 1])], tmp_path / "a.pt")
    answer = cli("lint", tmp_path / "a.pt")
    assert answer.code == 1
    assert "unbalanced: class 1 has 1" in answer.out
    torch.save([images * 4 - 2, torch.tensor([0, 0, 1, 1])], tmp_path / "b.pt")
    assert "probably normalised" in cli("lint", tmp_path / "b.pt").out


def test_lint_trains_on_a_set_when_asked_to(cli, foreign, protocol):
    answer = cli(
        "lint", foreign, "--accuracy", "--protocol", protocol, "--dataset", "digits",
        "--seeds", "0-1", "--device", "cpu",
    )  # fmt: skip
    assert answer.code in (0, 1), answer
    for text in ("accuracy as stored", "accuracy clipped to [0, 1]", "accuracy as 8-bit pictures"):
        assert text in answer.out
    assert "accuracy" not in cli("lint", foreign).out
    answer = cli("lint", foreign, "--seeds", "0")
    assert "--seeds says how to train on the set; give --accuracy with it" in answer.mistake


# explain and verify ---------------------------------------------------------------------------


def test_explain_prints_the_command_that_makes_the_same_cell(
    cli, tiny, out, protocol, records_of, tmp_path, verdicts
):
    tiny("--distillers", "random,dm", "--set", "dm.iterations=3", "--set", "dm.batch_real=5")
    (record,) = [
        r for r in records_of(out, "attack")
        if r.attack.name == "rdd-bench/pgd" and r.distill in
        {d.address for d in records_of(out, "distill") if d.distiller.name == "rdd-bench/dm"}
    ]  # fmt: skip
    answer = cli("explain", out, record.address[:10], "--protocol", protocol)
    assert answer.code == 0, answer
    command = shlex.split(answer.out.strip().splitlines()[-1])
    assert command[:2] == ["rdd-bench", "run"]
    assert "dm.iterations=3" in command
    again = tmp_path / "again"
    cli(*command[1:], "--out", again, "--device", "cpu", "--workers", 1)
    assert verdicts(again)[record.address] == verdicts(out)[record.address]


def test_explain_knows_the_options_of_the_network_that_distilled(
    cli, tiny, out, protocol, records_of
):
    tiny("--architectures", "mlp", "--set", "convnet.width=3", "--attacks", "fgsm")
    (record,) = records_of(out, "attack")
    answer = cli("explain", out, record.address[:8], "--protocol", protocol)
    assert "convnet.width=3" in answer.out
    assert "made by other code" not in answer.out


def test_verify_makes_cells_again_and_finds_a_changed_verdict(cli, tiny, out, protocol, records_of):
    tiny()
    answer = cli("verify", out, "--cells", 5, "--protocol", protocol, "--device", "cpu")
    assert answer.code == 0, answer
    assert "2 of 2 cells are equal, image by image" in answer.out
    # Somebody improves a number and its bitmap.
    (record,) = [r for r in records_of(out, "attack") if r.attack.name == "rdd-bench/fgsm"]
    path = out / "records" / f"{record.address}.json"
    content = json.loads(path.read_text())
    content["outcomes"] = [r for t in records_of(out, "train") for r in t.outcomes]
    content["correct"] = [c for t in records_of(out, "train") for c in t.correct]
    path.write_text(json.dumps(content))
    answer = cli("verify", out, "--cells", 5, "--protocol", protocol, "--device", "cpu")
    assert answer.code == 1
    assert "of 80 verdicts of the attack step differ" in answer.out
    assert "1 of 2 cells are equal" in answer.out


def test_an_unknown_cell_and_another_protocol_are_refused(cli, tiny, out, protocol):
    tiny("--attacks", "fgsm")
    answer = cli("explain", out, "zzz", "--protocol", protocol)
    assert "no finished cell has an address that begins with 'zzz'" in answer.mistake
    protocol.write_text(protocol.read_text().replace("epochs = 3", "epochs = 4"))
    answer = cli("verify", out, "--protocol", protocol)
    assert "made under protocol tiny-v1 with other rules" in answer.mistake
