"""Pictures, read back pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rdd_bench.pictures import GAP, TILE, Examples, picture_of_attack, picture_of_set
from rdd_bench.types import DistilledSet


def pixels(png: bytes) -> Tensor:
    """Return (h, w, 3) floats of [0, 1]."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return torch.tensor(np.asarray(image.convert("RGB")).astype("float32")) / 255


def tile(png: bytes, row: int, column: int, side: int = TILE) -> Tensor:
    """Return one image of a picture, (h, w, 3)."""
    top, left = (GAP + place * (side + GAP) for place in (row, column))
    return pixels(png)[top : top + side, left : left + side]


def test_a_set_is_shown_class_by_class_and_cut_to_the_box():
    images = torch.rand(6, 3, 8, 8)
    images[0, 0, 0, 0], images[0, 1, 0, 0] = 2.0, -1.0
    labels = torch.tensor([2, 0, 1, 2, 0, 1])
    png = picture_of_set(DistilledSet(images, labels), 3)
    assert pixels(png).shape == (3 * (TILE + GAP) + GAP, 2 * (TILE + GAP) + GAP, 3)
    for row, members in enumerate(([1, 4], [2, 5], [0, 3])):
        for column, index in enumerate(members):
            shown = tile(png, row, column)[:: TILE // 8, :: TILE // 8].permute(2, 0, 1)
            assert torch.allclose(shown, images[index].clamp(0, 1), atol=0.5 / 255 + 1e-6)


def test_a_large_set_shows_a_part_of_it():
    labels = torch.arange(40).repeat_interleave(30)
    png = picture_of_set(DistilledSet(torch.rand(1200, 1, 4, 4), labels), 40)
    assert pixels(png).shape == (20 * (TILE + GAP) + GAP, 10 * (TILE + GAP) + GAP, 3)
    assert len(png) < 300_000


@pytest.mark.parametrize(
    ("channels", "size", "scale"), [(1, (28, 28), 3), (2, (5, 9), 8), (3, (100, 70), 1)]
)
def test_images_are_enlarged_by_a_whole_number(channels, size, scale):
    made = DistilledSet(torch.rand(3, channels, *size), torch.tensor([0, 1, 1]))
    expected = [2 * (size[i] * scale + GAP) + GAP for i in (0, 1)]
    assert list(pixels(picture_of_set(made, 2)).shape) == [*expected, 3]


def test_soft_labels_are_shown_by_their_most_probable_class():
    images = torch.rand(2, 1, 8, 8)
    hard = picture_of_set(DistilledSet(images, torch.tensor([1, 0])), 2)
    soft = picture_of_set(DistilledSet(images, torch.tensor([[0.2, 0.8], [0.6, 0.4]])), 2)
    assert hard == soft


def test_an_attack_is_shown_with_what_it_added():
    images = torch.full((2, 1, 8, 8), 0.5)
    candidates = images.clone()
    candidates[0, 0, :4] += 0.1
    candidates[0, 0, 4:] -= 0.1
    examples = Examples(images, candidates, torch.tensor([3, 4]), torch.tensor([8, 4]))
    png = picture_of_attack(examples, 0.1)
    assert torch.allclose(tile(png, 0, 0), torch.tensor(0.5), atol=1 / 255)
    assert torch.allclose(tile(png, 1, 0)[:10], torch.tensor(0.6), atol=1 / 255)
    assert torch.allclose(tile(png, 2, 0)[:10], torch.tensor(1.0), atol=1 / 255)
    assert torch.allclose(tile(png, 2, 0)[-10:], torch.tensor(0.0), atol=1 / 255)
    assert torch.allclose(tile(png, 2, 1), torch.tensor(0.5), atol=1 / 255)
    # The captions below, in black.
    assert pixels(png)[-12:].min() < 0.1
