"""Real data, checked, cut to the protocol's part and identified by hash."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rdd_bench.checks import check_splits
from rdd_bench.components import Dataset, Source
from rdd_bench.errors import RddBenchError
from rdd_bench.types import LabelledImages, Splits


def load_splits(dataset: Dataset[Any], who: str, source: Source, subset: tuple[int, int]) -> Splits:
    """Load a data set, check it, cut it and put the hashes of both splits into its spec.

    Args:
        dataset: The plugin.
        who: Its name in messages.
        source: Where data may come from.
        subset: Training and test images of every class; 0 keeps all.
    """
    splits = check_splits(dataset.load(source), who)
    classes = splits.spec.num_classes
    train = take_per_class(splits.train, subset[0], classes, f"{who}, train split")
    test = take_per_class(splits.test, subset[1], classes, f"{who}, test split")
    spec = dataclasses.replace(
        splits.spec, train_sha256=content_hash(train), test_sha256=content_hash(test)
    )
    return Splits(spec, train, test)


def content_hash(part: LabelledImages) -> str:
    """Return the SHA-256 of shape, pixels and labels in their order."""
    return tensors_hash(part.images, part.labels)


def tensors_hash(*tensors: Tensor) -> str:
    """Return the SHA-256 of the shapes, types and values of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def take_per_class(part: LabelledImages, count: int, num_classes: int, who: str) -> LabelledImages:
    """Return ``count`` images of every class, in their stored order; all of them for 0.

    Which ones is decided by the hash of their position, so that it depends on no library's
    random numbers and a smaller subset is contained in a larger one.
    """
    if not count:
        return part
    kept: list[int] = []
    for label in range(num_classes):
        members = (part.labels == label).nonzero().flatten().tolist()
        if len(members) < count:
            raise RddBenchError(
                f"{who}: class {label} has {len(members)} images; the protocol takes {count}"
            )
        kept += sorted(members, key=_position_hash)[:count]
    return part.subset(torch.tensor(sorted(kept)))


def take_in_turn(part: LabelledImages, count: int) -> LabelledImages:
    """Return ``count`` images, or all if there are fewer: the first of every class, and so on.

    Stored images may be sorted by class; the first of them would be of one class only.
    """
    seen: Counter[int] = Counter()
    turns: list[tuple[int, int]] = []
    for position, label in enumerate(part.labels.tolist()):
        turns.append((seen[label], position))
        seen[label] += 1
    chosen = sorted(position for _, position in sorted(turns)[:count])
    return part.subset(torch.tensor(chosen))


@lru_cache(maxsize=200_000)
def _position_hash(index: int) -> bytes:
    return hashlib.sha256(b"rdd-bench subset %d" % index).digest()
