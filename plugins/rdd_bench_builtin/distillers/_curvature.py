"""The curvature of the loss with respect to the input, measured along its gradient.

With l the cross-entropy of one image x, and z = grad l(x) / ||grad l(x)|| held constant:

* ``gradient``          mean_x || grad l(x + h z) - grad l(x) ||
* ``gradient-squared``  mean_x || grad l(x + h z) - grad l(x) ||^2
* ``loss``              | mean_x [ l(x + h z) - l(x) ] |

The first two are h (squared: h^2) times the length of the Hessian times z, to first order
(Moosavi-Dezfooli et al. 2019, "Robustness via Curvature Regularization, and Vice Versa",
arXiv:1811.09716). The third is mostly h ||grad l(x)||: a penalty on the gradient.

Every image has the gradient of its own loss, so none of the three depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from rdd_bench.api import Config

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["gradient", "gradient-squared", "loss"]


class CurvatureConfig(Config):
    """How curvature is measured."""

    curvature_h: float = Field(default=3.0, gt=0)
    """Euclidean length of the step, between normalised images. In pixels it is h times the
    standard deviation: 3 is 0.60 on CIFAR-10 (2.8/255 a pixel, root mean square), 1.06 on
    Fashion-MNIST (9.6/255), 1.13 on digits (36/255)."""
    curvature_form: Form = "gradient"
    """Penalise the change of the gradient, its square, or the change of the loss."""


def loss_and_curvature(
    logits_of: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, form: Form, h: float
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy at ``inputs`` (n, c, h, w) and the curvature there.

    Both are scalars with a graph to the parameters.

    Args:
        logits_of: A network that treats every image alone: batch normalisation in eval mode.
        inputs: In the space in which ``h`` and gradients are measured.
        labels: Of the inputs, (n,).
        form: Which of the three.
        h: Euclidean length of the step.
    """
    here = inputs.detach().requires_grad_()
    losses = _cross_entropies(logits_of(here), labels)
    # One pass serves for the direction and for the comparison; ``detach`` makes z a constant.
    (gradient,) = torch.autograd.grad(
        losses.sum(), here, create_graph=form != "loss", retain_graph=True
    )
    there = (inputs + h * unit(gradient.detach())).detach().requires_grad_()
    losses_there = _cross_entropies(logits_of(there), labels)
    if form == "loss":
        return losses.mean(), (losses_there - losses).mean().abs()
    (gradient_there,) = torch.autograd.grad(losses_there.sum(), there, create_graph=True)
    change = (gradient_there - gradient).flatten(1)
    lengths = change.square().sum(dim=1) if form == "gradient-squared" else change.norm(dim=1)
    return losses.mean(), lengths.mean()


def curvature(
    logits_of: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor, form: Form, h: float
) -> Tensor:
    """Return the curvature alone."""
    return loss_and_curvature(logits_of, inputs, labels, form, h)[1]


def unit(gradient: Tensor) -> Tensor:
    """Return the gradient of each image scaled to length 1; zero where it vanishes.

    The gradients of images that a network is sure of are so short that their squares underflow,
    so they are first scaled by their largest component.
    """
    flat = gradient.flatten(1)
    tiny = torch.finfo(flat.dtype).tiny
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp_min(tiny)
    scaled: Tensor = flat / flat.norm(dim=1, keepdim=True).clamp_min(tiny)
    return scaled.view_as(gradient)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
