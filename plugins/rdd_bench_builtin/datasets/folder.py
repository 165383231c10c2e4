"""Any images in folders, laid out as for torchvision's ImageFolder.

``folder:PATH`` reads ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*``, where every file is an
image (files whose names begin with a dot are passed over). Classes are numbered in the order of
their sorted names, images in the order of theirs. All are held in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from rdd_bench.api import (
    Config,
    Dataset,
    DatasetSpec,
    Info,
    LabelledImages,
    RddBenchError,
    Source,
    Splits,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor


class Options(Config):
    """Options of ``folder``."""

    path: str = ""
    """The folder with 'train' and 'test' in it; required."""
    size: int | None = Field(default=None, ge=1)
    """Height and width to resize to (bilinear, not keeping proportions); None leaves images as
    they are, and all must then have one size."""
    channels: Literal[1, 3] = 3
    """1 reads images as grey, 3 as RGB; transparency is dropped."""


class Folder(Dataset[Options]):
    """Your own images, PATH/train/CLASS/* and PATH/test/CLASS/*: folder:PATH."""

    name = "folder"
    info = Info(title="Images in folders", licence="MIT")
    argument = "path"

    def load(self, source: Source) -> Splits:  # noqa: ARG002 - the option names the folder
        """Return both splits; mean and standard deviation are those of the training pixels.

        Raises:
            RddBenchError: If folders are missing or differ, or a file is not a usable image.
        """
        if not self.config.path:
            raise RddBenchError("folder needs a path: folder:PATH, with PATH/train and PATH/test")
        path = Path(self.config.path).expanduser()
        if not path.is_dir():
            raise RddBenchError(f"folder: {path} is not a folder; say folder:PATH with one that is")
        class_names = _class_names(path)
        train_files = _files(path / "train", class_names)
        example = train_files[0][0]
        train = self._read(train_files, example)
        test = self._read(_files(path / "test", class_names), example)
        mean, std = _mean_and_std(train.images)
        channels, height, width = train.images.shape[1:]
        spec = DatasetSpec(
            name=f"{self.name}:{path.resolve().name}",
            shape=(channels, height, width),
            class_names=class_names,
            mean=mean,
            std=std,
        )
        return Splits(spec, _as_pixels(train), _as_pixels(test))

    def _read(self, files: list[tuple[Path, int]], example: Path) -> LabelledImages:
        """Return uint8 images that are as large as the example, with their labels."""
        shape = self._image(example).shape
        images = []
        for file, _ in files:
            image = self._image(file)
            if image.shape != shape:
                raise RddBenchError(
                    f"folder: {example} is {shape[1]} pixels high and {shape[2]} wide, but {file} "
                    f"is {image.shape[1]} high and {image.shape[2]} wide; expected one size, or "
                    f"the option size=N to resize all"
                )
            images.append(image)
        return LabelledImages(torch.stack(images), torch.tensor([label for _, label in files]))

    def _image(self, file: Path) -> Tensor:
        """Return one image, uint8 (c, h, w)."""
        import numpy
        from PIL import Image

        try:
            with Image.open(file) as image:
                # Pillow would clip deeper pixels to 255 without a word.
                if image.mode.startswith(("I", "F")):
                    raise RddBenchError(
                        f"folder: {file} has pixels of mode {image.mode}; expected 8 bits a channel"
                    )
                picture = image.convert("L" if self.config.channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RddBenchError(
                f"folder: {file} is no image that Pillow can read ({error}); remove or replace it"
            ) from error
        if self.config.size is not None:
            size = (self.config.size, self.config.size)
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(numpy.array(picture))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files(folder: Path, class_names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return every file of one split with its label, class after class."""
    found = []
    for label, name in enumerate(class_names):
        files = _visible(folder / name)
        if not files:
            raise RddBenchError(f"folder: {folder / name} holds no images; expected one or more")
        found += [(file, label) for file in files]
    return found


def _class_names(path: Path) -> tuple[str, ...]:
    """Return the sorted names of the classes, the same in both splits."""
    names: dict[str, set[str]] = {}
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise RddBenchError(
                f"folder: {path} has no folder '{split}'; expected {folder}/CLASS/IMAGE"
            )
        names[split] = {entry.name for entry in _visible(folder) if entry.is_dir()}
    if names["train"] != names["test"]:
        lonely = [
            f"only in {split}: {', '.join(sorted(names[split] - names[other]))}"
            for split, other in (("train", "test"), ("test", "train"))
            if names[split] - names[other]
        ]
        raise RddBenchError(
            f"folder: the classes of {path} differ ({'; '.join(lonely)}); expected the same in "
            f"train and test"
        )
    if len(names["train"]) < 2:
        raise RddBenchError(
            f"folder: {path / 'train'} has {len(names['train'])} folders of images; expected one "
            f"for each of two or more classes"
        )
    return tuple(sorted(names["train"]))


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images, in [0, 1].

    From counts of the 256 levels: exact, and without a copy of the images in float64.
    """
    means, deviations = [], []
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        shares = counts / counts.sum()
        mean = (shares * levels).sum()
        means.append(mean.item())
        deviations.append((shares * (levels - mean) ** 2).sum().sqrt().item())
    return tuple(means), tuple(deviations)


def _as_pixels(split: LabelledImages) -> LabelledImages:
    return LabelledImages(split.images.contiguous().float().div_(255), split.labels)


@hookimpl
def rdd_bench_datasets() -> list[type[Dataset[Any]]]:
    return [Folder]
