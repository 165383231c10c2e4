"""The pictures of views, against plain slicing."""

from __future__ import annotations

import torch
from torch import Tensor

from rdd_bench.types import Views
from rdd_bench.views import render

IMAGES = torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(0))
WHOLE = (0.0, 0.0, 6.0, 8.0)


def views(
    crops: list[tuple[float, float, float, float]],
    images: list[int] | None = None,
    flips: list[bool] | None = None,
    partners: list[int] | None = None,
    boxes: list[tuple[int, int, int, int]] | None = None,
    shares: list[float] | None = None,
) -> Views:
    count = len(crops)
    return Views(
        image=torch.tensor(images or [0] * count),
        crop=torch.tensor(crops),
        flip=torch.tensor(flips or [False] * count),
        partner=torch.tensor(partners or list(range(count))),
        mix_box=torch.tensor(boxes or [(0, 0, 6, 8)] * count),
        mix_weight=torch.tensor(shares or [0.0] * count),
        logits=torch.zeros(count, 2).half(),
    )


def shown(made: Views, *indices: int) -> Tensor:
    return render(IMAGES, made, torch.tensor(indices))


def test_the_whole_image_is_shown_as_it_is():
    assert torch.allclose(shown(views([WHOLE], images=[2]), 0)[0], IMAGES[2], atol=1e-6)


def test_a_flip_mirrors_the_columns():
    assert torch.allclose(shown(views([WHOLE], flips=[True]), 0)[0], IMAGES[0].flip(2), atol=1e-6)


def test_a_shifted_crop_shows_black_beyond_the_image():
    picture = shown(views([(-2.0, 3.0, 6.0, 8.0)]), 0)[0]
    assert torch.allclose(picture[:, 2:, :5], IMAGES[0][:, :4, 3:], atol=1e-6)
    assert picture[:, :2].abs().max() < 1e-6
    assert picture[:, :, 5:].abs().max() < 1e-6


def test_a_smaller_crop_is_enlarged_bilinearly():
    picture = shown(views([(1.0, 2.0, 3.0, 4.0)]), 0)[0]
    # Twice the size: interpolate the crop with its true neighbours around it.
    whole = torch.nn.functional.interpolate(IMAGES[:1], scale_factor=2, mode="bilinear")[0]
    assert torch.allclose(picture, whole[:, 2:8, 4:12], atol=1e-6)


def test_cutmix_shows_the_partner_inside_the_box_only():
    made = views(
        [WHOLE, WHOLE], images=[0, 1], partners=[1, 1], boxes=[(1, 2, 3, 4), (0, 0, 6, 8)],
        shares=[1.0, 0.0],
    )  # fmt: skip
    expected = IMAGES[0].clone()
    expected[:, 1:4, 2:6] = IMAGES[1][:, 1:4, 2:6]
    # The partner is rendered although the batch does not hold it.
    assert torch.allclose(shown(made, 0)[0], expected, atol=1e-6)
    assert torch.allclose(shown(made, 1)[0], IMAGES[1], atol=1e-6)


def test_mixup_blends_two_views_with_their_own_crops_and_flips():
    made = views(
        [WHOLE, (0.0, 1.0, 6.0, 8.0)], images=[0, 1], flips=[False, True], partners=[1, 1],
        shares=[0.25, 0.0],
    )  # fmt: skip
    pictures = shown(made, 0, 1)
    assert torch.allclose(pictures[0], 0.75 * IMAGES[0] + 0.25 * pictures[1], atol=1e-6)


def test_a_view_has_a_gradient_to_its_image():
    images = IMAGES.clone().requires_grad_()
    picture = render(images, views([(1.0, 1.0, 4.0, 5.0)], images=[1]), torch.tensor([0]))
    torch.autograd.backward(picture.sum())
    assert images.grad is not None
    assert images.grad[1].abs().sum() > 0
    assert images.grad[0].abs().sum() == 0
