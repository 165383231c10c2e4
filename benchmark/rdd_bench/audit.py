"""Checks on a run's own evaluation. A check that fails is a flag on the row, in words.

Most published evaluations that turned out wrong would have been caught by one of these: an
attack that fails to change anything changes nothing about the accuracy either, a budget in
pixels is measured in pixels, twice the search finds no more, a budget without bounds leaves
nothing. What attacks say of each other is in ``consistency``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody uses
from scipy import stats
from torch import Tensor, nn

from rdd_bench.consistency import FEW, NON_DETERMINISTIC
from rdd_bench.data import tensors_hash
from rdd_bench.networks import predict
from rdd_bench.pictures import in_eight_bits
from rdd_bench.records import Flag
from rdd_bench.threats import TOLERANCE, distance
from rdd_bench.types import Threat

BUDGET = "budget"
BOX = "box"
NULL_ATTACK = "null-attack"
STATE_CHANGED = "state-changed"
TRAIN_MODE = "train-mode"
INPUT_RANGE = "input-range"
MORE_STEPS = "more-steps"
LARGE_BUDGET = "large-budget"
SATURATED_GRADIENT = "saturated-gradient"
ZERO_GRADIENT = "zero-gradient"
EIGHT_BIT = "eight-bit"
OUT_OF_RANGE = "out-of-range"
CLASS_BALANCE = "class-balance"
TEST_SELECTION = "test-selection"

MORE_STEPS_TOLERANCE = 0.02
"""Of all test images."""
CHANCE = 0.999
"""Quantile of what chance may leave under a budget that allows everything."""
VANISHED = 0.05
"""Fraction of right images without a gradient above which an attack on it means little."""
HALF_LEVEL = 0.5 / 255
MOVED_PIXELS = 0.01
"""Fraction of pixels outside [0, 1], or of images that 8 bits change, that is remarked on."""


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


# What the attack does with more ----------------------------------------------------------------


def check_more_steps(
    attack: str, effort: str, newly_broken: int, tried: int, survivors: int, total: int
) -> list[Flag]:
    """Twice the search breaks hardly more.

    Args:
        attack: How messages call it.
        effort: The option that was doubled.
        newly_broken: How many more images the longer search breaks than one as long as the
            attack's, both with the same new draws,
        tried: of how many that the attack had left,
        survivors: of how many that it left in all,
        total: of how many test images.
    """
    gain = newly_broken / tried * survivors / total
    if newly_broken <= FEW or gain <= MORE_STEPS_TOLERANCE:
        return []
    message = (
        f"{attack} with twice the {effort} breaks {newly_broken} more of {tried} images that it "
        f"had left, {100 * gain:.1f} points of all: it has not converged"
    )
    return [Flag(name=MORE_STEPS, message=message, value=gain)]


def check_large_budget(attack: str, labels: Tensor, left: int) -> list[Flag]:
    """Where every image may become the same grey, hardly more than one class stays right.

    The network gives the grey image one class, so a perfect attack leaves at most the images of
    the largest class; the quantile is for one that gets there by chance.

    Args:
        attack: How messages call it.
        labels: True classes of the attacked images, (m,).
        left: How many of them stayed right.
    """
    rate = torch.bincount(labels).max().item() / len(labels)
    most = int(stats.binom.ppf(CHANCE, len(labels), rate))
    if left <= most:
        return []
    message = (
        f"{attack} leaves {left} of {len(labels)} images right under a budget that turns all of "
        f"them into the same grey; chance leaves at most {most}: its gradients lead nowhere"
    )
    return [Flag(name=LARGE_BUDGET, message=message, value=left / len(labels))]


# Networks and sets -----------------------------------------------------------------------------


def check_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> list[Flag]:
    """Images that a network gets right have gradients for an attack to follow.

    On an over-confident network the cross-entropy's gradient is exactly zero in float32, while
    that of the margin, the largest other logit minus the true one, is not.
    """
    if not len(images):
        return []
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    lost = [torch.cat(parts) for parts in zip(*(_lost(model, *b) for b in batches), strict=True)]
    both = (lost[0] & lost[1]).float().mean().item()
    saturated = (lost[0] & ~lost[1]).float().mean().item()
    flags = []
    if saturated > VANISHED:
        message = (
            f"the cross-entropy has no gradient at {100 * saturated:.0f} % of the right images, "
            "where the margin has one: attacks on the cross-entropy are too weak here"
        )
        flags.append(Flag(name=SATURATED_GRADIENT, message=message, value=saturated))
    if both > VANISHED:
        message = (
            f"neither the cross-entropy nor the margin has a gradient at {100 * both:.0f} % of "
            "the right images: no attack that follows gradients says anything here"
        )
        flags.append(Flag(name=ZERO_GRADIENT, message=message, value=both))
    return flags


@torch.enable_grad()
def _lost(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return at which images the cross-entropy, and the margin, have no gradient, (n,) each."""
    leaf = images.detach().clone().requires_grad_()
    logits = model(leaf)
    true = F.one_hot(labels, logits.shape[1]).bool()
    margin = logits.masked_fill(true, -torch.inf).amax(dim=1) - logits[true]
    losses = F.cross_entropy(logits, labels, reduction="sum"), margin.sum()
    first, second = (_vanishes(loss, leaf) for loss in losses)
    return first, second


