"""SRe2L and GUARD: teachers and their store, recovery, views, and the methods as a whole."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.checks import check_distilled_set
from rdd_bench.components import Attack, DistillTask, Run
from rdd_bench.errors import NotApplicable, RddBenchError
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.robustness import attack_models, clean_outcomes
from rdd_bench.seeding import seeded
from rdd_bench.training import fit
from rdd_bench.types import DatasetSpec, DistilledSet, LabelledImages, Recipe, Threat
from rdd_bench.views import render
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.architectures.resnet import ResNet18
from rdd_bench_builtin.attacks.autoattack import AutoAttack
from rdd_bench_builtin.attacks.fgsm import FGSM
from rdd_bench_builtin.attacks.pgd import PGD
from rdd_bench_builtin.distillers import _recover, _teacher
from rdd_bench_builtin.distillers._crops import mirrored, random_boxes, shifted
from rdd_bench_builtin.distillers._recover import RecoverConfig, losses_of, transformed
from rdd_bench_builtin.distillers._relabel import RelabelConfig, draw_views, relabel
from rdd_bench_builtin.distillers._stages import StagesConfig
from rdd_bench_builtin.distillers._teacher import (
    batch_norms,
    find_or_train_teacher,
    natural_loss,
    teacher_architecture,
)
from rdd_bench_builtin.distillers.guard import GUARD, GUARDConfig, objective_of
from rdd_bench_builtin.distillers.sre2l import SRe2L

torch.set_num_threads(1)

CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("method", [SRe2L, GUARD])


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0):
        yield


@pytest.fixture(scope="module")
def train():
    """Thirty images of three classes, a bright stripe each."""
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
    architecture = ConvNet.configured({"depth": 2, "width": 4, **options})
    return DistillTask(spec, train, ipc, architecture, seed)


def make_run(folder: Path, **changes: Any) -> Run:
    run = Run(CPU, folder, lambda _: contextlib.nullcontext(), lambda *_: None)
    return replace(run, **changes)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def smoke(method: Any, **options: Any) -> Any:
    return method.configured({**method.smoke, "r_bn": 0.1, "teacher_batch": 8, **options})


def teacher_of(task: DistillTask, run: Run, **options: Any) -> nn.Module:
    config = smoke(SRe2L, **options).config
    return find_or_train_teacher(
        task, run, config, "sre2l", natural_loss(task), needs_statistics=True
    )


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# Crops ----------------------------------------------------------------------------------------


def test_random_boxes_are_parts_of_the_image_with_the_area_and_the_ratio_asked_for():
    boxes = random_boxes(4000, (40, 30), 0.2)
    top, left, tall, wide = boxes.double().unbind(dim=1)
    assert (boxes >= 0).all()
    assert (top + tall).max() == 40
    assert (left + wide).max() == 30
    area, ratio = tall * wide / 1200, wide / tall
    assert 0.19 < area.min() < 0.23
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4
    whole = random_boxes(50, (8, 8), 1.0)
    assert (whole[:, 2:] >= 7).all()


def test_shifted_images_are_windows_of_the_padded_ones():
    images = torch.rand(200, 2, 4, 5)
    moved = shifted(images, 1)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    places = set()
    for i in range(200):
        found = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(moved[i], padded[i, :, y : y + 4, x : x + 5])
        ]
        assert len(found) == 1
        places |= set(found)
    assert len(places) == 9
    turned = mirrored(images)
    kept = (turned == images).flatten(1).all(dim=1)
    assert torch.equal(turned[~kept], images[~kept].flip(3))
    assert 60 < kept.sum() < 140


# Teachers -------------------------------------------------------------------------------------


def test_a_teacher_is_made_once_for_all_ipc_and_draws_nothing_from_the_host(
    train, run, monkeypatch
):
    made = []
    original = _teacher.train_teacher

    def spy(*arguments: Any) -> None:
        made.append(1)
        original(*arguments)

    monkeypatch.setattr(_teacher, "train_teacher", spy)
    states, draws = [], []
    for ipc in (1, 7):
        with seeded(3):
            states.append(state_of(teacher_of(make_task(train, ipc), run)))
            draws.append(torch.rand(3).tolist())
    with seeded(3):
        assert draws == [torch.rand(3).tolist()] * 2
    assert len(made) == 1
    assert same(*states)
    assert not teacher_of(make_task(train), run).training


def test_whatever_decides_a_teacher_gives_another_one(train, run):
    teacher_of(make_task(train), run)
    other = LabelledImages(train.images * 0.5, train.labels)
    for task in (make_task(train, seed=1), make_task(other), make_task(train, width=5)):
        teacher_of(task, run)
    for option in ("teacher_lr", "teacher_momentum", "teacher_weight_decay"):
        teacher_of(make_task(train), run, **{option: 0.003})
    teacher_of(make_task(train), run, teacher_epochs=1)
    teacher_of(make_task(train), run, teacher_batch=5)
    teacher_of(make_task(train), run, padding=0)
    teacher_of(make_task(train), run, flip=True)
    assert len(list((run.scratch / "teachers").iterdir())) == 11
    teacher_of(make_task(train), run, iterations=7, r_bn=3.0, epochs=2, temperature=1.0)
    assert len(list((run.scratch / "teachers").iterdir())) == 11


def test_each_kind_of_teacher_is_a_file_of_its_own_and_shared_where_it_is_the_same(train, tmp_path):
    run, task = make_run(tmp_path / "scratch", cache=tmp_path / "cache"), make_task(train)
    variants: list[dict[str, Any]] = [
        {}, {"curvature": 0.1}, {"curvature_h": 1.0}, {"curvature_form": "loss"},
        {"curvature_unit": "pixels"}, {"curvature_warmup": 1}, {"curvature_eval_share": 0.5},
        {"images_from": "adversarial", "labels_from": "adversarial"},
        {"images_from": "adversarial", "labels_from": "adversarial", "adversarial_eps": 0.2},
        {"images_from": "adversarial", "labels_from": "adversarial", "adversarial_steps": 1},
        {"images_from": "plain", "labels_from": "plain"},
    ]  # fmt: skip
    for number, variant in enumerate(variants, 1):
        smoke(GUARD, iterations=0, epochs=1, **variant).distill(task, run)
        assert len(list((tmp_path / "cache/teachers").iterdir())) == number
    smoke(SRe2L, iterations=0, epochs=1).distill(task, run)
    smoke(GUARD, iterations=0, epochs=1, curvature=0.0).distill(task, run)
    smoke(GUARD, iterations=0, epochs=1, images_from="plain").distill(task, run)
    assert len(list((tmp_path / "cache/teachers").iterdir())) == len(variants)


def test_teachers_of_different_losses_begin_alike(train, run, monkeypatch):
    begun = []
    monkeypatch.setattr(
        _teacher, "train_teacher", lambda network, *_: begun.append(state_of(network))
    )
    for kind in ("plain", "curvature", "adversarial"):
        smoke(GUARD, images_from=kind, labels_from=kind).distill(make_task(train), run)
    assert len(begun) == 3
    assert same(begun[0], begun[1])
    assert same(begun[0], begun[2])


def test_a_damaged_file_is_refused(train, run):
    teacher_of(make_task(train), run)
    (path,) = (run.scratch / "teachers").iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RddBenchError, match=r"sre2l: .* content .* expected a teacher; delete it"):
        teacher_of(make_task(train), run)


def test_a_network_with_an_option_norm_gets_batch_normalisation(train):
    task = make_task(train)
    assert task.architecture.config.norm == "instance"
    architecture = teacher_architecture(task, "batch")
    assert architecture.config == task.architecture.config.model_copy(update={"norm": "batch"})
    assert len(batch_norms(architecture.build(task.spec))) == 2
    resnet = replace(task, architecture=ResNet18.configured({"width": 4}))
    assert teacher_architecture(resnet, "batch").config == resnet.architecture.config


@METHODS
def test_without_batch_normalisation_there_is_nothing_to_recover_from(train, run, method):
    task = make_task(train)
    with pytest.raises(NotApplicable, match=f"{method.name} recovers .* convnet keeps none") as e:
        smoke(method, teacher_norm="instance").distill(task, run)
    assert "\n" not in str(e.value)
    smoke(method, teacher_norm="instance", r_bn=0.0).distill(task, run)
    smoke(method, teacher_norm="instance", iterations=0).distill(task, run)


@METHODS
def test_a_teacher_that_diverges_stops_with_epoch_and_value(train, run, method):
    with pytest.raises(RddBenchError, match=rf"{method.name}: .*epoch 1 is (nan|inf).*teacher_lr"):
        smoke(method, teacher_lr=1e30).distill(make_task(train), run)
    assert not (run.scratch / "teachers").exists()


def test_adversarial_examples_of_the_control_are_pixels_within_the_budget(train, run):
    task = make_task(train)
    options = GUARD.parse({"adversarial_eps": 0.1, "adversarial_steps": 3})
    assert isinstance(options, GUARDConfig)
    objective, _ = objective_of("adversarial", task, options)
    seen: list[tuple[bool, Tensor]] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = task.build_network(CPU)

        def forward(self, images: Tensor) -> Tensor:
            seen.append((self.training, task.denormalise(images.detach())))
            logits: Tensor = self.inner(images)
            return logits

    pixels = torch.cat([train.images, train.images.round()])
    network = Spy().train()
    loss = objective(network, pixels, train.labels.repeat(2), 0)
    assert [mode for mode, _ in seen] == [False, False, False, True]
    attacked = seen[-1][1]
    assert 0.09 < (attacked - pixels).abs().max() < 0.1 + 1e-5
    assert attacked.min() > -1e-5
    assert attacked.max() < 1 + 1e-5
    plain = natural_loss(task)(network, pixels, train.labels.repeat(2), 0)
    assert loss > plain


# Recovery -------------------------------------------------------------------------------------


class Recorder:
    """Reference: what enters each batch normalisation, image by image."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        self.inputs: list[Tensor] = []
        for layer in self.layers:
            layer.register_forward_hook(lambda m, i, o: self.inputs.append(i[0]))

    def distance(self) -> float:
        total = 0.0
        for position, (layer, maps) in enumerate(zip(self.layers, self.inputs, strict=True)):
            gaps: list[list[float]] = [[], []]
            for channel in range(maps.shape[1]):
                values = maps[:, channel].flatten()
                mean = values.mean()
                assert layer.running_mean is not None
                assert layer.running_var is not None
                gaps[0].append((mean - layer.running_mean[channel]).item())
                spread = ((values - mean) ** 2).mean()
                gaps[1].append((spread - layer.running_var[channel]).item())
            norms = sum(sum(gap**2 for gap in column) ** 0.5 for column in gaps)
            total += norms * (10 if position == 0 else 1)
        self.inputs.clear()
        return total


