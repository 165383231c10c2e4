"""MTT and MAT against their equations: experts, their store, the matching, the robust losses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdd_bench.augment import draw
from rdd_bench.checks import check_distilled_set
from rdd_bench.components import Architecture, DistillTask, Run
from rdd_bench.errors import Diverged, NotApplicable, RddBenchError
from rdd_bench.seeding import seeded
from rdd_bench.types import Config, DatasetSpec, Info, LabelledImages, Recipe
from rdd_bench_builtin.distillers import _trajectories as trajectories
from rdd_bench_builtin.distillers import _trajectory_matching as matching
from rdd_bench_builtin.distillers._coreset import DSA
from rdd_bench_builtin.distillers._trajectories import (
    ExpertConfig,
    ExpertStore,
    Smoothing,
    find_or_train_experts,
    flat_parameters,
    train_expert,
)
from rdd_bench_builtin.distillers._trajectory_matching import (
    MatchingConfig,
    Student,
    draw_steps,
    match_by_adjoint,
    match_by_unrolling,
)
from rdd_bench_builtin.distillers._zca import fit_zca
from rdd_bench_builtin.distillers.mat import (
    MAT,
    AdversarialConfig,
    attack,
    divergence,
    mart_loss,
    robust_loss,
    trades_loss,
)
from rdd_bench_builtin.distillers.mtt import MTT, natural_loss

torch.set_num_threads(1)

NO_FLIP = "color_crop_cutout_scale_rotate"
QUICK: dict[str, Any] = {"num_experts": 2, "expert_epochs_total": 2, "expert_batch": 8}


class Block(nn.Module):
    """A convolution, a norm and a classifier of 8x8 images."""

    def __init__(self, classes: int, width: int, norm: str, dropout: float = 0.0) -> None:
        super().__init__()
        norms = {"instance": nn.GroupNorm(width, width), "batch": nn.BatchNorm2d(width)}
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), norms[norm], nn.ReLU(inplace=True), nn.AvgPool2d(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.body(images).flatten(1)))
        return logits


class TinyConfig(Config):
    """Options of the test's network."""

    width: int = 4
    """Channels."""
    norm: str = "instance"
    """Norm."""
    dropout: float = 0.0
    """Rate."""


class Tiny(Architecture[TinyConfig]):
    """One block."""

    name = "tiny"
    info = Info(title="Tiny", licence="MIT")

    def build(self, spec):
        return Block(spec.num_classes, self.config.width, self.config.norm, self.config.dropout)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0):
        yield


@pytest.fixture(scope="module")
def train():
    """Thirty images of three classes, a bright stripe each, in (0, 1)."""
    with seeded(5):
        labels = torch.arange(30) % 3
        images = 0.4 * torch.rand(30, 1, 8, 8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 3 * label : 3 * label + 2] += 0.5
    return LabelledImages(images, labels)


def make_task(train: LabelledImages, ipc: int = 2, seed: int = 0, **options: Any) -> DistillTask:
    spec = DatasetSpec(
        name="stripes", shape=(1, 8, 8), class_names=("a", "b", "c"), mean=(0.4,), std=(0.3,)
    )
    return DistillTask(spec, train, ipc, Tiny.configured(options), seed)


def make_run(folder: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "device": torch.device("cpu"),
        "scratch": folder,
        "phase": lambda name: contextlib.nullcontext(),
        "report": lambda what, done, total: None,
    }
    return Run(**(settings | changes))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


# The matching ---------------------------------------------------------------------------------


def problem(
    count: int, batch: int | None, augment: str = NO_FLIP, norm: str = "instance"
) -> dict[str, Any]:
    """A student of double precision, six images, and the steps it is to take."""
    with seeded(3):
        student = Student(Block(3, 4, norm).double())
        start = flat_parameters(student.network)
        return {
            "student": student,
            "start": start,
            "target": start + 0.1 * torch.randn_like(start),
            "images": torch.randn(6, 1, 8, 8, dtype=torch.float64),
            "labels": torch.arange(6) % 3,
            "step_size": torch.tensor(0.1, dtype=torch.float64),
            "steps": draw_steps(count, 6, batch, augment, (8, 8)),
        }


def plain_sgd(case: dict[str, Any]) -> Tensor:
    """The student's weights after its steps, by torch's own optimiser on a plain module."""
    network = case["student"].network
    start = flat_parameters(network)
    nn.utils.vector_to_parameters(case["start"].clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=case["step_size"].item())
    for batch, transform in case["steps"]:
        optimizer.zero_grad()
        logits = network(transform(case["images"][batch]))
        torch.autograd.backward(nn.functional.cross_entropy(logits, case["labels"][batch]))
        optimizer.step()
    end = flat_parameters(network)
    nn.utils.vector_to_parameters(start, network.parameters())
    return end


