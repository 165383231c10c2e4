"""DC and DSA against their definitions, on scikit-learn's digits."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.augment import Transform, draw
from rdd_bench.checks import check_distilled_set
from rdd_bench.components import Architecture, Distiller, DistillTask, NoOptions, Run
from rdd_bench.errors import Diverged, RddBenchError
from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec, Info, LabelledImages, Recipe
from rdd_bench_builtin.distillers import _gradient_matching as module
from rdd_bench_builtin.distillers._coreset import DSA as STRATEGY
from rdd_bench_builtin.distillers._gradient_matching import (
    DISTANCES,
    Distance,
    cosine_distance,
    loops,
    match,
    row_distance,
    settle_batch_norms,
    squared_distance,
)
from rdd_bench_builtin.distillers.dc import DC, DCConfig
from rdd_bench_builtin.distillers.dsa import DSA, DSAConfig

torch.set_num_threads(1)

DIGITS = "color_crop_cutout_scale_rotate"
KINDS: list[Distance] = ["ours", "mse", "cosine"]
METHODS: list[type[Distiller[Any]]] = [DC, DSA]


class Tiny(Architecture[NoOptions]):
    """One smooth block for images of 8x8; no ``embed``, for gradients need none."""

    name = "tiny"
    info = Info(title="Tiny", licence="MIT")

    def __init__(self, norm: str = "instance") -> None:
        super().__init__()
        self.norm = norm
        self.built: list[nn.Module] = []

    def build(self, spec: DatasetSpec) -> nn.Module:
        norm = nn.BatchNorm2d(4) if self.norm == "batch" else nn.GroupNorm(4, 4)
        self.built.append(
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), norm, nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(),
                nn.Linear(64, spec.num_classes),
            )
        )  # fmt: skip
        return self.built[-1]


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


def make_task(train: LabelledImages, ipc: int, architecture: Tiny | None = None) -> DistillTask:
    spec = DatasetSpec(
        name="digits",
        shape=(1, 8, 8),
        class_names=tuple("0123456789")[: int(train.labels.max()) + 1],
        mean=(0.3,),
        std=(0.4,),
    )
    return DistillTask(spec, train, ipc, architecture or Tiny(), seed=0)


def few(digits: LabelledImages, counts: list[int]) -> LabelledImages:
    """The first images of each digit, as many as ``counts`` says."""
    chosen = [(digits.labels == c).nonzero().flatten()[:n] for c, n in enumerate(counts)]
    return digits.subset(torch.cat(chosen))


# The distances ---------------------------------------------------------------------------------


def gradients(seed: int) -> list[Tensor]:
    """A convolution, its bias, a layer norm's scale of three dimensions, and a classifier."""
    shapes = [(5, 3, 2, 2), (5,), (4, 3, 3), (7, 20), (7,)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


ROWS = 5 + 4 + 7


def test_the_distance_is_zero_of_proportional_and_twice_the_rows_of_opposite_gradients():
    first = [1e3 * g for g in gradients(0)]
    # Every row may have a factor of its own.
    factors = [torch.rand(len(g), *[1] * (g.ndim - 1)).double() + 0.5 for g in first]
    along = [g * factor for g, factor in zip(first, factors, strict=True)]
    assert row_distance(along, first).item() == pytest.approx(0, abs=1e-8)
    assert row_distance([-g for g in along], first).item() == pytest.approx(2 * ROWS, abs=1e-8)


def test_tensors_of_one_dimension_do_not_count():
    first, second = gradients(0), gradients(1)
    other = [g if g.ndim > 1 else 100 * torch.randn_like(g) for g in first]
    assert row_distance(other, second).item() == row_distance(first, second).item()


def test_the_distances_are_their_definitions_one_number_at_a_time():
    first, second = gradients(0), gradients(1)
    first[0][2] = 0  # a dead filter

    def dot(a: Sequence[float], b: Sequence[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def apart(a: list[float], b: list[float]) -> float:
        return 1 - dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)) + 1e-6)

    rows = [
        apart(a.flatten().tolist(), b.flatten().tolist())
        for one, other in zip(first, second, strict=True)
        if one.ndim > 1
        for a, b in zip(one, other, strict=True)
    ]
    assert len(rows) == ROWS
    assert rows[2] == 1
    assert row_distance(first, second).item() == pytest.approx(sum(rows), rel=1e-12)

    a = [x for g in first for x in g.flatten().tolist()]
    b = [x for g in second for x in g.flatten().tolist()]
    squares = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert squared_distance(first, second).item() == pytest.approx(squares, rel=1e-12)
    assert cosine_distance(first, second).item() == pytest.approx(apart(a, b), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_filter_does_not_break_the_gradient(kind):
    first = [g.requires_grad_() for g in gradients(0)]
    dead = [g.detach().clone().index_fill_(0, torch.tensor([1]), 0) for g in first]
    for one, other in ((first, dead), (dead, first)):
        one = [g.detach().requires_grad_() for g in one]
        moved = torch.autograd.grad(DISTANCES[kind](one, other), one, materialize_grads=True)
        assert all(g.isfinite().all() for g in moved)


# One step --------------------------------------------------------------------------------------


def problem(
    ipc: int = 2, counts: tuple[int, ...] = (9, 5, 7), norm: str = "instance"
) -> tuple[nn.Module, list[Tensor], Tensor, list[Transform]]:
    """A network, real images of three classes, synthetic images, augmentations; in float64."""
    with seeded(4):
        spec = make_task(LabelledImages(torch.zeros(0), torch.tensor([2])), 1).spec
        network = Tiny(norm).build(spec).double().train()
        real = [torch.randn(n, 1, 8, 8).double() for n in counts]
        synthetic = torch.randn(len(counts), ipc, 1, 8, 8).double()
        transforms = [draw(DIGITS, 1, (8, 8)) for _ in counts]
        if norm == "batch":
            settle_batch_norms(network, torch.cat(real))
    return network, real, synthetic, transforms


def as_published(
    network: nn.Module,
    real: Sequence[Tensor],
    synthetic: Tensor,
    transforms: Sequence[Transform],
    kind: Distance = "ours",
) -> tuple[Tensor, Tensor]:
    """Gradients of every parameter, the losses of all classes in one graph, one backward pass."""
    leaf = synthetic.detach().clone().requires_grad_()
    parameters = list(network.parameters())
    total = torch.zeros((), dtype=synthetic.dtype)
    for label, (images, own, transform) in enumerate(zip(real, leaf, transforms, strict=True)):
        sides = []
        for pixels, keep in ((images, False), (own, True)):
            labels = torch.full((len(pixels),), label)
            error = nn.functional.cross_entropy(network(transform(pixels)), labels)
            sides.append(torch.autograd.grad(error, parameters, create_graph=keep))
        total = total + DISTANCES[kind](sides[1], sides[0])
    (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("batch_size", [1, 4, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_published_program(tmp_path, kind, batch_size, norm):
    """Whatever the size of the passes through the network."""
    task = problem(norm=norm)
    loss, gradient = match(*task, kind, make_run(tmp_path, batch_size=batch_size))
    expected_loss, expected = as_published(*task, kind)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10)
    assert torch.allclose(gradient, expected, rtol=1e-8, atol=1e-12)
    assert gradient.abs().amax(dim=(1, 2, 3, 4)).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_against_finite_differences(run, kind):
    network, real, synthetic, transforms = problem()
    _, gradient = match(network, real, synthetic, transforms, kind, run)
    step = 1e-5
    for _ in range(3):
        direction = torch.randn_like(synthetic)
        ends = [
            match(network, real, synthetic + sign * step * direction, transforms, kind, run)[0]
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]).item() / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_zero_when_the_synthetic_images_are_the_real_ones(run, kind):
    """Under any augmentation, so both sides must see the same one."""
    network, _, synthetic, transforms = problem(ipc=6)
    network.requires_grad_(True)
    scaled = {"ours": 1e-2, "mse": 1e-20, "cosine": 1e-4}[kind]  # the 1e-6 of the denominators
    loss, gradient = match(network, list(synthetic), synthetic, transforms, kind, run)
    assert loss.item() < scaled
    assert match(network, list(synthetic), synthetic, transforms[::-1], kind, run)[0] < scaled
    assert match(network, list(-synthetic), synthetic, transforms, kind, run)[0] > 10 * scaled
    assert gradient.isfinite().all()


def test_a_step_leaves_network_and_images_alone(run):
    network, real, synthetic, transforms = problem()
    before = [p.clone() for p in network.parameters()]
    real = [images.requires_grad_() for images in real]
    loss, gradient = match(network, real, synthetic, transforms, "ours", run)
    assert not loss.requires_grad
    assert not gradient.requires_grad
    assert not synthetic.requires_grad
    assert all(images.grad is None for images in real)
    assert all(p.grad is None for p in network.parameters())
    assert all(map(torch.equal, before, network.parameters()))


def test_batch_norms_take_running_statistics_from_one_pass_and_hold_them():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(), nn.BatchNorm1d(64))
    images = torch.randn(20, 1, 8, 8) * 3 + 5
    settle_batch_norms(network.eval(), images)
    first = network[0]
    assert isinstance(first, nn.BatchNorm2d)
    assert first.running_mean is not None
    assert first.running_mean.item() == pytest.approx(0.1 * images.mean().item(), rel=1e-5)
    assert [module.training for module in network] == [False, True, True, False]


# The whole algorithm ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ipc", "expected"),
    [(1, (1, 1)), (10, (10, 50)), (20, (20, 25)), (30, (30, 20)), (40, (40, 15)), (50, (50, 10)),
     (2, (2, 6)), (5, (5, 23)), (16, (16, 35)), (51, (50, 10)), (1000, (50, 10))],
)  # fmt: skip
def test_the_loops_are_the_published_ones_and_straight_between(ipc, expected):
    assert loops(ipc) == expected


