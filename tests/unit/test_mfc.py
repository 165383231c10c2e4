"""MFC and MFC-partial: what they choose, note and train with, on scikit-learn's digits."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rdd_bench.checks import check_distilled_set
from rdd_bench.components import DistillTask, Run
from rdd_bench.errors import RddBenchError
from rdd_bench.seeding import seeded
from rdd_bench.training import Lesson
from rdd_bench.types import AdversarialTraining, DatasetSpec, LabelledImages
from rdd_bench_builtin.architectures.mlp import MLP
from rdd_bench_builtin.distillers.mfc import MFC
from rdd_bench_builtin.distillers.mfc_partial import MFCPartial

torch.set_num_threads(1)

ORDERS = {"l1": 1, "l2": 2, "linf": math.inf}
BOTH = [MFC, MFCPartial]


@pytest.fixture(scope="module")
def digits():
    """Sixty images of each of the first four digits."""
    data = load_digits(n_class=4)
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target)
    first = torch.cat([(labels == label).nonzero().flatten()[:60] for label in range(4)])
    return LabelledImages(images[first], labels[first])


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(scratch: Path, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "device": torch.device("cpu"),
        "scratch": scratch,
        "phase": lambda name: contextlib.nullcontext(),
        "report": lambda what, done, total: None,
    }
    return Run(**(settings | changes))


def make_task(train: LabelledImages, ipc: int) -> DistillTask:
    spec = DatasetSpec(
        name="digits",
        shape=(1, *train.images.shape[2:]),
        class_names=tuple("0123")[: int(train.labels.max()) + 1],
        mean=(0.3,),
        std=(0.4,),
    )
    return DistillTask(spec, train, ipc, MLP(), seed=0)


def within_class(train: LabelledImages, images: Tensor, label: int, norm: str) -> Tensor:
    """Distances of the chosen images of a class, by row, to all images of it."""
    return torch.cdist(
        images.flatten(1).double(), train.of_class(label).flatten(1).double(), p=ORDERS[norm]
    )


# Every promise of a distiller -----------------------------------------------------------------


@pytest.mark.parametrize("distiller", BOTH)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "l1", "weighted": True},
        {"norm": "linf", "train_eps": "eps+radius"},
        {"train_norm": "l2", "train_eps": "eps+radius", "weighted": True},
    ],
)
def test_it_keeps_the_contract_whatever_the_seed(digits, run, distiller, options):
    task, before = make_task(digits, 3), digits.images.clone()
    sets = []
    for seed in (1, 2):
        with seeded(seed):
            made = distiller.configured(options).distill(task, run)
        sets.append(check_distilled_set(made, task.spec, 3, distiller.name))
    assert torch.equal(sets[0].images, sets[1].images)
    assert sets[0].notes == sets[1].notes
    assert torch.equal(digits.images, before)
    known = {image.numpy().tobytes() for image in digits.images}
    assert {image.numpy().tobytes() for image in sets[0].images} <= known


@pytest.mark.parametrize("norm", ORDERS)
def test_the_radii_in_the_notes_are_those_of_the_images(digits, run, norm):
    made = MFC.configured({"norm": norm}).distill(make_task(digits, 4), run)
    for label in range(4):
        away = within_class(digits, made.images[made.labels == label], label, norm)
        radius = away.amin(dim=0).max().item()
        assert made.notes["radius"][label] == pytest.approx(radius, rel=1e-6)
    assert made.notes["lower_bound"] == made.notes["radius"]
    assert made.notes["proven"] == [True] * 4
    assert all(programs > 0 for programs in made.notes["programs"])


def test_progress_and_time_are_reported(digits, tmp_path):
    phases: list[str] = []
    reports: list[tuple[str, int, int]] = []

    def phase(name: str) -> contextlib.AbstractContextManager[None]:
        phases.append(name)
        return contextlib.nullcontext()

    run = make_run(tmp_path, phase=phase, report=lambda *call: reports.append(call))
    MFC().distill(make_task(digits, 1), run)
    assert phases == ["covering"]
    assert reports == [("covering", done, 4) for done in range(5)]


@pytest.mark.parametrize("distiller", BOTH)
def test_a_class_that_is_too_small(digits, run, distiller):
    train = digits.subset(torch.cat([torch.arange(60), torch.arange(60, 63)]))
    with pytest.raises(RddBenchError, match=r"class '1' of digits has 3 .* but 4 are needed"):
        distiller().distill(make_task(train, 4), run)


@pytest.mark.parametrize("distiller", BOTH)
def test_copies_come_after_all_distinct_images(digits, run, distiller):
    images = digits.images[:3].repeat_interleave(3, dim=0)
    train = LabelledImages(torch.cat([images, digits.images[60:70]]), torch.arange(19) // 9 % 2)
    train = train.subset(torch.arange(18))
    made = distiller().distill(make_task(train, 5), run)
    own = {image.numpy().tobytes() for image in made.images[:5]}
    assert own == {image.numpy().tobytes() for image in digits.images[:3]}
    assert made.notes["radius"][0] == 0
    assert made.notes["centres"][0] == 3


# A radius that is given -----------------------------------------------------------------------


def test_a_given_radius_is_covered_and_the_rest_is_spread(digits, run):
    smallest = MFC.configured({"radius": 2.4}).distill(make_task(digits, 8), run)
    centres = smallest.notes["centres"]
    assert smallest.notes["lower_bound"] == centres
    assert max(centres) < 8
    for label, count in enumerate(centres):
        away = within_class(digits, smallest.images[smallest.labels == label], label, "l2")
        assert away[:count].amin(dim=0).max() <= 2.4 + 1e-6
        assert away.amin(dim=0).max().item() == pytest.approx(smallest.notes["radius"][label])
        nearest = away[:count].amin(dim=0)
        assert away[count].argmin() == nearest.argmax()  # the next one is the farthest


def test_a_radius_that_needs_more_images_than_there_are_to_be(digits, run):
    fits = MFC.configured({"radius": 1.5}).distill(make_task(digits, 40), run)
    needed = max(fits.notes["centres"])
    label = fits.notes["centres"].index(needed)
    with pytest.raises(RddBenchError) as caught:
        MFC.configured({"radius": 1.5}).distill(make_task(digits, 2), run)
    assert f"class '{label}' of digits needs {needed} images for radius=1.5" in str(caught.value)
    assert "has 2 per class" in str(caught.value)


def test_what_is_not_proven_says_so(digits, run):
    hurried = MFC.configured({"time_limit": 1e-9})
    made = hurried.distill(make_task(digits, 8), run)
    best = MFC().distill(make_task(digits, 8), run)
    assert not any(made.notes["proven"])
    for low, optimum, high in zip(
        made.notes["lower_bound"], best.notes["radius"], made.notes["radius"], strict=True
    ):
        assert low <= optimum <= high
    with pytest.raises(RddBenchError, match="needs at most"):
        MFC.configured({"time_limit": 1e-9, "radius": 1.5}).distill(make_task(digits, 2), run)


# The training ---------------------------------------------------------------------------------


def trained_with(made: Any) -> AdversarialTraining:
    attack = made.recipe.adversarial
    assert isinstance(attack, AdversarialTraining)
    return attack


def test_the_author_track_trains_adversarially(digits, run):
    made = MFC.configured({"eps": "16/255", "steps": 3}).distill(make_task(digits, 2), run)
    assert trained_with(made) == AdversarialTraining(norm="linf", eps=16 / 255, steps=3)
    assert made.recipe is not None
    assert made.recipe.uses is None
    assert made.weights is None


def test_the_largest_radius_is_added_to_the_budget(digits, run):
    options = {"train_norm": "l2", "train_eps": "eps+radius", "eps": 0.5}
    made = MFC.configured(options).distill(make_task(digits, 2), run)
    assert trained_with(made).norm == "l2"
    assert trained_with(made).eps == pytest.approx(0.5 + max(made.notes["radius"]))


def test_a_sum_that_leaves_the_pixels_is_all_of_them(digits, run):
    options = {"norm": "linf", "train_eps": "eps+radius", "eps": 0.3}
    made = MFC.configured(options).distill(make_task(digits, 2), run)
    assert max(made.notes["radius"]) + 0.3 > 1
    assert trained_with(made).eps == 1


@pytest.mark.parametrize(
    "options",
    [{"norm": "l1"}, {"norm": "l2"}, {"norm": "linf", "train_norm": "l2"}],
)
def test_a_radius_in_another_norm_cannot_be_added(options):
    with pytest.raises(RddBenchError, match="give norm and train_norm the same value"):
        MFC.configured({"train_eps": "eps+radius", **options})


def test_a_budget_in_grey_levels_is_a_mistake():
    with pytest.raises(RddBenchError, match="write 8/255"):
        MFC.configured({"eps": 8})


@pytest.mark.parametrize(("distiller", "share"), [(MFC, 1.0), (MFCPartial, 0.9)])
def test_weights_count_the_covered_images_nearest_to_each(digits, run, distiller, share):
    made = distiller.configured({"weighted": True}).distill(make_task(digits, 5), run)
    assert made.recipe is not None
    assert made.recipe.uses == ("weights",)
    assert made.weights is not None
    counts = []
    for label in range(4):
        away = within_class(digits, made.images[made.labels == label], label, "l2")
        covered = away.amin(dim=0) <= made.notes["radius"][label] + 1e-6
        assert covered.double().mean() >= share
        counts.append(torch.bincount(away.argmin(dim=0)[covered], minlength=5))
    expected = torch.cat(counts).double()
    assert torch.allclose(made.weights.double(), expected / expected.mean())


def test_the_weighted_loss_on_larger_balls_bounds_the_loss_on_all_images(digits, run):
    """The inclusion bound, for a linear model, whose worst case in l2 is known in closed form."""
    options = {"train_norm": "l2", "train_eps": "eps+radius", "eps": 0.1, "weighted": True}
    made = MFC.configured(options).distill(make_task(digits, 3), run)
    assert made.weights is not None

    def robust_loss(images: Tensor, labels: Tensor, weight: Tensor, eps: float) -> Tensor:
        sign = (labels % 2 * 2 - 1).double()
        margin = sign * (images.flatten(1).double() @ weight)
        return torch.nn.functional.softplus(eps * weight.norm() - margin)

    with seeded(0):
        for scale in (0.01, 0.1, 1.0):
            weight = scale * torch.randn(64, dtype=torch.float64)
            of_all = robust_loss(digits.images, digits.labels, weight, 0.1).mean()
            on_set = robust_loss(made.images, made.labels, weight, trained_with(made).eps)
            assert of_all <= (made.weights.double() * on_set).mean() + 1e-9


def test_the_host_weighs_the_loss_with_them(digits, run):
    made = MFC.configured({"weighted": True}).distill(make_task(digits, 2), run)
    assert made.recipe is not None
    assert made.weights is not None
    loss = Lesson(made, made.recipe, run.device).loss(torch.zeros(8, 4), torch.arange(8))
    assert torch.allclose(loss, made.weights * math.log(4))


# MFC-partial ----------------------------------------------------------------------------------


def test_a_share_needs_a_smaller_radius_and_is_never_called_proven(digits, run):
    whole = MFC().distill(make_task(digits, 3), run)
    radii = []
    for share in (0.5, 0.9, 1.0):
        made = MFCPartial.configured({"cover": share}).distill(make_task(digits, 3), run)
        assert made.notes["proven"] == [False] * 4
        radii.append(made.notes["radius"])
        for label in range(4):
            away = within_class(digits, made.images[made.labels == label], label, "l2")
            nearest = away.amin(dim=0).sort().values
            radius = nearest[math.ceil(share * len(nearest)) - 1].item()
            assert made.notes["radius"][label] == pytest.approx(radius, rel=1e-6)
    for half, most, everything, exact in zip(*radii, whole.notes["radius"], strict=True):
        assert half < most < everything
        assert exact <= everything
