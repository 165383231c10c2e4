"""Recover, the second stage of SRe2L: images that a teacher knows, with the statistics it expects.

For a batch x with labels y, a random crop and roll T, and batch normalisation layers l = 1, 2, ...

    loss = CE(f(T(x)), y) + r_bn * [ 10 R_1 + sum_{l >= 2} R_l ],
    R_l  = || mu_l(T(x)) - mu'_l || + || v_l(T(x)) - v'_l ||

with mu_l and v_l the mean and the biased variance of every channel of what enters layer l, and
mu', v' the teacher's running statistics. The norms are not squared. The teacher is in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from rdd_bench.api import Config, DistillTask, RddBenchError, Run
from rdd_bench_builtin.distillers._coreset import choose_at_random, members_of_classes
from rdd_bench_builtin.distillers._crops import random_boxes
from rdd_bench_builtin.distillers._passes import images_at_once
from rdd_bench_builtin.distillers._teacher import batch_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST_LAYER = 10.0
"""Weight of the statistics of the first layer, the authors' number."""

CLASSES_TOGETHER = 100
"""Classes in one batch of the published layout."""

BETAS = (0.5, 0.9)
"""Of Adam, the authors' numbers."""


class RecoverConfig(Config):
    """How images are recovered; the defaults are the authors' for CIFAR."""

    init: Literal["noise", "real"] = "noise"
    """Begin with standard normal noise or with random real images."""
    iterations: int = Field(default=1000, ge=0)
    """Steps on the images; 0 leaves them as they begin."""
    lr_img: float = Field(default=0.25, gt=0)
    """Learning rate of the images at the start, lowered to zero along a cosine; Adam."""
    r_bn: float = Field(default=0.01, ge=0)
    """Weight of the statistics. Their sum grows with the number of layers, so it should be chosen
    for each architecture; GUARD's example takes 10 for ImageNette."""
    layout: Literal["one-per-class", "joint"] = "one-per-class"
    """Whose statistics count: those of one image of each class, up to 100 classes, as published,
    or those of all images."""
    jitter: int = Field(default=4, ge=0)
    """Pixels by which images are rolled at random, along each axis; the authors take 32 for
    ImageNet."""
    smallest_crop: float = Field(default=1.0, gt=0, le=1)
    """Smallest part that a random crop shows, enlarged to the whole; 1 for no crops, as for CIFAR;
    the authors take 0.08 for ImageNet."""