def test_the_loops_are_monotone_between_the_published_ones():
    table = [loops(ipc) for ipc in range(1, 61)]
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(table))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(table[:10]))
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(table[9:]))


def test_the_defaults_are_the_papers():
    shared = {
        "iterations": 1000, "outer": None, "inner": None, "lr_img": 0.1, "momentum": 0.5,
        "lr_net": 0.01, "batch_real": 256, "batch_train": 256, "distance": "ours",
    }  # fmt: skip
    assert DCConfig().model_dump() == {
        **shared,
        "init": "noise",
        "curvature": 0.0,
        "curvature_h": 3.0,
        "curvature_form": "gradient",
    }
    assert DSAConfig().model_dump() == {**shared, "init": "real", "augment": STRATEGY}


def reference(task: DistillTask, options: Any, loop: tuple[int, int], augment: str) -> Tensor:
    """Write the program down once more, plainly; its draws come in the same order as ours."""
    k, ipc = task.spec.num_classes, task.ipc
    members = [(task.train.labels == c).nonzero().flatten() for c in range(k)]
    pixels = (task.train.images - 0.3) / 0.4

    def pick(count: int) -> list[Tensor]:
        return [pixels[m[torch.randperm(len(m))[:count]]] for m in members]

    start = torch.stack(pick(ipc)) if options.init == "real" else torch.randn(k, ipc, 1, 8, 8)
    velocity = torch.zeros_like(start)
    images = start
    labels = torch.arange(k).repeat_interleave(ipc)
    for _ in range(options.iterations):
        network = task.architecture.build(task.spec)
        for step in range(loop[0]):
            network.train()
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
            if norms:
                network(torch.cat(pick(16)))
                for norm in norms:
                    norm.eval()
            real = pick(options.batch_real)
            transforms = [draw(augment, 1, (8, 8)) for _ in range(k)]
            _, gradient = as_published(network, real, images, transforms, options.distance)
            velocity = options.momentum * velocity + gradient
            images = images - options.lr_img * velocity
            if step == loop[0] - 1:
                continue
            network.train()
            for _ in range(loop[1]):
                order = torch.randperm(k * ipc)
                for at in range(0, k * ipc, options.batch_train):
                    batch = order[at : at + options.batch_train]
                    inputs = draw(augment, len(batch), (8, 8))(images.flatten(0, 1)[batch])
                    loss = nn.functional.cross_entropy(network(inputs), labels[batch])
                    slopes = torch.autograd.grad(loss, list(network.parameters()))
                    with torch.no_grad():
                        for p, slope in zip(network.parameters(), slopes, strict=True):
                            p.sub_(options.lr_net * slope)
    return images


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(
    ("distiller", "more"),
    [(DC, {}), (DSA, {"augment": DIGITS}), (DC, {"init": "real", "distance": "mse"}),
     (DSA, {"init": "noise", "augment": ""})],
)  # fmt: skip
def test_the_result_is_that_of_the_algorithm_written_down_plainly(
    digits, run, distiller, more, norm
):
    options = {
        "iterations": 2, "outer": 3, "inner": 2, "lr_net": 0.05, "lr_img": 0.5, "momentum": 0.7,
        "batch_real": 6, "batch_train": 4, **more,
    }  # fmt: skip
    task = make_task(few(digits, [9, 5, 30]), 2, Tiny(norm))
    config = distiller.parse(options)
    with seeded(3):
        made = distiller(config).distill(task, run)
    with seeded(3):
        images = reference(task, config, (3, 2), more.get("augment", ""))
    assert torch.allclose((made.images - 0.3) / 0.4, images.flatten(0, 1), atol=2e-4)
    with seeded(3):
        still = distiller(config.model_copy(update={"lr_img": 1e-9})).distill(task, run)
    assert (made.images - still.images).abs().max() > 0.01


