"""DSA against the numbers of the paper and against slow per-sample references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rdd_bench import augment
from rdd_bench.augment import draw
from rdd_bench.errors import RddBenchError
from rdd_bench.types import AUGMENTATIONS

torch.set_num_threads(1)

ALL = "_".join(AUGMENTATIONS)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def ramps(count: int, height: int, width: int) -> Tensor:
    """Images that spell out where each pixel came from: channel 0 the row, channel 1 the column.

    Both count from one, because zero is what is filled in.
    """
    rows = torch.arange(1.0, height + 1)[:, None].expand(height, width)
    columns = torch.arange(1.0, width + 1)[None].expand(height, width)
    return torch.stack([rows, columns]).expand(count, 2, height, width)


def test_it_knows_the_operations_that_recipes_may_name():
    assert tuple(augment._OPERATIONS) == AUGMENTATIONS


@pytest.mark.parametrize("strategy", ["", "_"])
def test_an_empty_strategy_is_the_identity(strategy):
    images = noise(3, 1, 8, 8)
    assert torch.equal(draw(strategy, 1, (8, 8))(images), images)


def test_an_unknown_operation_is_named():
    with pytest.raises(RddBenchError, match=r"'colour' in 'crop_colour'.*known: color"):
        draw("crop_colour", 1, (8, 8))


def test_every_operation_of_the_strategy_is_drawn_equally_often(monkeypatch):
    drawn = []
    for name in AUGMENTATIONS:
        monkeypatch.setitem(
            augment._OPERATIONS, name, lambda count, size, name=name: drawn.append(name)
        )
    for _ in range(3000):
        draw(ALL, 1, (8, 8))
    for name in AUGMENTATIONS:
        # Binomial with mean 500 and standard deviation 20.
        assert abs(drawn.count(name) - 500) < 100


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_siamese_draw_gives_two_batches_the_same_parameters(name):
    image = noise(1, 3, 8, 10)
    transform = draw(name, 1, (8, 10))
    alone = transform(image)
    among_others = transform(torch.cat([noise(4, 3, 8, 10, seed=1), image]))
    assert torch.allclose(among_others[4:], alone, atol=1e-6)
    assert alone.shape == image.shape


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_for_single_images_differ_and_do_not_leak_into_each_other(name):
    images = noise(1, 3, 16, 12).expand(40, -1, -1, -1)
    out = draw(name, 40, (16, 12))(images)
    assert out.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in out}) >= (2 if name == "flip" else 10)
    torch.manual_seed(5)
    transform = draw(name, 40, (16, 12))
    before = transform(images)
    changed = images.clone()
    changed[7] += 1
    assert torch.equal(transform(changed)[torch.arange(40) != 7], before[torch.arange(40) != 7])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients_with_respect_to_images(name, count):
    images = noise(2, 3, 6, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(draw(name, count, (6, 5)), (images,))


def test_the_draw_depends_on_the_seed_only():
    images = noise(5, 3, 8, 8)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(torch.stack([draw(ALL, 5, (8, 8))(images) for _ in range(10)]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_color_is_brightness_then_saturation_then_contrast():
    """The three parameters are read off with images made for it, then applied by hand."""
    transform = draw("color", 500, (4, 4))
    flat = transform(torch.zeros(500, 3, 4, 4))
    shift = flat[:, 0, 0, 0]
    assert torch.equal(flat, shift.view(-1, 1, 1, 1).expand_as(flat))

    # Grey images have no saturation, so only the contrast stretches them; coloured images whose
    # every pixel is equal show the product of saturation and contrast.
    grey = torch.tensor([-1.0, 1.0]).repeat(8).view(1, 1, 4, 4).expand(500, 3, 4, 4)
    contrast = (transform(grey).amax((1, 2, 3)) - transform(grey).amin((1, 2, 3))) / 2
    colour = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(500, 3, 4, 4)
    saturation = transform(colour)[:, 2, 0, 0].sub(shift) / contrast

    for parameter, low, high in ((shift, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        assert low - 1e-5 <= parameter.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < parameter.max() <= high + 1e-5
    parameters = torch.stack([shift, contrast, saturation])
    assert torch.corrcoef(parameters).sub(torch.eye(3)).abs().max() < 0.2

    images = noise(500, 3, 4, 4)
    for n in range(0, 500, 50):
        expected = images[n] + shift[n]
        grey_value = expected.mean(0)
        expected = torch.stack([(c - grey_value) * saturation[n] + grey_value for c in expected])
        expected = (expected - expected.mean()) * contrast[n] + expected.mean()
        assert torch.allclose(transform(images)[n], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "reach"), [((32, 32), (4, 4)), ((8, 8), (1, 1)), ((28, 20), (4, 3))]
)
@pytest.mark.parametrize("siamese", [False, True])
def test_crop_shifts_by_whole_pixels_and_fills_with_zeros(size, reach, siamese):
    height, width = size
    seen = set()
    for _ in range(200 if siamese else 1):
        count = 1 if siamese else 200
        out = draw("crop", count, size)(ramps(200, *size))
        for image in out[:1] if siamese else out:
            # The middle pixel never leaves the image, so it tells the shift.
            y, x = height // 2, width // 2
            down, right = int(image[0, y, x]) - 1 - y, int(image[1, y, x]) - 1 - x
            seen.add((down, right))
            for i in range(0, height, 3):
                for j in range(0, width, 3):
                    inside = 0 <= i + down < height and 0 <= j + right < width
                    expected = (i + down + 1, j + right + 1) if inside else (0, 0)
                    assert (int(image[0, i, j]), int(image[1, i, j])) == expected
    downs, rights = ({shift[axis] for shift in seen} for axis in (0, 1))
    assert downs == set(range(-reach[0], reach[0] + 1))
    assert rights == set(range(-reach[1], reach[1] + 1))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (10, 6), (28, 28)])
def test_cutout_zeroes_one_square_whose_centre_lies_anywhere(size):
    height, width = size
    side_y, side_x = int(0.5 * height + 0.5), int(0.5 * width + 0.5)
    out = draw("cutout", 1500, size)(torch.ones(1500, 1, *size))
    centres: list[set[int]] = [set(), set()]
    for holes in out[:, 0] == 0:
        for axis, side, length in ((0, side_y, height), (1, side_x, width)):
            cut = holes.any(dim=1 - axis).nonzero().flatten().tolist()
            assert cut == list(range(cut[0], cut[-1] + 1))
            first = cut[0] if cut[0] > 0 else cut[-1] + 1 - side
            assert len(cut) == side or cut[0] == 0 or cut[-1] == length - 1
            centres[axis].add(first + side // 2)
        assert int(holes.sum()) == int(holes.any(0).sum()) * int(holes.any(1).sum())
    for axis, side, length in ((0, side_y, height), (1, side_x, width)):
        assert centres[axis] == set(range(length + 1 - side % 2))


def test_flip_mirrors_columns_of_half_of_the_images():
    images = noise(1000, 1, 4, 6)
    transform = draw("flip", 1000, (4, 6))
    out = transform(images)
    mirrored = (out == images.flip(3)).all(dim=(1, 2, 3))
    same = (out == images).all(dim=(1, 2, 3))
    assert torch.equal(mirrored, ~same)
    assert 420 < int(mirrored.sum()) < 580
    assert torch.equal(transform(out), images)


def sampled(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Bilinear interpolation at ``matrix @ (x, y)``, corners at +-1, zero outside: one by one."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = 2 * j / (width - 1) - 1, 2 * i / (height - 1) - 1
            u = (matrix[0][0] * x + matrix[0][1] * y + 1) * (width - 1) / 2
            v = (matrix[1][0] * x + matrix[1][1] * y + 1) * (height - 1) / 2
            for row in (math.floor(v), math.floor(v) + 1):
                for column in (math.floor(u), math.floor(u) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        weight = (1 - abs(v - row)) * (1 - abs(u - column))
                        out[:, i, j] += weight * image[:, row, column]
    return out


def parameters_of(name: str, count: int) -> list[list[list[float]]]:
    """Draw the matrices anew: the operations draw nothing else, and in this order."""
    if name == "scale":
        first, second = torch.rand(count), torch.rand(count)
        low, high = 1 / 1.2, 1.2
        x, y = low + (high - low) * first, low + (high - low) * second
        return [[[float(a), 0.0], [0.0, float(b)]] for a, b in zip(x, y, strict=True)]
    angles = [math.radians(15) * (2 * float(u) - 1) for u in torch.rand(count)]
    return [[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles]


@pytest.mark.parametrize("name", ["scale", "rotate"])
@pytest.mark.parametrize("siamese", [False, True])
def test_affine_operations_against_slow_interpolation(name, siamese):
    images = noise(4, 2, 9, 7, dtype=torch.float64)
    count = 1 if siamese else 4
    torch.manual_seed(3)
    torch.randint(1, ())  # the choice of the operation
    matrices = parameters_of(name, count) * (4 // count)
    torch.manual_seed(3)
    out = draw(name, count, (9, 7))(images)
    for image, matrix, got in zip(images, matrices, out, strict=True):
        # The parameters are drawn in single precision.
        assert torch.allclose(got, sampled(image, matrix), atol=1e-5)


def test_ranges_of_scale_and_rotation():
    """Linear ramps stay linear, so the matrix can be read off their slopes at the centre."""
    x = torch.linspace(-1, 1, 21).expand(21, 21)
    ramp = torch.stack([x, x.t()]).expand(2000, 2, 21, 21)
    step = 2 / 20

    def matrices(name: str) -> Tensor:
        out = draw(name, 2000, (21, 21))(ramp)
        right, down = out[:, :, 10, 11] - out[:, :, 10, 9], out[:, :, 11, 10] - out[:, :, 9, 10]
        return torch.stack([right, down], dim=2) / (2 * step)

    scale = matrices("scale")
    assert scale[:, 0, 1].abs().max() < 1e-4
    for axis in (0, 1):
        factor = scale[:, axis, axis]
        assert 1 / 1.2 - 1e-4 < factor.min() < 1 / 1.2 + 0.01
        assert 1.2 - 0.01 < factor.max() < 1.2 + 1e-4
    assert abs(torch.corrcoef(torch.stack([scale[:, 0, 0], scale[:, 1, 1]]))[0, 1]) < 0.1

    rotation = matrices("rotate")
    angle = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]).rad2deg()
    assert -15.01 < angle.min() < -14.8
    assert 14.8 < angle.max() < 15.01
    assert torch.allclose(rotation @ rotation.mT, torch.eye(2).expand(2000, 2, 2), atol=1e-4)
