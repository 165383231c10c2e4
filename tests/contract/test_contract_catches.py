"""The contract has teeth: for each of its rules, components that break it are caught."""

from __future__ import annotations

import os
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict
from torch import nn

from rdd_bench import testing
from rdd_bench.api import (
    Architecture,
    Attack,
    Config,
    Dataset,
    DatasetSpec,
    DistilledSet,
    Distiller,
    DistillTask,
    Info,
    LabelledImages,
    NotApplicable,
    RddBenchError,
    Recipe,
    Run,
    Splits,
    Threat,
    project,
)
from rdd_bench.components import KINDS, Component
from rdd_bench.errors import ContractError
from rdd_bench.registry import Offer, Registry
from rdd_bench.testing import SmallArchitecture, small_images, small_spec

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """Put back what the broken components of this file do to torch."""
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), 1
    yield
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def offer_of(cls: type[Component[Any]]) -> Offer:
    kind = next(kind for kind, base in KINDS.items() if issubclass(cls, base))
    return Offer(kind=kind, cls=cls, distribution="broken", version="1", entry_point="broken")


def apply(rule, cls: type[Component[Any]]) -> None:
    rule(offer_of(cls), Registry())


def says(rule, cls: type[Component[Any]]) -> str:
    """Apply the rule, see it fail, and return its sentence, which names the component."""
    with pytest.raises(ContractError) as caught:
        apply(rule, cls)
    message = str(caught.value)
    assert f"'{cls.name}' (broken 1)" in message
    assert "\n" not in message
    return message


# Components that keep the contract; the broken ones below change one thing each ---------------


class GoodDistiller(Distiller[Any]):
    """The first real images."""

    name = "victim"
    info = Info(title="Good", licence="MIT")

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        images = [
            task.train.of_class(label)[: task.ipc].clone() for label in range(task.spec.num_classes)
        ]
        labels = torch.arange(task.spec.num_classes).repeat_interleave(task.ipc)
        return DistilledSet(torch.cat(images), labels)


class GoodArchitecture(SmallArchitecture):
    """A small network."""

    name = "victim"
    info = Info(title="Good", licence="MIT")


class GoodAttack(Attack[Any]):
    """A random point of the budget."""

    name = "victim"
    info = Info(title="Good", licence="MIT")
    norms = frozenset({"linf", "l2"})

    def perturb(self, model, images, labels, threat, run):
        return project(images + threat.eps * torch.randn_like(images), images, threat)


class GoodDataset(Dataset[Any]):
    """Stripes."""

    name = "victim"
    info = Info(title="Good", licence="MIT")

    def load(self, source):
        return Splits(small_spec(), small_images(), small_images(2))


GOOD = {
    "distiller": (GoodDistiller, testing._DISTILLER_RULES),
    "architecture": (GoodArchitecture, testing._ARCHITECTURE_RULES),
    "attack": (GoodAttack, testing._ATTACK_RULES),
    "dataset": (GoodDataset, testing._DATASET_RULES),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_sound_component_passes_every_rule(kind):
    # Without this, the tests below could be passing because the victim itself is broken.
    cls, rules = GOOD[kind]
    for _, rule in [*testing._COMMON_RULES, *rules]:
        apply(rule, cls)


# Rules for everything -------------------------------------------------------------------------


@pytest.mark.parametrize("info", [Info(title=" ", licence="MIT"), Info(title="T", licence="")])
def test_a_component_without_title_or_licence_is_caught(info):
    class Nameless(GoodDistiller):
        """Has an empty description."""

    Nameless.info = info
    assert "title" in says(testing._described, Nameless)


class Lenient(Config):
    """Swallows any option."""

    model_config = ConfigDict(extra="ignore")


def test_options_that_swallow_unknown_names_are_caught():
    class Careless(GoodDistiller):
        """Takes whatever it is given."""

        config_class = Lenient

    assert "no_such_option" in says(testing._refuses_unknown_options, Careless)


def test_smoke_options_that_do_not_exist_are_caught():
    class Stale(GoodDistiller):
        """Has smoke options of an earlier version."""

        smoke: ClassVar = {"iterations": 2}

    with pytest.raises(RddBenchError, match="iterations is not an option"):
        apply(testing._smoke_options_fit, Stale)


# Distillers -----------------------------------------------------------------------------------


def distiller(change, role: Any = "method") -> type[Distiller[Any]]:
    """Return a distiller that returns ``change(good set, task)``."""

    class Broken(GoodDistiller):
        """Breaks one rule."""

        def distill(self, task: DistillTask, run: Run) -> Any:
            return change(super().distill(task, run), task)

    Broken.role = role
    return Broken


def set_of(images, labels) -> DistilledSet:
    return DistilledSet(images, labels)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda made, _: None, "NoneType"),
        (lambda made, _: (made.images, made.labels), "tuple"),
        (lambda made, _: set_of(made.images[:, :1], made.labels), "shape"),
        (lambda made, _: set_of(made.images.double(), made.labels), "float64"),
        (lambda made, _: set_of(made.images / 0, made.labels), "NaN or infinite"),
        (lambda made, _: set_of(made.images[:-1], made.labels[:-1]), "class 2 has 1 image"),
        (lambda made, _: set_of(made.images, made.labels + 1), "labels span 1..3"),
        (lambda made, _: set_of(made.images, made.labels.float()), "float32"),
        (lambda made, _: set_of(made.images, torch.ones(6, 3)), "no probabilities"),
    ],
)
def test_an_invalid_set_is_caught(change, found):
    assert found in says(testing._valid_set, distiller(change))