def test_each_network_takes_its_steps_and_its_epochs(digits, tmp_path, monkeypatch):
    """K networks, T steps on each, training of each but after the last step."""
    drawn, seen, reports = [], [], []

    def spy(network, real, images, transforms, distance, run):
        seen.append((network, [len(r) for r in real]))
        return torch.zeros(()), torch.zeros_like(images)

    def spied_draw(strategy, count, size):
        drawn.append((len(seen), strategy, count))
        return lambda images: images

    monkeypatch.setattr(module, "match", spy)
    monkeypatch.setattr(module, "draw_augmentation", spied_draw)
    architecture = Tiny()
    run = make_run(tmp_path, report=lambda *report: reports.append(report))
    options = {"iterations": 2, "outer": 3, "inner": 2, "batch_real": 7, "batch_train": 5}
    DSA.configured({**options, "augment": "crop"}).distill(
        make_task(few(digits, [9, 6, 30]), 3, architecture), run
    )
    assert [network for network, _ in seen] == [n for n in architecture.built for _ in range(3)]
    assert len(architecture.built) == 2
    assert all(counts == [7, 6, 7] for _, counts in seen)  # a small class gives all of its images
    # Three classes are matched with one draw each; nine images are trained on in batches 5 and 4.
    step = [("crop", 1)] * 3
    training = [("crop", 5), ("crop", 4)] * 2
    expected = (step + training + step + training + step) * 2
    assert [(strategy, count) for _, strategy, count in drawn] == expected
    assert ("matching", 2, 2) in reports


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, (4, 17)), ({"outer": 2}, (2, 17)), ({"inner": 3}, (4, 3)),
     ({"outer": 2, "inner": 3}, (2, 3))],
)  # fmt: skip
def test_the_table_is_used_where_no_loops_are_given(digits, run, monkeypatch, more, expected):
    """Four images per class: one draw a class for each step, one an epoch of a full batch."""
    counts: list[int] = []

    def spied_draw(strategy, count, size):
        counts.append(count)
        return lambda images: images

    monkeypatch.setattr(module, "draw_augmentation", spied_draw)
    monkeypatch.setattr(
        module, "match", lambda n, r, images, t, d, run: (torch.ones(()), torch.zeros_like(images))
    )
    task = make_task(few(digits, [9, 6]), 4)
    notes = DSA.configured({"iterations": 1, **more}).distill(task, run).notes
    assert (notes["outer"], notes["inner"]) == expected
    outer, inner = expected
    assert counts.count(1) == 2 * outer
    assert counts.count(8) == (outer - 1) * inner


