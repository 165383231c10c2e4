"""The contract as tests, for plugin authors: the same checks for everybody's plugins.

In a plugin's test suite::

    from rdd_bench.testing import contract

    @contract("my-distribution")
    def test_contract(check):
        check()

or without pytest: ``rdd-bench check my-distribution``. Every class that the installed
distribution offers is checked with its smoke options on small real images.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
import unittest
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdd_bench import audit
from rdd_bench.artifacts import set_hash
from rdd_bench.checks import (
    check_candidates,
    check_distilled_set,
    check_network,
    check_splits,
)
from rdd_bench.components import (
    Architecture,
    Attack,
    Dataset,
    Distiller,
    DistillTask,
    Run,
    Source,
)
from rdd_bench.data import content_hash
from rdd_bench.errors import ContractError, NotApplicable, RddBenchError
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.registry import Offer, Registry, load_plugins
from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec, DistilledSet, LabelledImages, Threat

IPC = 2

Rule = Callable[[Offer, Registry], None]
Rules = list[tuple[str, Rule]]


@dataclass(frozen=True)
class Check:
    """One rule applied to one offered class; ``run`` raises ContractError if it is broken."""

    offer: Offer
    rule: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.offer.kind} {self.offer.name}: {self.rule}"


def contract(distribution: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a test over the contract; it receives each check as ``check`` and calls it."""
    import pytest

    checks = list(checks_of(distribution))
    return pytest.mark.parametrize("check", [c.run for c in checks], ids=[str(c) for c in checks])


def checks_of(distribution: str) -> Iterator[Check]:
    """Yield the checks of everything that a distribution offers.

    Raises:
        RddBenchError: If it offers nothing, or a part of it did not load.
    """
    registry = load_plugins()
    problems = [p for p in registry.problems if p.plugin.split(":")[0] == distribution]
    if problems:
        raise RddBenchError(f"plugin not loaded: {'; '.join(map(str, problems))}")
    offers = [offer for offer in registry.offers if offer.distribution == distribution]
    if not offers:
        known = ", ".join(sorted({offer.distribution for offer in registry.offers}))
        raise RddBenchError(
            f"'{distribution}' offers no plugins; distributions that do: {known}. "
            "Is it installed, with an entry point in group rdd_bench?"
        )
    rules: dict[str, Rules] = {
        "distiller": _DISTILLER_RULES,
        "architecture": _ARCHITECTURE_RULES,
        "attack": _ATTACK_RULES,
        "dataset": _DATASET_RULES,
    }
    for offer in offers:
        for rule, check in [*_COMMON_RULES, *rules[offer.kind]]:
            yield Check(offer, rule, lambda check=check, offer=offer: check(offer, registry))  # type: ignore[misc]


# A small world to test in ---------------------------------------------------------------------


def small_spec() -> DatasetSpec:
    """Return the specification of the contract's images: three classes of 16x16 in colour."""
    return DatasetSpec(
        name="contract",
        shape=(3, 16, 16),
        class_names=("a", "b", "c"),
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.2, 0.2),
    )


def small_images(per_class: int = 8) -> LabelledImages:
    """Return learnable images of ``small_spec``: a bright stripe whose place is the class."""
    with seeded(7):
        labels = torch.arange(3).repeat_interleave(per_class)
        images = 0.3 * torch.rand(len(labels), 3, 16, 16)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[label, 5 * label : 5 * label + 5] += 0.6
    return LabelledImages(images, labels)


class _SmallNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()
        )
        self.classifier = nn.Linear(128, 3)

    def embed(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embed(images))
        return logits


class SmallArchitecture(Architecture[Any]):
    """A convolution and a linear layer, for tests of other components."""

    name = "contract-network"

    def build(self, _spec: DatasetSpec) -> nn.Module:
        return _SmallNetwork()


def small_run(scratch: Path) -> Run:
    """Return a Run on the CPU that reports nothing."""
    return Run(
        device=torch.device("cpu"),
        scratch=scratch,
        phase=lambda _: nullcontext(),
        report=lambda *_: None,
        batch_size=16,
    )


def _fail(offer: Offer, found: str, expected: str) -> None:
    raise ContractError(offer.who, found, expected)


def _unchanged_world(offer: Offer, call: Callable[[], None]) -> None:
    """Run something and see that it left the global settings of torch as they were."""
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    try:
        call()
        after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    finally:
        # The checks that follow must not suffer from this one.
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        torch.set_num_threads(before[2])
    if before != after:
        _fail(
            offer, f"gradient mode, default type and threads became {after}", f"{before} as found"
        )


# Rules for everything -------------------------------------------------------------------------


def _described(offer: Offer, _: Registry) -> None:
    info = offer.cls.info
    if not (info.title.strip() and info.licence.strip()):
        _fail(offer, f"title '{info.title}', licence '{info.licence}'", "neither empty")


def _refuses_unknown_options(offer: Offer, _: Registry) -> None:
    try:
        offer.cls.parse({"no_such_option": 1})
    except RddBenchError:
        return
    _fail(offer, "takes the option 'no_such_option'", "unknown options refused")


