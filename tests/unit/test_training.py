"""How networks are trained on a set: the draws, the recipe, the inner attack."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench import training
from rdd_bench.components import Architecture
from rdd_bench.errors import RddBenchError
from rdd_bench.networks import Classifier
from rdd_bench.threats import TOLERANCE, distance
from rdd_bench.training import Trained, fit, new_classifier
from rdd_bench.types import (
    AdversarialTraining,
    Config,
    DatasetSpec,
    DistilledSet,
    Info,
    Norm,
    Recipe,
    Views,
    Whitening,
)

SPEC = DatasetSpec(
    name="toy", shape=(1, 4, 4), class_names=("dark", "light"), mean=(0.4,), std=(0.25,)
)
CPU = torch.device("cpu")


class Options(Config):
    """Options of the test's network."""

    batch_norm: bool = False
    """Whether it mixes the images of a batch."""


class Small(Architecture[Options]):
    """A hidden layer."""

    name = "small"
    info = Info(title="Small", licence="MIT")

    def build(self, spec: DatasetSpec) -> nn.Module:
        norm: nn.Module = nn.BatchNorm1d(8) if self.config.batch_norm else nn.Identity()
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), norm, nn.ReLU(), nn.Linear(8, spec.num_classes)
        )


def toy_set(count: int = 8, seed: int = 0) -> DistilledSet:
    """Return dark and light images that a network can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 4, 4, generator=generator) + 0.5 * labels.view(-1, 1, 1, 1)
    return DistilledSet(images, labels)


def train(
    distilled: DistilledSet | None = None,
    seeds: tuple[int, ...] = (0,),
    batch_norm: bool = False,
    **recipe: Any,
) -> Trained:
    return fit(
        distilled or toy_set(),
        Recipe(**{"epochs": 4, "batch_size": 4, **recipe}),
        Small(Options(batch_norm=batch_norm)),
        SPEC,
        seeds,
        device=CPU,
        report=lambda *_: None,
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def accuracy(model: nn.Module, of: DistilledSet) -> float:
    with torch.no_grad():
        right: Tensor = model(of.images).argmax(1) == of.hard_labels
    return right.float().mean().item()


# Seeds ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whatever_ran_before():
    first = train(augment="color_crop", adversarial=AdversarialTraining(steps=2))
    torch.rand(3)
    second = train(augment="color_crop", adversarial=AdversarialTraining(steps=2))
    assert torch.equal(weights(first.models[0]), weights(second.models[0]))
    assert first.final_loss == second.final_loss


def test_a_network_does_not_depend_on_the_seeds_trained_beside_it():
    together = train(seeds=(0, 1, 2)).models
    assert torch.equal(weights(together[2]), weights(train(seeds=(2,)).models[0]))
    assert not torch.equal(weights(together[0]), weights(together[1]))


def test_the_generators_are_left_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(augment="flip")
    assert torch.equal(torch.rand(3), expected)


def test_initial_weights_depend_on_architecture_and_seed_and_not_on_the_set(monkeypatch):
    starts: list[Tensor] = []

    def note(model: nn.Module, *_: Any) -> float:
        starts.append(weights(model))
        return 0.0

    monkeypatch.setattr(training, "_train", note)
    train(toy_set(8), seeds=(0, 1))
    train(toy_set(20, seed=9), seeds=(0, 1), epochs=7, lr=0.5)
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], weights(new_classifier(Small(), SPEC, 0)))


def test_networks_come_back_in_eval_mode_and_frozen():
    for model in train(seeds=(0, 1), batch_norm=True).models:
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


# The recipe -----------------------------------------------------------------------------------


def rates(**recipe: Any) -> list[float]:
    """Return the learning rate of every epoch."""
    options = Recipe(**recipe)
    optimizer = training._optimizer(nn.Linear(1, 1), options)
    schedule = training._schedule(optimizer, options)
    seen = []
    for _ in range(options.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("epochs", [10, 11, 300])
def test_the_step_schedule_divides_by_ten_once_after_half(epochs):
    seen = rates(epochs=epochs, lr=0.1, schedule="step")
    half = epochs // 2 + 1  # the epoch of the authors' code
    assert seen[:half] == [0.1] * half
    assert seen[half:] == pytest.approx([0.01] * (epochs - half))


def test_the_other_schedules_are_constant_and_fall_to_zero():
    assert rates(epochs=5, lr=0.1, schedule="constant") == [0.1] * 5
    cosine = rates(epochs=100, lr=0.1, schedule="cosine")
    assert cosine[0] == 0.1
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[50] == pytest.approx(0.05)
    assert cosine[-1] < 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_optimiser_learns_a_simple_set(optimizer):
    trained = train(epochs=60, lr=0.05, optimizer=optimizer, schedule="cosine")
    assert accuracy(trained.models[0], toy_set(40, seed=3)) == 1.0
    assert 0 <= trained.final_loss[0] < 0.3


def test_every_image_is_seen_once_an_epoch(monkeypatch):
    seen: list[Tensor] = []
    original = training.Lesson.batches

    def spy(lesson: training.Lesson, epoch: int) -> Any:
        batches = original(lesson, epoch)
        seen.append(torch.cat(list(batches)))
        return batches

    monkeypatch.setattr(training.Lesson, "batches", spy)
    train(toy_set(10), epochs=3)
    assert [s.sort().values.tolist() for s in seen] == [list(range(10))] * 3
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("count", "sizes"), [(9, [4, 5]), (8, [4, 4]), (10, [4, 4, 2]), (1, [1]), (5, [5])]
)
def test_a_last_batch_of_one_joins_the_one_before_it(count, sizes):
    batches = training.Lesson(toy_set(count), Recipe(batch_size=4), CPU).batches(0)
    assert [len(b) for b in batches] == sizes
    assert torch.cat(list(batches)).sort().values.tolist() == list(range(count))


def test_a_last_batch_of_one_does_not_break_batch_normalisation():
    assert train(toy_set(9), batch_norm=True).final_loss[0] > 0


def test_a_loss_that_is_no_number_is_an_error_that_says_what_to_do():
    with pytest.raises(
        RddBenchError, match=r"training diverged: .* lower the learning rate \(1e\+"
    ):
        train(lr=1e30, epochs=10)


def test_progress_goes_over_all_seeds():
    reports: list[tuple[str, int, int]] = []
    fit(
        toy_set(), Recipe(epochs=3), Small(), SPEC, [0, 1], device=CPU,
        report=lambda *report: reports.append(report),
    )  # fmt: skip
    assert reports[0] == ("training", 0, 6)
    assert reports[-1] == ("training", 6, 6)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


def test_the_passes_of_training_are_counted_with_those_of_the_inner_attack():
    plain = train(toy_set(10), epochs=3, seeds=(0, 1)).passes
    assert (plain.forward, plain.backward) == (2 * 3 * 10, 2 * 3 * 10)
    attack = AdversarialTraining(steps=2)
    hardened = train(toy_set(10), epochs=3, adversarial=attack).passes
    assert (hardened.forward, hardened.backward) == (3 * 3 * 10, 3 * 3 * 10)


# Labels ---------------------------------------------------------------------------------------


def test_soft_labels_that_are_hard_are_the_same_as_hard_ones():
    hard = toy_set()
    soft = DistilledSet(hard.images, nn.functional.one_hot(hard.labels, 2).float())
    one, other = train(hard).models[0], train(soft).models[0]
    assert torch.allclose(weights(one), weights(other), atol=1e-6)


def test_soft_labels_are_what_the_network_learns():
    images = torch.full((8, 1, 4, 4), 0.5)
    soft = DistilledSet(images, torch.tensor([[0.7, 0.3]]).repeat(8, 1))
    model = train(soft, epochs=200, lr=0.05, schedule="cosine", weight_decay=0.0).models[0]
    assert model(images)[0].softmax(0).tolist() == pytest.approx([0.7, 0.3], abs=0.01)


def test_a_recipe_that_uses_what_the_set_lacks_is_refused():
    with pytest.raises(RddBenchError, match="the recipe uses weights, but the distilled set has"):
        train(uses=("weights",))


def test_an_image_of_weight_zero_is_as_good_as_absent():
    data = toy_set(8)
    weights_of = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    wrong = dataclasses.replace(
        data, labels=torch.cat([data.labels[:4], 1 - data.labels[4:]]), weights=weights_of
    )
    right = dataclasses.replace(data, weights=weights_of)
    one, other = (train(s, batch_size=8, uses=("weights",)).models[0] for s in (wrong, right))
    assert torch.equal(weights(one), weights(other))
    # A recipe that does not ask for them trains on every image alike.
    plain, ignored = train(data).models[0], train(right).models[0]
    assert torch.equal(weights(plain), weights(ignored))


def test_whitening_is_a_layer_of_the_network_that_is_evaluated():
    mean, matrix = torch.rand(16), torch.eye(16) + 0.1 * torch.rand(16, 16)
    data = dataclasses.replace(toy_set(), whitening=Whitening(mean, matrix))
    model = train(data, uses=("whitening",)).models[0]
    expected = model.network(((data.images.flatten(1) - mean) @ matrix).view_as(data.images))
    assert torch.allclose(model(data.images), expected, atol=1e-6)
    assert torch.allclose(
        model.preprocess.inverse(model.preprocess(data.images)), data.images, atol=1e-5
    )
    # The protocol's recipe does not ask for it, so there it is mean and deviation for all.
    assert torch.equal(weights(train(data).models[0]), weights(train(toy_set()).models[0]))


def plain_views(data: DistilledSet, epochs: int, logits: Tensor) -> Views:
    """Return views that show the images as they are."""
    count = len(data) * epochs
    height, width = data.images.shape[2:]
    return Views(
        image=torch.arange(len(data)).repeat(epochs),
        crop=torch.tensor([0.0, 0.0, height, width]).repeat(count, 1),
        flip=torch.zeros(count, dtype=torch.bool),
        partner=torch.arange(count),
        mix_box=torch.tensor([0, 0, height, width]).repeat(count, 1),
        mix_weight=torch.zeros(count),
        logits=logits.half(),
    )


def test_views_are_learned_in_their_order_and_begin_anew_when_used_up():
    data = toy_set(6)
    views = plain_views(data, 2, torch.zeros(12, 2))
    lesson = training.Lesson(
        dataclasses.replace(data, views=views), Recipe(batch_size=4, uses=("views",)), CPU
    )
    epochs = [torch.cat(list(lesson.batches(epoch))).tolist() for epoch in range(3)]
    assert epochs == [list(range(6)), list(range(6, 12)), list(range(6))]


def test_a_student_of_views_comes_to_the_answers_of_the_teacher():
    images = torch.full((8, 1, 4, 4), 0.5)
    data = DistilledSet(images, torch.arange(8) % 2)
    data = dataclasses.replace(
        data, views=plain_views(data, 1, torch.tensor([1.0, -1.0]).repeat(8, 1))
    )
    for temperature in (None, 4.0):
        recipe: dict[str, Any] = {"epochs": 300, "lr": 0.1, "schedule": "cosine"}
        model = train(
            data, uses=("views",), temperature=temperature, weight_decay=0.0, **recipe
        ).models[0]
        gap = model(images)[0] @ torch.tensor([1.0, -1.0])
        assert gap.item() == pytest.approx(2.0, abs=0.05)


def test_the_loss_of_views_is_the_divergence_of_softened_answers():
    data = toy_set(4)
    teacher, student = torch.randn(4, 2).half(), torch.randn(4, 2)
    lesson = training.Lesson(
        dataclasses.replace(data, views=plain_views(data, 1, teacher)),
        Recipe(uses=("views",), temperature=3.0),
        CPU,
    )
    expected = nn.functional.kl_div(
        (student / 3).log_softmax(1), (teacher.float() / 3).softmax(1), reduction="none"
    ).sum(1)
    assert torch.allclose(lesson.loss(student, torch.arange(4)), expected, atol=1e-6)


# Adversarial training -------------------------------------------------------------------------


def loss_with(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the loss of each image as a function of the logits."""
    return lambda logits: nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.fixture
