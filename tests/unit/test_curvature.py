"""GUARD's regulariser against closed forms, its place in a teacher's loss and in DC."""

from __future__ import annotations

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.components import DistillTask, Run
from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec, LabelledImages
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.distillers import _curvature, dc, guard
from rdd_bench_builtin.distillers._curvature import Form, curvature, unit
from rdd_bench_builtin.distillers._gradient_matching import match
from rdd_bench_builtin.distillers._teacher import natural_loss, train_teacher
from rdd_bench_builtin.distillers.dc import DC, DCConfig
from rdd_bench_builtin.distillers.guard import GUARD, GUARDConfig, regularised_loss

torch.set_num_threads(1)

FORMS: list[Form] = ["gradient", "gradient-squared", "loss"]
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    with seeded(0):
        yield


def smooth_network(norm: str = "batch") -> nn.Module:
    """A network of 3x4x4 images in double precision, with settled statistics, in eval mode."""
    norms = {"batch": nn.BatchNorm2d(4), "none": nn.Identity()}
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norms[norm], nn.Softplus(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    with torch.no_grad():
        network(torch.randn(50, 3, 4, 4, dtype=torch.float64))
    return network.eval()


def some_images(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 4, 4, dtype=torch.float64), torch.randint(5, (count,))


class Quadratic:
    """Stands for the cross-entropy: l(x) = x' A x / 2 + b' x of each image."""

    def __init__(self) -> None:
        root = torch.randn(48, 48, dtype=torch.float64)
        self.matrix = root + root.T
        self.vector = torch.randn(48, dtype=torch.float64)

    def __call__(self, logits: Tensor, _labels: Tensor) -> Tensor:
        flat = logits.flatten(1)
        return ((flat @ self.matrix) * flat).sum(1) / 2 + flat @ self.vector

    def gradient(self, x: Tensor) -> Tensor:
        return self.matrix @ x.flatten() + self.vector


def test_of_a_quadratic_loss_all_forms_are_exact(monkeypatch):
    quadratic = Quadratic()
    monkeypatch.setattr(_curvature, "_cross_entropies", quadratic)
    images, labels = some_images()
    h = 0.7
    expected: dict[Form, list[float]] = {form: [] for form in FORMS}
    for x in images:
        g = quadratic.gradient(x)
        z = g / g.norm()
        bend = h * (quadratic.matrix @ z).norm().item()
        rise = h * g.norm() + h * h / 2 * z @ quadratic.matrix @ z
        expected["gradient"].append(bend)
        expected["gradient-squared"].append(bend**2)
        expected["loss"].append(rise.item())
    for form, values in expected.items():
        found = curvature(lambda x: x, images, labels, form, h).item()
        assert found == pytest.approx(abs(sum(values) / len(values)), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-10, 1e-25, 1e-37])
