"""Matching of trajectories: the second stage of MTT, which MAT takes over unchanged.

Cazenavette et al. 2022, arXiv:2203.11932, sections 3.2 and 3.3. A student begins with an expert's
weights theta*_t, takes N steps of SGD with rate lambda on the synthetic images,

    theta_{i+1} = theta_i - lambda g_i,   g_i = grad CE(f(theta_i; A_i(X_i)), y_i),

and images and lambda are moved so that it ends where the expert is M epochs later:

    L = || theta_N - theta*_{t+M} ||^2 / D,   D = || theta*_t - theta*_{t+M} ||^2.

The gradient goes through all N steps. ``unroll`` keeps the graph of all of them, as the authors
do. ``adjoint`` keeps only the N weight vectors and one step's graph at a time, and goes backwards:

    v_N = 2 (theta_N - theta*_{t+M}) / D
    s_i = v_{i+1} . g_i                          the only thing that is differentiated
    dL/dX_i -= lambda ds_i/dX_i,   dL/dlambda -= s_i,   v_i = v_{i+1} - lambda ds_i/dtheta_i.

Both give the same gradient. (TESLA, Cui et al. 2023, also needs the memory of one step only, but
leaves out v's last term, the dependence of theta_i on the images of the steps before.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from rdd_bench.api import (
    DistilledSet,
    DistillTask,
    Diverged,
    NotApplicable,
    Recipe,
    Run,
    draw_augmentation,
)
from rdd_bench_builtin.distillers._coreset import (
    initial_images,
    labels_of_classes,
    members_of_classes,
)
from rdd_bench_builtin.distillers._trajectories import ExpertConfig, ExpertStore

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOW = 100
"""Iterations over which the final loss is averaged."""


class MatchingConfig(ExpertConfig):
    """Options of both stages. Defaults: those of the authors for CIFAR-10, 10 images per class."""

    iterations: int = Field(default=5000, ge=1)
    """Steps on the synthetic images, each along one piece of one expert."""
    syn_steps: int = Field(default=30, ge=1)
    """N, steps of the student on the synthetic images."""
    expert_epochs: int = Field(default=2, ge=1)
    """M, epochs of the expert that the student is to make up for."""
    max_start_epoch: int = Field(default=20, ge=1)
    """The student begins after 0 to max_start_epoch - 1 epochs of the expert."""
    batch_syn: int | None = Field(default=None, ge=1)
    """Synthetic images per step of the student; all of them if not given."""
    lr_img: float = Field(default=100.0, gt=0)
    """Learning rate of the images."""
    lr_lr: float = Field(default=1e-5, ge=0)
    """Learning rate of the student's step size; 0 keeps it."""
    init_lr: float = Field(default=0.001, gt=0)
    """Step size of the student at the start."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Momentum of the images and of the step size."""
    init: Literal["real", "noise"] = "real"
    """Begin with random real images or with standard normal noise."""
    gradient: Literal["adjoint", "unroll"] = "adjoint"
    """Two ways to one gradient: memory of one step of the student, or of all of them."""

    @model_validator(mode="after")
    def _enough_epochs(self) -> MatchingConfig:
        needed = self.max_start_epoch + self.expert_epochs - 1
        if self.expert_epochs_total < needed:
            raise ValueError(
                f"expert_epochs_total={self.expert_epochs_total} is too short; the last start, "
                f"epoch {self.max_start_epoch - 1}, and expert_epochs={self.expert_epochs} need "
                f"{needed}"
            )
        return self


SMOKE = {
    "num_experts": 2,
    "expert_epochs_total": 2,
    "expert_batch": 32,
    "iterations": 3,
    "syn_steps": 3,
    "expert_epochs": 1,
    "max_start_epoch": 2,
    "lr_img": 1.0,
    "lr_lr": 1e-7,
    "init_lr": 0.01,
}
"""Options for a run of seconds."""


def distil_by_matching(
    task: DistillTask, run: Run, options: MatchingConfig, experts: ExpertStore, who: str
) -> DistilledSet:
    """Return the images that lead a student along the experts, with the learned step size.

    Raises:
        Diverged: With the images of the iteration before.
        RddBenchError: If a class is too small to begin with.
        NotApplicable: If the network draws random numbers of its own.
    """
    classes = members_of_classes(task, who, at_least=task.ipc if options.init == "real" else 1)
    images = initial_images(task, classes, options.init).flatten(0, 1).to(run.device)
    labels = labels_of_classes(task).to(run.device)
    step_size = torch.tensor(options.init_lr, device=run.device)
    optimizer = torch.optim.SGD(
        [{"params": [images], "lr": options.lr_img}, {"params": [step_size], "lr": options.lr_lr}],
        momentum=options.momentum,
    )
    student = Student(task.build_network(run.device))
    _check_repeatable(student.network, images[:64], who)
    match = match_by_adjoint if options.gradient == "adjoint" else match_by_unrolling
    order = _in_turn(options.num_experts)
    size = (task.spec.shape[1], task.spec.shape[2])
    losses: list[float] = []

    with run.phase("matching"):
        for iteration in run.track(range(options.iterations), "matching"):
            expert, epoch = next(order), int(torch.randint(options.max_start_epoch, ()))
            start = experts.snapshot(expert, epoch).to(run.device)
            target = experts.snapshot(expert, epoch + options.expert_epochs).to(run.device)
            steps = draw_steps(
                options.syn_steps, len(images), options.batch_syn, options.augment, size
            )
            loss, images.grad, step_size.grad = match(
                student, start, target, images, labels, step_size, steps
            )
            before = images.clone(), step_size.item()
            optimizer.step()
            problem = _problem(iteration, loss.item(), before[1], step_size.item(), images)
            if problem:
                last_good = _as_set(task, options, before[0], labels, before[1], losses)
                raise Diverged(f"{who}: {problem}", last_good)
            losses.append(loss.item())

    return _as_set(task, options, images, labels, step_size.item(), losses)