def test_a_distiller_that_needs_something_says_so_in_one_sentence_and_is_skipped():
    def refuse(reason: str) -> type[Distiller[Any]]:
        def raising(*_: Any) -> None:
            raise NotApplicable(reason)

        return distiller(raising)

    # The rule as the contract applies it.
    (rule, *_) = (rule for _, rule in GOOD["distiller"][1] if rule.__name__ == "_valid_set")
    with pytest.raises(unittest.SkipTest, match="it needs a file"):
        apply(rule, refuse("it needs a file"))
    assert "not one sentence" in says(rule, refuse("it needs\na file"))


def test_a_reference_without_a_recipe_is_caught():
    broken = distiller(lambda made, _: made, role="reference")
    assert "recipe" in says(testing._valid_set, broken)


def test_a_reference_with_a_recipe_may_have_any_number_of_images():
    def whole(_, task):
        return DistilledSet(task.train.images, task.train.labels, Recipe(epochs=1))

    apply(testing._valid_set, distiller(whole, role="reference"))


@pytest.mark.parametrize(
    "meddle",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_num_threads(2),
    ],
    ids=["gradients off", "double precision", "threads"],
)
def test_global_settings_left_behind_are_caught(meddle):
    def change(made, _):
        meddle()
        return made

    assert "as found" in says(testing._valid_set, distiller(change))
    # The checks that follow must not suffer from it.
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == 1


def test_a_set_drawn_from_the_system_is_caught():
    def change(made, _):
        return set_of(made.images + int.from_bytes(os.urandom(4), "little") / 2**32, made.labels)

    assert "differ by up to" in says(testing._same_seed_same_set, distiller(change))


def test_a_set_that_depends_on_earlier_calls_is_caught():
    calls = []

    def change(made, _):
        calls.append(1)
        return set_of(made.images + len(calls), made.labels)

    assert "same bits" in says(testing._same_seed_same_set, distiller(change))


def test_training_images_changed_in_place_are_caught():
    def change(made, task):
        task.train.images.clamp_(0.1, 0.9)
        return made

    assert "in place" in says(testing._training_data_untouched, distiller(change))


# Architectures --------------------------------------------------------------------------------


def architecture(make) -> type[Architecture[Any]]:
    class Broken(GoodArchitecture):
        """Breaks one rule."""

        def build(self, spec):
            return make(super().build(spec), spec)

    return Broken


class Wrapped(nn.Module):
    """A network with something done to its logits, or to its features."""

    def __init__(self, network: Any, after: Any, embed: Any = None) -> None:
        super().__init__()
        self.network = network
        self.after = after
        if embed is not None:
            self.embed = embed

    def forward(self, images):
        return self.after(self.network(images))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda network, _: "a network", "build returned str"),
        (lambda network, _: Wrapped(network, lambda logits: logits[:, :2]), "give (2, 2)"),
        (lambda network, _: Wrapped(network, lambda logits: (logits,)), "give tuple"),
    ],
)
def test_a_network_that_gives_no_logits_is_caught(make, found):
    assert found in says(testing._images_to_logits, architecture(make))