def _smoke_options_fit(offer: Offer, _: Registry) -> None:
    offer.cls.parse(offer.cls.smoke)


_COMMON_RULES: Rules = [
    ("has a title and a licence", _described),
    ("refuses unknown options", _refuses_unknown_options),
    ("has smoke options that it accepts", _smoke_options_fit),
]


# Distillers -----------------------------------------------------------------------------------


def _distil(offer: Offer, train: LabelledImages, seed: int) -> DistilledSet:
    distiller = offer.cls.configured(offer.cls.smoke)
    assert isinstance(distiller, Distiller)
    task = DistillTask(
        spec=small_spec(), train=train, ipc=IPC, architecture=SmallArchitecture(), seed=0
    )
    with tempfile.TemporaryDirectory() as scratch, seeded(seed):
        made = distiller.distill(task, small_run(Path(scratch)))
    ipc = None if distiller.role == "reference" else IPC
    return check_distilled_set(made, task.spec, ipc, offer.who)


def _valid_set(offer: Offer, _: Registry) -> None:
    def call() -> None:
        distilled = _distil(offer, small_images(), seed=1)
        cls: Any = offer.cls
        if cls.role == "reference" and distilled.recipe is None:
            _fail(offer, "a reference without a recipe", "its own recipe")

    _unchanged_world(offer, call)


def _same_seed_same_set(offer: Offer, _: Registry) -> None:
    first = _distil(offer, small_images(), seed=1)
    random.random()  # the state outside must not matter
    torch.rand(3)
    second = _distil(offer, small_images(), seed=1)
    if set_hash(first) != set_hash(second):
        gap = (first.images - second.images).abs().max().item()
        _fail(offer, f"two runs with one seed differ by up to {gap:.3g}", "the same bits")


def _training_data_untouched(offer: Offer, _: Registry) -> None:
    train = small_images()
    before = content_hash(train)
    _distil(offer, train, seed=1)
    if content_hash(train) != before:
        _fail(offer, "changed the training images in place", "a copy")


def _or_says_why(rule: Rule) -> Rule:
    """Skip, with the reason, a plugin that cannot serve the small images and says so.

    ``unittest.SkipTest`` is what pytest and ``rdd-bench check`` both show as skipped.
    """

    @functools.wraps(rule)
    def applied(offer: Offer, registry: Registry) -> None:
        try:
            rule(offer, registry)
        except NotApplicable as reason:
            if "\n" in str(reason) or not str(reason).strip():
                _fail(offer, "a reason that is not one sentence", "one sentence on what is needed")
            raise unittest.SkipTest(str(reason)) from None

    return applied


_DISTILLER_RULES: Rules = [
    ("returns a valid set and leaves torch as found", _or_says_why(_valid_set)),
    ("gives the same set for the same seed", _or_says_why(_same_seed_same_set)),
    ("leaves the training data untouched", _or_says_why(_training_data_untouched)),
]


# Architectures --------------------------------------------------------------------------------


def _network(offer: Offer) -> tuple[nn.Module, DatasetSpec]:
    """Build it for the small images, or, if those are too small for it, for larger ones."""
    architecture = offer.cls.configured(offer.cls.smoke)
    assert isinstance(architecture, Architecture)
    spec = small_spec()
    with seeded(1):
        try:
            return architecture.build(spec), spec
        except NotApplicable:
            larger = DatasetSpec(
                name=spec.name,
                shape=(3, 224, 224),
                class_names=spec.class_names,
                mean=spec.mean,
                std=spec.std,
            )
            return architecture.build(larger), larger


def _images_to_logits(offer: Offer, _: Registry) -> None:
    network, spec = _network(offer)
    check_network(network, spec, offer.who)


def _input_gradients(offer: Offer, _: Registry) -> None:
    network, spec = _network(offer)
    images = torch.randn(2, *spec.shape, requires_grad=True)
    network.eval()(images).square().sum().backward()
    if images.grad is None or not images.grad.abs().sum() > 0:
        _fail(offer, "logits do not depend on the input by gradient", "attackable networks")


def _embed_shape(offer: Offer, _: Registry) -> None:
    network, spec = _network(offer)
    embed = getattr(network, "embed", None)
    if embed is None:
        return
    with torch.no_grad():
        network.eval()
        features = embed(torch.randn(2, *spec.shape))
    if features.ndim != 2 or len(features) != 2:
        _fail(offer, f"embed gives {tuple(features.shape)}", "features (n, d)")


def _same_seed_same_network(offer: Offer, _: Registry) -> None:
    first, second = _network(offer)[0], _network(offer)[0]
    if audit.state_hash(first) != audit.state_hash(second):
        _fail(offer, "two networks of one seed differ", "initial weights from torch's generator")


_ARCHITECTURE_RULES: Rules = [
    ("maps images to logits", _images_to_logits),
    ("has gradients with respect to its input", _input_gradients),
    ("embeds images as vectors, if at all", _embed_shape),
    ("builds the same network for the same seed", _same_seed_same_network),
]


# Attacks --------------------------------------------------------------------------------------