def trained() -> Classifier:
    return train(epochs=60, lr=0.05).models[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_adversarial_examples_stay_within_the_budget_and_raise_the_loss(trained, norm: Norm, eps):
    data = toy_set(40, seed=3)
    options = AdversarialTraining(norm=norm, eps=eps, steps=5)
    inputs = trained.preprocess(data.images)
    attacked = training._adversarial(trained, inputs, loss_with(data.labels), options)
    pixels = trained.preprocess.inverse(attacked)
    assert distance(pixels, data.images, norm).max().item() <= eps + TOLERANCE
    assert pixels.min() >= -TOLERANCE
    assert pixels.max() <= 1 + TOLERANCE
    assert not attacked.requires_grad
    loss = nn.functional.cross_entropy
    assert loss(trained.network(attacked), data.labels) > loss(trained.network(inputs), data.labels)
    assert trained.training


def test_of_several_restarts_every_image_keeps_the_worst(trained):
    data = toy_set(40, seed=3)
    inputs = trained.preprocess(data.images)
    losses = []
    for restarts in (1, 6):
        torch.manual_seed(0)
        options = AdversarialTraining(eps=0.2, steps=1, relative_step=0.5, restarts=restarts)
        attacked = training._adversarial(trained, inputs, loss_with(data.labels), options)
        losses.append(loss_with(data.labels)(trained.eval().network(attacked)))
    assert bool((losses[1] >= losses[0] - 1e-6).all())
    assert losses[1].sum() > losses[0].sum()


def test_the_inner_attack_sees_images_in_the_box_and_the_network_in_eval_mode(trained):
    """As the attacker at test time will."""
    seen: list[bool] = []
    trained.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    outside = trained.preprocess(toy_set().images * 3 - 1)
    options = AdversarialTraining(eps=0.1, steps=3)
    attacked = training._adversarial(trained, outside, loss_with(toy_set().labels), options)
    pixels = trained.preprocess.inverse(attacked)
    assert pixels.min() >= -TOLERANCE
    assert pixels.max() <= 1 + TOLERANCE
    assert seen == [False] * 3


def test_buffers_move_by_training_and_not_by_the_inner_attack():
    model = new_classifier(Small(Options(batch_norm=True)), SPEC, 0).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    data = toy_set()
    inputs = model.preprocess(data.images)
    training._adversarial(model, inputs, loss_with(data.labels), AdversarialTraining(eps=0.1))
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_adversarial_training_makes_networks_robust():
    data = toy_set(40, seed=3)
    attack = AdversarialTraining(eps=0.3, steps=5)
    robust = []
    for options in (None, attack):
        model = train(toy_set(40), epochs=40, lr=0.05, adversarial=options).models[0]
        attacked = training._adversarial(
            model, model.preprocess(data.images), loss_with(data.labels), attack
        )
        losses = nn.functional.cross_entropy(model.eval().network(attacked), data.labels)
        robust.append(losses.item())
    assert robust[1] < robust[0]
