"""What the coresets and DM share: which images belong to which class, and the field's recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import AfterValidator, ValidationError

from rdd_bench.api import Config, DistilledSet, DistillTask, RddBenchError, Recipe

if TYPE_CHECKING:
    from torch import Tensor

DSA = "color_crop_cutout_flip_scale_rotate"
"""The strategy of DSA and DM for natural images. Digits must go without 'flip'."""


def _known_operations(strategy: str) -> str:
    # Recipe owns the list of operations; asking it here reports a typing error at once and not
    # after an hour of distillation.
    try:
        Recipe(augment=strategy)
    except ValidationError as error:
        raise ValueError(str(error.errors()[0]["ctx"]["error"])) from None
    return strategy


Augmentation = Annotated[str, AfterValidator(_known_operations)]
"""Names of DSA operations joined by '_'; '' for none."""


class CoresetConfig(Config):
    """What every coreset can be told."""

    augment: Augmentation = DSA
    """Operations of DSA with which the author track trains on the set; '' for none."""


def members_of_classes(task: DistillTask, who: str, at_least: int) -> list[Tensor]:
    """Return the indices of the training images of every class, in their stored order.

    Raises:
        RddBenchError: If a class has fewer than ``at_least`` images.
    """
    labels = task.train.labels.cpu()
    classes = [(labels == label).nonzero().flatten() for label in range(task.spec.num_classes)]
    for name, members in zip(task.spec.class_names, classes, strict=True):
        if len(members) < at_least:
            raise RddBenchError(
                f"{who}: class '{name}' of {task.spec.name} has {len(members)} training images, "
                f"but {at_least} are needed; ask for at most {len(members)} images per class"
            )
    return classes


def choose_at_random(members: Tensor, count: int) -> Tensor:
    """Return ``count`` different members, or all of them if there are no more."""
    return members[torch.randperm(len(members))[:count]]


def labels_of_classes(task: DistillTask) -> Tensor:
    """Return the labels 0, 0, ..., 1, 1, ...: ``task.ipc`` of every class."""
    return torch.arange(task.spec.num_classes).repeat_interleave(task.ipc)


def initial_images(task: DistillTask, classes: Sequence[Tensor], init: str) -> Tensor:
    """Return normalised images to begin with, (k, ipc, c, h, w)."""
    shape = (len(classes), task.ipc, *task.spec.shape)
    if init == "noise":
        return torch.randn(shape)
    chosen = torch.cat([choose_at_random(members, task.ipc) for members in classes])
    return task.normalise(task.train.images[chosen].cpu()).reshape(shape)


def coreset(task: DistillTask, chosen: Sequence[Tensor], augment: str) -> DistilledSet:
    """Return the chosen training images, class by class, with the field's recipe."""
    indices = torch.cat(list(chosen))
    digest = hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()
    return DistilledSet(
        images=task.train.images[indices.to(task.train.images.device)].cpu(),
        labels=labels_of_classes(task),
        recipe=Recipe(augment=augment),
        notes={"chosen_sha256": digest},
    )
