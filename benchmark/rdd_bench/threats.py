"""Geometry of the threat models, in pixels of [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rdd_bench.types import Norm, Threat

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-6
"""Rounding that a distance may show; float32 resolves 6e-8 at one."""


def distance(first: Tensor, second: Tensor, norm: Norm) -> Tensor:
    """Return the distance of each pair of images, (n,)."""
    difference = (first - second).flatten(1)
    if norm == "linf":
        return difference.abs().amax(dim=1)
    length: Tensor = difference.norm(dim=1)
    return length


def project(candidates: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Return the candidates moved into the budget around ``images`` and into [0, 1].

    Both sets are convex and ``images`` lies in the box, so clamping after the projection on the
    ball keeps the budget.
    """
    delta = candidates - images
    if threat.norm == "linf":
        delta = delta.clamp(-threat.eps, threat.eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta = delta * (threat.eps / length).clamp(max=1).view(-1, 1, 1, 1)
    return (images + delta).clamp(0, 1)


def random_start(images: Tensor, threat: Threat) -> Tensor:
    """Return a uniform draw from the budget around ``images``, within [0, 1]."""
    if threat.norm == "linf":
        delta = torch.empty_like(images).uniform_(-threat.eps, threat.eps)
    else:
        direction = torch.randn_like(images).flatten(1)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        # The d-th root makes the draw uniform in the volume of the ball.
        radius = torch.rand(len(images), 1, device=images.device) ** (1 / direction.shape[1])
        delta = (threat.eps * radius * direction).view_as(images)
    return (images + delta).clamp(0, 1)


def ascend(images: Tensor, gradient: Tensor, norm: Norm, step: float) -> Tensor:
    """Return the images one step of steepest ascent further."""
    if norm == "linf":
        return images + step * gradient.sign()
    length = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    moved: Tensor = images + step * gradient / length
    return moved