def test_the_losses_are_those_of_the_equation_group_by_group(train, run):
    task = make_task(train)
    teacher = teacher_of(task, run).double()
    groups = torch.randn(4, 3, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([2, 0, 1])
    error, statistics = losses_of(teacher, groups, labels)
    recorder, expected = Recorder(teacher), [0.0, 0.0]
    for group in groups:
        expected[0] += nn.functional.cross_entropy(teacher(group), labels).item()
        expected[1] += recorder.distance()
    assert error.item() == pytest.approx(expected[0], rel=1e-10)
    assert statistics.item() == pytest.approx(expected[1], rel=1e-10)


def test_the_distance_is_zero_where_the_batch_has_the_running_statistics(train, run):
    teacher = teacher_of(make_task(train), run).double()
    images = torch.randn(1, 6, 1, 8, 8, dtype=torch.float64)
    entering: list[Tensor] = []
    # Layer by layer, for what enters the second depends on the statistics of the first.
    for layer in batch_norms(teacher):
        handle = layer.register_forward_pre_hook(lambda m, i: entering.append(i[0]))
        teacher(images[0])
        handle.remove()
        variance, mean = torch.var_mean(entering[-1], dim=(0, 2, 3), correction=0)
        layer.load_state_dict({**layer.state_dict(), "running_mean": mean, "running_var": variance})
    _, statistics = losses_of(teacher, images, torch.zeros(6, dtype=torch.long))
    assert statistics.item() < 1e-10


@pytest.mark.parametrize("layout", ["one-per-class", "joint"])
def test_recovery_lowers_its_losses_within_the_box_and_leaves_the_teacher_alone(train, run, layout):
    task = make_task(train, ipc=3)
    teacher = teacher_of(task, run, teacher_epochs=10)
    before = state_of(teacher)

    def recovered(iterations: int) -> tuple[Tensor, float]:
        options = RecoverConfig(
            iterations=iterations, r_bn=0.1, jitter=1, layout=layout, lr_img=0.1
        )
        with seeded(1):
            images, losses = _recover.recover(task, run, options, teacher, "sre2l", flip=False)
        return images, losses["recover_ce"] + 0.1 * losses["recover_bn"]

    (_, begun), (images, ended) = recovered(1), recovered(60)
    assert ended < 0.7 * begun
    assert images.shape == (9, 1, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1
    assert same(before, state_of(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(layer._forward_pre_hooks for layer in batch_norms(teacher))
    answers = teacher(task.normalise(images)).argmax(dim=1)
    assert torch.equal(answers, torch.arange(3).repeat_interleave(3))


def test_groups_recovered_together_are_those_recovered_alone(train, tmp_path):
    """Without rolls nothing is drawn, so the batch size can only change rounding."""
    task, sets = make_task(train, ipc=4), []
    teacher = teacher_of(task, make_run(tmp_path))
    for batch_size in (500, 3):
        with seeded(1):
            sets.append(
                _recover.recover(
                    task,
                    make_run(tmp_path, batch_size=batch_size),
                    RecoverConfig(iterations=20, jitter=0, r_bn=0.1, lr_img=0.05),
                    teacher,
                    "sre2l",
                    flip=False,
                )
            )
    assert torch.allclose(sets[0][0], sets[1][0], atol=1e-3)
    assert sets[0][1] == pytest.approx(sets[1][1], rel=1e-3)


def test_more_classes_than_go_together_keep_their_order(train, run, monkeypatch):
    monkeypatch.setattr(_recover, "CLASSES_TOGETHER", 2)
    options = RecoverConfig(init="real", iterations=0)
    task = make_task(train)
    images, _ = _recover.recover(task, run, options, nn.Identity(), "sre2l", flip=False)
    stripes = images.mean(dim=3)[:, 0].unfold(1, 2, 3).mean(dim=2).argmax(dim=1)
    assert torch.equal(stripes, torch.arange(3).repeat_interleave(2))


def test_real_images_without_steps_are_training_images(train, run):
    made = smoke(SRe2L, init="real", iterations=0).distill(make_task(train), run)
    gaps = (made.images[:, None] - train.images[None]).flatten(2).abs().amax(dim=2)
    nearest = gaps.argmin(dim=1)
    assert gaps.amin(dim=1).max() < 1e-6
    assert torch.equal(train.labels[nearest], made.labels)
    assert len(set(nearest.tolist())) == 6


@METHODS
def test_a_class_smaller_than_ipc_is_refused(train, run, method):
    with pytest.raises(RddBenchError, match=rf"{method.name}: class 'a' .* 10 .* but 11 are"):
        smoke(method, init="real").distill(make_task(train, ipc=11), run)


def test_rolls_and_crops_show_the_same_part_of_all_images():
    images = torch.rand(1, 1, 8, 8).expand(5, 1, 8, 8)
    options = RecoverConfig(jitter=2)
    rolled = [transformed(images, options, flip=True) for _ in range(60)]
    expected = {(y, x): images.roll((y, x), (2, 3)) for y in range(3) for x in range(3)}
    found = {place for place, e in expected.items() for r in rolled if torch.equal(e, r)}
    assert found == set(expected)
    cropped = transformed(images, RecoverConfig(jitter=0, smallest_crop=0.3), flip=False)
    assert cropped.shape == images.shape
    assert torch.equal(cropped[0], cropped[4])
    assert not torch.equal(cropped, images)


def test_a_recovery_that_diverges_is_one_sentence(train, run):
    task = make_task(train)
    teacher = teacher_of(task, run)
    teacher.load_state_dict({n: t * float("nan") for n, t in teacher.state_dict().items()})
    with pytest.raises(RddBenchError, match=r"sre2l: the losses of the last recovery .* nan") as e:
        _recover.recover(task, run, RecoverConfig(iterations=1), teacher, "sre2l", flip=False)
    assert "\n" not in str(e.value)


# Views ----------------------------------------------------------------------------------------

MIXES = pytest.mark.parametrize("mix", ["mixup", "cutmix", "none"])


@MIXES
@pytest.mark.parametrize("crop", [None, 0.2])
def test_the_labels_are_the_teachers_logits_on_the_pictures_that_students_see(
    train, run, mix, crop
):
    task = make_task(train)
    teacher = teacher_of(task, run)
    images = torch.rand(6, 1, 8, 8)
    options = RelabelConfig(epochs=5, batch=4, mix=mix, view_crop=crop)
    views = relabel(task, run, options, teacher, images, padding=2, flip=True)
    assert len(views) == 30
    for start in range(0, 30, 4):
        indices = torch.arange(start, min(start + 4, 30))
        logits = teacher(task.normalise(render(images, views, indices)))
        assert torch.allclose(logits.half().float(), views.logits[indices].float(), atol=2e-3)


@MIXES
def test_views_are_whole_epochs_mixed_within_the_batches_of_the_host(train, mix):
    task = make_task(train)
    options = RelabelConfig(epochs=40, batch=5, mix=mix)
    views = draw_views(task, options, 6, padding=2, flip=True)
    assert torch.equal(views.image.view(40, 6).sort(dim=1).values, torch.arange(6).expand(40, 6))
    # Five and one would leave a batch of one, which the host joins to the other.
    assert torch.equal(views.partner // 6, torch.arange(240) // 6)
    assert set(views.crop[:, 0].tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert (views.crop[:, 2:] == 8).all()
    assert 80 < views.flip.sum() < 160
    assert not draw_views(task, options, 6, padding=2, flip=False).flip.any()
    weights = views.mix_weight.view(40, 6)
    assert (weights == weights[:, :1]).all()
    if mix == "none":
        assert not weights.any()
        assert torch.equal(views.partner, torch.arange(240))
    elif mix == "mixup":
        assert 0.35 < weights.mean() < 0.65
        assert torch.equal(views.mix_box, torch.tensor([0, 0, 8, 8]).expand(240, 4))
    else:
        assert set(weights.flatten().tolist()) <= {0.0, 1.0}
        top, left, tall, wide = views.mix_box.unbind(dim=1)
        assert (top + tall).max() <= 8
        assert (left + wide).max() <= 8
        assert (top >= 0).all()
        assert len(set(views.mix_box[:, 2].tolist())) > 4


def test_fewer_epochs_of_views_can_be_stored(train, run):
    made = smoke(SRe2L, epochs=6, view_epochs=2).distill(make_task(train), run)
    assert made.views is not None
    assert len(made.views) == 12
    assert made.recipe is not None
    assert made.recipe.epochs == 6


def test_the_set_is_trained_on_by_the_host(train, run):
    task = make_task(train)
    made = smoke(SRe2L, epochs=3).distill(task, run)
    assert made.recipe == Recipe(
        optimizer="adamw", lr=1e-3, weight_decay=0.01, momentum=0.9, schedule="cosine", epochs=3,
        batch_size=16, uses=("views",), temperature=30.0,
    )  # fmt: skip
    trained = fit(
        made, made.recipe, task.architecture, task.spec, [0], device=CPU, report=lambda *_: None
    )
    assert trained.final_loss[0] < 1


# The methods ----------------------------------------------------------------------------------

VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (SRe2L, {}),
    (SRe2L, {"layout": "joint", "mix": "cutmix", "view_crop": 0.3, "smallest_crop": 0.3}),
    (GUARD, {}),
    (GUARD, {"images_from": "plain", "labels_from": "adversarial", "flip": True}),
]


@pytest.mark.parametrize(("method", "options"), VARIANTS)
def test_the_same_seed_gives_the_same_set_with_teachers_made_or_found(
    train, tmp_path, method, options
):
    task, sets = make_task(train), []
    before = train.images.clone()
    for seed, folder in ((1, "a"), (1, "a"), (1, "b"), (2, "b")):
        with seeded(seed):
            made = smoke(method, **options).distill(task, make_run(tmp_path / folder))
        sets.append(check_distilled_set(made, task.spec, 2, method.name))
    for other in sets[1:3]:
        assert same(sets[0].tensors, other.tensors)
        assert sets[0].notes == other.notes
    assert not torch.equal(sets[0].images, sets[3].images)
    assert torch.equal(sets[0].labels, torch.arange(3).repeat_interleave(2))
    assert torch.equal(train.images, before)
    json.dumps(dict(sets[0].notes), allow_nan=False)


def test_guard_without_weight_is_sre2l_bit_for_bit(train, tmp_path):
    task, sets = make_task(train), list[DistilledSet]()
    for method, options in ((SRe2L, {}), (GUARD, {"curvature": 0.0}), (GUARD, {})):
        with seeded(1):
            made = smoke(method, **options).distill(task, make_run(tmp_path / str(len(sets))))
        sets.append(made)
    assert same(sets[0].tensors, sets[1].tensors)
    assert sets[0].recipe == sets[1].recipe
    assert {name: sets[1].notes[name] for name in sets[0].notes} == sets[0].notes
    assert not torch.equal(sets[0].images, sets[2].images)


def test_images_and_labels_come_from_the_teachers_that_are_named(train, run):
    """Controls C and D: images of one teacher are the same whoever labels them."""
    task, made = make_task(train), {}
    for pair in (("plain", "plain"), ("plain", "curvature"), ("curvature", "plain")):
        with seeded(1):
            options = {"images_from": pair[0], "labels_from": pair[1]}
            made[pair] = smoke(GUARD, **options).distill(task, run)
    plain, labels, images = made.values()
    assert torch.equal(plain.images, labels.images)
    assert not torch.equal(plain.images, images.images)
    assert plain.views is not None
    assert labels.views is not None
    assert torch.equal(plain.views.crop, labels.views.crop)
    assert not torch.equal(plain.views.logits, labels.views.logits)
    for figure in ("accuracy", "loss", "curvature", "regulariser"):
        assert labels.notes[f"images_teacher_{figure}"] == images.notes[f"labels_teacher_{figure}"]


def test_the_options_of_the_two_differ_in_the_teachers_only():
    shared = StagesConfig().model_dump()
    every = GUARDConfig().model_dump()
    assert {name: every[name] for name in shared} == shared
    assert set(every) - set(shared) == {
        "curvature", "curvature_h", "curvature_form", "curvature_unit", "curvature_warmup",
        "curvature_eval_share", "images_from", "labels_from", "adversarial_eps",
        "adversarial_steps",
    }  # fmt: skip


def test_the_defaults_are_the_authors_for_cifar():
    o = StagesConfig()
    assert (o.teacher_epochs, o.teacher_lr, o.teacher_batch) == (200, 0.1, 128)
    assert (o.teacher_momentum, o.teacher_weight_decay, o.padding, o.flip) == (0.9, 5e-4, 4, True)
    assert (o.iterations, o.lr_img, o.r_bn, o.jitter, o.smallest_crop) == (1000, 0.25, 0.01, 4, 1)
    assert (o.init, o.layout) == ("noise", "one-per-class")
    assert (o.epochs, o.batch, o.temperature, o.mix, o.mix_alpha) == (400, 128, 30, "mixup", 0.8)


def test_a_regularised_teacher_is_flatter_and_harder_to_attack(run):
    """On digits; and attacks are ordered: a stronger one breaks no fewer images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[:200] / 16, dtype=torch.float32)[:, None]
    digits = LabelledImages(images, torch.tensor(data.target[:200]))
    task = make_task(digits, width=8)
    task = replace(task, spec=replace(task.spec, class_names=tuple("0123456789")))
    options = smoke(
        GUARD,
        teacher_epochs=15,
        teacher_batch=16,
        teacher_lr=0.1,
        curvature_h=0.9,
        curvature_eval_share=0.5,
    ).config
    teachers, found = {}, {}
    for kind in ("plain", "curvature"):
        objective, decisive = objective_of(kind, task, options)
        teachers[kind] = find_or_train_teacher(
            task, run, options, "guard", objective, decisive, needs_statistics=True
        )
        found[kind] = _teacher.figures(teachers[kind], task, run, options)
    assert found["curvature"]["curvature"] < 0.6 * found["plain"]["curvature"]
    assert found["curvature"]["accuracy"] > 0.9

    few = digits.subset(torch.arange(80))
    attacks: list[Attack[Any]] = [
        FGSM(),
        PGD.configured({"steps": 20}),
        AutoAttack.configured({"attacks": ["apgd-ce", "apgd-t"]}),
    ]

    def right(kind: str, attack: Attack[Any], eps: float = 24 / 255) -> int:
        model = Classifier(Normalise(task.spec), teachers[kind]).eval().requires_grad_(False)
        judged = attack_models([model], few, attack, Threat("linf", eps), [0], run, attack.name)
        return int(judged.robust[0].sum())

    model = Classifier(Normalise(task.spec), teachers["plain"]).eval()
    counts = [int(clean_outcomes(model, few, 500).sum())]
    counts += [right("plain", attack) for attack in attacks]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    for kind in teachers:
        assert right(kind, attacks[1], eps=1.0) < 10
    assert right("curvature", attacks[1]) > right("plain", attacks[1]) + 12


def test_phases_are_reported(train, tmp_path):
    phases: list[str] = []

    def phase(name: str) -> contextlib.AbstractContextManager[None]:
        phases.append(name)
        return contextlib.nullcontext()

    smoke(SRe2L).distill(make_task(train), make_run(tmp_path, phase=phase))
    assert phases == ["squeeze", "recover", "relabel"]


def test_importing_the_methods_does_not_touch_torch():
    program = """
import sys
from rdd_bench.lazy import imported_on_use
with imported_on_use("torch"):
    for name in ("sre2l", "guard", "dc"):
        module = __import__(f"rdd_bench_builtin.distillers.{name}", fromlist=["x"])
        for distiller in module.rdd_bench_distillers():
            distiller.parse(distiller.smoke)
assert "torch.nn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
