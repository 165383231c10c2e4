"""What the host demands of returned values. Every message names who, found and expected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdd_bench.checks import check_distilled_set, check_network, check_splits
from rdd_bench.errors import ContractError
from rdd_bench.types import (
    DatasetSpec,
    DistilledSet,
    LabelledImages,
    Recipe,
    Splits,
    Views,
    Whitening,
)

WHO = "distiller 'toy' (toys 1.0)"
SPEC = DatasetSpec(
    name="toy", shape=(1, 4, 4), class_names=("a", "b", "c"), mean=(0.5,), std=(0.2,)
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def refusal(check: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """Return what was found and what was expected."""
    with pytest.raises(ContractError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    match = re.fullmatch(rf"{re.escape(WHO)}[^:]*: (.+); expected (.+)", message)
    assert match, message
    return match[1], match[2]


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def soft(rows: int = 6, columns: int = 3) -> Tensor:
    return torch.full((rows, columns), 1 / columns)


# Distilled sets -------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [LABELS, soft()], ids=["hard", "soft"])
def test_a_good_set_is_returned_as_it_is(labels):
    made = DistilledSet(images() * 3 - 1, labels)  # distilled pixels may leave [0, 1]
    assert check_distilled_set(made, SPEC, 2, WHO) is made


def test_a_reference_may_have_any_number_of_images():
    made = DistilledSet(images(5), torch.tensor([0, 0, 0, 1, 2]))
    assert check_distilled_set(made, SPEC, None, WHO) is made


WRONG_SETS: dict[str, tuple[Any, Any, str, str]] = {
    "a list": ([[0.0]], LABELS, "images are list", "a torch tensor"),
    "numpy": (images().numpy(), LABELS, "images are ndarray", "a torch tensor"),
    "no channel": (images()[:, 0], LABELS, "images of shape (6, 4, 4)", "(n, 1, 4, 4)"),
    "other size": (
        torch.zeros(6, 1, 5, 4), LABELS, "images of shape (6, 1, 5, 4)", "(n, 1, 4, 4)",
    ),
    "nothing": (images(0), LABELS[:0], "images of shape (0, 1, 4, 4)", "(n, 1, 4, 4)"),
    "double": (images().double(), LABELS, "images are torch.float64", "torch.float32"),
    "bytes": (images().byte(), LABELS, "images are torch.uint8", "torch.float32"),
    "nan": (
        images().index_fill(0, torch.tensor([1]), torch.nan), LABELS,
        "16 pixels are NaN or infinite", "finite pixels",
    ),
    "inf": (images() / 0, LABELS, "96 pixels are NaN or infinite", "finite pixels"),
    "listed labels": (images(), [0, 0, 1, 1, 2, 2], "labels are list", "a torch tensor"),
    "int32 labels": (images(), LABELS.int(), "labels are torch.int32", "int64 (n,), or float32"),
    "float labels": (images(), LABELS.float(), "labels are torch.float32", "int64 (n,), or"),
    "few labels": (images(), LABELS[:4], "labels of shape (4,)", "(6,)"),
    "a label": (images(), torch.tensor(1), "labels of shape ()", "(6,)"),
    "label 3": (images(), LABELS + 1, "labels span 1..3", "0..2"),
    "label -1": (images(), LABELS - 1, "labels span -1..1", "0..2"),
    "one class twice": (
        images(), torch.tensor([0, 0, 0, 1, 2, 2]),
        "class 0 has 3 images (2 classes are wrong)", "exactly 2 images of every class",
    ),
    "too many": (images(9), torch.arange(9) % 3, "class 0 has 3 images (3 classes", "exactly 2"),
    "columns": (images(), soft(columns=4), "soft labels (6, 4) of torch.float32", "(6, 3) of"),
    "rows": (images(), soft(rows=5), "soft labels (5, 3) of torch.float32", "(6, 3) of"),
    "double rows": (images(), soft().double(), "soft labels (6, 3) of torch.float64", "(6, 3) of"),
    "logits": (images(), soft() * 2, "soft labels that are no probabilities", "rows from 0 to 1"),
    "negative": (
        images(), torch.tensor([[1.5, -0.5, 0.0]]).repeat(6, 1),
        "soft labels that are no probabilities", "rows from 0 to 1 that sum to one",
    ),
    "nan rows": (images(), soft() * torch.nan, "soft labels that are no prob", "rows from 0 to 1"),
    "soft and many": (images(9), soft(rows=9), "9 images", "6"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SETS)
def test_a_wrong_set_is_refused(case):
    pixels, labels, found, expected = WRONG_SETS[case]
    made = DistilledSet(pixels, labels)
    said = refusal(check_distilled_set, made, SPEC, 2, WHO)
    assert said[0].startswith(found)
    assert said[1].startswith(expected)


def whitening(**changes: Any) -> Whitening:
    return Whitening(**{"mean": torch.zeros(16), "matrix": torch.eye(16), **changes})


def views(**changes: Any) -> Views:
    """Return two epochs of views of six images."""
    parts: dict[str, Any] = {
        "image": torch.arange(12) % 6,
        "crop": torch.tensor([0.0, 0.0, 4.0, 4.0]).repeat(12, 1),
        "flip": torch.zeros(12, dtype=torch.bool),
        "partner": torch.arange(12).flip(0),
        "mix_box": torch.zeros(12, 4, dtype=torch.int64),
        "mix_weight": torch.zeros(12),
        "logits": torch.zeros(12, 3, dtype=torch.float16),
    }
    return Views(**{**parts, **changes})


def test_a_good_set_with_all_extras_is_returned_as_it_is():
    made = DistilledSet(
        images(), LABELS, Recipe(uses=("whitening", "weights", "views")),
        whitening=whitening(), weights=torch.ones(6), views=views(),
    )  # fmt: skip
    assert check_distilled_set(made, SPEC, 2, WHO) is made


WRONG_EXTRAS: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": (
        {"recipe": Recipe(uses=("weights",))}, "the recipe uses weights, which the set lacks",
        "weights",
    ),
    "a matrix": ({"whitening": torch.eye(16)}, "a Tensor for Whitening", "one or None"),
    "another size": (
        {"whitening": whitening(matrix=torch.eye(9))},
        "whitening.matrix is torch.float32 of shape (9, 9)", "float32 (16, 16)",
    ),
    "singular": (
        {"whitening": whitening(matrix=torch.ones(16, 16))}, "whitening.matrix is singular",
        "an invertible matrix",
    ),
    "weights of nothing": ({"weights": torch.zeros(6)}, "weights from 0 with mean 0", "none neg"),
    "few weights": ({"weights": torch.ones(5)}, "weights is torch.float32 of shape (5,)", "float"),
    "odd views": (
        {"views": views(image=torch.arange(7) % 6)}, "7 views for 6 images", "a multiple of 6",
    ),
    "views of another image": (
        {"views": views(image=torch.full((12,), 6))}, "views.image spans 6..6", "0..5",
    ),
    "no partner": ({"views": views(partner=torch.full((12,), -1))}, "views.partner spans", "0..11"),
    "wide logits": (
        {"views": views(logits=torch.zeros(12, 4).half())}, "views.logits is torch.float16 of (12",
        "torch.float16 (12, 3)",
    ),
    "nan logits": (
        {"views": views(logits=torch.full((12, 3), torch.nan).half())},
        "views.logits has NaN or infinite values", "finite values",
    ),
    "empty crops": ({"views": views(crop=torch.zeros(12, 4))}, "views with a mix weight", "parts"),
    "too much of the partner": (
        {"views": views(mix_weight=torch.full((12,), 1.5))}, "views with a mix weight", "parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_EXTRAS)
def test_wrong_extras_are_refused(case):
    changes, found, expected = WRONG_EXTRAS[case]
    made = DistilledSet(**{"images": images(), "labels": LABELS, **changes})
    said = refusal(check_distilled_set, made, SPEC, 2, WHO)
    assert said[0].startswith(found)
    assert said[1].startswith(expected)


@pytest.mark.parametrize("value", [None, (images(), LABELS), images()])
def test_what_is_no_set_is_refused(value):
    found, expected = refusal(check_distilled_set, value, SPEC, 2, WHO)
    assert found == f"distill returned {type(value).__name__}"
    assert expected == "a DistilledSet"


# Networks -------------------------------------------------------------------------------------


def test_a_good_network_is_returned_in_the_mode_it_came_in():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    before = {name: t.clone() for name, t in network.state_dict().items()}
    assert check_network(network, SPEC, WHO) is network
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert not check_network(network.eval(), SPEC, WHO).training


@pytest.mark.parametrize("value", [None, lambda x: x, nn.Linear])
def test_what_is_no_network_is_refused(value):
    found, expected = refusal(check_network, value, SPEC, WHO)
    assert found.startswith("build returned ")
    assert expected == "an nn.Module"


class _Pair(nn.Module):
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, pixels


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), "give (2, 10)"),
        (nn.Identity(), "give (2, 1, 4, 4)"),
        (nn.Flatten(0), "give (32,)"),
        (_Pair(), "give tuple"),
    ],
)
def test_a_network_that_gives_no_logits_is_refused(network, found):
    said = refusal(check_network, network, SPEC, WHO)
    assert said == (f"two images of shape (1, 4, 4) {found}", "logits (2, 3)")


# Splits ---------------------------------------------------------------------------------------


def splits(**changes: Any) -> Splits:
    part = LabelledImages(images(), LABELS)
    return dataclasses.replace(Splits(SPEC, part, part), **changes)


def spec(**changes: Any) -> DatasetSpec:
    return dataclasses.replace(SPEC, **changes)


def test_good_splits_are_returned_as_they_are():
    made = splits()
    assert check_splits(made, WHO) is made


BRIGHT, DARK = images() * 255, images() - 0.5
WRONG_SPLITS: dict[str, tuple[Any, str, str]] = {
    "nothing": (None, "load returned NoneType", "a Splits"),
    "a pair": ((1, 2), "load returned tuple", "a Splits"),
    "two means": (splits(spec=spec(mean=(0.5, 0.5))), "mean (0.5, 0.5)", "one mean and one"),
    "no std": (splits(spec=spec(std=(0.0,))), "mean (0.5,) and std (0.0,)", "one mean and one"),
    "one class": (splits(spec=spec(class_names=("a",))), "1 classes", "two or more"),
    "grey levels": (splits(train=LabelledImages(BRIGHT, LABELS)), "pixels span [", "[0, 1]"),
    "normalised": (splits(test=LabelledImages(DARK, LABELS)), "pixels span [-", "[0, 1]"),
    "bytes": (
        splits(test=LabelledImages(images().byte(), LABELS)), "images are torch.uint8", "torch.",
    ),
    "label range": (splits(test=LabelledImages(images(), LABELS + 1)), "labels span 1..3", "0..2"),
    "label type": (
        splits(train=LabelledImages(images(), LABELS.int())), "labels are torch.int32", "int64",
    ),
    "listed labels": (
        splits(train=LabelledImages(images(), [0] * 6)), "labels are list", "a torch tensor",  # type: ignore[arg-type]
    ),
    "numpy labels": (
        splits(train=LabelledImages(images(), np.zeros(6, int))), "labels are ndarray", "a torch",  # type: ignore[arg-type]
    ),
    "empty": (splits(test=LabelledImages(images(0), LABELS[:0])), "images of shape (0,", "(n, 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SPLITS)
def test_wrong_splits_are_refused(case):
    made, found, expected = WRONG_SPLITS[case]
    said = refusal(check_splits, made, WHO)
    assert said[0].startswith(found)
    assert said[1].startswith(expected)


def test_the_message_names_the_split():
    with pytest.raises(ContractError, match=re.escape(f"{WHO}, test split: labels span")):
        check_splits(splits(test=LabelledImages(images(), LABELS + 1)), WHO)
