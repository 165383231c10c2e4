"""MAT: trajectory matching whose experts are trained adversarially and smoothed.

Wei Lai, Tianyu Ding, Dongdong Ren, Lei Wang, Jing Huo, Yang Gao and Wenbin Li, "Robust Dataset
Distillation by Matching Adversarial Trajectories", 2025, arXiv:2503.12069. As in MTT, but the
experts see adversarial examples, and the way they take is smoothed by an exponential moving
average (EMA) of their weights, without which it is too rough for a student to follow. Students,
and whoever trains on the set, see no adversarial example.

This is a reconstruction from the abstract and from secondary sources. They name the idea, the
three regimes and the EMA. Not known to us, and our choices: where the EMA is taken and its decay,
the budget and the steps of the attack, and all numbers of the matching, which are those of MTT.
The result is therefore no reproduction of the paper's numbers.

The losses, with x' the adversarial example of x, p the softmax and beta a weight:

* PGD-AT (Madry et al. 2018):   CE(x', y)
* TRADES (Zhang et al. 2019):   CE(x, y) + beta KL(p(x) || p(x'))
* MART (Wang et al. 2020):      CE(x', y) - log(1.0001 - max_{k != y} p_k(x'))
                                + beta KL(p(x) || p(x')) (1 - p_y(x))

TRADES ascends the divergence, the others the cross-entropy. Deviations from their programs: the
step size follows from budget and steps, and the divergence is that of the exact probabilities,
without 1e-12 added to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    Config,
    DistilledSet,
    Distiller,
    DistillTask,
    Eps,
    Info,
    Run,
    Threat,
    ascend,
    hookimpl,
    project,
    random_start,
)
from rdd_bench_builtin.distillers._trajectories import (
    Smoothing,
    find_or_train_experts,
    preprocessed,
)
from rdd_bench_builtin.distillers._trajectory_matching import (
    SMOKE,
    MatchingConfig,
    distil_by_matching,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

SMALL_START = 0.001
"""Standard deviation in pixels of the start of TRADES and MART. At x itself the divergence has
no gradient."""


class AdversarialConfig(Config):
    """How the experts of MAT differ from those of MTT."""

    regime: Literal["pgd-at", "trades", "mart"] = "pgd-at"
    """Loss of the experts. The paper has all three; that this one comes first is our choice."""
    eps: Eps = Field(default=8 / 255, gt=0, le=1)
    """Budget in pixels of [0, 1], in the maximum norm; the usual one, our choice."""
    steps: int = Field(default=10, ge=0)
    """Gradient steps of the attack; our choice. 0 means no attack: x' = x."""
    relative_step: float = Field(default=2.5, gt=0)
    """Step size times steps over eps; our choice."""
    beta: float = Field(default=6.0, ge=0)
    """Weight of the divergence in TRADES and MART; the value of their authors."""
    ema_every: Literal["step", "epoch", "none"] = "step"
    """When the weights enter the average; our choice. 'none' matches the raw trajectory."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Weight of the average against the newest weights: with 0.999 it remembers about 1,000
    steps, five epochs of CIFAR-10 in batches of 256; our choice. Lower it for smaller data."""


class MATConfig(MatchingConfig, AdversarialConfig):
    """Options of MTT and of the adversarial experts."""


class MAT(Distiller[MATConfig]):
    """Match the smoothed weights that adversarial training on real images reaches."""

    name = "mat"
    info = Info(
        title="Matching adversarial trajectories",
        licence="MIT",
        paper="https://arxiv.org/abs/2503.12069",
        origin="reconstructed from the abstract; see the docstring",
    )
    smoke: ClassVar = {**SMOKE, "steps": 2, "ema_decay": 0.5}

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return ``task.ipc`` images of every class; their pixels may leave [0, 1].

        Raises:
            Diverged: If the matching does, with the last good set.
            RddBenchError: If an expert diverges, a class is too small to begin with, or a kept
                expert's file is damaged.
            NotApplicable: If the network draws random numbers of its own in training.
        """
        options = self.config
        task = preprocessed(task, run, options)
        experts = find_or_train_experts(
            task,
            run,
            options,
            self.name,
            robust_loss(task, options),
            Smoothing(options.ema_every, options.ema_decay),
            decisive=options.model_dump(mode="json", include=set(AdversarialConfig.model_fields)),
        )
        return distil_by_matching(task, run, options, experts, self.name)


def robust_loss(
    task: DistillTask, options: AdversarialConfig
) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Return the loss of an expert as a function of network, normalised images and labels.

    Augmented images are moved into [0, 1] first: an attacker sees no others.
    """

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        def logits_of(pixels: Tensor) -> Tensor:
            logits: Tensor = network(task.normalise(pixels))
            return logits

        pixels = task.denormalise(images).clamp(0, 1)
        # The attacker meets the network as one does at test time.
        network.eval()
        attacked = attack(logits_of, pixels, labels, options)
        network.train()
        if options.regime == "pgd-at":
            return torch.nn.functional.cross_entropy(logits_of(attacked), labels)
        clean, robust = logits_of(pixels), logits_of(attacked)
        outer = trades_loss if options.regime == "trades" else mart_loss
        return outer(clean, robust, labels, options.beta)

    return loss


def attack(
    logits_of: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    options: AdversarialConfig,
) -> Tensor:
    """Return adversarial examples of ``pixels``, in [0, 1] and within eps of them."""
    if not options.steps:
        return pixels
    threat = Threat("linf", options.eps)
    if options.regime == "pgd-at":
        candidates = random_start(pixels, threat)
    else:
        candidates = project(pixels + SMALL_START * torch.randn_like(pixels), pixels, threat)
    with torch.no_grad():
        clean = logits_of(pixels)
    for _ in range(options.steps):
        leaf = candidates.detach().requires_grad_()
        logits = logits_of(leaf)
        if options.regime == "trades":
            value = divergence(clean, logits).sum()
        else:
            value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(value, leaf)
        step = options.relative_step * options.eps / options.steps
        candidates = project(ascend(candidates, gradient, "linf", step), pixels, threat)
    return candidates


def trades_loss(clean: Tensor, robust: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return the loss of TRADES, averaged over images, from logits of x and x', (n, k)."""
    natural = torch.nn.functional.cross_entropy(clean, labels)
    return natural + beta * divergence(clean, robust).mean()


def mart_loss(clean: Tensor, robust: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Return the loss of MART, averaged over images, from logits of x and x', (n, k)."""
    column = labels.unsqueeze(1)
    runner_up = robust.softmax(dim=1).scatter(1, column, 0).amax(dim=1)
    boosted = torch.nn.functional.cross_entropy(robust, labels) - (1.0001 - runner_up).log().mean()
    unsure = 1 - clean.softmax(dim=1).gather(1, column).squeeze(1)
    return boosted + beta * (divergence(clean, robust) * unsure).mean()


def divergence(clean: Tensor, robust: Tensor) -> Tensor:
    """Return KL(p(x) || p(x')) of each image, (n,), from logits."""
    log_clean, log_robust = clean.log_softmax(dim=1), robust.log_softmax(dim=1)
    return (log_clean.exp() * (log_clean - log_robust)).sum(dim=1)


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [MAT]
