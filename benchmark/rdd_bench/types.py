"""The values that flow through the suite. All are frozen, none knows where it runs.

Shapes use ``n`` images, ``c`` channels, ``h`` height, ``w`` width, ``k`` classes. Images are
float32 **pixels in [0, 1]**; normalisation is a layer inside the network that is evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from rdd_bench.errors import RddBenchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Norm = Literal["linf", "l2"]

Extra = Literal["whitening", "weights", "views"]
"""What a distilled set may bring along, and a recipe may use."""

AUGMENTATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""The operations of differentiable Siamese augmentation (Zhao and Bilen 2021)."""


class Config(BaseModel):
    """Options: frozen, typed, described by the docstring under each; unknown names are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """Who made a component and what it is; shown by ``rdd-bench list`` and on the leaderboard."""

    title: str
    licence: str
    """SPDX identifier of this implementation."""
    paper: str | None = None
    """Where the method is published, as an address."""
    origin: str = "written from the paper"
    """Or what it was ported from, with commit and licence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """What every part may know of a data set."""

    name: str
    shape: tuple[int, int, int]
    """Channels, height and width."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, in pixels of [0, 1]; what networks subtract."""
    std: tuple[float, ...]
    train_sha256: str = ""
    """Hash of the training pixels and labels, filled in by the host."""
    test_sha256: str = ""
    """Hash of the test pixels and labels in their order, filled in by the host."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Real images: float32 (n, c, h, w) in [0, 1], with int64 labels (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_class(self, label: int) -> Tensor:
        """Return the images of one class, (m, c, h, w), in their stored order."""
        return self.images[self.labels == label]

    def subset(self, indices: Tensor) -> LabelledImages:
        return LabelledImages(self.images[indices], self.labels[indices])


@dataclass(frozen=True, slots=True)
class Splits:
    """What a data set plugin returns: the specification and both splits."""

    spec: DatasetSpec
    train: LabelledImages
    test: LabelledImages


def format_eps(eps: float) -> str:
    """Return a budget the way papers write it: '8/255' where that is what it is, else '0.1'."""
    levels = eps * 255
    if 0 < eps < 1 and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def parse_eps(text: str | float) -> float:
    """Read '8/255', '0.1' or a number; a fraction keeps its exact meaning.

    Raises:
        RddBenchError: If the text is neither a number nor a fraction of two.
    """
    try:
        if isinstance(text, str) and "/" in text:
            numerator, denominator = text.split("/")
            eps = float(numerator) / float(denominator)
        else:
            eps = float(text)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        eps = math.nan
    if not math.isfinite(eps):
        raise RddBenchError(f"'{text}' is not a budget; write 0.1 or 8/255")
    return eps


Eps = Annotated[float, BeforeValidator(parse_eps)]
"""A budget among options, which may be written as '8/255'."""


class AdversarialTraining(Config):
    """PGD adversarial training in pixel space (Madry et al. 2018)."""

    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: Eps = Field(default=8 / 255, gt=0)
    """Budget in pixels of [0, 1]; of the maximum norm at most 1."""
    steps: int = Field(default=7, ge=1)
    """Gradient steps of the inner maximisation."""
    relative_step: float = Field(default=2.5, gt=0)
    """Step size times steps over eps; 2.5 lets every step sequence reach the boundary."""
    restarts: int = Field(default=1, ge=1)
    """Random starts; of each image the example with the largest loss is trained on."""

    @model_validator(mode="after")
    def _eps_is_in_pixels(self) -> AdversarialTraining:
        Threat(self.norm, self.eps)
        return self


class Recipe(Config):
    """How a network is trained on a set. Data, never code: the host does the training.

    The defaults are the evaluation recipe of DC, DSA and DM, except that the learning rate is
    lowered on one optimiser (their code makes a new one, which forgets the momentum) and that
    exactly ``epochs`` epochs are run (theirs runs one more).
    """

    epochs: int = Field(default=1000, ge=1)
    """Passes over the distilled set."""
    batch_size: int = Field(default=256, ge=1)
    """Images per step; the last batch of an epoch may be smaller."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Update rule."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate at the start."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD; the first beta of Adam."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty (decoupled for AdamW)."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """'step' divides the rate by ten once, after epochs // 2 + 1 of them; 'cosine' goes to zero."""
    augment: str = ""
    """Operations of non-Siamese DSA joined by '_', such as 'color_crop_cutout'; '' for none."""
    adversarial: AdversarialTraining | None = None
    """Adversarial training on the set, or none."""
    uses: tuple[Extra, ...] | None = None
    """What training takes from the set beside images and labels. A set's own recipe names it; the
    recipes of protocols do not, so that every set is trained alike there."""
    temperature: float | None = Field(default=None, gt=0)
    """Of the distillation from the soft labels of views; None for 1."""

    @field_validator("augment")
    @classmethod
    def _known_operations(cls, value: str) -> str:
        unknown = [name for name in value.split("_") if value and name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(f"unknown augmentation {unknown}; known: {', '.join(AUGMENTATIONS)}")
        return value


@dataclass(frozen=True)
class Whitening:
    """A linear transform of flat pixels, in place of the normalisation by mean and deviation.

    An image x in [0, 1], flat, becomes ``(x - mean) @ matrix``. It is a layer inside the network
    that is evaluated, so an attacker's budget stays one of pixels.
    """

    mean: Tensor
    """Float32, (d,) with d = c * h * w."""
    matrix: Tensor
    """Float32, (d, d), invertible."""

    @cached_property
    def inverse(self) -> Tensor:
        """The inverse matrix, (d, d)."""
        return self.matrix.double().inverse().to(self.matrix)

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels (n, c, h, w) whitened, in the same shape."""
        flat = pixels.flatten(1) - self.mean.to(pixels)
        return (flat @ self.matrix.to(pixels)).view_as(pixels)

    def invert(self, whitened: Tensor) -> Tensor:
        """Return the pixels of whitened images; not clamped."""
        flat = whitened.flatten(1) @ self.inverse.to(whitened)
        return (flat + self.mean.to(whitened)).view_as(whitened)


@dataclass(frozen=True, slots=True)
class Views:
    """Crops, flips and mixes of the images of a set, and what a teacher says about each.

    Stored with the set, so that its soft labels need no teacher (Shen and Xing 2022). There are
    ``v = epochs * n`` views: training uses n of them an epoch, in their order, and begins anew
    when they are used up. ``rdd_bench.views.render`` makes the pictures.
    """

    image: Tensor
    """Which stored image, int64 (v,)."""
    crop: Tensor
    """Top, left, height and width of the part that is shown, in pixels of the stored image,
    float32 (v, 4); it may reach beyond the image, where there is black."""
    flip: Tensor
    """Whether it is mirrored, bool (v,)."""
    partner: Tensor
    """Which view is mixed in, int64 (v,); the view itself where none is."""
    mix_box: Tensor
    """Where, as top, left, height and width in pixels, int64 (v, 4): a part of the view for
    CutMix, all of it for mixup."""
    mix_weight: Tensor
    """Share of the partner inside the box, float32 (v,): 1 for CutMix; 0 for no mix."""
    logits: Tensor
    """The teacher's answer to each view, float16 (v, k)."""

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, slots=True)
class DistilledSet:
    """The product of a distiller.

    Images are in pixel space but **not clamped**: matching methods leave [0, 1], and the card of
    the stored set says how far.
    """

    images: Tensor
    """Float32, (n, c, h, w)."""
    labels: Tensor
    """Hard labels (n,) int64, or soft labels (n, k) float32 whose rows sum to one."""
    recipe: Recipe | None = None
    """How its author trains on it: the ``author`` track. None: only the protocol's recipe."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Figures worth keeping (final loss, chosen indices' hash); JSON values, shown on the card.
    ``selected_on`` names the split by which the makers chose the set among others: 'test' is a
    flag."""
    whitening: Whitening | None = None
    """What images go through before the network, for recipes that use 'whitening'."""
    weights: Tensor | None = None
    """Weight of each image in the loss, float32 (n,) with mean 1, for recipes that use it."""
    views: Views | None = None
    """Views with soft labels, for recipes that use them; without, the labels above serve."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hard_labels(self) -> Tensor:
        """Labels (n,) int64; of soft labels the most probable class."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(dim=1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored of the set, by name; parts of extras as 'views/crop'."""
        found = {"images": self.images, "labels": self.labels}
        if self.weights is not None:
            found["weights"] = self.weights
        for name, extra in (("whitening", self.whitening), ("views", self.views)):
            if extra is not None:
                found |= {f"{name}/{f.name}": getattr(extra, f.name) for f in fields(extra)}
        return found

    @property
    def num_bytes(self) -> int:
        """Storage of images, labels and extras as they are, uncompressed."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Threat:
    """What an attacker may do. It belongs to the protocol, never to an attack."""

    norm: Norm
    eps: float
    """Budget in pixels of [0, 1]: 8/255, not 8."""

    def __post_init__(self) -> None:
        if self.norm == "linf" and self.eps > 1:
            raise RddBenchError(
                f"eps={self.eps:g} is larger than the whole pixel range [0, 1]; "
                f"write {self.eps:g}/255 if you meant {self.eps:g} grey levels"
            )
        if self.eps < 0:
            raise RddBenchError(f"eps={self.eps:g} is negative; expected 0 or more")

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"
