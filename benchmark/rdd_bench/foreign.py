"""Files made elsewhere: distilled sets of other programs, and trained networks.

Nothing here runs code from a file. Pickles are read by ``torch.load(weights_only=True)``, which
builds tensors, numbers, texts and containers of them, and refuses everything else.

Formats of distilled sets, told apart by their content:

* ``.safetensors`` of this suite;
* a folder with one folder of images a class;
* ``res_*.pt`` of DC, DSA and DM: ``{"data": [[images, labels], ...]}``, an entry a repetition;
* ``images_best.pt`` of MTT with ``labels_best.pt`` beside it, or any such pair;
* a list or a dictionary with images and labels;
* a folder with exactly one such file, or one pair, as in the pools of BEARD, which keep the files
  of several methods in a folder each.

Programs that store several small images in one (IDM, BACON) need their decoder: ``unfold``.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rdd_bench.errors import RddBenchError

if TYPE_CHECKING:
    from torch import Tensor

    from rdd_bench.types import DistilledSet

LARGEST_FILE = 4 * 2**30
"""Bytes above which a file is refused: a distilled set is small."""
MOST_CLASSES = 1_000_000
"""Hard labels from which on a file is refused: they are counted class by class."""
IMAGE_KEYS = ("images", "image_syn", "images_syn", "syn_images", "data", "x")
LABEL_KEYS = ("labels", "label_syn", "labels_syn", "syn_labels", "targets", "y")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True, slots=True)
class ForeignSet:
    """Images and labels as a file holds them, before anything is undone."""

    images: Tensor
    """Float32, (n, c, h, w)."""
    labels: Tensor
    """Hard (n,) int64, or soft (n, k) float32."""
    format: str
    """In words, for the card."""
    normalised: bool
    """Whether programs of this format store normalised images and not pixels of [0, 1]."""
    remarks: tuple[str, ...] = ()
    """What a reader should know, such as a choice by test data."""
    selected_on: str = ""
    """The split by whose accuracy its makers chose the set, such as 'test', if the file says."""
    class_names: tuple[str, ...] = ()
    """What labels 0, 1, ... are called in the file, if it says so."""
    complete: DistilledSet | None = None
    """The set itself, with recipe and extras, if the file is one of this suite."""


def read_set(path: Path, repetition: int = 0) -> ForeignSet:
    """Read a distilled set.

    Args:
        path: File or folder.
        repetition: Which one of a file that holds several.

    Raises:
        RddBenchError: If it is none, truncated, too large, or would need code to be run.
    """
    if path.is_dir():
        return _from_folder(path, repetition)
    if path.suffix == ".safetensors":
        from rdd_bench.artifacts import set_from_bytes

        made = set_from_bytes(_bytes_of(path), str(path))
        return ForeignSet(made.images, made.labels, "rdd-bench", normalised=False, complete=made)
    content = read_pickle(path)
    remarks: tuple[str, ...] = ()
    selected_on = ""
    if isinstance(content, torch.Tensor):
        images, labels = content, _labels_beside(path)
        kind = "images and labels in two files, as MTT stores them"
        if "best" in path.stem:
            selected_on = "test"
            remarks = ("chosen by accuracy on the test images by the program that made it",)
    else:
        images, labels, kind = _pair_in(content, repetition, path)
    images, labels = _checked(images, labels, path)
    return ForeignSet(images, labels, kind, _looks_normalised(images), remarks, selected_on)


def read_weights(path: Path) -> Any:
    """Return what a file of torch.save or a safetensors file holds; see ``read_pickle``."""
    if path.suffix != ".safetensors":
        return read_pickle(path)
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(_bytes_of(path))
    except SafetensorError as error:
        raise RddBenchError(f"{path} is truncated or no safetensors file ({error})") from None


def read_pickle(path: Path) -> Any:
    """Return what ``torch.save`` stored, on the CPU, without running code.

    Raises:
        RddBenchError: If the file is missing, too large, truncated, or needs code.
    """
    _check_size(path)
    try:
        with torch.serialization.safe_globals(_numbers_of_numpy()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one sentence is said below, or nothing is wrong
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # noqa: BLE001 - a damaged file makes the reader raise anything
        wants_code = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and wants_code:
            raise RddBenchError(
                f"{path} holds more than tensors, numbers and texts, so reading it would run code "
                "from the file; it is refused. Save images and labels as plain tensors"
            ) from None
        raise RddBenchError(
            f"{path} is no file of torch.save, or a truncated one ({type(error).__name__})"
        ) from None


def unfold(images: Tensor, factor: int) -> Tensor:
    """Return the small images inside each stored one, enlarged to its size.

    IDM and BACON store ``factor`` times ``factor`` images of a lower resolution in one, in rows.
    From (n, c, h, w) come (n * factor^2, c, h, w), the parts of one image next to each other.

    Raises:
        RddBenchError: If the size cannot be divided.
    """
    height, width = images.shape[2:]
    if height % factor or width % factor:
        raise RddBenchError(f"images of {height}x{width} have no {factor}x{factor} parts")
    parts = [
        column
        for row in torch.split(images, height // factor, dim=2)
        for column in torch.split(row, width // factor, dim=3)
    ]
    small = torch.stack(parts, dim=1).flatten(0, 1)
    return torch.nn.functional.interpolate(
        small, size=(height, width), mode="bilinear", align_corners=False
    )


def _numbers_of_numpy() -> list[Any]:
    """Return the constructors of NumPy's numbers: results beside the images are often such."""
    import numpy as np

    make_scalar = np.float64(0).__reduce__()[0]
    return [np.dtype, make_scalar, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8"))]


def _bytes_of(path: Path) -> bytes:
    _check_size(path)
    return path.read_bytes()


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RddBenchError(f"cannot read {path}: {error.strerror}") from None
    if size > LARGEST_FILE:
        raise RddBenchError(
            f"{path} has {size / 2**30:.1f} GiB; a distilled set or a network has at most "
            f"{LARGEST_FILE // 2**30}"
        )


def _labels_beside(path: Path) -> Tensor:
    name = path.name.replace("images", "labels")
    beside = path.with_name(name)
    if name == path.name or not beside.exists():
        raise RddBenchError(
            f"{path} holds images without labels; expected {beside.name} beside it"
            if name != path.name
            else f"{path} holds one tensor; expected a name such as images_best.pt with "
            "labels_best.pt beside it"
        )
    labels = read_pickle(beside)
    if not isinstance(labels, torch.Tensor):
        raise RddBenchError(f"{beside} holds no tensor of labels")
    return labels


def _pair_in(content: Any, repetition: int, path: Path) -> tuple[Tensor, Tensor, str]:
    """Find images and labels in lists and dictionaries."""
    if isinstance(content, Mapping):
        data = content.get("data")
        if isinstance(data, Sequence) and data and _is_pair(data[0]):
            if not 0 <= repetition < len(data):
                raise RddBenchError(f"{path} holds {len(data)} repetitions; {repetition} is none")
            return data[repetition][0], data[repetition][1], "a result file of DC, DSA or DM"
        images = next((content[key] for key in IMAGE_KEYS if key in content), None)
        labels = next((content[key] for key in LABEL_KEYS if key in content), None)
        if isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor):
            return images, labels, "a dictionary of images and labels"
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise RddBenchError(
            f"{path} is no distilled set: it holds {found}; expected images and labels"
        )
    if _is_pair(content):
        return content[0], content[1], "a list of images and labels"
    raise RddBenchError(
        f"{path} is no distilled set: it holds {type(content).__name__}; expected tensors of "
        "images and labels"
    )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(part, torch.Tensor) for part in value)
    )


