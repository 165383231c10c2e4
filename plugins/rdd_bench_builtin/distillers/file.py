"""A distilled set from a file that another program made, judged like every other.

``rdd-bench evaluate FILE`` and ``--distillers file:PATH`` use it. The pixels come back from the
space that the other program worked in: normalised images are multiplied by the deviation and get
the mean, whitened ones go through the inverse of the whitening fitted on the training images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from rdd_bench.api import (
    Config,
    DistilledSet,
    Distiller,
    DistillTask,
    ForeignSet,
    Info,
    NotApplicable,
    RddBenchError,
    Recipe,
    Run,
    hookimpl,
    read_set,
    unfold,
)
from rdd_bench_builtin.distillers._zca import fit_zca

if TYPE_CHECKING:
    from torch import Tensor


class FileConfig(Config):
    """How a file is to be read."""

    path: str = ""
    """The file, or the folder with one of them, or with one folder of pictures a class."""
    sha256: str = ""
    """Hash of the content; filled in, so that a changed file is another set."""
    repetition: int = Field(default=0, ge=0)
    """Which one of a file that holds several."""
    factor: int = Field(default=1, ge=1, le=8)
    """Small images along each side of a stored one: 2 for IDM and BACON."""
    space: Literal["auto", "pixels", "normalised", "whitened"] = "auto"
    """What the stored numbers are; 'auto' takes numbers outside [0, 1] for normalised ones."""
    mean: tuple[float, ...] | None = None
    """What was subtracted, per channel; None for the data set's constants."""
    std: tuple[float, ...] | None = None
    """What was divided by, per channel; None for the data set's constants."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of the author track, such as the one that MTT learned; None for 0.01."""
    augment: str = ""
    """Operations of DSA in the author track; '' for none."""

    @model_validator(mode="before")
    @classmethod
    def _hash_the_content(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("path"):
            return values
        found = content_hash(Path(str(values["path"])))
        if values.get("sha256", found) != found:
            raise ValueError(f"{values['path']} has changed since the run was planned; run again")
        return {**values, "sha256": found}


def content_hash(path: Path) -> str:
    """Return the hash of a file (with its labels beside it) or of all files below a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        labels = path.with_name(path.name.replace("images", "labels"))
        files = [file for file in dict.fromkeys((path, labels)) if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path) if path.is_dir() else file.name).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else ""


class File(Distiller[FileConfig]):
    """A distilled set that another program made, read from a file or folder."""

    name = "file"
    argument = "path"
    imports = True
    info = Info(title="Imported set", licence="MIT", origin="made elsewhere; see the notes")

    def distill(self, task: DistillTask, run: Run) -> DistilledSet:  # noqa: ARG002
        """Return the set of the file; it must have ``task.ipc`` images of every class.

        Raises:
            RddBenchError: If the file is no such set, or not one for this data set.
            NotApplicable: If no file is named.
        """
        options = self.config
        if not options.path:
            raise NotApplicable("file needs the set to read; write file:PATH")
        found = read_set(Path(options.path), options.repetition)
        if found.complete is not None:
            _refuse_what_does_nothing(options)
            return found.complete
        images = unfold(found.images, options.factor) if options.factor > 1 else found.images
        labels = found.labels.repeat_interleave(options.factor**2, dim=0)
        if tuple(images.shape[1:]) != task.spec.shape:
            raise RddBenchError(
                f"{options.path} has images of {_size(images.shape[1:])}; "
                f"{task.spec.name} has {_size(task.spec.shape)}"
            )
        pixels, space = self._to_pixels(task, found, images)
        recipe = Recipe(augment=options.augment)
        if options.lr is not None:
            recipe = recipe.model_copy(update={"lr": options.lr})
        made = DistilledSet(
            images=pixels,
            labels=_in_order_of(labels, found.class_names, task),
            recipe=recipe,
            notes={
                "format": found.format,
                "stored_as": space,
                "stored_images": len(found.images),
                "remarks": list(found.remarks),
                **({"selected_on": found.selected_on} if found.selected_on else {}),
            },
        )
        if space != "whitened":
            return made
        return dataclasses.replace(
            made,
            recipe=recipe.model_copy(update={"uses": ("whitening",)}),
            whitening=fit_zca(task.train.images),
        )

    def _to_pixels(
        self, task: DistillTask, found: ForeignSet, images: Tensor
    ) -> tuple[Tensor, str]:
        """Undo what the other program did to pixels; return them and what that was."""
        space = self.config.space
        if space == "auto":
            space = "normalised" if found.normalised else "pixels"
        if space == "whitened":
            return fit_zca(task.train.images).invert(images), space
        if space == "normalised":
            mean = images.new_tensor(self.config.mean or task.spec.mean).view(-1, 1, 1)
            std = images.new_tensor(self.config.std or task.spec.std).view(-1, 1, 1)
            return images * std + mean, space
        return images, space


def _refuse_what_does_nothing(options: FileConfig) -> None:
    """Refuse options for a set of this suite, which says everything itself."""
    given = set(options.model_dump(exclude_defaults=True)) - {"path", "sha256"}
    if given:
        raise RddBenchError(
            f"{options.path} is a set of rdd-bench and says itself what it is; leave out "
            f"{', '.join(sorted(given))}"
        )


def _in_order_of(labels: Tensor, names: tuple[str, ...], task: DistillTask) -> Tensor:
    """Return the data set's labels of classes that the file calls by name.

    Folders that are all numbers count as labels. Others must be classes of the data set: an
    alphabetical order would be a guess.
    """
    known = task.spec.class_names
    unknown = sorted(set(names) - set(known))
    if not names:
        return labels
    if unknown and all(name.isdigit() for name in names):
        return torch.tensor([int(name) for name in names])[labels]
    if unknown:
        raise RddBenchError(
            f"the folders {', '.join(unknown[:3])} are no classes of {task.spec.name}; call them "
            f"{', '.join(known[:3])} and so on, or number them from 0"
        )
    return torch.tensor([known.index(name) for name in names])[labels]


def _size(shape: Any) -> str:
    channels, height, width = shape
    return f"{height}x{width} and {channels} channel{'s' if channels > 1 else ''}"


@hookimpl
def rdd_bench_distillers() -> list[type[Distiller[Any]]]:
    return [File]
