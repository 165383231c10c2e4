"""CW: Carlini and Wagner 2017, 'Towards Evaluating the Robustness of Neural Networks', L2.

arXiv:1608.04644, section VI.A: Adam on |x' - x|^2 + c max(0, z_y - max z_i + kappa) over w with
x' = (tanh w + 1) / 2, and a search for the smallest c that works, image by image. The answer is
a distance; under a budget an image counts as broken if that distance is within it, and the median
distance is reported as a message. What papers call CW under L-inf is the plugin ``margin-pgd``.

Defaults are those of the authors' program: 9 values of c with up to 10,000 steps of 0.01 each. On
small networks 200 steps of 0.05 found medians within 0.2 % of those of 1,000 steps of 0.01.

Deviations: an image leaves a value of c when the lowest of **its own** objectives stops falling,
where the program looks at the sum over the batch, so no distance depends on the neighbours; pixels
are drawn in by a factor of 1 - 1e-6, because atanh of 0 and 1 is infinite and such pixels would
never move; an adversarial counts if it is misclassified by more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, Run, Threat, distance, hookimpl
from rdd_bench_builtin.attacks._gradient import broken, margin
from rdd_bench_builtin.attacks._nearest import in_words, nearest_within

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKS = 10
"""How often in a descent the progress is looked at."""
NO_PROGRESS = 0.9999
"""Share of the objective at the check before that must be undercut."""

INSIDE = 1 - 1e-6
"""How far pixels are drawn in from 0 and 1."""
FARTHEST = math.atanh(INSIDE)
"""Where a pixel of 1 begins in w; a step of Adam moves it by about the learning rate."""


class CWOptions(Config):
    """Options of CW."""

    searches: int = Field(default=9, ge=1)
    """Values of c that are tried for every image."""
    steps: int = Field(default=10_000, ge=1)
    """Steps of Adam for each value of c."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Rate of Adam."""
    initial_c: float = Field(default=1e-3, gt=0)
    """The first weight of the misclassification against the distance."""
    confidence: float = Field(default=0.0, ge=0)
    """How far another logit must exceed the true one (the paper's kappa)."""


class CW(Attack[CWOptions]):
    """The smallest L2 perturbation by optimisation; reports the median distance."""

    name = "cw"
    info = Info(
        title="Carlini and Wagner's L2 attack",
        licence="MIT",
        paper="https://arxiv.org/abs/1608.04644",
    )
    smoke: ClassVar[Mapping[str, Any]] = {"searches": 3, "steps": 20, "learning_rate": 0.05}
    norms = frozenset({"l2"})

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return the adversarials that lie within the budget; other images as they came."""
        attacked, self.distances = nearest_within(
            self._search, model, images, labels, threat, run, self.name
        )
        self.messages = in_words(self.distances)
        return attacked

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        best = _Best(images)
        c = images.new_full((len(images),), self.config.initial_c)
        low, high = torch.zeros_like(c), torch.full_like(c, math.inf)
        for _ in range(self.config.searches):
            worked = self._descend(model, images, labels, c, best)
            low, high = torch.where(worked, low, c), torch.where(worked, c, high)
            # Grow until one works; then halve the interval between failure and success.
            c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
        return best.points, best.distances.isfinite()

    def _descend(
        self, model: nn.Module, images: Tensor, labels: Tensor, c: Tensor, best: _Best
    ) -> Tensor:
        """Minimise the objective for these c, keep what is best, and return which c worked."""
        options = self.config
        worked = torch.zeros_like(labels, dtype=torch.bool)
        active = torch.arange(len(images), device=images.device)
        lowest, before = torch.full_like(c, math.inf), torch.full_like(c, math.inf)
        w = torch.atanh(INSIDE * (2 * images - 1))
        origin = _pixels(w)
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        # Not before a black or white pixel had the time to come back from where tanh is flat.
        interval = math.ceil(max(options.steps / CHECKS, FARTHEST / options.learning_rate))
        for step in range(options.steps):
            with torch.enable_grad():
                leaf = w.detach().requires_grad_()
                points = _pixels(leaf)
                logits = model(points)
                lead = margin(logits, labels)
                lacking = (options.confidence - lead).clamp_min(0)
                objective = (points - origin).flatten(1).square().sum(dim=1) + c * lacking
                gradient = torch.autograd.grad(objective.sum(), leaf)[0]
            points, objective = points.detach(), objective.detach()
            success = broken(logits.detach(), labels) & (lead.detach() >= options.confidence)
            best.keep(points[success], active[success])
            worked[active[success]] = True
            lowest = torch.minimum(lowest, objective)
            if step % interval == 0:
                staying = lowest <= NO_PROGRESS * before
                if not staying.any():
                    break
                active, labels, c, lowest, w, origin, mean, square, gradient = (
                    every[staying]
                    for every in (active, labels, c, lowest, w, origin, mean, square, gradient)
                )
                before = lowest
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient.square()
            scale = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            w = w - options.learning_rate * mean / (1 - 0.9 ** (step + 1)) / scale
        return worked


class _Best:
    """The nearest adversarial of each image so far."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.points = images.clone()
        self.distances = images.new_full((len(images),), math.inf)

    def keep(self, points: Tensor, which: Tensor) -> None:
        """Take those points, of the images ``which``, that are nearer than what is known."""
        distances = distance(points, self.images[which], "l2")
        nearer = distances < self.distances[which]
        self.points[which[nearer]] = points[nearer]
        self.distances[which[nearer]] = distances[nearer]


def _pixels(w: Tensor) -> Tensor:
    return (w.tanh() + 1) / 2


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [CW]
