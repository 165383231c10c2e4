"""DeepFool: Moosavi-Dezfooli, Fawzi and Frossard 2016, 'DeepFool: a simple and accurate method'.

arXiv:1511.04599, algorithm 2: step to the nearest boundary of the linearised network until the
class changes. The answer is a distance; under a budget an image counts as broken if that distance,
overshoot included, is within it, and the median distance is reported as a message.

As in the authors' program, and unlike the paper's text: the overshoot is applied at every step and
not only at the end, each step is 1e-4 longer, and only the ten likeliest classes are looked at.
Deviations: pixels stay in [0, 1]; an image stops when it is misclassified by more than rounding,
because a point on the boundary itself has another class in another batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from rdd_bench.api import Attack, Config, Info, Run, Threat, hookimpl
from rdd_bench_builtin.attacks._gradient import broken
from rdd_bench_builtin.attacks._nearest import in_words, nearest_within

if TYPE_CHECKING:
    from torch import Tensor, nn

EXTRA_LENGTH = 1e-4
"""Added to every step, so that steps do not die out just before the boundary."""


class DeepFoolOptions(Config):
    """Options of DeepFool."""

    steps: int = Field(default=50, ge=1)
    """Linearisations at most."""
    overshoot: float = Field(default=0.02, ge=0)
    """How much further than the boundary to go, as a share of the way."""
    candidates: int = Field(default=10, ge=2)
    """Classes to look at: the true one and the likeliest others."""


class DeepFool(Attack[DeepFoolOptions]):
    """Steps to the nearest linearised boundary; reports the median distance."""

    name = "deepfool"
    info = Info(title="DeepFool", licence="MIT", paper="https://arxiv.org/abs/1511.04599")
    smoke: ClassVar[Mapping[str, Any]] = {"steps": 3}
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
        others = self._candidates(model, images, labels)
        points, way = images.clone(), torch.zeros_like(images)
        active = torch.arange(len(images), device=images.device)
        for _ in range(self.config.steps):
            way[active] += _to_boundary(model, points[active], labels[active], others[active])
            there = images[active] + (1 + self.config.overshoot) * way[active]
            points[active] = there.clamp(0, 1)
            with torch.no_grad():
                left = broken(model(points[active]), labels[active])
            active = active[~left]
            if not len(active):
                break
        found = torch.ones_like(labels, dtype=torch.bool)
        found[active] = False
        return points, found

    def _candidates(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the likeliest classes other than the true one, (n, candidates - 1)."""
        with torch.no_grad():
            logits = model(images)
        count = min(self.config.candidates, logits.shape[1]) - 1
        others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
        likeliest: Tensor = others.topk(count, dim=1).indices
        return likeliest


def _to_boundary(model: nn.Module, points: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """Return the step over the nearest of the linearised boundaries, (n, c, h, w).

    With f the difference of two logits and w its gradient, the boundary is |f| / |w| away along
    w (equation 8), and the nearest is the smallest of these (equation 9).
    """
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = model(leaf)
        gaps = logits.gather(1, others) - logits.gather(1, labels.unsqueeze(1))
        slopes = torch.stack(
            [torch.autograd.grad(gap.sum(), leaf, retain_graph=True)[0] for gap in gaps.unbind(1)],
            dim=1,
        )
    # The small number keeps a flat network from dividing by zero; its step is zero.
    steepness = slopes.flatten(2).norm(dim=2) + 1e-8
    distances, nearest = (gaps.detach().abs() / steepness).min(dim=1)
    rows = torch.arange(len(points), device=points.device)
    length = (distances + EXTRA_LENGTH) / steepness[rows, nearest]
    step: Tensor = length.view(-1, 1, 1, 1) * slopes[rows, nearest]
    return step


@hookimpl
def rdd_bench_attacks() -> list[type[Attack[Any]]]:
    return [DeepFool]
