"""Digits: 1,797 real handwritten digits of 8x8 pixels that come with scikit-learn.

Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49 (CC BY 4.0). scikit-learn holds the 1,797 images of
its test part, with grey levels 0 to 16. Nothing is fetched, so this set serves for trying things
out and for tests.

The set has no split of its own. Here 50 images of every class, those whose numbers have the
smallest SHA-256, are for testing, and the other 1,297 for training.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from rdd_bench.api import (
    Dataset,
    DatasetSpec,
    Info,
    LabelledImages,
    NoOptions,
    Source,
    Splits,
    hookimpl,
)

CLASSES = 10
TEST_IMAGES_PER_CLASS = 50
GREY_LEVELS = 16


class Digits(Dataset[NoOptions]):
    """Handwritten digits, 8x8 grey pixels, 1,297 for training and 500 for testing; built in."""

    name = "digits"
    info = Info(
        title="Digits",
        licence="MIT",
        paper="https://doi.org/10.24432/C50P49",
        origin="images from the package scikit-learn (UCI, CC-BY-4.0)",
    )

    def load(self, source: Source) -> Splits:  # noqa: ARG002 - the images come with a package
        """Return both splits, images (n, 1, 8, 8) in multiples of 1/16."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float().div_(GREY_LEVELS).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        everything = LabelledImages(images, labels)
        train, test = split_indices(labels.tolist())
        spec = DatasetSpec(
            name=self.name,
            shape=(1, 8, 8),
            class_names=tuple(map(str, range(CLASSES))),
            mean=(0.3064,),
            std=(0.3769,),
        )
        return Splits(
            spec,
            train=everything.subset(torch.tensor(train)),
            test=everything.subset(torch.tensor(test)),
        )


def split_indices(labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the numbers of the training and of the test images, both ascending.

    Hashes instead of a random generator: no version of any library can change the split.
    """
    shuffled = sorted(range(len(labels)), key=_rank)
    test: set[int] = set()
    for label in range(CLASSES):
        of_class = [index for index in shuffled if labels[index] == label]
        test.update(of_class[:TEST_IMAGES_PER_CLASS])
    train = [index for index in range(len(labels)) if index not in test]
    return train, sorted(test)


def _rank(index: int) -> str:
    return hashlib.sha256(f"digits-v1:{index}".encode()).hexdigest()


@hookimpl
def rdd_bench_datasets() -> list[type[Dataset[Any]]]:
    return [Digits]