def _vanishes(loss: Tensor, leaf: Tensor) -> Tensor:
    if not loss.requires_grad:  # nothing in the network lets a gradient through
        return torch.ones(len(leaf), dtype=torch.bool, device=leaf.device)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return (gradient == 0).flatten(1).all(dim=1)


def check_eight_bit(model: nn.Module, images: Tensor, batch_size: int) -> list[Flag]:
    """A network sees in the stored images of its set what it sees in pictures of them."""
    stored = predict(model, images, batch_size)
    changed = (stored != predict(model, in_eight_bits(images), batch_size)).float().mean().item()
    if changed <= MOVED_PIXELS:
        return []
    message = (
        f"clipped and rounded to 8 bits, {100 * changed:.1f} % of the distilled images change "
        "their class: pictures of the set are not the set"
    )
    return [Flag(name=EIGHT_BIT, message=message, value=changed)]


def fraction_out_of_range(images: Tensor) -> float:
    """Return the fraction of pixels over half a grey level outside [0, 1]."""
    outside = (images < -HALF_LEVEL) | (images > 1 + HALF_LEVEL)
    return outside.float().mean().item()


def check_out_of_range(images: Tensor) -> list[Flag]:
    """Hardly any of a set's pixels lie outside [0, 1] by more than rounding to 8 bits hides."""
    fraction = fraction_out_of_range(images)
    if fraction <= MOVED_PIXELS:
        return []
    message = (
        f"{100 * fraction:.1f} % of the pixels lie outside [0, 1] by over half a grey level: an "
        "attacker cannot reach them, and pictures cannot hold them"
    )
    return [Flag(name=OUT_OF_RANGE, message=message, value=fraction)]


def check_class_balance(labels: Tensor, num_classes: int) -> list[Flag]:
    """Every class has as many images as the others; of soft labels the most probable counts."""
    counts = torch.bincount(labels, minlength=num_classes)
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return []
    message = (
        f"classes have from {low} to {high} images (class {int(counts.argmin())} the fewest); "
        "a table is about one number of images per class"
    )
    return [Flag(name=CLASS_BALANCE, message=message, value=high - low)]


def check_selection(notes: Mapping[str, Any]) -> list[Flag]:
    """A set was not chosen by what is right on the test images.

    The note ``selected_on`` of a set names the split by which its makers chose it among others.
    """
    if notes.get("selected_on") != "test":
        return []
    message = "its makers chose it by accuracy on the test images, which are to judge it"
    return [Flag(name=TEST_SELECTION, message=message)]


def first_of_each(flags: Sequence[Flag]) -> list[Flag]:
    """Return the first flag of each name: the seeds of a cell mostly raise the same ones."""
    found: dict[str, Flag] = {}
    for flag in flags:
        found.setdefault(flag.name, flag)
    return list(found.values())
