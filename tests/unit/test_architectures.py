"""The built-in architectures: published sizes, independent forward passes, honest refusals."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm as timm_package
import torch
import torchvision
from torch import nn
from torch.nn import functional

import rdd_bench_builtin
from rdd_bench.checks import check_network
from rdd_bench.components import Architecture
from rdd_bench.errors import NotApplicable, RddBenchError
from rdd_bench.types import DatasetSpec
from rdd_bench_builtin.architectures.convnet import ConvNet
from rdd_bench_builtin.architectures.mlp import MLP
from rdd_bench_builtin.architectures.resnet import ResNet18
from rdd_bench_builtin.architectures.timm import Timm

PLUGINS = Path(rdd_bench_builtin.__file__).parent
MODULES = sorted(
    path
    for kind in ("architectures", "datasets")
    for path in (PLUGINS / kind).glob("*.py")
    if not path.name.startswith("_")
)


def spec_of(shape: tuple[int, int, int], classes: int = 10) -> DatasetSpec:
    return DatasetSpec(
        name="test",
        shape=shape,
        class_names=tuple(map(str, range(classes))),
        mean=(0.5,) * shape[0],
        std=(0.25,) * shape[0],
    )


def build(
    architecture: type[Architecture[Any]], spec: DatasetSpec, options: Mapping[str, Any] = {}
) -> Any:
    return architecture(architecture.parse(options)).build(spec)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("shape", "classes", "depth", "count"),
    [
        ((1, 28, 28), 10, 3, 317_706),
        ((3, 32, 32), 10, 3, 320_010),
        ((3, 32, 32), 100, 3, 504_420),
        ((3, 64, 64), 200, 4, 857_160),
        ((3, 128, 128), 10, 5, 615_690),
    ],
)
def test_convnet_has_the_field_s_parameter_counts(shape, classes, depth, count):
    network = build(ConvNet, spec_of(shape, classes), {"depth": depth})
    assert parameters(network) == count
    assert network.embed(torch.rand(2, *shape)).shape == (2, 128 * 4 * 4)


@pytest.mark.parametrize(("shape", "first_padding"), [((1, 28, 28), 3), ((3, 32, 32), 1)])
def test_convnet_computes_what_the_paper_says(shape, first_padding):
    """Against functional calls, with instance norm where the network has group norm."""
    torch.manual_seed(0)
    network = build(ConvNet, spec_of(shape))
    with torch.no_grad():
        for parameter in network.parameters():  # Fresh norms are the identity; make them count.
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = list(network.parameters())
    images = torch.randn(4, *shape)
    maps = images
    for block in range(3):
        weight, bias, scale, shift = weights[4 * block : 4 * block + 4]
        padding = first_padding if block == 0 else 1
        maps = functional.conv2d(maps, weight, bias, padding=padding)
        maps = functional.instance_norm(maps, weight=scale, bias=shift)
        maps = functional.avg_pool2d(maps.clamp_min(0), 2)
    torch.testing.assert_close(network.embed(images), maps.flatten(1), atol=1e-4, rtol=1e-4)
    logits = maps.flatten(1) @ weights[-2].T + weights[-1]
    torch.testing.assert_close(network(images), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("norm", "activation", "pooling"),
    list(
        itertools.product(
            ("instance", "batch", "layer", "group", "none"),
            ("relu", "leakyrelu", "sigmoid", "swish"),
            ("avg", "max", "none"),
        )
    ),
)
def test_every_convnet_runs_on_small_grey_images(norm, activation, pooling):
    options = {"width": 4, "norm": norm, "activation": activation, "pooling": pooling}
    spec = spec_of((1, 8, 8))
    network = build(ConvNet, spec, options)
    check_network(network, spec, "convnet")
    side = 8 if pooling == "none" else 1
    assert network.embed(torch.rand(2, 1, 8, 8)).shape == (2, 4 * side**2)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", lambda x: x.clamp_min(0)),
        ("leakyrelu", lambda x: torch.where(x > 0, x, 0.01 * x)),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
        ("swish", lambda x: x / (1 + (-x).exp())),
    ],
)
def test_convnet_activations(activation, function):
    options = {"depth": 1, "width": 4, "norm": "none", "pooling": "none", "activation": activation}
    network = build(ConvNet, spec_of((3, 8, 8)), options)
    weight, bias, *_ = network.parameters()
    images = torch.randn(2, 3, 8, 8)
    expected = function(functional.conv2d(images, weight, bias, padding=1)).flatten(1)
    torch.testing.assert_close(network.embed(images), expected)


@pytest.mark.parametrize(
    ("pooling", "function"),
    [("avg", lambda windows: windows.mean(-1)), ("max", lambda windows: windows.amax(-1))],
)
def test_convnet_poolings(pooling, function):
    options = {"depth": 1, "width": 4, "norm": "none", "activation": "relu", "pooling": pooling}
    network = build(ConvNet, spec_of((3, 8, 8)), options)
    weight, bias, *_ = network.parameters()
    images = torch.randn(2, 3, 8, 8)
    maps = functional.conv2d(images, weight, bias, padding=1).clamp_min(0)
    windows = maps.view(2, 4, 4, 2, 4, 2).transpose(3, 4).flatten(4)
    torch.testing.assert_close(network.embed(images), function(windows).flatten(1))


@pytest.mark.parametrize(
    ("norm", "axes"),
    # The maps (2, 8, 8, 8) are seen as (image, group, channel of the group, pixel), four groups.
    [("batch", (0, 3)), ("layer", (1, 2, 3)), ("group", (2, 3)), ("instance", (3,))],
)
def test_convnet_norms_average_over_the_right_axes(norm, axes):
    options = {"depth": 1, "width": 8, "norm": norm, "activation": "sigmoid", "pooling": "none"}
    network = build(ConvNet, spec_of((3, 8, 8)), options)
    weight, bias, *_ = network.parameters()
    images = torch.randn(2, 3, 8, 8)
    maps = functional.conv2d(images, weight, bias, padding=1).view(2, 4, 2, 64)
    if norm in ("batch", "instance"):
        maps = maps.reshape(2, 8, 1, 64)
    mean = maps.mean(axes, keepdim=True)
    variance = (maps - mean).square().mean(axes, keepdim=True)
    expected = ((maps - mean) / (variance + 1e-5).sqrt()).sigmoid().flatten(1)
    torch.testing.assert_close(network.embed(images), expected, atol=1e-5, rtol=1e-4)


def test_convnet_sizes_its_classifier_by_the_map_that_is_left():
    network = build(ConvNet, spec_of((3, 13, 30)), {"depth": 2, "width": 4})
    assert network.embed(torch.rand(2, 3, 13, 30)).shape == (2, 4 * 3 * 7)


@pytest.mark.parametrize(
    ("depth", "shape", "block"), [(4, (1, 8, 8), 4), (6, (3, 32, 32), 6), (2, (3, 2, 32), 2)]
)
def test_convnet_refuses_images_too_small_for_its_depth(depth, shape, block):
    with pytest.raises(NotApplicable, match=rf"block {block} .* use depth={block - 1} or less"):
        build(ConvNet, spec_of(shape), {"depth": depth})


def test_convnet_refuses_to_normalise_single_pixels_away():
    with pytest.raises(NotApplicable, match="instance normalisation of a 1x1 map erases it"):
        build(ConvNet, spec_of((3, 1, 1)), {"pooling": "none"})


def test_convnet_groups_must_divide_the_width():
    with pytest.raises(RddBenchError, match="width divisible by 4, not 6"):
        ConvNet.configured({"norm": "group", "width": 6})


def test_convnet_can_be_differentiated_twice():
    """Gradient-matching distillers need it."""
    network = build(ConvNet, spec_of((3, 8, 8)), {"width": 4})
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    first = torch.autograd.grad(
        network(images).logsumexp(1).sum(), list(network.parameters()), create_graph=True
    )
    (second,) = torch.autograd.grad(
        torch.stack([part.square().sum() for part in first]).sum(), images
    )
    assert second.abs().sum() > 0


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((1, 28, 28), {}, 784 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ((3, 32, 32), {"width": 64, "depth": 2}, 3072 * 64 + 64 + 64 * 10 + 10),
        ((1, 8, 8), {"depth": 1}, 64 * 10 + 10),
    ],
)
def test_mlp_parameter_counts(shape, options, count):
    assert parameters(build(MLP, spec_of(shape), options)) == count


def test_mlp_computes_relu_layers():
    network = build(MLP, spec_of((1, 8, 8)))
    first, a, second, b, last, c = network.parameters()
    images = torch.randn(5, 1, 8, 8)
    hidden = (images.flatten(1) @ first.T + a).clamp_min(0)
    hidden = (hidden @ second.T + b).clamp_min(0)
    torch.testing.assert_close(network.embed(images), hidden)
    torch.testing.assert_close(network(images), hidden @ last.T + c)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_resnet18_has_the_usual_parameter_count(norm):
    assert parameters(build(ResNet18, spec_of((3, 32, 32)), {"norm": norm})) == 11_173_962


def test_resnet18_computes_what_torchvision_s_resnet_does():
    """Torchvision's own class with the stem replaced, given the same weights."""
    torch.manual_seed(0)
    network = build(ResNet18, spec_of((3, 32, 32))).eval()
    reference = torchvision.models.resnet18(num_classes=10).eval()
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    theirs = reference.state_dict()
    ours = network.state_dict().values()
    assert len(ours) == len(theirs)
    reference.load_state_dict(dict(zip(theirs, ours, strict=True)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images))
        assert network.embed(images).shape == (2, 512)


