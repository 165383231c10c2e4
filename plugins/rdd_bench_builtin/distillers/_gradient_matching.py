"""Gradient matching, the algorithm that DC and DSA share.

Zhao, Mopuri and Bilen 2021, arXiv:2006.05929, algorithm 1. With D the distance of gradients, R_c
and S_c real and synthetic images of class c, and A_c a Siamese augmentation (DSA) or none (DC):

    repeat K times with a new network theta_0:
        for t = 0 .. T-1:
            S <- S - lr grad_S sum_c D(grad L(A_c(S_c), theta_t), grad L(A_c(R_c), theta_t))
            theta_{t+1} <- train theta_t on S for some epochs, except after the last t

The published algorithm takes a step class by class. The authors' program, whose numbers everybody
quotes, adds the classes up and takes one step, and so does this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    Config,
    DistilledSet,
    DistillTask,
    Diverged,
    Recipe,
    Run,
    draw_augmentation,
)
from rdd_bench_builtin.distillers._class_gradients import ClassLoss, cross_entropy, real_gradients
from rdd_bench_builtin.distillers._coreset import (
    choose_at_random,
    initial_images,
    labels_of_classes,
    members_of_classes,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""The authors' T and epochs between two steps, by images per class."""

SETTLING_IMAGES = 16
"""Real images of every class from which batch normalisation takes its running statistics."""

WINDOW = 100
"""Networks over which the final loss is averaged."""

Distance = Literal["ours", "mse", "cosine"]


class GradientMatchingConfig(Config):
    """What DC and DSA can both be told."""

    iterations: int = Field(default=1000, ge=1)
    """Networks, each drawn anew."""
    outer: int | None = Field(default=None, ge=1)
    """Steps on the images per network; none takes the authors' number for the images per class,
    on a straight line between the numbers they give (1, 10, 20, ..., 50), and constant beyond."""
    inner: int | None = Field(default=None, ge=1)
    """Epochs of the network on the synthetic images between two steps; none as for 'outer'."""
    lr_img: float = Field(default=0.1, gt=0)
    """Learning rate of the images; the authors take 0.01 if the network is an MLP."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images."""
    lr_net: float = Field(default=0.01, gt=0)
    """Learning rate of the networks; SGD without momentum."""
    batch_real: int = Field(default=256, ge=1)
    """Real images of every class per step."""
    batch_train: int = Field(default=256, ge=1)
    """Synthetic images per step of a network."""
    distance: Distance = "ours"
    """Of gradients: the authors' sum of cosine distances of the rows of every weight, the squared
    error, or the cosine distance of everything as one vector."""


def loops(ipc: int) -> tuple[int, int]:
    """Return T and the epochs between two steps, for any number of images per class."""
    import numpy as np

    known = list(LOOPS)
    columns = zip(*LOOPS.values(), strict=True)
    outer, inner = (round(float(np.interp(ipc, known, column))) for column in columns)
    return outer, inner


def condense(
    task: DistillTask,
    run: Run,
    options: GradientMatchingConfig,
    who: str,
    *,
    init: Literal["real", "noise"],
    augment: str,
    recipe: Recipe,
    real_loss: ClassLoss | None = None,
) -> DistilledSet:
    """Run the algorithm above.

    ``real_loss`` takes the place of the cross-entropy of real images, and only of these.

    Raises:
        Diverged: If the loss is no number, with the images of the network before.
        RddBenchError: If a class is too small to begin with.
    """
    classes = members_of_classes(task, who, at_least=task.ipc if init == "real" else 1)
    train = task.train.images.to(run.device)
    size = (task.spec.shape[1], task.spec.shape[2])
    images = initial_images(task, classes, init).to(run.device)
    optimizer = torch.optim.SGD([images], lr=options.lr_img, momentum=options.momentum)
    table = loops(task.ipc)
    outer, inner = options.outer or table[0], options.inner or table[1]
    pull = match if real_loss is None else partial(match, real_loss=real_loss)

    def real_images(count: int) -> list[Tensor]:
        batches = [choose_at_random(members, count) for members in classes]
        pixels = train[torch.cat(batches).to(run.device)]
        return list(torch.split(task.normalise(pixels), [len(batch) for batch in batches]))

    def as_set(images: Tensor, notes: Mapping[str, Any]) -> DistilledSet:
        pixels = task.denormalise(images.flatten(0, 1)).cpu()
        return DistilledSet(pixels, labels_of_classes(task), recipe, notes)

    means: list[float] = []
    for iteration in run.track(range(options.iterations), "matching"):
        network = task.build_network(run.device)
        good = images.clone()
        losses: list[Tensor] = []
        for step in range(outer):
            with run.phase("matching"):
                network.train()
                if _batch_norms(network):
                    settle_batch_norms(network, torch.cat(real_images(SETTLING_IMAGES)))
                real = real_images(options.batch_real)
                transforms = [draw_augmentation(augment, 1, size) for _ in classes]
                loss, images.grad = pull(network, real, images, transforms, options.distance, run)
                optimizer.step()
                losses.append(loss)
            # After the last step nobody would look at the network any more.
            if step < outer - 1:
                with run.phase("training"):
                    _train(network, images, options, inner, augment)
        # Reading a loss waits for the device, so it is done once a network.
        values = torch.stack(losses).tolist()
        if problem := _problem(values, iteration, images):
            raise Diverged(f"{who}: {problem}", as_set(good, {}))
        means.append(sum(values) / outer)

    recent = means[-WINDOW:]
    notes = {"final_loss": sum(recent) / len(recent), "averaged_iterations": len(recent)}
    return as_set(images, {**notes, "outer": outer, "inner": inner})


