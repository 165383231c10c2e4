"""Attack networks and judge the outcome image by image.

The attack is trusted with nothing: what it returns is checked against the budget and the box,
projected onto both, and scored again by the host's own forward pass in eval mode. An image
counts as robust if it is right clean **and** under attack; the denominator is all test images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rdd_bench import audit
from rdd_bench.checks import check_candidates
from rdd_bench.components import Attack, Run
from rdd_bench.hashing import derive
from rdd_bench.measure import PassCounter
from rdd_bench.networks import predict
from rdd_bench.pictures import PER_CLASS, Examples
from rdd_bench.records import Flag
from rdd_bench.seeding import seeded
from rdd_bench.threats import project
from rdd_bench.types import LabelledImages, Threat

NULL_IMAGES = 32
"""Images of the null-attack control."""
PERTURB = "attack"
"""The phase of a run that is the attack itself, without the controls around it."""


@dataclass
class Judgement:
    """Which images stay right, for each network, and what the audit saw."""

    robust: list[Tensor] = field(default_factory=list)
    """One boolean tensor (n,) a network."""
    flags: list[Flag] = field(default_factory=list)
    passes: PassCounter = field(default_factory=PassCounter)
    messages: list[str] = field(default_factory=list)
    median_distance: list[float | None] = field(default_factory=list)
    """Of each network, if the attack measures distances; see ``AttackRecord``."""
    examples: Examples | None = None
    """One image of every class that the first network gets right, and what became of it."""


def clean_outcomes(model: nn.Module, test: LabelledImages, batch_size: int) -> Tensor:
    """Return which test images a network gets right, (n,) booleans."""
    return predict(model, test.images, batch_size) == test.labels


def attack_models(
    models: Sequence[nn.Module],
    test: LabelledImages,
    attack: Attack[Any],
    threat: Threat,
    seeds: Sequence[int],
    run: Run,
    who: str,
    memos: Sequence[dict[str, Any]] | None = None,
) -> Judgement:
    """Attack each network on the test images that it gets right.

    Args:
        models: Pixels to logits, in eval mode with frozen parameters.
        test: The test split, on the device of the models.
        attack: The plugin.
        threat: Norm and budget.
        seeds: The training seed of each model; the draws of the attack depend on it.
        run: Where to run.
        who: The plugin's name in messages.
        memos: Of each model, what the attack left behind under the budgets before this one.
    """
    judgement = Judgement()
    memos = memos or [{} for _ in models]
    for model, seed, memo in zip(models, seeds, memos, strict=True):
        run = dataclasses.replace(run, memo=memo)
        before = audit.state_hash(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        clean = clean_outcomes(model, test, run.batch_size)
        images, labels = test.images[clean], test.labels[clean]
        robust = clean.clone()
        if len(images):
            _note(judgement, audit.check_input_range(images))
            _note(judgement, audit.check_deterministic(model, images[: run.batch_size]))
            _note(judgement, _null_control(model, images, labels, attack, threat, run, who))
            _note(judgement, audit.check_state(model, before))
            _restore(model, state)
            counting = judgement.passes.counting(model)
            with counting, seeded(_seed(attack, threat, seed)), run.phase(PERTURB):
                candidates = attack.perturb(model, images.clone(), labels.clone(), threat, run)
            _note(judgement, audit.check_state(model, before))
            _restore(model, state)
            candidates = check_candidates(candidates, images, who)
            _note(judgement, audit.check_budget(candidates, images, threat))
            candidates = project(candidates, images, threat)
            if attack.distances is not None:
                judgement.median_distance.append(_median(attack.distances))
            said = predict(model, candidates, run.batch_size)
            robust[clean] = said == labels
            judgement.examples = judgement.examples or _examples(images, candidates, labels, said)
        judgement.robust.append(robust)
        for message in attack.messages:
            if message not in judgement.messages:
                judgement.messages.append(message)
    return judgement


def _median(distances: Tensor) -> float | None:
    median = distances.median().item()
    return median if math.isfinite(median) else None


def _examples(images: Tensor, candidates: Tensor, labels: Tensor, said: Tensor) -> Examples:
    """Return the first image of every class."""
    first = [int((labels == label).nonzero()[0]) for label in torch.unique(labels).tolist()]
    few = first[:PER_CLASS]
    return Examples(images[few], candidates[few], labels[few], said[few])


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo whatever an attack did to a network, so that the verdict is about the one trained."""
    model.load_state_dict(state)
    model.eval().requires_grad_(requires_grad=False)


def _null_control(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack[Any],
    threat: Threat,
    run: Run,
    who: str,
) -> list[Flag]:
    """Run the attack with a budget of zero on a few images.

    It runs with the plugin's smoke options: the control is about the pixels it hands over, not
    about its strength, and AutoAttack is slowest where nothing breaks.
    """
    control = type(attack).configured({**attack.config.model_dump(), **attack.smoke})
    assert isinstance(control, Attack)
    quiet = dataclasses.replace(run, report=lambda *_: None, memo={})
    few, their = images[:NULL_IMAGES], labels[:NULL_IMAGES]
    nothing = Threat(threat.norm, 0.0)
    with seeded(_seed(attack, nothing, 0)):
        candidates = control.perturb(model, few.clone(), their.clone(), nothing, quiet)
    model.eval()
    candidates = check_candidates(candidates, few, who)
    flags = audit.check_null_attack(model, few, their, candidates, run.batch_size)
    return flags + audit.check_budget(candidates, few, nothing)


def _seed(attack: Attack[Any], threat: Threat, seed: int) -> int:
    return derive("attack", attack.name, threat.norm, threat.eps, seed)


def _note(judgement: Judgement, flags: Sequence[Flag]) -> None:
    """Keep the first flag of each name: the seeds of a cell mostly raise the same ones."""
    known = {flag.name for flag in judgement.flags}
    judgement.flags.extend(flag for flag in flags if flag.name not in known)