def _victim() -> tuple[Classifier, LabelledImages]:
    """Return a network trained to fit the small images, and those it gets right."""
    spec, data = small_spec(), small_images()
    with seeded(3):
        model = Classifier(Normalise(spec), _SmallNetwork())
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images), data.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    optimizer.zero_grad()
    model.eval().requires_grad_(requires_grad=False)
    right = model(data.images).argmax(dim=1) == data.labels
    return model, data.subset(right.nonzero().flatten())


def _perturb(
    offer: Offer, threat: Threat, memo: dict[str, Any] | None = None
) -> tuple[Tensor, Classifier, Tensor]:
    attack = offer.cls.configured(offer.cls.smoke)
    assert isinstance(attack, Attack)
    model, data = _victim()
    images = data.images.clone()
    with tempfile.TemporaryDirectory() as scratch, seeded(1):
        run = dataclasses.replace(
            small_run(Path(scratch)),
            memo={} if memo is None else memo,
            surrogates=lambda count: [_victim()[0] for _ in range(count)],
        )
        candidates = attack.perturb(model, images, data.labels, threat, run)
    candidates = check_candidates(candidates, data.images, offer.who)
    if not torch.equal(images, data.images):
        _fail(offer, "changed the images it was given in place", "a copy")
    return candidates, model, data.images


def _norms(offer: Offer) -> list[Any]:
    cls: Any = offer.cls
    return sorted(cls.norms)


def _within_budget(offer: Offer, _: Registry) -> None:
    for norm in _norms(offer):
        threat = Threat(norm, 0.1 if norm == "linf" else 0.5)
        candidates, _model, images = _perturb(offer, threat)
        for flag in audit.check_budget(candidates, images, threat):
            _fail(offer, flag.message, "a perturbation within the threat")


def _null_attack(offer: Offer, _: Registry) -> None:
    for norm in _norms(offer):
        threat = Threat(norm, 0.0)
        candidates, _model, images = _perturb(offer, threat)
        for flag in audit.check_budget(candidates, images, threat):
            _fail(offer, f"with a budget of 0 it {flag.message}", "the images themselves")


def _network_unchanged(offer: Offer, _: Registry) -> None:
    fresh, _data = _victim()

    def call() -> None:
        _, model, _ = _perturb(offer, Threat(_norms(offer)[0], 0.1))
        for flag in audit.check_state(model, audit.state_hash(fresh)):
            _fail(offer, flag.message, "the network as it was, in eval mode")
        if any(p.requires_grad or p.grad is not None for p in model.parameters()):
            _fail(offer, "left gradients on the parameters", "frozen parameters")

    _unchanged_world(offer, call)


def _same_seed_same_attack(offer: Offer, _: Registry) -> None:
    threat = Threat(_norms(offer)[0], 0.1)
    if not torch.equal(_perturb(offer, threat)[0], _perturb(offer, threat)[0]):
        _fail(offer, "two attacks with one seed differ", "the same bits")


def _memo_changes_nothing(offer: Offer, _: Registry) -> None:
    smaller, larger = (Threat(_norms(offer)[0], eps) for eps in (0.05, 0.1))
    memo: dict[str, Any] = {}
    _perturb(offer, smaller, memo)
    if not torch.equal(_perturb(offer, larger, memo)[0], _perturb(offer, larger)[0]):
        _fail(
            offer,
            "what it left in run.memo changes its answer under the next budget",
            "only what no budget and no random draw decides",
        )


def _effort_is_a_number(offer: Offer, _: Registry) -> None:
    """The option that says how long it searches can be doubled."""
    cls: Any = offer.cls
    if cls.effort is None:
        return
    value = cls().config.model_dump().get(cls.effort)
    if not isinstance(value, int) or isinstance(value, bool):
        _fail(offer, f"effort '{cls.effort}' with the value {value!r}", "an option that counts")
    cls.configured({cls.effort: 2 * value})


_ATTACK_RULES: Rules = [
    ("stays within budget and box in every norm it names", _or_says_why(_within_budget)),
    ("changes nothing with a budget of zero", _or_says_why(_null_attack)),
    ("leaves the network as it was", _or_says_why(_network_unchanged)),
    ("gives the same images for the same seed", _or_says_why(_same_seed_same_attack)),
    ("is not led astray by what it keeps between budgets", _or_says_why(_memo_changes_nothing)),
    ("names as its effort an option that counts", _effort_is_a_number),
]


# Data sets ------------------------------------------------------------------------------------


def _loads_or_says_why(offer: Offer, _: Registry) -> None:
    """Without a folder a data set either loads or says in one sentence what it needs."""
    dataset = offer.cls.configured(offer.cls.smoke)
    assert isinstance(dataset, Dataset)
    try:
        splits = dataset.load(Source(None))
    except RddBenchError as error:
        if "\n" in str(error) or not str(error).strip():
            _fail(offer, "an error that is not one sentence", "one sentence on what is needed")
        return
    check_splits(splits, offer.who)
    if content_hash(splits.train) != content_hash(dataset.load(Source(None)).train):
        _fail(offer, "two loads differ", "the same images in the same order")


_DATASET_RULES: Rules = [("loads, or says what it needs", _loads_or_says_why)]