def test_the_same_augmentation_goes_to_both_sides_of_a_class(digits, run, monkeypatch):
    applied: list[list[Tensor]] = []

    def spied_draw(strategy, count, size):
        inputs: list[Tensor] = []
        if count == 1:
            applied.append(inputs)

        def apply(images: Tensor) -> Tensor:
            inputs.append(images.detach().clone())
            return images

        return apply

    monkeypatch.setattr(module, "draw_augmentation", spied_draw)
    train = few(digits, [9, 6, 8])
    DSA.configured({"iterations": 1, "batch_real": 4}).distill(make_task(train, 1), run)
    assert len(applied) == 3
    for label, (real, synthetic) in enumerate(applied):
        of_class = {tuple(i.flatten().mul(16).round().tolist()) for i in train.of_class(label)}
        for images, count in ((real, 4), (synthetic, 1)):
            pixels = (images * 0.4 + 0.3).flatten(1).mul(16).round()
            assert len(pixels) == count
            assert {tuple(i.tolist()) for i in pixels} <= of_class


@pytest.mark.parametrize("distiller", METHODS)
def test_smoke_options_give_the_asked_images_and_the_same_for_the_same_seed(digits, run, distiller):
    pixels, labels = digits.images.clone(), digits.labels.clone()
    sets = []
    for seed in (1, 1, 2):
        with seeded(seed):
            made = distiller.configured(distiller.smoke).distill(make_task(digits, 3), run)
        sets.append(check_distilled_set(made, make_task(digits, 3).spec, 3, distiller.name))
    assert torch.equal(sets[0].images, sets[1].images)
    assert sets[0].notes == sets[1].notes
    assert not torch.equal(sets[0].images, sets[2].images)
    assert torch.equal(sets[0].labels, torch.arange(10).repeat_interleave(3))
    assert torch.equal(digits.images, pixels)
    assert torch.equal(digits.labels, labels)
    assert sets[0].notes["final_loss"] > 0
    assert sets[0].notes["averaged_iterations"] == 2