def test_resnet18_is_initialised_by_fan_out():
    torch.manual_seed(0)
    network = build(ResNet18, spec_of((3, 32, 32)))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 17 + 3
    for convolution in convolutions[1:]:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        ("batch", (1, 8, 8)),
        ("group", (1, 8, 8)),
        ("instance", (1, 9, 8)),
        ("instance", (3, 32, 32)),
    ],
)
def test_resnet18_runs_and_listens_to_its_images(norm, shape):
    spec = spec_of(shape)
    network = build(ResNet18, spec, {"width": 8, "norm": norm})
    check_network(network, spec, "resnet18")
    first, second = network(torch.randn(2, *shape))
    assert not torch.allclose(first, second)
    assert network.embed(torch.rand(2, *shape)).shape == (2, 64)


@pytest.mark.parametrize(("norm", "width"), [("instance", 8), ("group", 4)])
def test_resnet18_refuses_norms_that_erase_the_last_map(norm, width):
    with pytest.raises(NotApplicable, match="the last map is 1x1"):
        build(ResNet18, spec_of((1, 8, 8)), {"norm": norm, "width": width})


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("test_resnet", (1, 8, 8)),  # takes no img_size
        ("test_convnext", (3, 32, 32)),
        ("test_efficientnet", (3, 28, 28)),
        ("test_vit", (1, 32, 32)),  # takes img_size
        ("test_vit", (3, 32, 64)),
    ],
)
def test_timm_models_are_fitted_to_the_images(model, shape):
    spec = spec_of(shape, classes=7)
    network = build(Timm, spec, {"model": model})
    assert network.training
    check_network(network, spec, model)
    network.eval()
    images = torch.randn(3, *shape)
    features = network.embed(images)
    assert features.ndim == 2
    head = network.model.get_classifier()
    torch.testing.assert_close(network(images), head(features))