@pytest.mark.parametrize(
    "after", [lambda logits: logits.detach().requires_grad_(), lambda logits: logits * 0]
)
def test_a_network_without_input_gradients_is_caught(after):
    broken = architecture(lambda network, _: Wrapped(network, after))
    assert "gradient" in says(testing._input_gradients, broken)


def test_features_that_are_no_vectors_are_caught():
    broken = architecture(
        lambda network, _: Wrapped(network, nn.Identity(), embed=lambda images: images)
    )
    assert "features (n, d)" in says(testing._embed_shape, broken)


def test_a_network_without_features_is_no_fault():
    apply(testing._embed_shape, architecture(lambda network, _: Wrapped(network, nn.Identity())))


def test_initial_weights_from_an_own_generator_are_caught():
    generator = torch.Generator().manual_seed(0)

    def make(network, _):
        nn.init.normal_(network.classifier.weight, generator=generator)
        return network

    assert "one seed differ" in says(testing._same_seed_same_network, architecture(make))


def test_an_architecture_for_large_images_only_is_tried_on_large_ones():
    seen = []

    class Large(GoodArchitecture):
        """Needs 224 pixels."""

        def build(self, spec):
            if spec.shape[1] < 224:
                raise NotApplicable("images are too small")
            seen.append(spec.shape)
            return nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, spec.num_classes))

    for _, rule in testing._ARCHITECTURE_RULES:
        apply(rule, Large)
    assert set(seen) == {(3, 224, 224)}


# Attacks --------------------------------------------------------------------------------------


def attack(change, norm: Any = "linf") -> type[Attack[Any]]:
    """Return an attack of one norm that returns ``change(model, images, threat)``."""

    class Broken(GoodAttack):
        """Breaks one rule."""

        norms = frozenset({norm})

        def perturb(self, model, images, labels, threat, run):
            return change(model, images, threat)

    return Broken


def sound(model: nn.Module, images: torch.Tensor, threat: Threat) -> torch.Tensor:
    return project(images + threat.eps, images, threat)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model, x, t: None, "perturb returned NoneType"),
        (lambda model, x, t: sound(model, x, t)[:1], "perturb returned (1,"),
        (lambda model, x, t: sound(model, x, t).double(), "float64"),
        (lambda model, x, t: x + torch.nan, "NaN or infinite"),
        (lambda model, x, t: (x + 2 * t.eps).clamp(0, 1), "moved images by up to 0.2 (linf)"),
        (lambda model, x, t: x - t.eps, "outside [0, 1]"),
        (lambda model, x, t: sound(model, x.add_(0.01).clamp_(0, 1), t), "in place"),
    ],
)
def test_images_outside_the_threat_are_caught(change, found):
    assert found in says(testing._within_budget, attack(change))


def test_an_attack_that_keeps_what_a_budget_decided_is_caught():
    class Forgetful(GoodAttack):
        """Returns what it made under the first budget."""

        def perturb(self, model, images, labels, threat, run):
            return run.memo.setdefault("made", project(images + threat.eps, images, threat))

    assert "run.memo changes its answer" in says(testing._memo_changes_nothing, Forgetful)
    apply(testing._memo_changes_nothing, GoodAttack)


@pytest.mark.parametrize(("named", "found"), [("depth", "the value None"), ("speed", "value 0.5")])
def test_an_effort_that_is_no_number_of_steps_is_caught(named, found):
    class Options(Config):
        """Options."""

        speed: float = 0.5
        """No count."""
        rounds: int = 3
        """A count."""

    class Lazy(GoodAttack):
        """Has no such option."""

        config_class = Options
        effort = named

    assert found in says(testing._effort_is_a_number, Lazy)
    Lazy.effort = "rounds"
    apply(testing._effort_is_a_number, Lazy)


def test_the_budget_is_measured_in_every_norm_that_is_named():
    class OnlyLinf(GoodAttack):
        """Says that it respects both norms, and boxes each pixel whatever the norm."""

        def perturb(self, model, images, labels, threat, run):
            return project(images + threat.eps, images, Threat("linf", threat.eps))

    assert "(l2)" in says(testing._within_budget, OnlyLinf)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x, t: (x * 255).round() / 255,  # stores the images as bytes
        lambda model, x, t: x.clamp(0.1, 0.9),  # takes them for something else than [0, 1]
        lambda model, x, t: x + 0.01,
    ],
)
def test_an_attack_that_changes_images_without_a_budget_is_caught(change):
    assert "budget of 0" in says(testing._null_attack, attack(change))