def relative(first: Tensor, second: Tensor) -> float:
    ratio: float = ((first - second).norm() / second.norm()).item()
    return ratio


MATCHES = pytest.mark.parametrize("match", [match_by_unrolling, match_by_adjoint])


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_adjoint_has_the_gradient_of_the_unrolled_steps(count, batch, norm):
    case = problem(count, batch, norm=norm)
    loss, of_images, of_step_size = match_by_adjoint(**case)
    expected_loss, expected_images, expected_step_size = match_by_unrolling(**case)
    assert relative(loss, expected_loss) < 1e-12
    assert relative(of_images, expected_images) < 1e-10
    assert relative(of_step_size, expected_step_size) < 1e-10
    assert expected_images.norm() > 0


@pytest.mark.parametrize("operation", [*NO_FLIP.split("_"), "flip"])
def test_every_augmentation_is_replayed_as_it_was(operation):
    case = problem(3, 4, operation)
    assert relative(match_by_adjoint(**case)[1], match_by_unrolling(**case)[1]) < 1e-10


@MATCHES
@pytest.mark.parametrize("batch", [None, 4])
def test_the_loss_is_that_of_a_student_trained_by_plain_sgd(match, batch):
    case = problem(4, batch)
    end = plain_sgd(case)
    distance = (end - case["target"]).norm() ** 2 / (case["start"] - case["target"]).norm() ** 2
    assert match(**case)[0].item() == pytest.approx(distance.item(), rel=1e-12)


@MATCHES
def test_the_gradient_is_that_of_finite_differences(match):
    case = problem(4, 4)
    direction = torch.randn_like(case["images"])

    def loss(images: float, step_size: float) -> float:
        moved = {
            "images": case["images"] + images * direction,
            "step_size": case["step_size"] + step_size,
        }
        return float(match(**(case | moved))[0])

    _, of_images, of_step_size = match(**case)
    h = 1e-6
    slope = (loss(h, 0) - loss(-h, 0)) / (2 * h)
    assert slope == pytest.approx(float((of_images * direction).sum()), rel=1e-5)
    assert (loss(0, h) - loss(0, -h)) / (2 * h) == pytest.approx(of_step_size.item(), rel=1e-5)


@MATCHES
def test_the_loss_is_one_without_a_step_and_zero_at_the_target(match):
    case = problem(3, 4)
    nothing = {"step_size": torch.zeros((), dtype=torch.float64)}
    loss, of_images, _ = match(**(case | nothing))
    assert loss.item() == 1
    assert of_images.abs().max() == 0
    loss, of_images, _ = match(**(case | {"target": plain_sgd(case)}))
    assert loss.item() < 1e-25
    assert of_images.abs().max() < 1e-10


@MATCHES
def test_matching_leaves_its_arguments_alone(match):
    case = problem(3, None)
    before = {k: v.clone() for k, v in case.items() if isinstance(v, Tensor)}
    network = flat_parameters(case["student"].network)
    for result in match(**case):
        assert not result.requires_grad
    for name, value in before.items():
        assert torch.equal(case[name], value)
        assert not case[name].requires_grad
    assert torch.equal(flat_parameters(case["student"].network), network)


def test_batches_cut_a_random_order_and_the_small_one_comes_first():
    steps = draw_steps(7, 8, 3, "", (8, 8))
    assert [len(step.batch) for step in steps] == [2, 3, 3, 2, 3, 3, 2]
    rounds = [torch.cat([step.batch for step in steps[i : i + 3]]).tolist() for i in (0, 3)]
    assert [sorted(r) for r in rounds] == [list(range(8))] * 2
    assert rounds[0] != rounds[1]
    assert [len(step.batch) for step in draw_steps(2, 8, None, "", (8, 8))] == [8, 8]


# Experts --------------------------------------------------------------------------------------


def config(**options: Any) -> ExpertConfig:
    return ExpertConfig.model_validate({**QUICK, "augment": NO_FLIP, **options})


