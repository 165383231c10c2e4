"""Squeeze, the first stage of SRe2L: a teacher with batch normalisation, trained on all images.

What images and labels are made of later is only this network: its weights and the running
statistics of its batch normalisation. It does not depend on the number of images per class, so it
is kept in the folder of the run and shared by all calls that ask for the same one (``_kept``).
Teachers that differ in nothing but their loss begin with the same weights and see the same
batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from rdd_bench.api import (
    Architecture,
    Config,
    DistillTask,
    NotApplicable,
    RddBenchError,
    Run,
    seeded,
)
from rdd_bench_builtin.distillers import _kept
from rdd_bench_builtin.distillers._crops import mirrored, shifted
from rdd_bench_builtin.distillers._curvature import curvature

if TYPE_CHECKING:
    from torch import Tensor, nn

Objective = Callable[["nn.Module", "Tensor", "Tensor", int], "Tensor"]
"""The loss of a teacher: network, augmented pixels, labels, epoch counted from 0."""

Measure = Callable[["nn.Module", "Tensor", "Tensor"], "Tensor"]
"""A mean over images: network in eval mode, pixels, labels."""

FORMAT = "rdd-bench-teacher-1"
NOTHING: Mapping[str, Any] = {}

MEASURED = 1000
"""Training images, evenly spread, on which the figures of a teacher are taken."""

MEASURED_STEP = 0.01
"""Root mean square per pixel of the step along which curvature is measured for the notes, near
the 2.8/255 of the published h on CIFAR-10; the same for all methods and data, to compare them."""


class TeacherConfig(Config):
    """How a teacher is trained; the defaults are GUARD's for CIFAR-10."""

    teacher_epochs: int = Field(default=200, ge=1)
    """Passes over the training images."""
    teacher_lr: float = Field(default=0.1, gt=0)
    """Learning rate at the start, lowered to zero along a cosine; SGD."""
    teacher_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""
    teacher_weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty."""
    teacher_batch: int = Field(default=128, ge=1)
    """Real images per step."""
    teacher_norm: str = "batch"
    """Set as the option 'norm' of the architecture, if it has one: the field's ConvNet normalises
    each image by itself and has no statistics to recover images from."""
    padding: int = Field(default=4, ge=0)
    """Pixels by which images are moved at random, for the teacher and, unless they are resized
    crops, in the views."""
    flip: bool = True
    """Mirror images at random, for the teacher, in the views and with the crops of the recovery;
    digits must go without."""


def natural_loss(task: DistillTask) -> Objective:
    """Return the cross-entropy as the loss of a teacher."""

    def loss(network: nn.Module, pixels: Tensor, labels: Tensor, _epoch: int) -> Tensor:
        return torch.nn.functional.cross_entropy(network(task.normalise(pixels)), labels)

    return loss


def teacher_architecture(task: DistillTask, norm: str) -> Architecture[Any]:
    """Return the task's architecture, with its option 'norm' set if it has one.

    Raises:
        RddBenchError: If the option does not know this norm.
    """
    options = task.architecture.config.model_dump()
    if "norm" not in options:
        return task.architecture
    return type(task.architecture).configured({**options, "norm": norm})


def find_or_train_teacher(
    task: DistillTask,
    run: Run,
    options: TeacherConfig,
    who: str,
    objective: Objective,
    decisive: Mapping[str, Any] = NOTHING,
    *,
    needs_statistics: bool,
) -> nn.Module:
    """Return a teacher in eval mode with frozen parameters, on the device of the run.

    Args:
        task: Whose images, architecture and seed.
        run: Whose folder: ``cache`` where a run offers one, else ``scratch``.
        options: How it is trained.
        who: The method, in messages.
        objective: Its loss.
        decisive: What decides the objective; JSON values. Empty for the cross-entropy.
        needs_statistics: Whether a network without batch normalisation will not do.

    Raises:
        RddBenchError: If it diverges, or a file in the folder is not what it should be.
        NotApplicable: If it has no batch normalisation and needs it.
    """
    architecture = teacher_architecture(task, options.teacher_norm)
    names = set(TeacherConfig.model_fields)
    shared: dict[str, Any] = {
        "format": FORMAT,
        "options": options.model_dump(mode="json", include=names),
    }
    # The same for every objective: methods are compared on the same initial weights.
    seed = _kept.own_seed(_kept.key_of(task, architecture, shared))
    parts = {**shared, "decisive": dict(decisive)}
    own_code = [objective, curvature] if decisive else []
    key = _kept.key_of(task, architecture, parts, [find_or_train_teacher, *own_code])
    path = (run.cache or run.scratch) / "teachers" / f"{key[:32]}.safetensors"
    header = {"format": FORMAT, "key": key}
    with run.phase("squeeze"), seeded(seed):
        network = architecture.build(task.spec).to(run.device)
        if needs_statistics and not batch_norms(network):
            raise NotApplicable(
                f"{who} recovers images from the statistics of batch normalisation, of which "
                f"{architecture.name} keeps none"
            )
        state = _kept.read(path, header, who, "a teacher")
        if state is None:
            train_teacher(network, task, run, options, objective, who)
            state = network.state_dict()
            _kept.write(path, header, state)
    network.load_state_dict(state)
    network.zero_grad(set_to_none=True)
    return network.eval().requires_grad_(False)


def train_teacher(
    network: nn.Module,
    task: DistillTask,
    run: Run,
    options: TeacherConfig,
    objective: Objective,
    who: str,
) -> None:
    """Train the network in place.

    Raises:
        RddBenchError: If the loss of an epoch is no number.
    """
    images, labels = task.train.images.to(run.device), task.train.labels.to(run.device)
    optimizer = torch.optim.SGD(
        network.train().parameters(),
        lr=options.teacher_lr,
        momentum=options.teacher_momentum,
        weight_decay=options.teacher_weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.teacher_epochs)
    for epoch in run.track(range(options.teacher_epochs), "squeeze"):
        total = torch.zeros((), device=run.device)
        for batch in torch.split(torch.randperm(len(labels)).to(run.device), options.teacher_batch):
            if len(batch) == 1:
                continue  # Batch normalisation cannot be computed from a single vector.
            pixels = shifted(images[batch], options.padding)
            if options.flip:
                pixels = mirrored(pixels)
            loss = objective(network, pixels, labels[batch], epoch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach() * len(batch)
        schedule.step()
        mean = total.item() / len(labels)
        if not math.isfinite(mean):
            raise RddBenchError(
                f"{who}: the loss of the teacher in epoch {epoch + 1} is {mean}; expected a finite "
                f"number; lower the option teacher_lr"
            )


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return the layers that keep running statistics of maps."""
    return [
        module
        for module in network.modules()
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None
    ]