def _checked(images: Tensor, labels: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    for what, tensor in (("images", images), ("labels", labels)):
        if tensor.layout != torch.strided:
            raise RddBenchError(f"{path}: {what} are {tensor.layout}; expected a dense tensor")
        if 4 * tensor.numel() > LARGEST_FILE:  # a small file may repeat one number for ever
            raise RddBenchError(
                f"{path}: {what} of shape {tuple(tensor.shape)} take "
                f"{4 * tensor.numel() / 2**30:.1f} GiB; a distilled set has at most "
                f"{LARGEST_FILE // 2**30}"
            )
    if images.ndim != 4 or not len(images):
        raise RddBenchError(f"{path}: images of shape {tuple(images.shape)}; expected (n, c, h, w)")
    if not images.is_floating_point():
        if images.dtype != torch.uint8:
            raise RddBenchError(f"{path}: images are {images.dtype}; expected floats or bytes")
        images = images.float() / 255
    if not torch.isfinite(images).all():
        raise RddBenchError(f"{path}: images have NaN or infinite pixels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise RddBenchError(
            f"{path}: labels of shape {tuple(labels.shape)} for {len(images)} images; expected "
            f"({len(images)},) or ({len(images)}, classes)"
        )
    if not torch.isfinite(labels).all():
        raise RddBenchError(f"{path}: labels have NaN or infinite values")
    if labels.ndim == 1:
        hard = labels.long()
        if bool((hard != labels).any()) or int(hard.max()) >= MOST_CLASSES:
            raise RddBenchError(
                f"{path}: hard labels span {labels.min().item():g} to {labels.max().item():g}; "
                "expected the numbers of classes, from 0"
            )
        return images.float().contiguous(), hard
    return images.float().contiguous(), _probabilities(labels.float())


def _probabilities(labels: Tensor) -> Tensor:
    """Return soft labels whose rows sum to one; others are taken for logits."""
    is_distribution = labels.min() >= 0 and bool(((labels.sum(dim=1) - 1).abs() < 1e-3).all())
    return labels if is_distribution else labels.softmax(dim=1)


def _looks_normalised(images: Tensor) -> bool:
    return bool(images.min() < -1e-3 or images.max() > 1 + 1e-3)


def _from_folder(path: Path, repetition: int) -> ForeignSet:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if (path / "images_best.pt").exists():
        return read_set(path / "images_best.pt", repetition)
    classes = sorted((child for child in path.iterdir() if child.is_dir()), key=_in_order)
    images, labels = [], []
    for label, folder in enumerate(classes):
        for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES):
            try:
                with Image.open(file) as picture:
                    mode = "L" if picture.mode == "L" else "RGB"
                    array = np.asarray(picture.convert(mode)).astype("float32") / 255
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
                raise RddBenchError(f"{file} is no picture, or a truncated one") from None
            except Image.DecompressionBombError:
                raise RddBenchError(f"{file} is far too large for a picture of a set") from None
            images.append(torch.from_numpy(array).reshape(*array.shape[:2], -1))
            labels.append(label)
    if not images:
        return read_set(_only_file_in(path), repetition)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise RddBenchError(
            f"{path} holds pictures of {len(shapes)} sizes, or grey and coloured ones; expected "
            "all alike"
        )
    stacked = torch.stack(images).permute(0, 3, 1, 2).contiguous()
    return ForeignSet(
        stacked,
        torch.tensor(labels),
        "pictures in one folder a class",
        normalised=False,
        class_names=tuple(folder.name for folder in classes),
    )


def _only_file_in(path: Path) -> Path:
    """Return the one file of torch.save in a folder; labels belong to the images beside them."""
    names = {file.name for file in path.glob("*.pt") if file.is_file()}
    sets = sorted(names - {name.replace("images", "labels") for name in names if "images" in name})
    if len(sets) == 1:
        return path / sets[0]
    if sets:
        more = f" and {len(sets) - 8} more" if len(sets) > 8 else ""
        raise RddBenchError(
            f"{path} holds {len(sets)} sets: {', '.join(sets[:8])}{more}; name one of them"
        )
    pool = sorted(folder.name for folder in path.iterdir() if any(folder.glob("*.pt")))
    if pool:
        raise RddBenchError(
            f"{path} holds folders of sets: {', '.join(pool[:8])}; name one of them"
        )
    raise RddBenchError(
        f"{path} holds no pictures; expected one folder a class with .png files in it"
    )


def _in_order(folder: Path) -> tuple[int, str]:
    """Sort folders 0, 1, ..., 10 as numbers, and others by name."""
    return (int(folder.name) if folder.name.isdigit() else -1, folder.name)