def test_an_expert_is_plain_sgd_with_augmentation(train, run):
    """The same draws and torch's optimiser give the same weights; no two snapshots are alike."""
    task, options = make_task(train), config(expert_epochs_total=3, expert_lr=0.05)
    with seeded(7):
        made = train_expert(task, run, options, natural_loss, Smoothing())
    with seeded(7):
        network = task.build_network(run.device)
        images = task.normalise(train.images)
        expected = [flat_parameters(network).clone()]
        for _ in range(3):
            for batch in torch.randperm(30).split(8):  # type: ignore[no-untyped-call]
                inputs = draw(NO_FLIP, len(batch), (8, 8))(images[batch])
                loss = nn.functional.cross_entropy(network(inputs), train.labels[batch])
                gradients = torch.autograd.grad(loss, list(network.parameters()))
                with torch.no_grad():
                    for p, g in zip(network.parameters(), gradients, strict=True):
                        p.sub_(0.05 * g)
            expected.append(flat_parameters(network).clone())
    assert torch.allclose(made, torch.stack(expected), atol=1e-6)
    assert made.dtype == torch.float32
    assert len({tuple(row.tolist()) for row in made}) == 4


def test_flat_parameters_are_a_copy():
    network = Block(3, 4, "instance")
    flat = flat_parameters(network)
    before = flat.clone()
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert torch.equal(flat, before)
    one = nn.Linear(3, 1, bias=False)
    assert flat_parameters(one).data_ptr() != one.weight.data_ptr()


def trajectory(train: LabelledImages, run: Run, smoothing: Smoothing, **options: Any) -> Tensor:
    with seeded(7):
        return train_expert(make_task(train), run, config(**options), natural_loss, smoothing)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_an_average_without_memory_is_the_raw_trajectory(train, run, every):
    raw = trajectory(train, run, Smoothing())
    assert torch.equal(trajectory(train, run, Smoothing(every, 0.0)), raw)
    assert torch.equal(trajectory(train, run, Smoothing("none", 0.9)), raw)
    assert not torch.allclose(trajectory(train, run, Smoothing(every, 0.9))[1:], raw[1:], atol=1e-4)


def test_the_average_of_epochs_is_that_of_the_raw_snapshots(train, run):
    raw = trajectory(train, run, Smoothing(), expert_epochs_total=4)
    expected = [raw[0]]
    for row in raw[1:]:
        expected.append(0.7 * expected[-1] + 0.3 * row)
    made = trajectory(train, run, Smoothing("epoch", 0.7), expert_epochs_total=4)
    assert torch.allclose(made, torch.stack(expected), atol=1e-6)


def test_the_average_of_steps_with_one_step_an_epoch_is_that_of_epochs(train, run):
    by_step = trajectory(train, run, Smoothing("step", 0.7), expert_batch=30)
    assert torch.equal(by_step, trajectory(train, run, Smoothing("epoch", 0.7), expert_batch=30))
    # With four steps an epoch the averages differ, by their memory.
    assert not torch.equal(
        trajectory(train, run, Smoothing("step", 0.7)),
        trajectory(train, run, Smoothing("epoch", 0.7)),
    )


def contents(store: ExpertStore, count: int = 3) -> list[list[tuple[float, ...]]]:
    return [[tuple(store.snapshot(i, e).tolist()) for e in range(3)] for i in range(count)]


def experts(train: LabelledImages, run: Run, *, task: Any = None, **options: Any) -> ExpertStore:
    return find_or_train_experts(
        task or make_task(train), run, config(**options), "mtt", natural_loss
    )


def test_experts_survive_the_disk_bit_by_bit(tmp_path):
    store, snapshots = ExpertStore(tmp_path, "k" * 64, "mtt"), torch.randn(4, 9)
    assert not store.holds(3)
    store.write(3, snapshots)
    assert store.holds(3)
    assert not store.holds(2)
    for epoch in range(4):
        assert torch.equal(store.snapshot(3, epoch), snapshots[epoch])
    assert [path.name for path in store.folder.iterdir()] == ["0003.safetensors"]