def test_timm_models_start_untrained(monkeypatch):
    torch.manual_seed(5)
    network = build(Timm, spec_of((3, 32, 32)), {"model": "test_resnet"})
    torch.manual_seed(5)
    plain = timm_package.create_model("test_resnet", pretrained=False, num_classes=10)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], tensor), name

    asked = []
    create = timm_package.create_model

    def record(*args, **kwargs):
        asked.append(kwargs["pretrained"])
        return create(*args, **kwargs)

    monkeypatch.setattr(timm_package, "create_model", record)
    build(Timm, spec_of((3, 32, 32)), {"model": "test_resnet"})
    assert asked == [False, False]  # With the image size, refused, and without.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet81", r"has no model 'resnet81'; did you mean resnet\d+ or .*timm.list_models"),
        ("no such thing at all", r"has no model .*; the \d+ names are in timm.list_models"),
        ("resnet18.a1_in1k", "asks for the weights 'a1_in1k'.* say timm:resnet18"),
        ("hf-hub:timm/resnet18.a1_in1k", "has no model"),
    ],
)
def test_timm_names_that_do_not_exist(model, message):
    with pytest.raises(RddBenchError, match=message) as caught:
        build(Timm, spec_of((3, 32, 32)), {"model": model})
    assert not isinstance(caught.value, NotApplicable)


@pytest.mark.parametrize("model", ["test_vit", "inception_v4"])
def test_timm_models_that_cannot_take_the_images(model):
    with pytest.raises(NotApplicable, match=rf"timm:{model} cannot take images of 3x8x8: \w+"):
        build(Timm, spec_of((3, 8, 8)), {"model": model})


@pytest.mark.parametrize("architecture", [ConvNet, MLP, ResNet18, Timm])
def test_building_draws_from_the_global_generator(architecture):
    """Same seed, same bits; and a second network is another one."""
    spec = spec_of((1, 8, 8))
    options = architecture.smoke
    torch.manual_seed(1)
    first, second = build(architecture, spec, options), build(architecture, spec, options)
    torch.manual_seed(1)
    again = build(architecture, spec, options)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in weights)
    check_network(first, spec, architecture.name)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_plugin_modules_touch_nothing_heavy_when_imported(path, monkeypatch):
    """What ``rdd-bench list`` relies on."""

    class Untouchable(types.ModuleType):
        def __getattribute__(self, name):
            if name.startswith("__"):
                return super().__getattribute__(name)
            raise AssertionError(f"touched torch.{name} at import time")

    monkeypatch.setitem(sys.modules, "torch", Untouchable("torch"))
    for heavy in ("torchvision", "timm", "sklearn", "PIL", "scipy", "numpy"):
        monkeypatch.setitem(sys.modules, heavy, None)
    spec = importlib.util.spec_from_file_location("freshly_imported", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "freshly_imported", module)
    spec.loader.exec_module(module)
