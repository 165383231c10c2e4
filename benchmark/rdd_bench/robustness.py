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
from rdd_bench.measure import PassCounter
from rdd_bench.networks import predict
from rdd_bench.pictures import PER_CLASS, Examples
from rdd_bench.probes import Probe, draws_of, spread
from rdd_bench.records import Flag
from rdd_bench.seeding import seeded
from rdd_bench.threats import project
from rdd_bench.types import LabelledImages, Threat

PERTURB = "attack"
"""The phase of a run that is the attack itself."""
AUDIT = "audit"
"""The phase of the probes around it."""
SURROGATES = "surrogates"
"""The phase in which an attack has networks of its own trained."""
GRADIENT_IMAGES = 256
"""Right test images whose gradients are looked at."""


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


def audit_networks(
    models: Sequence[nn.Module],
    test: LabelledImages,
    clean: Sequence[Tensor],
    learnt: Tensor | None,
    batch_size: int,
) -> list[Flag]:
    """Check trained networks before anything attacks them; return the first flag of each name.

    Args:
        models: Pixels to logits, in eval mode with frozen parameters.
        test: The test split, on the device of the models.
        clean: Which test images each network gets right.
        learnt: The images that they were trained on, as stored; None if these are not known.
        batch_size: Images at once.
    """
    flags: list[Flag] = []
    for model, outcome in zip(models, clean, strict=True):
        few = spread(test.subset(outcome), GRADIENT_IMAGES)
        flags += audit.check_gradients(model, few.images, few.labels, batch_size)
        if learnt is not None:
            flags += audit.check_eight_bit(model, learnt.to(test.images.device), batch_size)
    return audit.first_of_each(flags)


def attack_models(
    models: Sequence[nn.Module],
    test: LabelledImages,
    attack: Attack[Any],
    threat: Threat,
    seeds: Sequence[int],
    run: Run,
    who: str,
    memos: Sequence[dict[str, Any]] | None = None,
    *,
    probe_strength: bool = False,
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
        probe_strength: Whether to try on the first network if a longer search breaks more and if
            a large budget breaks everything.
    """
    judgement = Judgement()
    memos = memos or [{} for _ in models]
    for model, seed, memo in zip(models, seeds, memos, strict=True):
        run = dataclasses.replace(run, memo=memo)
        before = audit.state_hash(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        clean = clean_outcomes(model, test, run.batch_size)
        right = test.subset(clean)
        robust = clean.clone()
        median = None
        if len(right):
            flags = audit.check_input_range(right.images)
            flags += audit.check_deterministic(model, right.images[: run.batch_size])
            probe = Probe(model, attack, threat, seed, run, who)
            with run.phase(AUDIT):
                flags += probe.null_attack(right)
            flags += audit.check_state(model, before)
            _restore(model, state)
            counting = judgement.passes.counting(model)
            with counting, seeded(draws_of(attack, threat, seed)), run.phase(PERTURB):
                candidates = attack.perturb(
                    model, right.images.clone(), right.labels.clone(), threat, run
                )
            flags += audit.check_state(model, before)
            _restore(model, state)
            candidates = check_candidates(candidates, right.images, who)
            flags += audit.check_budget(candidates, right.images, threat)
            candidates = project(candidates, right.images, threat)
            if attack.distances is not None:
                median = _median(attack.distances)
            said = predict(model, candidates, run.batch_size)
            robust[clean] = said == right.labels
            judgement.examples = judgement.examples or _examples(right, candidates, said)
            if probe_strength and model is models[0]:
                with run.phase(AUDIT):
                    flags += probe.more_steps(test.subset(robust), len(test))
                    flags += probe.large_budget(right)
                _restore(model, state)
            judgement.flags = audit.first_of_each([*judgement.flags, *flags])
        judgement.robust.append(robust)
        judgement.median_distance.append(median)
        for message in attack.messages:
            if message not in judgement.messages:
                judgement.messages.append(message)
    if attack.distances is None:
        judgement.median_distance = []
    return judgement


def _median(distances: Tensor) -> float | None:
    median = distances.quantile(0.5).item()
    return median if math.isfinite(median) else None


def _examples(right: LabelledImages, candidates: Tensor, said: Tensor) -> Examples:
    """Return the first image of every class."""
    images, labels = right.images, right.labels
    first = [int((labels == label).nonzero()[0]) for label in torch.unique(labels).tolist()]
    few = first[:PER_CLASS]
    return Examples(images[few], candidates[few], labels[few], said[few])


def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo whatever an attack did to a network, so that the verdict is about the one trained."""
    model.load_state_dict(state)
    model.eval().requires_grad_(requires_grad=False)
