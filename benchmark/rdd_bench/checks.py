"""What the host demands of everything that comes back from a plugin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rdd_bench.errors import ContractError
from rdd_bench.hashing import canonical_json
from rdd_bench.types import (
    DatasetSpec,
    DistilledSet,
    LabelledImages,
    Recipe,
    Splits,
    Views,
    Whitening,
)


def check_splits(splits: Any, who: str) -> Splits:
    """Return what a data set plugin loaded, if it is fit for use."""
    if not isinstance(splits, Splits):
        raise ContractError(who, f"load returned {type(splits).__name__}", "a Splits")
    spec = splits.spec
    channels = spec.shape[0]
    if len(spec.mean) != channels or len(spec.std) != channels or min(spec.std) <= 0:
        raise ContractError(
            who,
            f"mean {spec.mean} and std {spec.std} for {channels} channels",
            "one mean and one positive std per channel",
        )
    if spec.num_classes < 2:
        raise ContractError(who, f"{spec.num_classes} classes", "two or more")
    for split, part in (("train", splits.train), ("test", splits.test)):
        _check_real_images(part, spec, f"{who}, {split} split")
    return splits


def _check_real_images(part: LabelledImages, spec: DatasetSpec, who: str) -> None:
    _check_images(part.images, spec.shape, who)
    _check_tensor(part.labels, "labels", who)
    _check_hard_labels(part.labels, len(part.images), spec.num_classes, who)
    low, high = part.images.min().item(), part.images.max().item()
    if low < 0 or high > 1:
        raise ContractError(who, f"pixels span [{low:.3g}, {high:.3g}]", "[0, 1]")


def check_distilled_set(
    distilled: Any, spec: DatasetSpec, ipc: int | None, who: str
) -> DistilledSet:
    """Return what a distiller made, if every later step can rely on it.

    Args:
        distilled: The returned value.
        spec: The data set it was made from.
        ipc: Images per class it must have; None for a reference, which may have any number.
        who: The plugin, for the message.
    """
    if not isinstance(distilled, DistilledSet):
        raise ContractError(who, f"distill returned {type(distilled).__name__}", "a DistilledSet")
    _check_images(distilled.images, spec.shape, who)
    if not isinstance(distilled.recipe, Recipe | None):
        raise ContractError(who, f"recipe is {type(distilled.recipe).__name__}", "a Recipe or None")
    try:
        canonical_json(dict(distilled.notes))
    except (TypeError, ValueError) as error:
        raise ContractError(who, f"notes: {error}", "finite numbers, texts, lists") from None
    _check_extras(distilled, spec, who)
    labels = distilled.labels
    _check_tensor(labels, "labels", who)
    if labels.ndim == 2:
        _check_soft_labels(labels, len(distilled), spec.num_classes, who)
    else:
        _check_hard_labels(labels, len(distilled), spec.num_classes, who)
        counts = torch.bincount(labels.cpu(), minlength=spec.num_classes)
        wrong = None if ipc is None else (counts != ipc).nonzero().flatten().tolist()
        if wrong:
            found = f"class {wrong[0]} has {int(counts[wrong[0]])} images"
            others = f" ({len(wrong)} classes are wrong)" if len(wrong) > 1 else ""
            raise ContractError(who, found + others, f"exactly {ipc} images of every class")
    if ipc is not None and len(distilled) != ipc * spec.num_classes:
        raise ContractError(who, f"{len(distilled)} images", f"{ipc * spec.num_classes}")
    return distilled


def _check_extras(distilled: DistilledSet, spec: DatasetSpec, who: str) -> None:
    """Check whitening, weights and views, and that the recipe uses none that is missing."""
    for name in (distilled.recipe.uses if distilled.recipe else None) or ():
        if getattr(distilled, name) is None:
            raise ContractError(who, f"the recipe uses {name}, which the set lacks", f"{name}")
    for value, kind in ((distilled.whitening, Whitening), (distilled.views, Views)):
        if not isinstance(value, kind | None):
            raise ContractError(who, f"a {type(value).__name__} for {kind.__name__}", "one or None")
    count, pixels = len(distilled), spec.shape[0] * spec.shape[1] * spec.shape[2]
    if distilled.whitening is not None:
        _check_floats(distilled.whitening.mean, "whitening.mean", (pixels,), who)
        _check_floats(distilled.whitening.matrix, "whitening.matrix", (pixels, pixels), who)
        if torch.linalg.slogdet(distilled.whitening.matrix.double()).sign == 0:
            raise ContractError(who, "whitening.matrix is singular", "an invertible matrix")
    if distilled.weights is not None:
        _check_floats(distilled.weights, "weights", (count,), who)
        low, mean = distilled.weights.min().item(), distilled.weights.mean().item()
        if low < 0 or abs(mean - 1) > 1e-3:
            raise ContractError(
                who, f"weights from {low:.3g} with mean {mean:.3g}", "none negative, mean 1"
            )
    if distilled.views is not None:
        _check_views(distilled.views, count, spec.num_classes, who)


def _check_floats(value: Any, what: str, shape: tuple[int, ...], who: str) -> None:
    _check_tensor(value, what, who)
    if value.dtype != torch.float32 or tuple(value.shape) != shape:
        raise ContractError(
            who, f"{what} is {value.dtype} of shape {tuple(value.shape)}", f"float32 {shape}"
        )
    if not torch.isfinite(value).all():
        raise ContractError(who, f"{what} has NaN or infinite values", "finite values")


def _check_views(views: Views, count: int, num_classes: int, who: str) -> None:
    total = len(views)
    if not total or total % count:
        raise ContractError(who, f"{total} views for {count} images", f"a multiple of {count}")
    expected = {
        "image": (torch.int64, (total,)),
        "crop": (torch.float32, (total, 4)),
        "flip": (torch.bool, (total,)),
        "partner": (torch.int64, (total,)),
        "mix_box": (torch.int64, (total, 4)),
        "mix_weight": (torch.float32, (total,)),
        "logits": (torch.float16, (total, num_classes)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(views, name)
        _check_tensor(tensor, f"views.{name}", who)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ContractError(
                who, f"views.{name} is {tensor.dtype} of {tuple(tensor.shape)}", f"{dtype} {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise ContractError(who, f"views.{name} has NaN or infinite values", "finite values")
    for name, tensor, limit in (
        ("image", views.image, count),
        ("partner", views.partner, total),
    ):
        if int(tensor.min()) < 0 or int(tensor.max()) >= limit:
            raise ContractError(
                who,
                f"views.{name} spans {int(tensor.min())}..{int(tensor.max())}",
                f"0..{limit - 1}",
            )
    if views.mix_weight.min() < 0 or views.mix_weight.max() > 1 or views.crop[:, 2:].min() <= 0:
        raise ContractError(
            who, "views with a mix weight outside [0, 1] or an empty crop", "parts of a picture"
        )


def _check_tensor(value: Any, what: str, who: str) -> None:
    if not isinstance(value, Tensor):
        raise ContractError(who, f"{what} are {type(value).__name__}", "a torch tensor")


def _check_images(images: Any, shape: tuple[int, int, int], who: str) -> None:
    _check_tensor(images, "images", who)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise ContractError(
            who, f"images of shape {tuple(images.shape)}", f"(n, {', '.join(map(str, shape))})"
        )
    if images.dtype != torch.float32:
        raise ContractError(who, f"images are {images.dtype}", "torch.float32")
    bad = int((~torch.isfinite(images)).sum())
    if bad:
        raise ContractError(who, f"{bad} pixels are NaN or infinite", "finite pixels")


def _check_hard_labels(labels: Tensor, count: int, num_classes: int, who: str) -> None:
    if labels.dtype != torch.int64:
        raise ContractError(
            who, f"labels are {labels.dtype}", "int64 (n,), or float32 (n, k) probabilities"
        )
    if tuple(labels.shape) != (count,):
        raise ContractError(who, f"labels of shape {tuple(labels.shape)}", f"({count},)")
    if count and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ContractError(
            who,
            f"labels span {int(labels.min())}..{int(labels.max())}",
            f"0..{num_classes - 1}",
        )


def _check_soft_labels(labels: Tensor, count: int, num_classes: int, who: str) -> None:
    if tuple(labels.shape) != (count, num_classes) or labels.dtype != torch.float32:
        raise ContractError(
            who,
            f"soft labels {tuple(labels.shape)} of {labels.dtype}",
            f"({count}, {num_classes}) of torch.float32",
        )
    sums = labels.sum(dim=1)
    if not torch.isfinite(labels).all() or labels.min() < 0 or (sums - 1).abs().max() > 1e-3:
        raise ContractError(
            who, "soft labels that are no probabilities", "rows from 0 to 1 that sum to one"
        )


def check_network(network: Any, spec: DatasetSpec, who: str) -> nn.Module:
    """Return what an architecture built, if it maps images of this shape to logits."""
    if not isinstance(network, nn.Module):
        raise ContractError(who, f"build returned {type(network).__name__}", "an nn.Module")
    training = network.training
    with torch.no_grad():
        logits = network.eval()(torch.zeros(2, *spec.shape))
    network.train(training)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, spec.num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ContractError(
            who, f"two images of shape {spec.shape} give {found}", f"logits (2, {spec.num_classes})"
        )
    return network


def check_candidates(candidates: Any, images: Tensor, who: str) -> Tensor:
    """Return what an attack made, if it is as many finite images as it was given."""
    if not isinstance(candidates, Tensor) or candidates.shape != images.shape:
        found = (
            tuple(candidates.shape) if isinstance(candidates, Tensor) else type(candidates).__name__
        )
        raise ContractError(who, f"perturb returned {found}", f"images {tuple(images.shape)}")
    if candidates.dtype != images.dtype:
        raise ContractError(who, f"perturb returned {candidates.dtype}", f"{images.dtype}")
    if not torch.isfinite(candidates).all():
        raise ContractError(who, "perturb returned NaN or infinite pixels", "finite pixels")
    return candidates.detach()