def _as_set(
    task: DistillTask,
    options: MatchingConfig,
    images: Tensor,
    labels: Tensor,
    step_size: float,
    losses: Sequence[float],
) -> DistilledSet:
    recent = losses[-WINDOW:]
    return DistilledSet(
        images=task.denormalise(images).cpu(),
        labels=labels.cpu(),
        recipe=Recipe(
            lr=step_size,
            augment=options.augment,
            uses=("whitening",) if task.whitening else None,
        ),
        whitening=task.whitening,
        notes={
            "final_loss": sum(recent) / len(recent) if recent else None,
            "averaged_iterations": len(recent),
            "step_size": step_size,
        },
    )


class Student:
    """A network as a function of one flat vector of its parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.train()
        parameters = dict(network.named_parameters())
        self.names = list(parameters)
        self.shapes = [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy with the parameters ``theta``, (p,)."""
        # One split has one backward, a concatenation; as many slices would add whole vectors.
        parts = zip(self.names, torch.split(theta, self.sizes), self.shapes, strict=True)
        parameters = {name: part.view(shape) for name, part, shape in parts}
        logits = torch.func.functional_call(self.network, parameters, (images,))
        return torch.nn.functional.cross_entropy(logits, labels)


class Step(NamedTuple):
    """One step of the student: which synthetic images, and how they are augmented."""

    batch: Tensor
    """Indices, each at most once."""
    transform: Callable[[Tensor], Tensor]


def draw_steps(
    count: int, images: int, batch: int | None, augment: str, size: tuple[int, int]
) -> list[Step]:
    """Draw the steps of a student, with one set of augmentation parameters an image.

    Batches cut a random order of the images, which is drawn anew when it is used up. As with the
    authors they are taken from its end, so that a smaller last one comes first.
    """
    steps: list[Step] = []
    order: list[Tensor] = []
    for _ in range(count):
        if not order:
            order = list(torch.split(torch.randperm(images), batch or images))
        indices = order.pop()
        steps.append(Step(indices, draw_augmentation(augment, len(indices), size)))
    return steps


def match_by_unrolling(
    student: Student,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    steps: Sequence[Step],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L and its gradients with respect to images and step size, through one long graph.

    Args:
        student: The network.
        start: The expert's weights where the student begins, (p,).
        target: Where it is to end, (p,).
        images: Normalised synthetic images, (n, c, h, w).
        labels: Their classes, (n,).
        step_size: Lambda, a scalar.
        steps: The steps in their order.
    """
    images, step_size = images.detach().requires_grad_(), step_size.detach().requires_grad_()
    theta = start.detach().requires_grad_()
    for batch, transform in steps:
        loss = student.loss(theta, transform(images[batch]), labels[batch])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - step_size * gradient
    distance = (theta - target).square().sum() / (start - target).square().sum()
    of_images, of_step_size = torch.autograd.grad(distance, (images, step_size))
    return distance.detach(), of_images, of_step_size


def match_by_adjoint(
    student: Student,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    steps: Sequence[Step],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as ``match_by_unrolling``, with the graph of one step at a time.

    Each step is computed twice, and the weights of all steps are kept.
    """
    images, step_size = images.detach(), step_size.detach()
    visited: list[Tensor] = []
    theta = start.detach()
    for batch, transform in steps:
        visited.append(theta.requires_grad_())
        loss = student.loss(theta, transform(images[batch]), labels[batch])
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() - step_size * gradient

    scale = (start - target).square().sum()
    distance = (theta - target).square().sum() / scale
    v = 2 * (theta - target) / scale
    of_images, of_step_size = torch.zeros_like(images), torch.zeros_like(step_size)
    for batch, transform in reversed(steps):
        theta, inputs = visited.pop(), images[batch].requires_grad_()
        loss = student.loss(theta, transform(inputs), labels[batch])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        s = v @ gradient
        of_inputs, of_theta = torch.autograd.grad(s, (inputs, theta))
        of_step_size -= s.detach()
        of_images[batch] -= step_size * of_inputs
        v = v - step_size * of_theta
    return distance, of_images, of_step_size


def _in_turn(count: int) -> Iterator[int]:
    """Yield all experts in a random order, and then again in another."""
    while True:
        yield from torch.randperm(count).tolist()


def _check_repeatable(network: nn.Module, images: Tensor, who: str) -> None:
    """See that a step of the student can be computed twice with one result."""
    with torch.no_grad():
        if not torch.allclose(network(images), network(images), rtol=1e-3, atol=1e-3):
            raise NotApplicable(
                f"{who} needs a network that gives the same for the same images in training; "
                f"{type(network).__name__} draws random numbers, as dropout does"
            )


def _problem(
    iteration: int, loss: float, before: float, step_size: float, images: Tensor
) -> str | None:
    """Return what is wrong after an iteration, if nothing good can follow from there."""
    finite = math.isfinite(loss) and bool(torch.isfinite(images).all())
    if finite and 0 < step_size < math.inf:
        return None
    return (
        f"in iteration {iteration + 1} the loss is {loss:.4g}, the learned step size goes "
        f"from {before:.4g} to {step_size:.4g} and the images are "
        f"{'finite' if finite else 'not all finite'}; expected a finite loss and a positive step "
        "size; lower the options lr_lr or lr_img"
    )