def test_a_network_left_in_train_mode_is_caught():
    def change(model, images, threat):
        model.train()
        return sound(model, images, threat)

    assert "train mode" in says(testing._network_unchanged, attack(change))


def test_parameters_changed_by_an_attack_are_caught():
    def change(model, images, threat):
        next(model.parameters()).data.add_(1e-6)
        return sound(model, images, threat)

    assert "changed parameters" in says(testing._network_unchanged, attack(change))


def test_gradients_left_on_the_parameters_are_caught():
    def change(model, images, threat):
        model.requires_grad_(requires_grad=True)
        model(images).sum().backward()
        return sound(model, images, threat)

    assert "gradients" in says(testing._network_unchanged, attack(change))


def test_global_settings_changed_by_an_attack_are_caught():
    def change(model, images, threat):
        torch.set_grad_enabled(False)
        return sound(model, images, threat)

    assert "gradient mode" in says(testing._network_unchanged, attack(change))


def test_an_attack_with_its_own_randomness_is_caught():
    generator = torch.Generator().manual_seed(0)

    def change(model, images, threat):
        noise = torch.rand(images.shape, generator=generator) - 0.5
        return project(images + threat.eps * noise, images, threat)

    assert "one seed differ" in says(testing._same_seed_same_attack, attack(change))


# Data sets ------------------------------------------------------------------------------------


def dataset(load) -> type[Dataset[Any]]:
    class Broken(GoodDataset):
        """Breaks one rule."""

        def load(self, source):
            return load()

    return Broken


def splits(images=None, labels=None, **changes: Any) -> Splits:
    good = small_images()
    facts = {"name": "s", "shape": (3, 16, 16), "class_names": ("a", "b", "c")}
    spec = DatasetSpec(**{**facts, "mean": (0.5,) * 3, "std": (0.2,) * 3, **changes})
    train = LabelledImages(
        good.images if images is None else images, good.labels if labels is None else labels
    )
    return Splits(spec, train, good)


@pytest.mark.parametrize(
    ("load", "found"),
    [
        (lambda: None, "load returned NoneType"),
        (lambda: splits(images=small_images().images * 255), "pixels span"),
        (lambda: splits(images=small_images().images[:, :1]), "shape"),
        (lambda: splits(labels=small_images().labels + 1), "labels span"),
        (lambda: splits(std=(0.2, 0.2, 0.0)), "std"),
    ],
)
def test_invalid_data_are_caught(load, found):
    assert found in says(testing._loads_or_says_why, dataset(load))


@pytest.mark.parametrize("message", ["", "two\nlines"])
def test_missing_data_without_a_sentence_are_caught(message):
    def load():
        raise RddBenchError(message)

    assert "one sentence" in says(testing._loads_or_says_why, dataset(load))


def test_missing_data_with_a_sentence_are_no_fault():
    def load():
        raise RddBenchError("needs a folder: --data-root DIR")

    apply(testing._loads_or_says_why, dataset(load))


def test_missing_data_with_a_bare_exception_are_a_fault():
    def load():
        raise FileNotFoundError("/data/images")

    with pytest.raises(FileNotFoundError):
        apply(testing._loads_or_says_why, dataset(load))


def test_images_in_a_new_order_at_each_load_are_caught():
    order = iter([torch.arange(24), torch.arange(24).flip(0)])

    def load():
        chosen = small_images().subset(next(order))
        return splits(chosen.images, chosen.labels)

    assert "two loads differ" in says(testing._loads_or_says_why, dataset(load))


# What is checked ------------------------------------------------------------------------------


def test_a_distribution_that_offers_nothing_is_named_with_those_that_do():
    with pytest.raises(RddBenchError, match="'pytest' offers no plugins"):
        list(testing.checks_of("pytest"))


def test_every_rule_is_tried_in_this_file():
    source = Path(__file__).read_text(encoding="utf-8")
    rules = [*testing._COMMON_RULES, *(rule for _, rules in GOOD.values() for rule in rules)]
    assert [rule.__name__ for _, rule in rules if f"testing.{rule.__name__}" not in source] == []
