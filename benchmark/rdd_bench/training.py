"""Train networks on a set. The host does it, by a declarative recipe, the same for everybody.

There is no choice by test data: the network of the last epoch is the one that is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from torch import Tensor, nn

from rdd_bench.augment import draw
from rdd_bench.components import Architecture
from rdd_bench.errors import RddBenchError
from rdd_bench.hashing import derive
from rdd_bench.measure import PassCounter
from rdd_bench.networks import Classifier, Normalise, Whiten
from rdd_bench.seeding import seeded
from rdd_bench.threats import ascend, project, random_start
from rdd_bench.types import (
    AdversarialTraining,
    DatasetSpec,
    DistilledSet,
    Recipe,
    Threat,
)
from rdd_bench.views import render

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
    lesson = Lesson(distilled, recipe, device)
    for position, seed in enumerate(seeds):
        model = new_classifier(architecture, spec, seed)
        if lesson.whitening is not None:
            model.preprocess = Whiten(lesson.whitening)
        model.to(device)
        with seeded(derive("train", architecture.name, seed)):
            progress = _for_seed(report, position, len(seeds), recipe.epochs)
            with passes.counting(model.network):
                losses.append(_train(model, lesson, recipe, progress))
        models.append(model.eval().requires_grad_(requires_grad=False))
    return Trained(models, losses, passes)


def new_classifier(architecture: Architecture[Any], spec: DatasetSpec, seed: int) -> Classifier:
    """Return a fresh network behind its normalisation, initialised by the seed."""
    with seeded(derive("initialise", architecture.name, seed)):
        return Classifier(Normalise(spec), architecture.build(spec))


class Lesson:
    """What a recipe takes from a set: the images of each batch, and the loss on them."""

    def __init__(self, distilled: DistilledSet, recipe: Recipe, device: torch.device) -> None:
        """Move the set to the device, whole: it is small.

        Raises:
            RddBenchError: If the recipe uses something that the set does not bring along.
        """
        uses = recipe.uses or ()
        for name in uses:
            if getattr(distilled, name) is None:
                raise RddBenchError(f"the recipe uses {name}, but the distilled set has none")
        self.pixels = distilled.images.to(device)
        self.whitening = distilled.whitening if "whitening" in uses else None
        self._labels = distilled.labels.to(device)
        self._weights: Tensor | None = None
        if "weights" in uses and distilled.weights is not None:
            self._weights = distilled.weights.to(device)
        self._views = distilled.views if "views" in uses else None
        self._temperature = recipe.temperature or 1.0
        self._batch_size = recipe.batch_size
        if self._views is not None:
            logits = self._views.logits.to(device).float()
            self._teacher = (logits / self._temperature).log_softmax(dim=1)

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """Return what ``pictures`` and ``loss`` take, batch by batch.

        With views they are those of the epoch in their stored order, otherwise the images in a
        random one. A last batch of one joins the one before it: batch normalisation cannot be
        computed from a single vector.
        """
        if self._views is None:
            order = torch.randperm(len(self))
        else:
            order = (torch.arange(len(self)) + epoch * len(self)) % len(self._views)
        batches = list(torch.split(order.to(self.pixels.device), self._batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def preprocessed(self, model: Classifier) -> Callable[[Tensor], Tensor]:
        """Return the images of a batch as the network wants them; computed once if they can be."""
        views = self._views
        if views is not None:
            return lambda batch: model.preprocess(render(self.pixels, views, batch.cpu()))
        images = model.preprocess(self.pixels)
        return lambda batch: images[batch]

    def loss(self, logits: Tensor, batch: Tensor) -> Tensor:
        """Return the loss of each image of the batch, (b,).

        Cross-entropy with the labels; for views the divergence of the student's answer from the
        teacher's, both softened by the temperature (Hinton et al. 2015, without the factor T^2).
        """
        if self._views is not None:
            student = (logits / self._temperature).log_softmax(dim=1)
            teacher = self._teacher[batch]
            of_each = (teacher.exp() * (teacher - student)).sum(dim=1)
            batch = self._views.image.to(batch.device)[batch]
        else:
            of_each = F.cross_entropy(logits, self._labels[batch], reduction="none")
        return of_each if self._weights is None else of_each * self._weights[batch]


def _for_seed(report: Report, position: int, seeds: int, epochs: int) -> Callable[[int], None]:
    return lambda epoch: report("training", position * epochs + epoch, seeds * epochs)


def _train(
    model: Classifier, lesson: Lesson, recipe: Recipe, progress: Callable[[int], None]
) -> float:
    model.train()
    optimizer = _optimizer(model, recipe)
    schedule = _schedule(optimizer, recipe)
    size = (lesson.pixels.shape[2], lesson.pixels.shape[3])
    pictures = lesson.preprocessed(model)
    mean_loss = float("nan")
    for epoch in range(recipe.epochs):
        progress(epoch)
        total = torch.zeros((), device=lesson.pixels.device)
        for batch in lesson.batches(epoch):
            inputs = draw(recipe.augment, len(batch), size)(pictures(batch))
            of_each = partial(lesson.loss, batch=batch)
            if recipe.adversarial is not None:
                inputs = _adversarial(model, inputs, of_each, recipe.adversarial)
            loss = of_each(model.network(inputs)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(batch)
        schedule.step()
        # Reading a loss waits for the device, so a diverged run is noticed at the end.
        if epoch == recipe.epochs - 1:
            mean_loss = total.item() / len(lesson)
    progress(recipe.epochs)
    if not torch.isfinite(torch.tensor(mean_loss)):
        raise RddBenchError(
            f"training diverged: the loss of the last epoch is {mean_loss}; "
            f"expected a finite value, so lower the learning rate ({recipe.lr:g})"
        )
    return mean_loss


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
    model: Classifier,
    inputs: Tensor,
    of_each: Callable[[Tensor], Tensor],
    options: AdversarialTraining,
) -> Tensor:
    """Return normalised adversarial examples of normalised, augmented images (Madry et al. 2018).

    The attack acts in pixel space, on images moved into [0, 1] first: an attacker at test time
    sees no others. It sees the network in eval mode, as that attacker will. Of several restarts
    each image keeps the example with the largest loss.
    """
    pixels = model.preprocess.inverse(inputs).clamp(0, 1)
    model.eval()
    worst = _ascended(model, pixels, of_each, options)
    if options.restarts > 1:
        with torch.no_grad():
            largest = of_each(model(worst))
            for _ in range(options.restarts - 1):
                again = _ascended(model, pixels, of_each, options)
                loss = of_each(model(again))
                worst = torch.where((loss > largest).view(-1, 1, 1, 1), again, worst)
                largest = torch.maximum(loss, largest)
    model.train()
    normalised: Tensor = model.preprocess(worst)
    return normalised


@torch.enable_grad()
def _ascended(
    model: Classifier,
    pixels: Tensor,
    of_each: Callable[[Tensor], Tensor],
    options: AdversarialTraining,
) -> Tensor:
    """Return examples after one random start and all steps of PGD."""
    threat = Threat(options.norm, options.eps)
    step = options.relative_step * options.eps / options.steps
    candidates = random_start(pixels, threat)
    for _ in range(options.steps):
        candidates.requires_grad_()
        (gradient,) = torch.autograd.grad(of_each(model(candidates)).sum(), candidates)
        moved = ascend(candidates.detach(), gradient, options.norm, step)
        candidates = project(moved, pixels, threat)
    return candidates
