"""The built-in distillers against their definitions, on scikit-learn's digits."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.augment import Transform, draw
from rdd_bench.checks import check_distilled_set
from rdd_bench.components import Architecture, DistillTask, NoOptions, Run
from rdd_bench.errors import Diverged, NotApplicable, RddBenchError
from rdd_bench.foreign import unfold
from rdd_bench.seeding import seeded
from rdd_bench.types import AdversarialTraining, DatasetSpec, Info, LabelledImages, Recipe
from rdd_bench_builtin.distillers import dm as dm_module
from rdd_bench_builtin.distillers._coreset import DSA
from rdd_bench_builtin.distillers.dm import DM, DMConfig, match
from rdd_bench_builtin.distillers.herding import Herding, herd
from rdd_bench_builtin.distillers.kcenter import KCenter, farthest_first
from rdd_bench_builtin.distillers.random import Random
from rdd_bench_builtin.distillers.random_decoded import RandomDecoded
from rdd_bench_builtin.distillers.whole import Whole, WholeAt, WholeAtConfig

torch.set_num_threads(1)


class Block(nn.Module):
    """A convolution, a norm and features to embed; small enough for seconds."""

    def __init__(self, channels: int, classes: int, norm: str, width: int = 8) -> None:
        super().__init__()
        layers = {
            "instance": nn.GroupNorm(width, width),
            "batch": nn.BatchNorm2d(width),
            "none": nn.Identity(),
        }
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), layers[norm], nn.ReLU(), nn.AvgPool2d(2)
        )
        self.classifier = nn.Linear(width * 4 * 4, classes)  # images of 8x8

    def embed(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embed(images))
        return logits


class Tiny(Architecture[NoOptions]):
    """One block."""

    name = "tiny"
    info = Info(title="Tiny", licence="MIT")

    def __init__(self) -> None:
        super().__init__()
        self.built: list[Block] = []

    def build(self, spec):
        self.built.append(Block(spec.shape[0], spec.num_classes, "instance"))
        return self.built[-1]


class Blind(Architecture[NoOptions]):
    """A network without features."""

    name = "blind"
    info = Info(title="Blind", licence="MIT")

    def build(self, spec):
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(spec.shape), spec.num_classes))


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0):
        yield


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    return LabelledImages(images, torch.tensor(data.target))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(tmp_path: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "device": torch.device("cpu"),
        "scratch": tmp_path,
        "phase": lambda name: contextlib.nullcontext(),
        "report": lambda what, done, total: None,
    }
    return Run(**(settings | changes))


def make_task(
    train: LabelledImages, ipc: int, architecture: Architecture[NoOptions] | None = None
) -> DistillTask:
    spec = DatasetSpec(
        name="digits",
        shape=(1, *train.images.shape[2:]),
        class_names=tuple("0123456789")[: int(train.labels.max()) + 1],
        mean=(0.3,),
        std=(0.4,),
    )
    return DistillTask(spec, train, ipc, architecture or Tiny(), seed=0)


def few(digits: LabelledImages, counts: list[int]) -> LabelledImages:
    """The first images of each digit, as many as ``counts`` says."""
    chosen = [(digits.labels == c).nonzero().flatten()[:n] for c, n in enumerate(counts)]
    return digits.subset(torch.cat(chosen))


SMALL = [
    (Random, {}),
    (RandomDecoded, {}),
    (Herding, {}),
    (Herding, {"features": "pixels"}),
    (KCenter, {}),
    (KCenter, {"features": "pixels"}),
    (DM, {}),
    (DM, {"init": "noise"}),
]


@pytest.mark.parametrize(("distiller", "options"), SMALL)
def test_smoke_options_give_the_asked_images_and_the_same_for_the_same_seed(
    digits, run, distiller, options
):
    pixels, labels = digits.images.clone(), digits.labels.clone()
    sets = []
    for seed in (1, 1, 2):
        with seeded(seed):
            made = distiller.configured({**distiller.smoke, **options}).distill(
                make_task(digits, 3), run
            )
        sets.append(check_distilled_set(made, make_task(digits, 3).spec, 3, distiller.name))
    assert torch.equal(sets[0].images, sets[1].images)
    assert sets[0].notes == sets[1].notes
    assert torch.equal(sets[0].labels, torch.arange(10).repeat_interleave(3))
    if options.get("features") != "pixels":
        assert not torch.equal(sets[0].images, sets[2].images)
    assert sets[0].recipe == Recipe(augment=DSA)
    assert torch.equal(digits.images, pixels)
    assert torch.equal(digits.labels, labels)


@pytest.mark.parametrize("distiller", [Random, Herding, KCenter])
def test_coresets_are_different_real_images_of_their_class(digits, run, distiller):
    train = few(digits, [7, 6, 8])
    for ipc in (1, 4, 6):
        made = distiller.configured(distiller.smoke).distill(make_task(train, ipc), run)
        for label in range(3):
            real = {tuple(image.flatten().tolist()) for image in train.of_class(label)}
            chosen = {tuple(i.flatten().tolist()) for i in made.images[made.labels == label]}
            assert len(chosen) == ipc
            assert chosen <= real


@pytest.mark.parametrize("distiller", [Random, Herding, KCenter, DM])
def test_a_class_too_small_is_named(digits, run, distiller):
    task = make_task(few(digits, [5, 3, 5]), 4)
    with pytest.raises(
        RddBenchError, match=rf"{distiller.name}: class '1' .* has 3 .* 4 are needed.*at most 3"
    ):
        distiller().distill(task, run)


@pytest.mark.parametrize("distiller", [Herding, KCenter, DM])
def test_a_network_without_features_is_not_applicable(digits, run, distiller):
    with pytest.raises(NotApplicable, match=f"{distiller.name} needs .* embed"):
        distiller().distill(make_task(digits, 1, Blind()), run)


@pytest.mark.parametrize("distiller", [Random, Herding, KCenter, DM, Whole, WholeAt])
def test_the_augmentation_is_checked_with_the_options_and_goes_into_the_recipe(
    digits, run, distiller
):
    with pytest.raises(RddBenchError, match=r"colour.*known: color, crop"):
        distiller.configured({"augment": "colour"})
    made = distiller.configured({**distiller.smoke, "augment": "crop"}).distill(
        make_task(digits, 1), run
    )
    assert made.recipe is not None
    assert made.recipe.augment == "crop"


def test_random_decoded_is_random_through_the_decoder_of_factorised_sets(digits, run):
    """Four real images of one class, stored in one and unfolded, are what it makes of each."""
    task = make_task(digits, ipc=4)
    with seeded(1):
        real = Random().distill(task, run).images
    with seeded(1):
        made = RandomDecoded().distill(task, run)
    small = torch.nn.functional.avg_pool2d(real[:4], 2)
    stored = torch.cat([torch.cat([*small[:2]], dim=2), torch.cat([*small[2:]], dim=2)], dim=1)
    assert torch.equal(made.images[:4], unfold(stored[None], 2))
    assert made.images.shape == real.shape
    assert not torch.equal(made.images, real)
    assert torch.allclose(made.images.mean(), real.mean(), atol=1e-3)


def test_random_decoded_refuses_images_that_it_cannot_divide(digits, run):
    with pytest.raises(RddBenchError, match="have no 3x3 parts; choose another factor"):
        RandomDecoded.configured({"factor": 3}).distill(make_task(digits, ipc=1), run)


def test_random_is_uniform(run):
    """Every image of a class is drawn equally often: 600 draws of 2 of 4."""
    train = LabelledImages(torch.linspace(0, 1, 8).view(8, 1, 1, 1), torch.arange(8) % 2)
    task = make_task(train, 2)
    drawn = torch.cat([Random().distill(task, run).images.flatten() for _ in range(600)])
    counts = (drawn[:, None] == train.images.flatten()).sum(dim=0)
    assert (counts - 300).abs().max() < 75  # standard deviation 12


def features_of_points(seed: int, count: int = 30, size: int = 4) -> Tensor:
    return torch.randn(
        count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("seed", range(5))
def test_herding_takes_the_minimum_of_its_definition(seed):
    features = features_of_points(seed)
    mean = features.mean(dim=0)
    picked: list[int] = []
    for _ in range(12):
        best = min(
            (x for x in range(30) if x not in picked),
            key=lambda x: float(
                (mean * (len(picked) + 1) - features[picked].sum(dim=0) - features[x]).norm()
            ),
        )
        picked.append(best)
    assert herd(features, 12).tolist() == picked


@pytest.mark.parametrize("seed", range(3))
def test_herding_of_equal_lengths_is_wellings_rule_and_beats_random(seed):
    features = nn.functional.normalize(features_of_points(seed, 400), dim=1)
    mean = features.mean(dim=0)
    weights, picked, free = mean.clone(), [], torch.ones(400, dtype=torch.bool)
    for _ in range(20):
        scores = (features @ weights).masked_fill(~free, -torch.inf)
        picked.append(int(scores.argmax()))
        free[picked[-1]] = False
        weights += mean - features[picked[-1]]
    assert herd(features, 20).tolist() == picked
    error = float((features[picked].mean(dim=0) - mean).norm())
    draws = [features[torch.randperm(400)[:20]].mean(dim=0).sub(mean).norm() for _ in range(50)]
    assert error < torch.stack(draws).median() / 3


def test_herding_of_the_whole_class_is_the_whole_class():
    assert sorted(herd(features_of_points(0), 30).tolist()) == list(range(30))


@pytest.mark.parametrize("seed", range(5))
def test_k_center_takes_the_maximum_of_its_definition(seed):
    features = features_of_points(seed)
    picked = [min(range(30), key=lambda x: math.dist(features[x], features.mean(dim=0)))]
    while len(picked) < 8:
        picked.append(
            max(
                range(30),
                key=lambda x: min(math.dist(features[x], features[p]) for p in picked),
            )
        )
    assert farthest_first(features, 8).tolist() == picked


@pytest.mark.parametrize("seed", range(5))
def test_k_center_covers_within_twice_the_optimum(seed):
    features = features_of_points(seed, count=12, size=2)
    distances = torch.cdist(features, features)
    best = min(
        float(distances[list(centres)].amin(dim=0).max())
        for centres in itertools.combinations(range(12), 3)
    )
    ours = float(distances[farthest_first(features, 3)].amin(dim=0).max())
    assert best <= ours <= 2 * best


def test_k_center_never_picks_twice_though_all_images_are_equal():
    assert sorted(farthest_first(torch.ones(5, 2).double(), 5).tolist()) == list(range(5))


@pytest.mark.parametrize("distiller", [Herding, KCenter])
def test_the_feature_network_is_trained_once_on_all_classes(digits, tmp_path, distiller):
    """One network is built, learns the digits, and is left in eval mode."""
    reports, phases = [], []

    def phase(name):
        phases.append(name)
        return contextlib.nullcontext()

    run = make_run(tmp_path, phase=phase, report=lambda *report: reports.append(report))
    architecture = Tiny()
    task = make_task(digits, 1, architecture)
    distiller.configured({"epochs": 3, "lr": 0.05}).distill(task, run)
    [network] = architecture.built
    assert not network.training
    assert phases == ["features"]
    assert ("features", 3, 3) in reports
    predicted = network(task.normalise(digits.images)).argmax(dim=1)
    assert (predicted == digits.labels).float().mean() > 0.7


def dm_problem(
    norm: str = "instance", ipc: int = 2, counts: tuple[int, ...] = (9, 5, 7)
) -> tuple[Block, list[Tensor], Tensor, list[Transform]]:
    """A network, real images of three classes, synthetic images and augmentations."""
    with seeded(4):
        network = Block(1, 3, norm)
        # The classes differ in contrast, which statistics over one class alone would hide.
        real = [torch.randn(n, 1, 8, 8) * (c + 1) for c, n in enumerate(counts)]
        synthetic = torch.randn(len(counts), ipc, 1, 8, 8)
        transforms = [draw("color_crop_cutout_scale_rotate", 1, (8, 8)) for _ in counts]
    return network.train().requires_grad_(False), real, synthetic, transforms


@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("batch_size", [1, 4, 500])
def test_dm_loss_and_gradient_are_those_of_the_equation(tmp_path, norm, batch_size):
    """The sum over classes, one by one, whatever the size of the passes."""
    network, real, synthetic, transforms = dm_problem(norm)
    leaf = synthetic.clone().requires_grad_()
    differences = [
        (network.embed(t(r)).mean(dim=0) - network.embed(t(s)).mean(dim=0)).square().sum()
        for t, r, s in zip(transforms, real, leaf, strict=True)
    ]
    expected = torch.stack(differences).sum()
    torch.autograd.backward(expected)
    loss, gradient = match(
        network, real, synthetic, transforms, make_run(tmp_path, batch_size=batch_size)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert leaf.grad is not None
    assert torch.allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-6)
    assert gradient.abs().amax(dim=(1, 2, 3, 4)).min() > 0


@pytest.mark.parametrize("batch_size", [1, 500])
def test_dm_shares_the_statistics_of_batch_norm_over_all_classes(tmp_path, batch_size):
    network, real, synthetic, transforms = dm_problem("batch")
    together = match(
        network, real, synthetic, transforms, make_run(tmp_path, batch_size=batch_size)
    )[0].item()

    def means(images: list[Tensor]) -> list[Tensor]:
        augmented = torch.cat([t(i) for t, i in zip(transforms, images, strict=True)])
        parts = torch.split(network.embed(augmented), [len(i) for i in images])
        return [part.mean(dim=0) for part in parts]

    pairs = zip(means(real), means(list(synthetic)), strict=True)
    assert together == pytest.approx(sum((r - s).square().sum().item() for r, s in pairs), rel=1e-5)

    run = make_run(tmp_path)
    apart = sum(
        match(network, [r], s[None], [t], run)[0].item()
        for r, s, t in zip(real, synthetic, transforms, strict=True)
    )
    assert together != pytest.approx(apart, rel=1e-2)


def test_dm_gradient_against_finite_differences(run):
    network, real, synthetic, transforms = dm_problem()
    network, real, synthetic = network.double(), [r.double() for r in real], synthetic.double()
    _, gradient = match(network, real, synthetic, transforms, run)
    direction = torch.randn_like(synthetic)
    step = 1e-6

    def loss(where: float) -> float:
        return match(network, real, synthetic + where * direction, transforms, run)[0].item()

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_dm_loss_is_zero_when_the_synthetic_images_are_the_real_ones(run, norm):
    network, _, synthetic, transforms = dm_problem(norm, ipc=6)
    loss, gradient = match(network, list(synthetic), synthetic, transforms, run)
    assert loss.item() < 1e-10
    assert gradient.abs().max() < 1e-5


def test_dm_builds_no_graph_on_the_real_side(run):
    network, real, synthetic, transforms = dm_problem()
    real = [images.requires_grad_() for images in real]
    loss, gradient = match(network, real, synthetic, transforms, run)
    assert not loss.requires_grad
    assert not gradient.requires_grad
    assert all(images.grad is None for images in real)
    assert not synthetic.requires_grad


def test_dm_takes_sgd_steps_with_momentum_in_normalised_space(digits, run, monkeypatch):
    """A loss with a constant gradient of one moves the pixels by the closed form of momentum."""
    monkeypatch.setattr(
        dm_module, "match", lambda n, r, images, t, run: (torch.ones(()), torch.ones_like(images))
    )
    ends = {}
    for iterations in (1, 3):
        with seeded(0):
            ends[iterations] = DM(DMConfig(iterations=iterations)).distill(
                make_task(digits, 2), run
            )
    # Velocities 1, 1.5, 1.75 with momentum 0.5; a step in normalised space is 0.4 in pixels.
    moved = ends[1].images - ends[3].images
    assert torch.allclose(moved, torch.full_like(moved, (1.5 + 1.75) * 0.4), atol=1e-5)
    real = {tuple(i.flatten().mul(16).round().tolist()) for i in digits.images}
    start = (ends[1].images + 0.4).flatten(1).mul(16).round()
    assert all(tuple(image.tolist()) in real for image in start)
    assert ends[3].images.min() < 0  # not clamped
    assert ends[3].notes == {"final_loss": 1.0, "averaged_iterations": 3}


def test_dm_uses_a_new_frozen_network_and_all_images_of_small_classes(digits, run, monkeypatch):
    seen = []

    def spy(network, real, synthetic, transforms, run):
        seen.append((network, real))
        assert network.training
        assert not any(p.requires_grad for p in network.parameters())
        return torch.zeros(()), torch.zeros_like(synthetic)

    monkeypatch.setattr(dm_module, "match", spy)
    train = few(digits, [20, 3, 12])
    task = make_task(train, 2)
    DM(DMConfig(iterations=4, batch_real=10)).distill(task, run)
    weights = {tuple(network.body[0].weight.flatten().tolist()) for network, _ in seen}
    assert len(weights) == 4
    for _, real in seen:
        assert [len(images) for images in real] == [10, 3, 10]
        for label, images in enumerate(real):
            rows = {tuple(i.flatten().tolist()) for i in images}
            assert len(rows) == len(images)
            assert rows <= {
                tuple(i.flatten().tolist()) for i in task.normalise(train.of_class(label))
            }


def test_dm_stops_at_the_first_loss_that_is_no_number(digits, run, monkeypatch):
    calls = itertools.count(1)

    def breaks(network, real, synthetic, transforms, run):
        loss = math.nan if next(calls) >= 137 else 1.0
        return torch.tensor(loss), torch.zeros_like(synthetic)

    monkeypatch.setattr(dm_module, "match", breaks)
    task = make_task(digits, 1)
    with pytest.raises(Diverged, match="dm: the loss of iteration 137 is nan") as error:
        DM(DMConfig(iterations=150, batch_real=1)).distill(task, run)
    check_distilled_set(error.value.last_good, task.spec, 1, "kept")


def test_dm_moves_the_features_of_noise_towards_the_real_ones(digits, run):
    with seeded(1):
        made = DM(DMConfig(iterations=60, batch_real=32, init="noise", augment="")).distill(
            make_task(digits, 4), run
        )
    task = make_task(digits, 4)
    noise = torch.randn(10, 4, 1, 8, 8)
    end = task.normalise(made.images).view(10, 4, 1, 8, 8)
    network = task.build_network(run.device).requires_grad_(False)
    real = [task.normalise(digits.of_class(c)) for c in range(10)]
    identity = [draw("", 1, (8, 8))] * 10
    before, after = (match(network, real, x, identity, run)[0].item() for x in (noise, end))
    assert after < before / 4


def test_dm_reports_its_progress_and_phase(digits, tmp_path):
    reports, phases = [], []

    def phase(name):
        phases.append(name)
        return contextlib.nullcontext()

    run = make_run(tmp_path, phase=phase, report=lambda *report: reports.append(report))
    DM(DMConfig(iterations=3, batch_real=2)).distill(make_task(digits, 1), run)
    assert phases == ["matching"]
    assert reports == [("matching", done, 3) for done in range(4)]


@pytest.mark.parametrize("distiller", [Whole, WholeAt])
def test_whole_is_the_training_set_with_its_own_recipe(digits, run, distiller):
    made = distiller.configured({"epochs": 7, "lr": 0.2, "batch_size": 16}).distill(
        make_task(digits, 1), run
    )
    assert distiller.role == "reference"
    assert torch.equal(made.images, digits.images)
    assert torch.equal(made.labels, digits.labels)
    assert made.recipe is not None
    assert (made.recipe.epochs, made.recipe.lr, made.recipe.batch_size) == (7, 0.2, 16)
    assert made.recipe.schedule == "cosine"
    assert (made.recipe.adversarial is None) == (distiller is Whole)


def test_whole_at_trains_within_the_named_threat(digits, run):
    made = WholeAt().distill(make_task(digits, 1), run)
    assert made.recipe is not None
    assert made.recipe.adversarial == AdversarialTraining(norm="linf", eps=8 / 255, steps=7)
    made = WholeAt(WholeAtConfig(norm="l2", eps=0.5, steps=3)).distill(make_task(digits, 1), run)
    assert made.recipe is not None
    assert made.recipe.adversarial == AdversarialTraining(norm="l2", eps=0.5, steps=3)


def test_importing_the_distillers_does_not_touch_torch():
    program = """
import sys
from rdd_bench.lazy import imported_on_use
with imported_on_use("torch"):
    for name in ("random", "herding", "kcenter", "dm", "whole"):
        module = __import__(f"rdd_bench_builtin.distillers.{name}", fromlist=["x"])
        for distiller in module.rdd_bench_distillers():
            distiller.parse(distiller.smoke)
assert "torch.nn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
