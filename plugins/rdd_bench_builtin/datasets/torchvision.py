"""The usual small data sets, read by torchvision.

- MNIST: LeCun, Bottou, Bengio and Haffner 1998, http://yann.lecun.com/exdb/mnist/
- Fashion-MNIST: Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747
- CIFAR-10, CIFAR-100: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
- SVHN: Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/ (without its extra split)

Means and standard deviations are those of the code of Zhao, Mopuri and Bilen 2020
(arXiv:2006.05929), so that networks see what they see in the field's papers. The deviations given
for CIFAR-10 are smaller than those of its training pixels, which are 0.247, 0.243 and 0.262.
"""

from __future__ import annotations

import pickle
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rdd_bench.api import (
    Dataset,
    DatasetSpec,
    Info,
    LabelledImages,
    NoOptions,
    RddBenchError,
    Source,
    Splits,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE = (
    AssertionError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""How torchvision says that files are missing, damaged, or not to be fetched."""


class _FromTorchvision(Dataset[NoOptions]):
    """A data set of two splits that torchvision finds below the data root."""

    folder: ClassVar[str]
    """Where torchvision keeps the files, relative to the root."""
    shape: ClassVar[tuple[int, int, int]]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    @abstractmethod
    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Return one split: uint8 images (n, c, h, w), labels (n,) and the names of the classes."""

    def load(self, source: Source) -> Splits:
        if source.root is None:
            raise RddBenchError(
                f"{self.name} needs a folder: --data-root DIR (with --download to fetch it)"
            )
        train, class_names = self._split(source.root, True, source.download)
        test, _ = self._split(source.root, False, source.download)
        spec = DatasetSpec(
            name=self.name,
            shape=self.shape,
            class_names=class_names,
            mean=self.mean,
            std=self.std,
        )
        return Splits(spec, train, test)

    def _split(
        self, root: Path, train: bool, download: bool
    ) -> tuple[LabelledImages, tuple[str, ...]]:
        split = "training" if train else "test"
        try:
            pixels, labels, class_names = self.read(root, train, download)
        except UNREADABLE as error:
            raise RddBenchError(self._what_to_do(root, split, download, error)) from error
        if len(pixels) != len(labels):
            raise RddBenchError(
                f"{self.name}: {len(pixels)} images but {len(labels)} labels in the {split} files "
                f"of {root / self.folder}; delete them and give --download"
            )
        # One large copy only: the division is in place.
        images = pixels.contiguous().float().div_(255)
        return LabelledImages(images, labels.long()), class_names

    def _what_to_do(self, root: Path, split: str, download: bool, error: Exception) -> str:
        folder = root / self.folder
        found = " ".join(str(error).split()) or type(error).__name__
        if download:
            return (
                f"{self.name}: the {split} files could be neither read from {folder} nor fetched "
                f"({found}); check the connection, and delete damaged files there"
            )
        present = folder.is_dir() and any(path.is_file() for path in folder.iterdir())
        if not present:
            return (
                f"{self.name}: no files in {folder}; give --download to fetch them, or name the "
                f"folder that has them with --data-root"
            )
        return (
            f"{self.name}: the {split} files in {folder} are missing or damaged ({found}); "
            f"delete damaged files there and give --download"
        )


class MNIST(_FromTorchvision):
    """Handwritten digits, 28x28 grey pixels, 60,000 for training and 10,000 for testing."""

    name = "mnist"
    info = Info(
        title="MNIST",
        licence="MIT",
        paper="http://yann.lecun.com/exdb/mnist/",
        origin="images of LeCun and Cortes (CC-BY-SA-3.0), read by torchvision",
    )
    folder = "MNIST/raw"
    shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)

    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        import torchvision

        data = torchvision.datasets.MNIST(root, train=train, download=download)
        return data.data.unsqueeze(1), data.targets, tuple(map(str, range(10)))


class FashionMNIST(_FromTorchvision):
    """Clothes, 28x28 grey pixels, 60,000 for training and 10,000 for testing."""

    name = "fashion-mnist"
    info = Info(
        title="Fashion-MNIST",
        licence="MIT",
        paper="https://arxiv.org/abs/1708.07747",
        origin="images of Zalando SE (MIT), read by torchvision",
    )
    folder = "FashionMNIST/raw"
    shape = (1, 28, 28)
    mean = (0.2861,)
    std = (0.3530,)

    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        import torchvision

        data = torchvision.datasets.FashionMNIST(root, train=train, download=download)
        return data.data.unsqueeze(1), data.targets, tuple(data.classes)


class CIFAR10(_FromTorchvision):
    """Photographs of 10 classes, 32x32 pixels, 50,000 for training and 10,000 for testing."""

    name = "cifar10"
    info = Info(
        title="CIFAR-10",
        licence="MIT",
        paper="https://www.cs.toronto.edu/~kriz/cifar.html",
        origin="images of Krizhevsky, Nair and Hinton (no licence stated), read by torchvision",
    )
    folder = "cifar-10-batches-py"
    shape = (3, 32, 32)
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)

    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        import torchvision

        return _of_cifar(torchvision.datasets.CIFAR10(root, train=train, download=download))


class CIFAR100(_FromTorchvision):
    """Photographs of 100 classes, 32x32 pixels, 50,000 for training and 10,000 for testing."""

    name = "cifar100"
    info = Info(
        title="CIFAR-100",
        licence="MIT",
        paper="https://www.cs.toronto.edu/~kriz/cifar.html",
        origin="images of Krizhevsky, Nair and Hinton (no licence stated), read by torchvision",
    )
    folder = "cifar-100-python"
    shape = (3, 32, 32)
    mean = (0.5071, 0.4866, 0.4409)
    std = (0.2673, 0.2564, 0.2762)

    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        import torchvision

        return _of_cifar(torchvision.datasets.CIFAR100(root, train=train, download=download))


class SVHN(_FromTorchvision):
    """House numbers, 32x32 pixels, 73,257 for training and 26,032 for testing."""

    name = "svhn"
    info = Info(
        title="Street View House Numbers",
        licence="MIT",
        paper="http://ufldl.stanford.edu/housenumbers/",
        origin="images of Netzer et al. (non-commercial use), read by torchvision",
    )
    folder = ""
    shape = (3, 32, 32)
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)

    def read(
        self, root: Path, train: bool, download: bool
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        import torchvision

        split = "train" if train else "test"
        data = torchvision.datasets.SVHN(root, split=split, download=download)
        pixels, labels = torch.from_numpy(data.data), torch.from_numpy(data.labels)
        return pixels, labels, tuple(map(str, range(10)))


def _of_cifar(data: Any) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return pixels, torch.tensor(data.targets), tuple(data.classes)


@hookimpl
def rdd_bench_datasets() -> list[type[Dataset[Any]]]:
    return [MNIST, FashionMNIST, CIFAR10, CIFAR100, SVHN]