def test_experts_are_made_once_and_only_the_missing_ones_again(train, run, monkeypatch):
    store = experts(train, run, num_experts=3)
    before = contents(store)
    store.path(1).unlink()
    made = []
    original = trajectories.train_expert

    def spy(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(trajectories, "train_expert", spy)
    # A call for more images per class, in the middle of other draws, shares them.
    torch.rand(5)
    again = experts(train, run, task=make_task(train, ipc=1), num_experts=3)
    assert len(made) == 1
    assert contents(again) == before
    experts(train, run, num_experts=5)
    assert len(made) == 3
    assert len({tuple(store.snapshot(i, 0).tolist()) for i in range(5)}) == 5


def test_an_interrupted_call_goes_on(train, run, monkeypatch):
    whole = experts(train, run, num_experts=3)
    before = contents(whole)
    for i in range(3):
        whole.path(i).unlink()
    original, calls = trajectories.train_expert, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(trajectories, "train_expert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experts(train, run, num_experts=3)
    assert [whole.path(i).exists() for i in range(3)] == [True, True, False]
    experts(train, run, num_experts=3)
    assert len(calls) == 4
    assert contents(whole) == before


def test_finding_experts_and_making_them_draw_the_same_from_the_host(train, run):
    states = []
    for _ in range(2):
        with seeded(1):
            experts(train, run)
            states.append((torch.rand(2).tolist(), np.random.rand(), random.random()))
    assert states[0] == states[1]
    with seeded(1):
        assert states[0] == (torch.rand(2).tolist(), np.random.rand(), random.random())


def test_whatever_decides_an_expert_is_in_its_key(train, tmp_path, monkeypatch):
    def key(task: DistillTask | None = None, objective: Any = natural_loss, **options: Any) -> str:
        decisive = options.pop("decisive", {})
        return trajectories._key(task or make_task(train), config(**options), objective, decisive)

    other = LabelledImages(train.images * 0.5, train.labels)
    relabelled = LabelledImages(train.images, train.labels.flip(0))
    different = [
        key(make_task(train, seed=1)),
        key(make_task(other)),
        key(make_task(relabelled)),
        key(make_task(train, width=6)),
        key(decisive={"eps": 0.1}),
        key(objective=robust_loss(make_task(train), AdversarialConfig())),
        key(expert_lr=0.02),
        key(expert_batch=4),
        key(expert_epochs_total=3),
        key(augment="crop"),
    ]
    assert len({key(), *different}) == len(different) + 1
    assert key() == key(make_task(train, ipc=7)) == key(num_experts=9)
    before = key()
    edited = tmp_path / "edited.py"
    edited.write_text("other code")
    monkeypatch.setattr(sys.modules[natural_loss.__module__], "__file__", str(edited))
    assert key() != before


def test_an_edit_that_changes_nothing_gives_the_same_experts(train, tmp_path, monkeypatch):
    run, again = make_run(tmp_path / "before"), make_run(tmp_path / "after")
    first = experts(train, run)
    edited = tmp_path / "edited.py"
    edited.write_text("other code")
    monkeypatch.setattr(sys.modules[natural_loss.__module__], "__file__", str(edited))
    second = experts(train, again)
    assert first.key != second.key
    assert torch.equal(first.snapshot(0, 1), second.snapshot(0, 1))


def damage(store: ExpertStore, how: str) -> None:
    path = store.path(1)
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "swapped":
        path.write_bytes(store.path(0).read_bytes())
    else:
        from safetensors.torch import save

        path.write_bytes(save({"other": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("truncated", "is truncated"),
        ("empty", "is truncated"),
        ("flipped", "does not have the content"),
        ("swapped", "is another file"),
        ("foreign", "is another file"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_kept(train, run, how, found):
    store = experts(train, run)
    damage(store, how)
    before = store.path(1).read_bytes()
    with pytest.raises(RddBenchError, match=rf"mtt: .*0001.* {found}.*expert 2.*delete it"):
        experts(train, run)
    assert store.path(1).read_bytes() == before
    store.path(1).unlink()
    experts(train, run)


def test_a_run_with_a_cache_keeps_experts_there(train, tmp_path):
    run: Any = SimpleNamespace(
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        cache=tmp_path / "cache",
        phase=lambda name: contextlib.nullcontext(),
        track=lambda items, what: items,
    )
    assert experts(train, run).path(0).is_relative_to(tmp_path / "cache" / "experts")


def test_an_expert_that_diverges_is_named(train, run):
    with pytest.raises(RddBenchError, match=r"mtt: expert 1 .* after epoch 1; .*lower .*expert_lr"):
        experts(train, run, expert_lr=1e30)
    assert not list(run.scratch.rglob("*.safetensors"))


# The methods ----------------------------------------------------------------------------------


def smoke(distiller: Any, **options: Any) -> Any:
    return distiller.configured({**distiller.smoke, "expert_batch": 8, **options})


VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (MTT, {}),
    (MTT, {"init": "noise", "batch_syn": 4}),
    (MTT, {"gradient": "unroll"}),
    (MAT, {}),
    (MAT, {"regime": "trades"}),
    (MAT, {"regime": "mart", "ema_every": "epoch"}),
]


@pytest.mark.parametrize(("distiller", "options"), VARIANTS)
def test_the_same_seed_gives_the_same_set_with_experts_made_or_found(
    train, tmp_path, distiller, options
):
    task, sets = make_task(train), []
    before = train.images.clone()
    for seed, folder in ((1, "a"), (1, "a"), (1, "b"), (2, "b")):
        with seeded(seed):
            made = smoke(distiller, **options).distill(task, make_run(tmp_path / folder))
        sets.append(check_distilled_set(made, task.spec, 2, distiller.name))
    assert torch.equal(sets[0].images, sets[1].images)
    assert torch.equal(sets[0].images, sets[2].images)
    assert sets[0].notes == sets[1].notes == sets[2].notes
    assert not torch.equal(sets[0].images, sets[3].images)
    assert torch.equal(sets[0].labels, torch.arange(3).repeat_interleave(2))
    assert torch.equal(train.images, before)
    recipe = sets[0].recipe
    augment = DSA
    assert recipe == Recipe(lr=sets[0].notes["step_size"], augment=augment, epochs=1000)
    json.dumps(dict(sets[0].notes), allow_nan=False)


def test_both_gradients_make_the_same_set(train, tmp_path):
    sets = []
    for gradient in ("adjoint", "unroll"):
        with seeded(1):
            method = smoke(MTT, gradient=gradient, iterations=5)
            sets.append(method.distill(make_task(train), make_run(tmp_path)))
    assert torch.allclose(sets[0].images, sets[1].images, atol=1e-4)
    assert sets[0].notes["final_loss"] == pytest.approx(sets[1].notes["final_loss"], rel=1e-4)


def test_images_and_step_size_take_steps_of_sgd_with_momentum(train, tmp_path, monkeypatch):
    """Constant gradients move them by the closed form: velocities 1, 1.5, 1.75."""
    monkeypatch.setattr(
        matching,
        "match_by_adjoint",
        lambda student, start, target, images, labels, step_size, steps: (
            torch.ones(()),
            torch.ones_like(images),
            torch.ones_like(step_size),
        ),
    )
    ends = {}
    for iterations in (1, 3):
        with seeded(1):
            method = smoke(MTT, iterations=iterations, lr_img=2.0, lr_lr=0.01, init_lr=0.1)
            ends[iterations] = method.distill(make_task(train), make_run(tmp_path))
    moved = ends[1].images - ends[3].images
    # A step in normalised space is 0.3 in pixels.
    assert torch.allclose(moved, torch.full_like(moved, (1.5 + 1.75) * 2 * 0.3), atol=1e-5)
    assert ends[3].recipe is not None
    assert ends[3].recipe.lr == pytest.approx(0.1 - 0.01 * (1 + 1.5 + 1.75))
    assert ends[3].images.min() < 0  # not clamped
    real = {tuple(i.flatten().mul(1e4).round().tolist()) for i in train.images}
    begun = (ends[1].images + 0.6).flatten(1).mul(1e4).round()
    assert all(tuple(image.tolist()) in real for image in begun)


def test_students_begin_and_end_where_the_options_say(train, tmp_path, monkeypatch):
    """Starts are epochs 0 to max_start_epoch - 1, ends M later, and experts take turns."""
    seen = []

    def spy(student, start, target, images, labels, step_size, steps):
        seen.append((start, target, len(steps)))
        return torch.ones(()), torch.zeros_like(images), torch.zeros_like(step_size)

    monkeypatch.setattr(matching, "match_by_adjoint", spy)
    options = {
        "num_experts": 3,
        "expert_epochs_total": 5,
        "expert_epochs": 2,
        "max_start_epoch": 4,
        "iterations": 60,
        "syn_steps": 7,
    }
    task, run = make_task(train), make_run(tmp_path)
    smoke(MTT, **options).distill(task, run)
    store = experts(train, run, augment=DSA, num_experts=3, expert_epochs_total=5)
    place = {tuple(store.snapshot(i, e).tolist()): (i, e) for i in range(3) for e in range(6)}
    starts = [place[tuple(s.tolist())] for s, _, _ in seen]
    ends = [place[tuple(t.tolist())] for _, t, _ in seen]
    assert [(i, e + 2) for i, e in starts] == ends
    assert {e for _, e in starts} == {0, 1, 2, 3}
    assert all({i for i, _ in starts[n : n + 3]} == {0, 1, 2} for n in range(0, 60, 3))
    assert {count for _, _, count in seen} == {7}


def test_matching_lowers_the_loss(train, run):
    """Against images that do not move, over the same experts and starts."""
    options = {"num_experts": 4, "expert_lr": 0.05, "init_lr": 0.05, "syn_steps": 4}
    losses = []
    for rates in ({"lr_img": 1e-9, "lr_lr": 0.0}, {"lr_img": 3.0, "lr_lr": 1e-4}):
        with seeded(1):
            made = smoke(MTT, **options, **rates, iterations=150).distill(make_task(train), run)
        losses.append(made.notes["final_loss"])
    assert losses[1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("distiller", [MTT, MAT])
def test_too_few_epochs_of_the_experts_are_refused_with_the_options(distiller):
    fits = {"expert_epochs_total": 6, "max_start_epoch": 5, "expert_epochs": 2}
    distiller.configured(fits)
    with pytest.raises(RddBenchError, match=r"expert_epochs_total=5 is too short.*need 6"):
        distiller.configured({**fits, "expert_epochs_total": 5})


@pytest.mark.parametrize(
    ("options", "gradients", "message"),
    [
        ({"lr_lr": 0.02}, (1.0, 1.0, 1.0), r"is 1, .* from 0.01 to -0.01 .*are finite.*positive"),
        ({"lr_lr": 1e-7}, (1.0, torch.nan, 1.0), r"is 1, .*images are not all finite"),
        ({"lr_lr": 1e-7}, (1.0, 1.0, torch.inf), r"is 1, .* to -inf"),
        ({"lr_lr": 1e-7}, (torch.nan, 1.0, 1.0), r"is nan"),
    ],
)
def test_divergence_is_one_sentence(train, run, monkeypatch, options, gradients, message):
    monkeypatch.setattr(
        matching,
        "match_by_adjoint",
        lambda student, start, target, images, labels, step_size, steps: (
            torch.tensor(gradients[0]),
            torch.full_like(images, gradients[1]),
            torch.full_like(step_size, gradients[2]),
        ),
    )
    task = make_task(train)
    with seeded(1), pytest.raises(Diverged, match=f"iteration 1 the loss {message}.*lower") as e:
        smoke(MTT, **options).distill(task, run)
    assert "\n" not in str(e.value)
    assert str(e.value).startswith("mtt: in ")
    # Nothing good came before but the real images that it began with, and the first step size.
    kept = check_distilled_set(e.value.last_good, task.spec, task.ipc, "kept")
    rows = {tuple(image.flatten().tolist()) for image in train.images}
    back = {tuple(image.flatten().tolist()) for image in kept.images}
    assert len(back) == len(kept)
    gaps = [min((torch.tensor(b) - torch.tensor(r)).abs().max().item() for r in rows) for b in back]
    assert max(gaps) < 1e-6
    assert kept.recipe is not None
    assert kept.recipe.lr == pytest.approx(0.01)


def test_zca_makes_the_covariance_what_its_equation_says():
    images = torch.rand(200, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    images[:, 0] *= 20  # Variances above and below eps.
    whitening = fit_zca(images)
    whitened = whitening.apply(images).flatten(1)
    variances, directions = torch.linalg.eigh(torch.cov(images.flatten(1).T))
    expected = directions @ torch.diag(variances / (variances + 0.1)) @ directions.T
    assert torch.allclose(torch.cov(whitened.T), expected, atol=1e-10)
    assert whitened.mean(dim=0).abs().max() < 1e-10
    assert torch.allclose(whitening.matrix, whitening.matrix.T)
    assert torch.allclose(whitening.invert(whitening.apply(images)), images, atol=1e-10)


def test_zca_of_pixels_survives_float32():
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whitening = fit_zca(images)  # Fewer images than pixels: most directions have no variance.
    assert whitening.matrix.dtype == torch.float32
    assert torch.allclose(whitening.invert(whitening.apply(images)), images, atol=1e-5)


@pytest.mark.parametrize("distiller", [MTT, MAT])
def test_with_zca_experts_and_students_see_whitened_images(distiller, train, run, monkeypatch):
    seen: list[Tensor] = []
    original = matching.match_by_adjoint

    def spy(student, start, target, images, *rest):
        seen.append(images.clone())
        return original(student, start, target, images, *rest)

    monkeypatch.setattr(matching, "match_by_adjoint", spy)
    made = smoke(distiller, zca=True, augment="").distill(make_task(train), run)
    whitening = fit_zca(train.images)
    assert made.whitening is not None
    assert torch.equal(made.whitening.matrix, whitening.matrix)
    assert made.recipe.uses == ("whitening",)
    whitened = whitening.apply(train.images)
    gaps = (seen[0].flatten(1)[:, None] - whitened.flatten(1)[None]).abs().amax(dim=2).amin(dim=1)
    assert gaps.max() < 1e-6  # It begins with whitened real images ...
    assert (made.images.mean() - train.images.mean()).abs() < 0.2  # ... and returns pixels.
    plain = smoke(distiller, augment="").distill(make_task(train), run)
    assert plain.whitening is None
    assert plain.recipe.uses is None


def test_the_attack_on_whitened_experts_works_on_pixels(train):
    """Its budget is one of pixels, whatever the networks see."""
    task = dataclasses.replace(make_task(train), whitening=fit_zca(train.images))
    options = AdversarialConfig(eps=0.1, steps=3)
    seen: list[Tensor] = []
    network = task.build_network(torch.device("cpu"))
    network.register_forward_pre_hook(lambda _, inputs: seen.append(task.denormalise(inputs[0])))
    images = task.normalise(train.images[:6])
    robust_loss(task, options)(network, images, train.labels[:6])
    assert (seen[-1] - train.images[:6]).abs().max() <= 0.1 + 1e-4
    assert (seen[-1] - train.images[:6]).abs().max() > 0.05
    assert seen[-1].min() >= -1e-4
    assert seen[-1].max() <= 1 + 1e-4


def test_a_network_with_dropout_is_not_applicable(train, run):
    with pytest.raises(NotApplicable, match=r"mtt needs .* Block draws random numbers"):
        smoke(MTT).distill(make_task(train, dropout=0.5), run)


def test_batch_norm_and_a_last_batch_of_one_are_served(train, run):
    made = smoke(MTT, expert_batch=29).distill(make_task(train, norm="batch"), run)
    assert torch.isfinite(made.images).all()


def test_phases_and_progress_are_reported(train, tmp_path):
    reports, phases = [], []

    def phase(name):
        phases.append(name)
        return contextlib.nullcontext()

    run = make_run(tmp_path, phase=phase, report=lambda *report: reports.append(report))
    smoke(MTT, iterations=2).distill(make_task(train), run)
    assert phases == ["experts", "matching"]
    assert reports == [
        *[("experts", done, 2) for done in range(3)],
        *[("matching", done, 2) for done in range(3)],
    ]


# Adversarial experts --------------------------------------------------------------------------

REGIMES = pytest.mark.parametrize("regime", ["pgd-at", "trades", "mart"])


@REGIMES
def test_attacks_stay_within_the_budget_and_the_box_in_pixels(train, regime):
    task = make_task(train)
    network = task.build_network(torch.device("cpu"))
    pixels = torch.cat([train.images, train.images.round()])  # some at the borders of the box
    labels = train.labels.repeat(2)
    options = AdversarialConfig(regime=regime, eps=0.1, steps=5)
    attacked = attack(lambda x: network(task.normalise(x)), pixels, labels, options)
    assert not attacked.requires_grad
    assert (attacked - pixels).abs().max() <= 0.1 + 1e-6
    assert (attacked - pixels).abs().max() > 0.09
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    clean, robust = (
        nn.functional.cross_entropy(network(task.normalise(x)), labels) for x in (pixels, attacked)
    )
    assert robust > clean + 0.02


@REGIMES
def test_one_step_of_the_attack_follows_the_gradient_of_its_objective_in_pixels(train, regime):
    """By finite differences, through the normalisation, from the same random start."""
    task = make_task(train)
    network = task.build_network(torch.device("cpu")).double()
    pixels = train.images[:2].double() * 0.8 + 0.1
    options = AdversarialConfig(regime=regime, eps=0.01, steps=1, relative_step=0.5)

    def logits_of(x: Tensor) -> Tensor:
        logits: Tensor = network(task.normalise(x))
        return logits

    labels = train.labels[:2]
    with seeded(4):
        attacked = attack(logits_of, pixels, labels, options)
    with seeded(4):
        if regime == "pgd-at":
            start = pixels + torch.empty_like(pixels).uniform_(-0.01, 0.01)
        else:
            start = pixels + 0.001 * torch.randn_like(pixels)

    def value(x: Tensor) -> Tensor:
        if regime == "trades":
            p, q = logits_of(pixels).softmax(1), logits_of(x).softmax(1)
            return (p * (p / q).log()).sum()
        return -logits_of(x).softmax(1)[torch.arange(2), labels].log().sum()

    with torch.no_grad():
        for place in range(0, 128, 5):
            bump = torch.zeros(128, dtype=torch.float64)
            bump[place] = 1e-6
            slope = (value(start + bump.view_as(start)) - value(start - bump.view_as(start))).item()
            expected = (start.flatten()[place] + 0.005 * np.sign(slope)).item()
            original = pixels.flatten()[place].item()
            expected = min(max(expected, original - 0.01), original + 0.01)
            assert attacked.flatten()[place].item() == pytest.approx(expected, abs=1e-9)


def test_without_steps_the_robust_loss_is_the_natural_one(train):
    task = make_task(train)
    network = task.build_network(torch.device("cpu")).train()
    images = task.normalise(train.images)
    loss = robust_loss(task, AdversarialConfig(steps=0))(network, images, train.labels)
    natural = natural_loss(network, images, train.labels)
    assert loss.item() == pytest.approx(natural.item(), rel=1e-5)
    first, second = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, list(network.parameters()))])
        for x in (loss, natural)
    )
    assert relative(first, second) < 1e-4
    assert network.training


@REGIMES
def test_the_robust_loss_is_that_of_clipped_pixels_and_their_adversarial_examples(train, regime):
    task = make_task(train)
    network = task.build_network(torch.device("cpu"))
    images = task.normalise(train.images) * 3  # an augmentation may leave [0, 1]
    options = AdversarialConfig(regime=regime, eps=0.1, steps=2, beta=2.0)
    with seeded(2):
        loss = robust_loss(task, options)(network, images, train.labels)
    pixels = task.denormalise(images).clamp(0, 1)
    with seeded(2):
        attacked = attack(lambda x: network(task.normalise(x)), pixels, train.labels, options)
    clean, robust = network(task.normalise(pixels)), network(task.normalise(attacked))
    outer: dict[str, Any] = {"trades": trades_loss, "mart": mart_loss}
    if regime == "pgd-at":
        expected = nn.functional.cross_entropy(robust, train.labels)
    else:
        expected = outer[regime](clean, robust, train.labels, 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def some_logits() -> tuple[Tensor, Tensor, Tensor]:
    clean = 3 * torch.randn(7, 5, dtype=torch.float64)
    return clean, clean + torch.randn_like(clean), torch.randint(5, (7,))


def test_the_outer_losses_are_those_of_the_papers_image_by_image():
    clean, robust, labels = some_logits()
    trades = mart = 0.0
    for a, b, y in zip(clean, robust, labels.tolist(), strict=True):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        kl = sum(float(p[k] * (p[k] / q[k]).log()) for k in range(5))
        other = max(float(q[k]) for k in range(5) if k != y)
        trades += -float(p[y].log()) + 6 * kl
        mart += -float(q[y].log()) - np.log(1.0001 - other) + 6 * kl * (1 - float(p[y]))
    assert trades_loss(clean, robust, labels, 6.0).item() == pytest.approx(trades / 7, rel=1e-10)
    assert mart_loss(clean, robust, labels, 6.0).item() == pytest.approx(mart / 7, rel=1e-10)


def test_the_divergence_vanishes_between_equals_and_its_gradient_reaches_both_sides():
    clean, robust, labels = some_logits()
    assert divergence(clean, clean).abs().max() < 1e-12
    assert (divergence(clean, robust) > 0).all()
    for outer in (trades_loss, mart_loss):
        leaves = clean.clone().requires_grad_(), robust.clone().requires_grad_()
        for gradient in torch.autograd.grad(outer(*leaves, labels, 1.0), leaves):
            assert gradient.norm() > 0


def test_adversarial_experts_resist_better_than_natural_ones(train, run):
    """The adversarial loss of the last weights, averaged over two experts of each kind."""
    task = make_task(train, width=8)
    options = AdversarialConfig(eps=0.2, steps=5)
    loss = robust_loss(task, options)
    means = []
    for objective in (natural_loss, loss):
        made = find_or_train_experts(
            task,
            run,
            config(expert_epochs_total=20, expert_lr=0.1, augment=""),
            "mat",
            objective,
            decisive={"which": objective.__qualname__},
        )
        network = task.build_network(run.device)
        values = []
        for expert in range(2):
            nn.utils.vector_to_parameters(made.snapshot(expert, 20), network.parameters())
            with seeded(0):
                values.append(loss(network, task.normalise(train.images), train.labels).item())
        means.append(sum(values) / 2)
    assert means[1] < 0.8 * means[0]


def test_importing_the_methods_does_not_touch_torch():
    program = """
import sys
from rdd_bench.lazy import imported_on_use
with imported_on_use("torch"):
    for name in ("mtt", "mat"):
        module = __import__(f"rdd_bench_builtin.distillers.{name}", fromlist=["x"])
        for distiller in module.rdd_bench_distillers():
            distiller.parse(distiller.smoke)
assert "torch.nn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_defaults_are_the_authors_for_cifar10_with_ten_images():
    options = MatchingConfig()
    assert (options.num_experts, options.expert_epochs_total, options.expert_lr) == (100, 50, 0.01)
    assert (options.syn_steps, options.expert_epochs, options.max_start_epoch) == (30, 2, 20)
    assert (options.lr_img, options.lr_lr, options.init_lr) == (100, 1e-5, 0.001)