def figures(
    teacher: nn.Module,
    task: DistillTask,
    run: Run,
    options: TeacherConfig,
    measures: Mapping[str, Measure] = NOTHING,
) -> dict[str, float]:
    """Return accuracy, cross-entropy and curvature of a teacher on training images.

    The curvature is || grad l(x + h z) - grad l(x) || / h in pixels. ``measures`` are further
    means over images, by name.
    """
    count = len(task.train)
    places = torch.arange(min(MEASURED, count)) * count // min(MEASURED, count)
    h = MEASURED_STEP * math.sqrt(math.prod(task.spec.shape))

    def accuracy(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        right: Tensor = network(task.normalise(pixels)).argmax(dim=1) == labels
        return right.float().mean()

    def loss(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(network(task.normalise(pixels)), labels)

    def bend(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        return curvature(lambda p: network(task.normalise(p)), pixels, labels, "gradient", h) / h

    every = {"accuracy": accuracy, "loss": loss, "curvature": bend, **measures}
    means = dict.fromkeys(every, 0.0)
    # A batch of the training fits the memory, so it fits here.
    for part in torch.split(places, options.teacher_batch):
        pixels, labels = task.train.images[part], task.train.labels[part]
        pixels, labels = pixels.to(run.device), labels.to(run.device)
        for name, measure in every.items():
            means[name] += measure(teacher, pixels, labels).item() * len(part) / len(places)
    return means
