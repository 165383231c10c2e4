"""Train networks on a set. The host does it, by a declarative recipe, the same for everybody.

There is no choice by test data: the network of the last epoch is the one that is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from torch import Tensor, nn

from rdd_bench.augment import draw
from rdd_bench.components import Architecture
from rdd_bench.errors import RddBenchError
from rdd_bench.hashing import derive
from rdd_bench.measure import PassCounter
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.seeding import seeded
from rdd_bench.threats import ascend, project, random_start
from rdd_bench.types import (
    AdversarialTraining,
    DatasetSpec,
    DistilledSet,
    Recipe,
    Threat,
)

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """Networks of several seeds in eval mode, the loss of each one's last epoch, the passes."""

    models: list[Classifier]
    final_loss: list[float]
    passes: PassCounter


def fit(
    distilled: DistilledSet,
    recipe: Recipe,
    architecture: Architecture[Any],
    spec: DatasetSpec,
    seeds: Sequence[int],
    *,
    device: torch.device,
    report: Report,
) -> Trained:
    """Train one network a seed.

    The initial weights and the order of batches depend on the architecture and the seed only, so
    two sets are compared on the same draws.
    """
    models, losses, passes = [], [], PassCounter()
    images = distilled.images.to(device)
    labels = distilled.labels.to(device)
    for position, seed in enumerate(seeds):
        model = new_classifier(architecture, spec, seed).to(device)
        with seeded(derive("train", architecture.name, seed)):
            progress = _for_seed(report, position, len(seeds), recipe.epochs)
            with passes.counting(model.network):
                losses.append(_train(model, images, labels, recipe, progress))
        models.append(model.eval().requires_grad_(requires_grad=False))
    return Trained(models, losses, passes)


def new_classifier(architecture: Architecture[Any], spec: DatasetSpec, seed: int) -> Classifier:
    """Return a fresh network behind its normalisation, initialised by the seed."""
    with seeded(derive("initialise", architecture.name, seed)):
        return Classifier(Normalise(spec), architecture.build(spec))


def _for_seed(report: Report, position: int, seeds: int, epochs: int) -> Callable[[int], None]:
    return lambda epoch: report("training", position * epochs + epoch, seeds * epochs)


def _train(
    model: Classifier,
    pixels: Tensor,
    labels: Tensor,
    recipe: Recipe,
    progress: Callable[[int], None],
) -> float:
    model.train()
    optimizer = _optimizer(model, recipe)
    schedule = _schedule(optimizer, recipe)
    size = (pixels.shape[2], pixels.shape[3])
    # The set is small and stays on the device whole: no loader, normalised once.
    images = model.preprocess(pixels)
    mean_loss = float("nan")
    for epoch in range(recipe.epochs):
        progress(epoch)
        total = torch.zeros((), device=pixels.device)
        for batch in _batches(len(pixels), recipe.batch_size, pixels.device):
            inputs = draw(recipe.augment, len(batch), size)(images[batch])
            if recipe.adversarial is not None:
                inputs = _adversarial(model, inputs, labels[batch], recipe.adversarial)
            loss = F.cross_entropy(model.network(inputs), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(batch)
        schedule.step()
        # Reading a loss waits for the device, so a diverged run is noticed at the end.
        if epoch == recipe.epochs - 1:
            mean_loss = total.item() / len(pixels)
    progress(recipe.epochs)
    if not torch.isfinite(torch.tensor(mean_loss)):
        raise RddBenchError(
            f"training diverged: the loss of the last epoch is {mean_loss}; "
            f"expected a finite value, so lower the learning rate ({recipe.lr:g})"
        )
    return mean_loss


def _batches(count: int, size: int, device: torch.device) -> Sequence[Tensor]:
    """Return a random order cut into batches; a last batch of one joins the one before it.

    Batch normalisation cannot be computed from a single vector.
    """
    order = torch.randperm(count).to(device)
    batches = list(torch.split(order, size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters, lr, decay = list(model.parameters()), recipe.lr, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=recipe.momentum, weight_decay=decay)
    rule = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return rule(parameters, lr, betas=(recipe.momentum, 0.999), weight_decay=decay)


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    drop = [recipe.epochs // 2 + 1] if recipe.schedule == "step" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, drop, gamma=0.1)


def _adversarial(
    model: Classifier, inputs: Tensor, labels: Tensor, options: AdversarialTraining
) -> Tensor:
    """Return normalised adversarial examples of normalised, augmented images (Madry et al. 2018).

    The attack acts in pixel space, on images moved into [0, 1] first: an attacker at test time
    sees no others. It sees the network in eval mode, as that attacker will.
    """
    normalise = model.preprocess
    assert isinstance(normalise, Normalise)
    pixels = normalise.inverse(inputs).clamp(0, 1)
    threat = Threat(options.norm, options.eps)
    step = options.relative_step * options.eps / options.steps
    model.eval()
    candidates = random_start(pixels, threat)
    for _ in range(options.steps):
        candidates.requires_grad_()
        loss = F.cross_entropy(model(candidates), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, candidates)
        moved = ascend(candidates.detach(), gradient, options.norm, step)
        candidates = project(moved, pixels, threat)
    model.train()
    normalised: Tensor = normalise(candidates)
    return normalised