def test_the_recipes_are_the_authors(digits, run):
    task = make_task(digits, 1)
    assert DC.configured(DC.smoke).distill(task, run).recipe == Recipe(epochs=300, augment="")
    assert DSA.configured(DSA.smoke).distill(task, run).recipe == Recipe(
        epochs=1000, augment=STRATEGY
    )
    made = DSA.configured({**DSA.smoke, "augment": "crop"}).distill(task, run)
    assert made.recipe == Recipe(epochs=1000, augment="crop")
    with pytest.raises(RddBenchError, match=r"colour.*known: color, crop"):
        DSA.configured({"augment": "colour"})


def test_the_loss_gets_smaller(digits, run):
    """On one class of networks, with the rate of the paper."""
    losses = {}
    for iterations in (1, 30):
        with seeded(0):
            options = {"iterations": iterations, "batch_real": 32, "init": "noise"}
            made = DC.configured(options).distill(make_task(few(digits, [40] * 3), 1), run)
        losses[iterations] = made.notes["final_loss"]
    # The mean over thirty networks, of which the first is the one of the other run.
    assert losses[30] < 0.9 * losses[1]


def test_a_class_too_small_is_named(digits, run):
    task = make_task(few(digits, [5, 3, 5]), 4)
    with pytest.raises(RddBenchError, match=r"dsa: class '1' .* has 3 .* 4 are needed.*at most 3"):
        DSA().distill(task, run)
    # Noise needs real images only to compare with.
    assert len(DC.configured(DC.smoke).distill(task, run)) == 12


@pytest.mark.parametrize(("step", "value"), [(1, math.nan), (5, math.inf)])
def test_a_loss_that_is_no_number_stops_with_its_place(digits, run, monkeypatch, step, value):
    calls = itertools.count(1)
    monkeypatch.setattr(
        module,
        "match",
        lambda n, r, images, t, d, run: (
            torch.tensor(value if next(calls) == step else 1.0), torch.zeros_like(images)
        ),
    )  # fmt: skip
    place = f"iteration {(step + 1) // 2}, step {2 - step % 2} is {value}"
    task = make_task(digits, 1)
    with pytest.raises(Diverged, match=rf"dc: the matching loss of {place}; .*lower") as error:
        DC.configured({"outer": 2, "inner": 1}).distill(task, run)
    check_distilled_set(error.value.last_good, task.spec, 1, "kept")


def test_a_diverging_network_is_reported(digits, run):
    options = {**DC.smoke, "outer": 4, "inner": 30, "lr_net": 1e30}
    with pytest.raises(Diverged, match=r"iteration 1, step \d is nan; .* lr_img or lr_net"):
        DC.configured(options).distill(make_task(digits, 2), run)


def test_importing_them_does_not_touch_torch():
    program = """
import sys
from rdd_bench.lazy import imported_on_use
with imported_on_use("torch"):
    for name in ("dc", "dsa"):
        module = __import__(f"rdd_bench_builtin.distillers.{name}", fromlist=["x"])
        for distiller in module.rdd_bench_distillers():
            distiller.parse(distiller.smoke)
assert "torch.nn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
