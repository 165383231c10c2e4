"""What can be said of a distilled set without training on it."""

from __future__ import annotations

from pathlib import Path

import torch

from rdd_bench.artifacts import set_hash
from rdd_bench.audit import fraction_out_of_range
from rdd_bench.foreign import ForeignSet, read_set
from rdd_bench.pictures import in_eight_bits
from rdd_bench.types import DistilledSet

Fact = tuple[str, str, str]
"""What was looked at, what was found, and what to think of it ('' if it is well)."""


def lint(path: Path) -> list[Fact]:
    """Return the facts of a file or folder.

    Raises:
        RddBenchError: If it is no distilled set.
    """
    found = read_set(path)
    made = found.complete or DistilledSet(found.images, found.labels)
    return [*_form(found, made), *_balance(made), *_pixels(found, made), *_training(found, made)]


def _form(found: ForeignSet, made: DistilledSet) -> list[Fact]:
    count, channels, height, width = made.images.shape
    kind = "hard" if made.labels.ndim == 1 else f"soft over {made.labels.shape[1]} classes"
    if made.views is not None:
        kind += f", and soft for {len(made.views)} views"
    return [
        ("format", found.format, ""),
        ("images", f"{count} of {height}x{width}, {channels} channel{'s'[: channels > 1]}", ""),
        ("labels", kind, ""),
        ("bytes", f"{made.num_bytes:,}", ""),
        ("sha256", set_hash(made), ""),
    ]


def _balance(made: DistilledSet) -> list[Fact]:
    labels = made.hard_labels
    if int(labels.min()) < 0:
        return [("classes", f"labels from {int(labels.min())}", "labels are 0 or more")]
    counts = torch.bincount(labels)
    low, high = int(counts.min()), int(counts.max())
    if low == high:
        return [("classes", f"{len(counts)}, {low} images each", "")]
    rarest = int(counts.argmin())
    return [
        (
            "classes",
            f"{len(counts)}, {low} to {high} images each",
            f"unbalanced: class {rarest} has {low}; a table is about images per class",
        )
    ]


def _pixels(found: ForeignSet, made: DistilledSet) -> list[Fact]:
    images = made.images
    low, high = images.min().item(), images.max().item()
    if found.normalised:
        space = "probably normalised, so to be undone on import"
        return [("pixel range", f"[{low:.3g}, {high:.3g}]", space)]
    outside = fraction_out_of_range(images)
    clipped = images.clamp(0, 1)
    cut = (images - clipped).abs()
    moved = (images - in_eight_bits(images)).abs()
    remark = "an attacker cannot reach such pixels, and a picture file cannot hold them"
    return [
        ("pixel range", f"[{low:.3g}, {high:.3g}]", ""),
        ("outside [0, 1]", f"{100 * outside:.1f} % of pixels", remark if outside else ""),
        ("clipping", f"moves pixels by {cut.mean():.2g} on average, {cut.max():.2g} at most", ""),
        (
            "as 8-bit pictures",
            f"moves pixels by {moved.mean():.2g} on average, {moved.max():.2g} at most",
            "",
        ),
    ]


def _training(found: ForeignSet, made: DistilledSet) -> list[Fact]:
    facts: list[Fact] = [
        ("remark", remark, "do not compare it with others") for remark in found.remarks
    ]
    if made.recipe is not None:
        changed = made.recipe.model_dump(mode="json", exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in changed.items()) or "the field's"
        facts.append(("recipe", shown, ""))
    else:
        facts.append(("recipe", "none", "only the protocol's recipes can train on it"))
    return facts
