"""The gradient that FGSM and PGD follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Loss = Literal["ce", "margin"]


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Return the gradient of each image's loss with respect to that image, (n, c, h, w).

    The losses are summed, so that no image's gradient depends on how many others are in the
    batch. Works under ``no_grad`` and ``inference_mode`` and leaves every ``.grad`` alone.

    Args:
        model: Pixels of [0, 1] to logits (n, k).
        images: Pixels of [0, 1], (n, c, h, w).
        labels: True classes, int64 (n,).
        loss: 'ce' for the cross-entropy; 'margin' for the largest other logit minus the true
            one, whose direction does not change when all logits are multiplied by a number.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because tensors made under inference_mode may not be saved for the backward pass.
        leaf, labels = images.detach().clone().requires_grad_(), labels.clone()
        logits = model(leaf)
        if loss == "ce":
            value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        else:
            value = margin(logits, labels).sum()
        return torch.autograd.grad(value, leaf)[0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the true one, (n,): positive where misclassified."""
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, float("-inf"))
    return others.amax(dim=1) - logits.gather(1, column).squeeze(1)
