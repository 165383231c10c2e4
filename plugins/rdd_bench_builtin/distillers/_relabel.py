"""Relabel, the third stage of SRe2L: the teacher's answers to random views of the images.

The views are drawn once and stored with their answers (Shen and Xing 2022, "A Fast Knowledge
Distillation Framework for Visual Recognition", arXiv:2112.01528), so that a student needs no
teacher. Each batch of an epoch has one mixing weight, one box and one permutation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from rdd_bench.api import Config, DistillTask, Recipe, Run, Views, render_views
from rdd_bench_builtin.distillers._crops import random_boxes

if TYPE_CHECKING:
    from torch import Tensor, nn


class RelabelConfig(Config):
    """Views, labels and the author track; the defaults are the authors' for CIFAR."""

    epochs: int = Field(default=400, ge=1)
    """Epochs of the author track, with AdamW and a cosine."""
    batch: int = Field(default=128, ge=1)
    """Images per step of the author track, which are mixed with each other in the views."""
    temperature: float = Field(default=30.0, gt=0)
    """Of the soft labels in the author track."""
    view_epochs: int | None = Field(default=None, ge=1)
    """Epochs of views that are stored, used again and again; none stores all of ``epochs``."""
    view_crop: float | None = Field(default=None, gt=0, le=1)
    """Smallest part that a view shows, enlarged to the whole; none moves the image by ``padding``
    instead, as for CIFAR; the authors take 0.08 for ImageNet."""
    mix: Literal["mixup", "cutmix", "none"] = "mixup"
    """How views are mixed with each other; the authors take CutMix for ImageNet."""
    mix_alpha: float = Field(default=0.8, gt=0)
    """Both parameters of the beta distribution of mixing weights; 1 for the authors' CutMix."""


def author_recipe(options: RelabelConfig) -> Recipe:
    """Return how the authors train on images and views."""
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        schedule="cosine",
        uses=("views",),
        temperature=options.temperature,
    )


def relabel(
    task: DistillTask,
    run: Run,
    options: RelabelConfig,
    teacher: nn.Module,
    images: Tensor,
    *,
    padding: int,
    flip: bool,
) -> Views:
    """Return views of pixels (n, c, h, w) with the answers of a teacher in eval mode."""
    views = draw_views(task, options, len(images), padding=padding, flip=flip)
    pixels = images.to(run.device)
    logits = []
    with torch.no_grad():
        for part in run.batches(len(views)):
            indices = torch.arange(part.start, part.stop)
            pictures = render_views(pixels, views, indices)
            logits.append(teacher(task.normalise(pictures)).half().cpu())
            run.report("relabel", part.stop, len(views))
    return replace(views, logits=torch.cat(logits))


def draw_views(
    task: DistillTask, options: RelabelConfig, count: int, *, padding: int, flip: bool
) -> Views:
    """Return views of ``count`` images, whose answers are still missing."""
    epochs = options.view_epochs or options.epochs
    total, size = epochs * count, (task.spec.shape[1], task.spec.shape[2])
    if options.view_crop is None:
        corner = torch.randint(-padding, padding + 1, (total, 2))
        crop = torch.cat([corner, torch.tensor(size).expand(total, 2)], dim=1)
    else:
        crop = random_boxes(total, size, options.view_crop)
    views = Views(
        image=torch.cat([torch.randperm(count) for _ in range(epochs)]),
        crop=crop.float(),
        flip=torch.rand(total) < (0.5 if flip else 0.0),
        partner=torch.arange(total),
        mix_box=torch.tensor([0, 0, *size]).repeat(total, 1),
        mix_weight=torch.zeros(total),
        logits=torch.empty(0),
    )
    if options.mix != "none":
        for epoch in torch.split(torch.arange(total), count):
            for batch in _batches(epoch, options.batch):
                _mix(views, batch, options, size)
    return views


def _batches(epoch: Tensor, size: int) -> list[Tensor]:
    """Return the batches in which the host trains: a last one of one image joins another."""
    batches = list(torch.split(epoch, size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _mix(views: Views, batch: Tensor, options: RelabelConfig, size: tuple[int, int]) -> None:
    """Draw partners, weight and box of one batch."""
    views.partner[batch] = batch[torch.randperm(len(batch))]
    alpha = torch.tensor(options.mix_alpha)
    own_share = torch.distributions.Beta(alpha, alpha).sample()
    if options.mix == "mixup":
        views.mix_weight[batch] = 1 - own_share
        return
    height, width = size
    # A box with the partner's share of the area around any pixel, cut off at the border.
    sides = torch.tensor(size) * (1 - own_share).sqrt()
    centre = (torch.rand(2) * torch.tensor(size)).floor()
    low = (centre - sides / 2).clamp_min(0).long()
    high = torch.minimum((centre + sides / 2).long(), torch.tensor([height, width]))
    if (high > low).all():
        views.mix_box[batch] = torch.cat([low, high - low])
        views.mix_weight[batch] = 1.0
