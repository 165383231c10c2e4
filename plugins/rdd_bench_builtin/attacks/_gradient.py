"""The losses that gradient attacks climb, their gradients, and when an image counts as broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from rdd_bench.api import NotApplicable

if TYPE_CHECKING:
    from torch import Tensor, nn

Loss = Literal["ce", "margin", "dlr"]

CLEAR = 1e-4
"""Share of the largest logit by which a wrong class must lead to count as broken. Float32 rounds
differently in batches of another size, and the host scores every image once more."""


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Return the gradient of each image's loss with respect to that image, (n, c, h, w)."""
    return logits_and_gradient(model, images, labels, loss)[1]


def logits_and_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return the logits (n, k) and the gradient of each image's loss, (n, c, h, w).

    The losses are summed, so that no image's gradient depends on how many others are in the
    batch. Works under ``no_grad`` and ``inference_mode`` and leaves every ``.grad`` alone.

    Args:
        model: Pixels of [0, 1] to logits (n, k).
        images: Pixels of [0, 1], (n, c, h, w).
        labels: True classes, int64 (n,).
        loss: 'ce' for the cross-entropy; 'margin' for the largest other logit minus the true
            one, whose direction does not change when all logits are multiplied by a number;
            'dlr' for the margin relative to the lead of the first logit over the third.

    Raises:
        NotApplicable: If the loss is 'dlr' and there are fewer than three classes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because tensors made under inference_mode may not be saved for the backward pass.
        leaf, labels = images.detach().clone().requires_grad_(), labels.clone()
        logits = model(leaf)
        if loss == "ce":
            value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        elif loss == "margin":
            value = margin(logits, labels).sum()
        else:
            value = difference_of_logits_ratio(logits, labels).sum()
        gradient = torch.autograd.grad(value, leaf)[0]
    return logits.detach(), gradient


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the largest other logit minus the true one, (n,): positive where misclassified."""
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, float("-inf"))
    return others.amax(dim=1) - logits.gather(1, column).squeeze(1)


def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the DLR loss of Croce and Hein 2020, equation 6, (n,): free of scale and shift."""
    if logits.shape[1] < 3:
        raise NotApplicable(
            f"the loss 'dlr' needs three classes and the network has {logits.shape[1]}; "
            "choose 'margin'"
        )
    largest = logits.topk(3, dim=1).values
    # The small number keeps a division finite when the first three logits are equal.
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + 1e-12)


def broken(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which images are misclassified by more than rounding, (n,) booleans."""
    return margin(logits, labels) > CLEAR * logits.abs().amax(dim=1)