def recover(
    task: DistillTask, run: Run, options: RecoverConfig, teacher: nn.Module, who: str, *, flip: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return pixels in [0, 1], class by class (k * ipc, c, h, w) on the CPU, and the last losses.

    Raises:
        RddBenchError: If the loss is no number, or a class is too small to begin with.
    """
    classes = task.spec.num_classes
    images = _initial_images(task, options.init, who).to(run.device)  # (ipc, k, c, h, w)
    labels = torch.arange(classes, device=run.device)
    together = CLASSES_TOGETHER
    if options.layout == "joint":
        images, labels = images.flatten(0, 1)[None], labels.repeat(task.ipc)
        together = len(labels)
    optimizer = torch.optim.Adam([images], lr=options.lr_img, betas=BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.iterations))
    last: list[float] = []
    for step in run.track(range(options.iterations), "recover"):
        images.requires_grad_()
        shown = transformed(images.flatten(0, 1), options, flip=flip).view_as(images)
        losses, slope = _losses_and_slope(teacher, shown.detach(), labels, together, options, run)
        (images.grad,) = torch.autograd.grad(shown, images, slope)
        optimizer.step()
        schedule.step()
        images.requires_grad_(False)
        images.copy_(task.normalise(task.denormalise(images).clamp(0, 1)))
        if step + 1 == options.iterations:
            last = (losses / len(images)).tolist()
    if not all(map(math.isfinite, last)):
        raise RddBenchError(
            f"{who}: the losses of the last recovery step are {last[0]} and {last[1]}; expected "
            f"finite numbers; lower the option lr_img or r_bn"
        )
    pixels = task.denormalise(images).clamp(0, 1).view(task.ipc, classes, *task.spec.shape)
    notes = dict(zip(("recover_ce", "recover_bn"), last, strict=False))
    return pixels.transpose(0, 1).flatten(0, 1).cpu(), notes


def _losses_and_slope(
    teacher: nn.Module,
    groups: Tensor,
    labels: Tensor,
    together: int,
    options: RecoverConfig,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Return both losses, summed over groups, and the gradient with respect to the groups.

    Groups (g, m, c, h, w), cut into ``together`` columns if they are wider, do not meet in the
    loss. So as many as memory allows go through the teacher at once, which changes nothing.
    """
    rows = max(1, images_at_once(groups, run) // min(together, len(labels)))
    losses, slope = groups.new_zeros(2), torch.empty_like(groups)
    for columns in torch.split(torch.arange(len(labels), device=groups.device), together):
        for first in range(0, len(groups), rows):
            part = groups[first : first + rows, columns].requires_grad_()
            error, statistics = losses_of(teacher, part, labels[columns])
            loss = error + options.r_bn * statistics if options.r_bn else error
            (slope[first : first + rows, columns],) = torch.autograd.grad(loss, part)
            losses += torch.stack([error, statistics]).detach()
    return losses, slope


def _initial_images(task: DistillTask, init: str, who: str) -> Tensor:
    """Return normalised images, (ipc, k, c, h, w)."""
    classes = task.spec.num_classes
    if init == "noise":
        return torch.randn(task.ipc, classes, *task.spec.shape)
    members = members_of_classes(task, who, at_least=task.ipc)
    chosen = torch.stack([choose_at_random(of_class, task.ipc) for of_class in members], dim=1)
    pixels = task.train.images[chosen.flatten()].cpu()
    return task.normalise(pixels).view(task.ipc, classes, *task.spec.shape)


def transformed(images: Tensor, options: RecoverConfig, *, flip: bool) -> Tensor:
    """Return the images cropped, mirrored and rolled, all of them alike."""
    height, width = images.shape[2:]
    if options.smallest_crop < 1:
        (box,) = random_boxes(1, (height, width), options.smallest_crop).tolist()
        top, left, tall, wide = box
        images = torch.nn.functional.interpolate(
            images[:, :, top : top + tall, left : left + wide], (height, width), mode="bilinear"
        )
        if flip and torch.rand(()) < 0.5:
            images = images.flip(3)
    if options.jitter:
        # One-sided, as with the authors; over many steps the images settle around half of it.
        down, right = torch.randint(options.jitter + 1, (2,)).tolist()
        images = images.roll((down, right), dims=(2, 3))
    return images


def losses_of(teacher: nn.Module, groups: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and distance of statistics, each summed over groups.

    Args:
        teacher: In eval mode.
        groups: Normalised images, (g, m, c, h, w); each group has statistics of its own.
        labels: Of the images of every group, (m,).
    """
    count, size = groups.shape[:2]
    with entering_batch_norms(teacher, count) as distances:
        logits = teacher(groups.flatten(0, 1))
    errors = torch.nn.functional.cross_entropy(logits, labels.repeat(count), reduction="sum")
    weights = [FIRST_LAYER, *[1.0] * len(distances)]
    total = [weight * each for weight, each in zip(weights, distances, strict=False)]
    return errors / size, torch.stack(total).sum() if total else groups.new_zeros(())


@contextmanager
def entering_batch_norms(network: nn.Module, groups: int) -> Iterator[Sequence[Tensor]]:
    """Yield a list that fills with R_l, summed over groups, as images pass through the network."""
    distances: list[Tensor] = []

    def look(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        maps = inputs[0]
        entering = maps.reshape(groups, -1, maps.shape[1], maps[0, 0].numel())  # (g, m, c, h * w)
        variance, mean = torch.var_mean(entering, dim=(1, 3), correction=0)
        distances.append(
            (mean - layer.running_mean).norm(dim=1).sum()
            + (variance - layer.running_var).norm(dim=1).sum()
        )

    handles = [layer.register_forward_pre_hook(look) for layer in batch_norms(network)]
    try:
        yield distances
    finally:
        for handle in handles:
            handle.remove()
