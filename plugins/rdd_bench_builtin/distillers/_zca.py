"""ZCA whitening, in which the authors of MTT made most of their sets for CIFAR.

Over the training images as flat pixels x of [0, 1], with mean mu and covariance
Sigma = U S U^T (divisor n - 1):

    T = U (S + eps)^(-1/2) U^T,      whitened x = (x - mu) T.

T turns the covariance into U S / (S + eps) U^T: directions with S far above eps get variance one,
those far below stay small. T is symmetric and invertible, and the transform is a layer of the
networks trained on the set, so an attacker still works on pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rdd_bench.api import Whitening

if TYPE_CHECKING:
    from torch import Tensor

EPS = 0.1
"""What the authors add to the eigenvalues."""


def fit_zca(images: Tensor) -> Whitening:
    """Return the whitening of images (n, c, h, w) in [0, 1], on their device."""
    flat = images.flatten(1).double()
    mean = flat.mean(dim=0)
    centred = flat - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / (len(flat) - 1))
    # The covariance has no negative eigenvalue; rounding may give one.
    scales = (variances.clamp_min(0) + EPS).rsqrt()
    matrix = (directions * scales) @ directions.T
    return Whitening(mean.to(images), matrix.to(images))
