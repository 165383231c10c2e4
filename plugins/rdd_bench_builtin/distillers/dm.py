"""DM: synthetic images whose features have the mean of the real ones.

Bo Zhao and Hakan Bilen, "Dataset Condensation with Distribution Matching", WACV 2023,
arXiv:2110.04181. Every iteration draws an untrained network psi and, for every class c, a batch
of real images R_c and one Siamese augmentation A_c, and takes one step of SGD on

    L = sum_c || mean_{x in R_c} psi(A_c(x)) - mean_{x in S_c} psi(A_c(x)) ||^2.

Deviations, none of which changes the mathematics:

* Any number of images per class; the authors' program stops at those it has no loop counts for.
* All classes go through the network together and not one by one, in passes of bounded size. A
  network with batch normalisation sees one pass, as with the authors, because its statistics
  depend on what is in it.
* Networks and batches come from generators that the host seeds; theirs from the clock.
* A class with fewer than ``batch_real`` images gives all of them.
* Exactly ``iterations`` steps are taken; their program takes one more. The loss in the notes is
  the sum over classes; they print the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    Config,
    DistilledSet,
    Distiller,
    DistillTask,
    Diverged,
    Info,
    Recipe,
    Run,
    draw_augmentation,
    embedding_of,
    hookimpl,
)
from rdd_bench_builtin.distillers._coreset import (
    DSA,
    Augmentation,
    choose_at_random,
    initial_images,
    labels_of_classes,
    members_of_classes,
)
from rdd_bench_builtin.distillers._passes import images_at_once

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOW = 100
"""Iterations over which the final loss is averaged; after as many a loss is looked at."""


class DMConfig(Config):
    """Options of DM."""

    iterations: int = Field(default=20_000, ge=1)
    """Steps on the synthetic images, each with a new network."""
    lr: float = Field(default=1.0, gt=0)
    """Learning rate of the images; the authors take 10 for CIFAR-10 from 100 images per class."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images."""
    batch_real: int = Field(default=256, ge=1)
    """Real images of every class per step."""
    init: Literal["real", "noise"] = "real"
    """Begin with random real images or with standard normal noise."""
    augment: Augmentation = DSA
    """Operations of DSA, for the matching and for the author track; '' for none."""


class DM(Distiller[DMConfig]):
    """Match the mean features of real and synthetic images in random networks."""

    name = "dm"
    info = Info(
        title="Distribution matching", licence="MIT", paper="https://arxiv.org/abs/2110.04181"
    )
    smoke: ClassVar = {"iterations": 20, "batch_real": 32}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class; their pixels may leave [0, 1].

        Raises:
            Diverged: If the loss is no number, with the images of the last look at it.
            RddBenchError: If a class is too small to begin with.
            NotApplicable: If the architecture offers no features.
        """
        options = self.config
        needed = task.ipc if options.init == "real" else 1
        classes = members_of_classes(task, self.name, at_least=needed)
        train = task.train.images.to(run.device)
        images = initial_images(task, classes, options.init).to(run.device)
        optimizer = torch.optim.SGD([images], lr=options.lr, momentum=options.momentum)
        recent = torch.zeros(min(WINDOW, options.iterations), device=run.device)
        good = images.clone()

        with run.phase("matching"):
            for iteration in run.track(range(options.iterations), "matching"):
                network = task.build_network(run.device).train().requires_grad_(False)
                batches = [choose_at_random(members, options.batch_real) for members in classes]
                pixels = train[torch.cat(batches).to(run.device)]
                real = torch.split(task.normalise(pixels), [len(batch) for batch in batches])
                size = task.spec.shape[1:]
                transforms = [draw_augmentation(options.augment, 1, size) for _ in classes]
                loss, images.grad = match(network, real, images, transforms, run)
                optimizer.step()
                recent[iteration % WINDOW] = loss
                # Reading a loss waits for the device, so it is done once in a while.
                if (iteration + 1) % WINDOW == 0 or iteration + 1 == options.iterations:
                    if problem := _problem(recent, iteration, images):
                        raise Diverged(f"{self.name}: {problem}", self._as_set(task, good))
                    good = images.clone()

        notes = {"final_loss": recent.mean().item(), "averaged_iterations": len(recent)}
        return self._as_set(task, images, notes)

    def _as_set(
        self, task: DistillTask, images: Tensor, notes: Mapping[str, Any] | None = None
    ) -> DistilledSet:
        return DistilledSet(
            images=task.denormalise(images.flatten(0, 1)).cpu(),
            labels=labels_of_classes(task),
            recipe=Recipe(augment=self.config.augment),
            notes=notes or {},
        )


def match(
    network: nn.Module,
    real: Sequence[Tensor],
    synthetic: Tensor,
    transforms: Sequence[Callable[[Tensor], Tensor]],
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one iteration and its gradient.

    Args:
        network: Frozen, in train mode; it offers ``embed``.
        real: Normalised real images of every class, (m, c, h, w); m may differ.
        synthetic: Normalised images, (k, ipc, c, h, w).
        transforms: The augmentation of every class, for both kinds of images.
        run: How many images may go through the network at once.

    Returns:
        The loss, a scalar summed over classes and features, and its gradient with respect to
        the synthetic images, (k, ipc, c, h, w).
    """
    embed = embedding_of(network, DM.name)
    one_pass = _mixes_images(network)
    at_once = images_at_once(synthetic, run)

    with torch.no_grad():
        augmented = torch.cat([t(images) for t, images in zip(transforms, real, strict=True)])
        passes = torch.split(augmented, len(augmented) if one_pass else at_once)
        features = torch.cat([embed(images).flatten(1) for images in passes])
        parts = torch.split(features, [len(images) for images in real])
        targets = torch.stack([part.mean(dim=0) for part in parts])

    # Classes meet only in the sum of their losses, so the graph of a few of them can be used up
    # before the next one is made.
    classes, ipc = synthetic.shape[:2]
    together = classes if one_pass else max(1, at_once // ipc)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, classes, together):
        part = slice(start, start + together)
        images = synthetic[part].detach().requires_grad_()
        augmented = torch.cat([t(of) for t, of in zip(transforms[part], images, strict=True)])
        means = embed(augmented).reshape(len(images), ipc, -1).mean(dim=1)
        loss = (targets[part] - means).square().sum()
        gradients.extend(torch.autograd.grad(loss, images))
        losses.append(loss.detach())
    return torch.stack(losses).sum(), torch.cat(gradients)


def _mixes_images(network: nn.Module) -> bool:
    """Whether what the network makes of an image depends on the others in its pass."""
    batch_norm = torch.nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, batch_norm) for module in network.modules())


def _problem(recent: Tensor, iteration: int, images: Tensor) -> str | None:
    """Return the first loss of the window, which ends at ``iteration``, that is no number.

    Or say that the images are none, which the loss would show only in the next iteration.
    """
    last = iteration % WINDOW
    for position, loss in enumerate(recent[: last + 1].tolist()):
        if not math.isfinite(loss):
            return (
                f"the loss of iteration {iteration - last + position + 1} is {loss}; "
                "expected a finite number; lower the option lr"
            )
    if not torch.isfinite(images).all():
        return f"the images of iteration {iteration + 1} are not all finite; lower the option lr"
    return None


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [DM]