def test_the_step_has_its_length_and_direction_however_short_the_gradient(scale):
    """With 1e-7 added, as released, a short gradient gives another direction and a long step."""
    direction = torch.randn(4, 3, 8, 8)
    step = 3.0 * unit(direction * scale)
    assert torch.allclose(step.flatten(1).norm(dim=1), torch.full((4,), 3.0), rtol=1e-5)
    aligned = torch.cosine_similarity(step.flatten(1), direction.flatten(1))
    assert (aligned > 0.999).all()
    released = direction * scale / 128 + 1e-7
    released = 3.0 * released / (released.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    turned = torch.cosine_similarity(released.flatten(1), direction.flatten(1))
    assert (turned < 0.2).all() or scale >= 1e-3
    assert unit(torch.zeros(2, 3, 8, 8)).abs().sum() == 0


def test_a_confident_network_is_stepped_from_by_h(monkeypatch):
    network = smooth_network().float()
    images, _ = some_images()
    images = images.float()
    labels = network(images).argmax(dim=1)
    seen: list[Tensor] = []

    def sure(x: Tensor) -> Tensor:
        seen.append(x.detach())
        logits: Tensor = network(x) * 60
        return logits

    value = curvature(sure, images, labels, "gradient", 0.5)
    losses = nn.functional.cross_entropy(sure(images), labels, reduction="none")
    assert losses.min() < 1e-6
    assert torch.allclose((seen[1] - seen[0]).flatten(1).norm(dim=1), torch.tensor(0.5), rtol=1e-4)
    gradients = torch.autograd.grad(value, list(network.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


def test_where_the_loss_is_flat_the_gradient_is_finite():
    layer = nn.Linear(48, 5).double()
    nn.init.zeros_(layer.weight)
    images, labels = some_images()
    value = curvature(lambda x: layer(x.flatten(1)), images, labels, "gradient", 1.0)
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, layer.weight)
    assert torch.isfinite(gradient).all()


@EVERY_FORM
def test_the_gradient_of_the_weights_is_that_with_a_constant_direction(form):
    """Finite differences with z held; with z recomputed they are others."""
    network = smooth_network()
    images, labels = some_images()
    h = 0.8
    x = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network(x), labels, reduction="sum")
    z = unit(torch.autograd.grad(loss, x)[0])

    def with_constant_direction() -> float:
        points = images.clone().requires_grad_(), (images + h * z).requires_grad_()
        losses = [nn.functional.cross_entropy(network(p), labels, reduction="none") for p in points]
        if form == "loss":
            return (losses[1] - losses[0]).mean().abs().item()
        slopes = [torch.autograd.grad(v.sum(), p)[0] for v, p in zip(losses, points, strict=True)]
        length = (slopes[1] - slopes[0]).flatten(1).norm(dim=1)
        value: float = (length if form == "gradient" else length.square()).mean().item()
        return value

    def anew() -> float:
        return curvature(network, images, labels, form, h).item()

    assert anew() == pytest.approx(with_constant_direction(), rel=1e-10)
    parameters = [p for p in network.parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(curvature(network, images, labels, form, h), parameters)
    slopes: dict[Any, list[float]] = {with_constant_direction: [], anew: []}
    wanted = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.norm() > 1e-4
        for place in range(0, parameter.numel(), 23):
            wanted.append(gradient.flatten()[place].item())
            for value, found in slopes.items():
                ends = []
                for bump in (1e-6, -1e-6):
                    with torch.no_grad():
                        parameter.view(-1)[place] += bump
                    ends.append(value())
                    with torch.no_grad():
                        parameter.view(-1)[place] -= bump
                found.append((ends[0] - ends[1]) / 2e-6)
    held, free = (torch.tensor(values) for values in slopes.values())
    exact = torch.tensor(wanted)
    assert (held - exact).norm() < 1e-6 * exact.norm()
    assert (free - exact).norm() > 1e-3 * exact.norm()


@EVERY_FORM
def test_the_size_of_the_batch_does_not_matter(form):
    network = smooth_network()
    images, labels = some_images()
    once = curvature(network, images, labels, form, 1.0).item()
    twice = curvature(network, images.repeat(2, 1, 1, 1), labels.repeat(2), form, 1.0).item()
    assert twice == pytest.approx(once, rel=1e-12)


def test_the_forms_agree_to_first_order():
    """Gradient over h tends to the Hessian's product, loss over h to the gradient's length."""
    network = smooth_network()
    images, labels = some_images(1)
    x = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(network(x), labels)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    z = g.detach() / g.detach().norm()
    (hessian_z,) = torch.autograd.grad((g * z).sum(), x)
    h = 1e-5
    values = {form: curvature(network, images, labels, form, h).item() for form in FORMS}
    assert values["gradient"] / h == pytest.approx(hessian_z.norm().item(), rel=1e-4)
    assert values["gradient-squared"] / h**2 == pytest.approx(
        hessian_z.norm().item() ** 2, rel=1e-3
    )
    assert values["loss"] / h == pytest.approx(g.norm().item(), rel=1e-4)


# In the loss of a teacher ---------------------------------------------------------------------


def make_task() -> DistillTask:
    spec = DatasetSpec(
        name="noise", shape=(3, 8, 8), class_names=("a", "b"), mean=(0.5, 0.4, 0.3), std=(0.25,) * 3
    )
    train = LabelledImages(torch.rand(12, *spec.shape), torch.arange(12) % 2)
    architecture = ConvNet.configured({"depth": 2, "width": 4, "norm": "batch"})
    return DistillTask(spec, train, 1, architecture, 0)


def make_run() -> Run:
    return Run(CPU, Path(), lambda _: contextlib.nullcontext(), lambda *_: None)


def options_of(**options: Any) -> GUARDConfig:
    config = GUARD.parse({**GUARD.smoke, **options})
    assert isinstance(config, GUARDConfig)
    return config


@EVERY_FORM
def test_the_regulariser_leaves_statistics_and_gradients_alone(form):
    task = make_task()
    pixels, labels = task.train.images, task.train.labels
    ends = []
    for objective in (natural_loss(task), regularised_loss(task, options_of(curvature_form=form))):
        with seeded(1):
            network = task.build_network(CPU).train()
        objective(network, pixels, labels, 0)
        assert network.training
        assert all(p.grad is None for p in network.parameters())
        ends.append(dict(network.named_buffers()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_loss_of_a_teacher_is_cross_entropy_and_weighted_curvature_in_eval_mode():
    task = make_task()
    pixels, labels = task.train.images, task.train.labels
    options = options_of(curvature=0.4, curvature_h=0.9)
    network = task.build_network(CPU).train()
    loss = regularised_loss(task, options)(network, pixels, labels, 0).item()
    images = task.normalise(pixels)
    regulariser = curvature(network.eval(), images, labels, "gradient", 0.9).item()
    error = nn.functional.cross_entropy(network.train()(images), labels).item()
    assert loss == pytest.approx(error + 0.4 * regulariser, rel=1e-5)


def test_the_weight_grows_from_zero_in_the_warm_up():
    task = make_task()
    network = task.build_network(CPU).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    loss = regularised_loss(task, options_of(curvature=2.0, curvature_warmup=4))
    values = [loss(network, task.train.images, task.train.labels, e).item() for e in range(6)]
    steps = [after - before for before, after in itertools.pairwise(values)]
    assert steps[:4] == pytest.approx([(values[4] - values[0]) / 4] * 4, rel=1e-3)
    assert steps[4] == pytest.approx(0, abs=1e-6)
    assert steps[0] > 1e-3


@pytest.mark.parametrize("end", [{"curvature": 0.0}, {"curvature_warmup": 10**9}])
def test_without_weight_the_teacher_is_the_plain_one_bit_for_bit(end):
    task, states = make_task(), []
    for objective in (natural_loss(task), regularised_loss(task, options_of(**end))):
        with seeded(1):
            network = task.build_network(CPU)
            options = options_of(teacher_epochs=1 if "curvature_warmup" in end else 3)
            train_teacher(network, task, make_run(), options, objective, "guard")
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@EVERY_FORM
def test_a_step_in_pixels_is_the_deviation_times_one_between_normalised_images(form):
    """With one deviation s, gradients in pixels are 1/s as long: the stated conversion."""
    task, s = make_task(), 0.25
    network = task.build_network(CPU).eval()
    values = {}
    for unit_of, h in (("normalised", 1.2), ("pixels", 1.2 * s)):
        options = options_of(curvature_unit=unit_of, curvature_h=h, curvature_form=form)
        values[unit_of] = guard.regularise(
            task, options, network, task.train.images, task.train.labels
        )[1].item()
    factor = {"gradient": s, "gradient-squared": s**2, "loss": 1.0}[form]
    assert values["normalised"] == pytest.approx(factor * values["pixels"], rel=1e-4)


# In DC ----------------------------------------------------------------------------------------


def test_dc_matches_gradients_of_the_regularised_real_loss():
    """The loss of a step is the distance to gradients taken independently in double precision."""
    weight, h = 0.7, 0.5
    network = make_task().build_network(CPU).double().eval()
    real = list(torch.randn(2, 5, 3, 8, 8, dtype=torch.float64))
    synthetic = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    parameters = list(network.parameters())

    options = DCConfig(curvature=weight, curvature_h=h)
    run = Run(CPU, Path(), lambda _: contextlib.nullcontext(), lambda *_: None, batch_size=2)
    transforms = [lambda images: images] * 2
    loss, _ = match(network, real, synthetic, transforms, "mse", run, dc.regularised_loss(options))
    expected = 0.0
    for label in range(2):
        labels = torch.full((5,), label)
        own = nn.functional.cross_entropy(network(synthetic[label]), labels[:1])
        theirs = nn.functional.cross_entropy(network(real[label]), labels)
        theirs = theirs + weight * curvature(network, real[label], labels, "gradient", h)
        pairs = zip(
            torch.autograd.grad(own, parameters),
            torch.autograd.grad(theirs, parameters, allow_unused=True, materialize_grads=True),
            strict=True,
        )
        expected += sum((a - b).square().sum().item() for a, b in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_option_of_dc_is_off_by_default_and_changes_the_set():
    task, sets = make_task(), []
    for options in ({}, {"curvature": 0.0, "curvature_h": 1.0}, {"curvature": 1.0}):
        with seeded(2):
            sets.append(DC.configured({**DC.smoke, **options}).distill(task, make_run()).images)
    assert torch.equal(sets[0], sets[1])
    assert torch.isfinite(sets[2]).all()
    assert not torch.equal(sets[0], sets[2])


def test_the_default_weight_is_the_published_one_of_a_batch_per_image():
    """100 times the norm of a gradient of the mean of 128 losses."""
    options = GUARDConfig()
    assert (options.curvature, options.curvature_h) == (100 / 128, 3.0)
    network = smooth_network()
    images, labels = some_images()
    x, y = (images.clone().requires_grad_() for _ in range(2))
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(network(x), labels), x)
    z = 3 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    rise = nn.functional.cross_entropy(network(y + z), labels) - nn.functional.cross_entropy(
        network(y), labels
    )
    (d,) = torch.autograd.grad(rise, y)
    theirs = 100 * d.flatten(1).norm(dim=1).mean().item()
    ours = 100 / len(images) * curvature(network, images, labels, "gradient", 3.0).item()
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert math.isclose(options.curvature, 0.78125)


def test_a_share_of_the_cross_entropy_is_taken_in_eval_mode():
    task = make_task()
    pixels, labels = task.train.images, task.train.labels
    network = task.build_network(CPU).train()
    values = []
    for share in (0.0, 0.25, 1.0):
        options = options_of(curvature=1e-9, curvature_eval_share=share)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        values.append(regularised_loss(task, options)(network, pixels, labels, 0).item())
    assert abs(values[2] - values[0]) > 1e-4
    assert values[1] == pytest.approx(0.75 * values[0] + 0.25 * values[2], rel=1e-5)
    in_eval = nn.functional.cross_entropy(network.eval()(task.normalise(pixels)), labels).item()
    assert values[2] == pytest.approx(in_eval, rel=1e-5)
