"""Checks on a run's own evaluation. A check that fails is a flag on the row, in words.

Most published evaluations that turned out wrong would have been caught by one of these: an
attack that fails to change anything changes nothing about the accuracy either, a budget in
pixels is measured in pixels, the stronger attack does not lose to the weaker one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdd_bench.data import tensors_hash
from rdd_bench.networks import predict
from rdd_bench.records import Flag
from rdd_bench.threats import TOLERANCE, distance
from rdd_bench.types import Threat

BUDGET = "budget"
BOX = "box"
NULL_ATTACK = "null-attack"
NON_DETERMINISTIC = "non-deterministic"
STATE_CHANGED = "state-changed"
TRAIN_MODE = "train-mode"
INPUT_RANGE = "input-range"


def state_hash(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer."""
    return tensors_hash(*model.state_dict().values())


def check_state(model: nn.Module, before: str) -> list[Flag]:
    """Parameters and buffers are as they were, and no part is in train mode."""
    flags = []
    if state_hash(model) != before:
        flags.append(
            Flag(
                name=STATE_CHANGED,
                message="the attack changed parameters or buffers of the network",
            )
        )
    training = [name or "the network" for name, part in model.named_modules() if part.training]
    if training:
        flags.append(
            Flag(
                name=TRAIN_MODE,
                message=f"{training[0]} is in train mode under attack",
                value=len(training),
            )
        )
    return flags


def check_deterministic(model: nn.Module, images: Tensor) -> list[Flag]:
    """Two forward passes over the same images give the same bits."""
    with torch.no_grad():
        first, second = model(images), model(images)
    if torch.equal(first, second):
        return []
    gap = (first - second).abs().max().item()
    message = f"two forward passes differ by up to {gap:.3g}; needs an attack made for randomness"
    return [Flag(name=NON_DETERMINISTIC, message=message, value=gap)]


def check_input_range(images: Tensor) -> list[Flag]:
    """Images that are handed to an attack are pixels of [0, 1]."""
    low, high = images.min().item(), images.max().item()
    if low >= 0 and high <= 1:
        return []
    message = (
        f"images handed to the attack span [{low:.3g}, {high:.3g}], not [0, 1]: "
        "they look normalised, so the budget is not in pixels"
    )
    return [Flag(name=INPUT_RANGE, message=message, value=max(-low, high - 1))]


def check_budget(candidates: Tensor, images: Tensor, threat: Threat) -> list[Flag]:
    """What the attack returned, before the host projects it, is within the budget and the box."""
    if not len(images):
        return []
    flags = []
    furthest = distance(candidates, images, threat.norm).max().item()
    # An L2 norm of many pixels rounds at a relative 1e-6; the projection removes what is left.
    if furthest > threat.eps * (1 + 1e-4) + TOLERANCE:
        message = f"moved images by up to {furthest:.4g} ({threat.norm}); eps is {threat.eps:.4g}"
        flags.append(Flag(name=BUDGET, message=message, value=furthest))
    low, high = candidates.min().item(), candidates.max().item()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        message = f"returned pixels in [{low:.3g}, {high:.3g}], outside [0, 1]"
        flags.append(Flag(name=BOX, message=message, value=max(-low, high - 1)))
    return flags


def check_null_attack(
    model: nn.Module, images: Tensor, labels: Tensor, candidates: Tensor, batch_size: int
) -> list[Flag]:
    """With a budget of zero, an attack gives exactly the clean outcomes.

    ``candidates`` are what the attack returned for eps=0, **not** projected: the projection would
    repair an attack that clamps or rescales its input, which is what this check is for.
    """
    clean = predict(model, images, batch_size) == labels
    attacked = predict(model, candidates, batch_size) == labels
    changed = int((clean != attacked).sum())
    if not changed:
        return []
    message = (
        f"with a budget of 0 the attack still changes the outcome of {changed} of {len(images)} "
        "images: it clamps or rescales what it is given"
    )
    return [Flag(name=NULL_ATTACK, message=message, value=changed / len(images))]