def match(
    network: nn.Module,
    real: Sequence[Tensor],
    synthetic: Tensor,
    transforms: Sequence[Callable[[Tensor], Tensor]],
    distance: Distance,
    run: Run,
    real_loss: ClassLoss = cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one step and its gradient.

    Classes meet only in the sum of their losses, so each one's graph is used up before the next
    is made, and the memory needed does not grow with their number.

    Args:
        network: Must treat every image alone: batch normalisation in eval mode.
        real: Normalised real images of every class, (m, c, h, w); m may differ.
        synthetic: Normalised images, (k, ipc, c, h, w).
        transforms: The augmentation of every class, for both kinds of images.
        distance: How gradients are compared.
        run: How many images may go through the network at once.
        real_loss: Of the real images.

    Returns:
        The loss, a scalar summed over classes, and its gradient with respect to the synthetic
        images, (k, ipc, c, h, w).
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if distance == "ours":
        # Biases and scales do not count there, so their gradients need not be computed.
        parameters = [p for p in parameters if p.ndim > 1]
    measure = DISTANCES[distance]
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for label, transform in enumerate(transforms):
        wanted = real_gradients(network, transform(real[label]), label, parameters, run, real_loss)
        images = synthetic[label].detach().requires_grad_()
        error = cross_entropy(network, transform(images), label) / len(images)
        own = torch.autograd.grad(
            error, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        loss = measure(own, wanted)
        # Asking for this gradient only spares the one with respect to the network's parameters.
        gradients.extend(torch.autograd.grad(loss, images))
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.stack(gradients)


def row_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the sum over weights and their output rows of 1 - cos; 1-D tensors do not count."""
    layers = []
    for one, other in zip(first, second, strict=True):
        if one.ndim > 1:
            a, b = one.flatten(1), other.flatten(1)
            lengths = a.norm(dim=1) * b.norm(dim=1)
            layers.append((1 - (a * b).sum(dim=1) / (lengths + 1e-6)).sum())
    return torch.stack(layers).sum()


def squared_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the squared length of the difference, all tensors as one vector."""
    return (_flat(first) - _flat(second)).square().sum()


def cosine_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos, all tensors as one vector."""
    a, b = _flat(first), _flat(second)
    cosine: Tensor = (a * b).sum() / (a.norm() * b.norm() + 1e-6)
    return 1 - cosine


DISTANCES: dict[Distance, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "ours": row_distance,
    "mse": squared_distance,
    "cosine": cosine_distance,
}


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _batch_norms(network: nn.Module) -> list[nn.Module]:
    kind = torch.nn.modules.batchnorm._BatchNorm
    return [module for module in network.modules() if isinstance(module, kind)]


def settle_batch_norms(network: nn.Module, images: Tensor) -> None:
    """Update running statistics from real images, then hold them: batch norms go to eval mode.

    As in the authors' program this is one pass, which moves the statistics by the momentum of
    the layers. Statistics of one class alone, as matching would take them, mean nothing.
    """
    network.train()
    with torch.no_grad():
        network(images)
    for module in _batch_norms(network):
        module.eval()


def _train(
    network: nn.Module,
    synthetic: Tensor,
    options: GradientMatchingConfig,
    epochs: int,
    augment: str,
) -> None:
    """Train on the synthetic images (k, ipc, c, h, w); augmentation is drawn for every image."""
    network.train()
    classes, ipc, _, height, width = synthetic.shape
    images = synthetic.detach().flatten(0, 1)
    labels = torch.arange(classes, device=images.device).repeat_interleave(ipc)
    optimizer = torch.optim.SGD(network.parameters(), lr=options.lr_net)
    for _ in range(epochs):
        order = torch.randperm(len(images)).to(images.device)
        for batch in torch.split(order, options.batch_train):
            if len(batch) == 1:
                continue  # Batch normalisation cannot be computed from a single vector.
            inputs = draw_augmentation(augment, len(batch), (height, width))(images[batch])
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(inputs), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()


def _problem(losses: Sequence[float], iteration: int, images: Tensor) -> str | None:
    """Return the first loss of this iteration that is no number, or that the images are none."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            return (
                f"the matching loss of iteration {iteration + 1}, step {step + 1} is {loss}; "
                "expected a finite number; lower the option lr_img or lr_net"
            )
    if not torch.isfinite(images).all():
        return f"the images of iteration {iteration + 1} are not all finite; lower lr_img or lr_net"
    return None
