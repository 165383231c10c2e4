"""The built-in data sets: the right pixels under the right labels, and errors that help."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from rdd_bench.checks import check_splits
from rdd_bench.components import Dataset, Source
from rdd_bench.data import take_in_turn
from rdd_bench.errors import RddBenchError
from rdd_bench.types import LabelledImages, Splits
from rdd_bench_builtin.datasets import digits
from rdd_bench_builtin.datasets.digits import Digits
from rdd_bench_builtin.datasets.folder import Folder, Options
from rdd_bench_builtin.datasets.torchvision import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

NOWHERE = Source(root=None)


def load(dataset: Dataset[Any], source: Source = NOWHERE) -> Splits:
    splits = check_splits(dataset.load(source), dataset.name)
    for part in (splits.train, splits.test):
        assert part.images.is_contiguous()
        assert part.labels.dtype == torch.int64
    return splits


def test_digits_are_scikit_learn_s_each_once():
    splits = load(Digits())
    assert splits.spec.shape == (1, 8, 8)
    assert (len(splits.train), len(splits.test)) == (1297, 500)
    assert splits.test.labels.bincount().tolist() == [50] * 10
    bunch = load_digits()
    train, test = digits.split_indices(bunch.target.tolist())
    assert sorted(train + test) == list(range(1797))
    for part, indices in ((splits.train, train), (splits.test, test)):
        assert np.array_equal(part.images.squeeze(1).numpy() * 16, bunch.images[indices])
        assert np.array_equal(part.labels.numpy(), bunch.target[indices])


def test_digits_split_never_changes():
    _, test = digits.split_indices(load_digits().target.tolist())
    digest = hashlib.sha256(",".join(map(str, test)).encode()).hexdigest()
    assert digest == "a5f1dd5586dd0f0286c1bb16f8348a0aee3a8707da69176ddb12a2b26e1eb444"


def test_digits_constants_are_those_of_the_training_images():
    splits = load(Digits())
    images = splits.train.images.double()
    assert splits.spec.mean == pytest.approx((images.mean().item(),), abs=5e-5)
    assert splits.spec.std == pytest.approx((images.std(correction=0).item(),), abs=5e-5)


def test_digits_can_be_learnt():
    """The nearest training image mostly has the label of a test image (98 % in the literature)."""
    splits = load(Digits())
    distances = torch.cdist(splits.test.images.flatten(1), splits.train.images.flatten(1))
    predicted = splits.train.labels[distances.argmin(dim=1)]
    assert (predicted == splits.test.labels).float().mean() > 0.96


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    written = {}
    for split, count in (("train", 12), ("t10k", 6)):
        images = generator.integers(0, 256, (count, 28, 28))
        images[0, 0, :2] = 0, 255
        written[split] = images
        write_idx(root / name / "raw" / f"{split}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    return written


@pytest.mark.parametrize(
    ("dataset", "folder"), [(MNIST(), "MNIST"), (FashionMNIST(), "FashionMNIST")]
)
def test_grey_sets_are_read_pixel_by_pixel(dataset, folder, tmp_path):
    written = write_mnist(tmp_path, folder)
    splits = load(dataset, Source(tmp_path))
    for part, split in ((splits.train, "train"), (splits.test, "t10k")):
        expected = torch.from_numpy(written[split]).float().unsqueeze(1) / 255
        assert torch.equal(part.images, expected)
        assert part.labels.tolist() == [index % 10 for index in range(len(part))]
    assert splits.spec.num_classes == 10


def write_cifar(root: Path, classes: int) -> dict[str, np.ndarray]:
    """Write files of the published layout with three images each."""
    hundred = classes == 100
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    train = ["train"] if hundred else [f"data_batch_{number}" for number in range(1, 6)]
    generator = np.random.default_rng(0)
    written = {}
    for name in [*train, "test" if hundred else "test_batch"]:
        rows = generator.integers(0, 256, (3, 3072), dtype=np.uint8)
        batch = {"data": rows, "fine_labels" if hundred else "labels": [0, 1, classes - 1]}
        (folder / name).write_bytes(pickle.dumps(batch))
        written[name] = rows
    names = [f"class {number}" for number in range(classes)]
    key = "fine_label_names" if hundred else "label_names"
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps({key: names}))
    return written


@pytest.fixture
def unchecked(monkeypatch):
    """Let torchvision read files whose checksums are not the published ones."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize(("dataset", "classes"), [(CIFAR10(), 10), (CIFAR100(), 100)])
@pytest.mark.usefixtures("unchecked")
def test_cifar_rows_become_channels_first_images(dataset, classes, tmp_path):
    written = write_cifar(tmp_path, classes)
    *train, test = written.values()
    splits = load(dataset, Source(tmp_path))
    for part, rows in ((splits.train, np.concatenate(train)), (splits.test, test)):
        # Each row holds the red, then the green, then the blue plane.
        expected = torch.from_numpy(rows.reshape(-1, 3, 32, 32)).float() / 255
        assert torch.equal(part.images, expected)
        assert part.labels.tolist() == [0, 1, classes - 1] * (len(rows) // 3)
    assert splits.spec.class_names == tuple(f"class {number}" for number in range(classes))


@pytest.mark.usefixtures("unchecked")
def test_svhn_s_ten_is_a_zero(tmp_path):
    generator = np.random.default_rng(0)
    written = {}
    for split in ("train", "test"):
        images = generator.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
        labels = np.array([[10], [1], [2], [9]], dtype=np.uint8)
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels})
        written[split] = images
    splits = load(SVHN(), Source(tmp_path))
    for part, split in ((splits.train, "train"), (splits.test, "test")):
        for number in range(4):
            expected = torch.from_numpy(written[split][..., number]).permute(2, 0, 1).float() / 255
            assert torch.equal(part.images[number], expected)
        assert part.labels.tolist() == [0, 1, 2, 9]


TORCHVISION = [MNIST(), FashionMNIST(), CIFAR10(), CIFAR100(), SVHN()]


@pytest.mark.parametrize("dataset", TORCHVISION, ids=lambda dataset: dataset.name)
def test_no_data_root(dataset):
    with pytest.raises(RddBenchError, match=f"{dataset.name} needs a folder: --data-root DIR"):
        dataset.load(NOWHERE)


@pytest.mark.parametrize("dataset", TORCHVISION, ids=lambda dataset: dataset.name)
def test_no_files_and_no_leave_to_fetch_them(dataset, tmp_path):
    with pytest.raises(RddBenchError, match="give --download") as caught:
        dataset.load(Source(tmp_path))
    assert str(tmp_path / dataset.folder) in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # Nothing was fetched, nothing was made.


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: (raw / "t10k-images-idx3-ubyte").write_bytes(b"this is no image file"),
        lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(b""),
        lambda raw: os.truncate(raw / "t10k-images-idx3-ubyte", 1000),
        lambda raw: (raw / "t10k-labels-idx1-ubyte").unlink(),
    ],
    ids=["nonsense", "empty", "truncated", "missing"],
)
def test_damaged_mnist(damage, tmp_path):
    write_mnist(tmp_path)
    damage(tmp_path / "MNIST" / "raw")
    with pytest.raises(RddBenchError, match=r"missing or damaged .* give --download") as caught:
        MNIST().load(Source(tmp_path))
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)


def test_mnist_with_fewer_labels_than_images(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.zeros(5))
    with pytest.raises(RddBenchError, match="6 images but 5 labels in the test files"):
        MNIST().load(Source(tmp_path))


@pytest.mark.parametrize(("dataset", "classes"), [(CIFAR10(), 10), (CIFAR100(), 100)])
def test_cifar_with_foreign_checksums_is_damaged(dataset, classes, tmp_path):
    write_cifar(tmp_path, classes)
    with pytest.raises(RddBenchError, match="missing or damaged"):
        dataset.load(Source(tmp_path))


def test_a_download_that_fails(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", refuse)
    with pytest.raises(RddBenchError, match=r"neither read from .* nor fetched .*no route to host"):
        MNIST().load(Source(tmp_path, download=True))


def test_a_download_that_works(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torchvision.datasets.mnist,
        "download_and_extract_archive",
        lambda *args, **kwargs: write_mnist(tmp_path),
    )
    assert len(load(MNIST(), Source(tmp_path, download=True)).train) == 12


@pytest.mark.data
@pytest.mark.skipif("RDD_BENCH_DATA" not in os.environ, reason="RDD_BENCH_DATA names no folder")
@pytest.mark.parametrize(
    ("dataset", "sizes", "first_labels"),
    [
        (MNIST(), (60_000, 10_000), [5, 0, 4, 1, 9]),
        (FashionMNIST(), (60_000, 10_000), [9, 0, 0, 3, 0]),
        (CIFAR10(), (50_000, 10_000), [6, 9, 9, 4, 1]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_real_sets(dataset, sizes, first_labels):
    splits = load(dataset, Source(Path(os.environ["RDD_BENCH_DATA"])))
    assert (len(splits.train), len(splits.test)) == sizes
    assert splits.train.labels[:5].tolist() == first_labels
    assert splits.spec.num_classes == 10
    mean = splits.train.images.mean(dim=(0, 2, 3))
    assert splits.spec.mean == pytest.approx(mean.tolist(), abs=2e-4)


def write_folder(
    path: Path,
    size: tuple[int, int] = (6, 4),
    splits: tuple[str, ...] = ("train", "test"),
    classes: tuple[str, ...] = ("cat", "dog"),
) -> None:
    """Write two PNG images a class; size is width and height."""
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / split / name / f"{number}.png")


def folder(path: Path, **options: Any) -> Folder:
    return Folder(Options(path=str(path), **options))


def test_folder_reads_pixels_in_order(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"litter")
    splits = load(folder(tmp_path))
    assert splits.spec.shape == (3, 4, 6)
    assert splits.spec.class_names == ("cat", "dog")
    for part, split in ((splits.train, "train"), (splits.test, "test")):
        assert part.labels.tolist() == [0, 0, 1, 1]
        files = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(2)]
        for image, file in zip(part.images, files, strict=True):
            pixels = np.asarray(Image.open(tmp_path / split / file)) / np.float32(255)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_folder_constants_are_those_of_the_training_images(tmp_path):
    write_folder(tmp_path)
    splits = load(folder(tmp_path))
    images = splits.train.images.double()
    assert splits.spec.mean == pytest.approx(images.mean(dim=(0, 2, 3)).tolist(), abs=1e-7)
    deviation = images.std(dim=(0, 2, 3), correction=0).tolist()
    assert splits.spec.std == pytest.approx(deviation, abs=1e-7)


def test_folder_agrees_with_torchvision(tmp_path):
    write_folder(tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train", torchvision.transforms.ToTensor())
    ours = load(folder(tmp_path)).train
    for index, (image, label) in enumerate(theirs):
        assert torch.equal(ours.images[index], image)
        assert ours.labels[index] == label


def test_folder_reads_grey_and_resizes(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (9, 9), (10, 10, 10)).save(tmp_path / "test" / "cat" / "0.png")
    splits = load(folder(tmp_path, size=5, channels=1))
    assert splits.spec.shape == (1, 5, 5)
    assert torch.equal(splits.test.images[0], torch.full((1, 5, 5), 10 / 255))


def test_folder_averages_when_it_shrinks(tmp_path):
    write_folder(tmp_path)
    board = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "train" / "cat" / "0.png")
    shrunk = load(folder(tmp_path, size=4, channels=1)).train.images[0]
    assert (shrunk - 0.5).abs().max() < 0.1  # Taking the nearest pixel would give 0 or 1.


def test_folder_without_a_path():
    with pytest.raises(RddBenchError, match="folder needs a path: folder:PATH"):
        Folder().load(NOWHERE)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(RddBenchError, match="nowhere is not a folder"):
        folder(tmp_path / "nowhere").load(NOWHERE)


@pytest.mark.parametrize("there", ["train", "test"])
def test_folder_without_a_split(there, tmp_path):
    write_folder(tmp_path, splits=(there,))
    missing = {"train": "test", "test": "train"}[there]
    with pytest.raises(RddBenchError, match=f"has no folder '{missing}'; expected"):
        folder(tmp_path).load(NOWHERE)


def test_folder_with_other_classes_in_test(tmp_path):
    write_folder(tmp_path, splits=("train",), classes=("cat", "dog", "emu"))
    write_folder(tmp_path, splits=("test",), classes=("cat", "fox"))
    with pytest.raises(RddBenchError, match=r"only in train: dog, emu; only in test: fox"):
        folder(tmp_path).load(NOWHERE)


def test_folder_with_one_class(tmp_path):
    write_folder(tmp_path, classes=("cat",))
    with pytest.raises(
        RddBenchError, match="has 1 folders of images; expected one for each of two"
    ):
        folder(tmp_path).load(NOWHERE)


def test_folder_with_an_empty_class(tmp_path):
    write_folder(tmp_path)
    for file in (tmp_path / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(RddBenchError, match=r"test/dog holds no images"):
        folder(tmp_path).load(NOWHERE)


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_with_images_of_two_sizes(split, tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (9, 7)).save(tmp_path / split / "dog" / "1.png")
    with pytest.raises(RddBenchError) as caught:
        folder(tmp_path).load(NOWHERE)
    message = str(caught.value)
    assert f"{tmp_path}/train/cat/0.png is 4 pixels high and 6 wide" in message
    assert f"{tmp_path}/{split}/dog/1.png is 7 high and 9 wide" in message


def test_folder_with_a_file_that_is_no_image(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    with pytest.raises(RddBenchError, match=r"train/dog/notes.txt is no image"):
        folder(tmp_path).load(NOWHERE)


def test_folder_with_a_truncated_image(tmp_path):
    write_folder(tmp_path, size=(64, 64))
    os.truncate(tmp_path / "train" / "dog" / "1.png", 2000)
    with pytest.raises(RddBenchError, match=r"train/dog/1.png is no image that Pillow can read"):
        folder(tmp_path).load(NOWHERE)


def test_folder_with_sixteen_bits(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((4, 6), 3000, dtype=np.uint16)).save(
        tmp_path / "train" / "cat" / "0.png"
    )
    with pytest.raises(RddBenchError, match=r"mode I;16; expected 8 bits"):
        folder(tmp_path).load(NOWHERE)


@pytest.mark.parametrize(
    ("count", "labels"), [(3, [0, 1, 2]), (5, [0, 0, 1, 1, 2]), (99, [0, 0, 0, 0, 1, 1, 2, 2, 2])]
)
def test_images_are_taken_from_every_class_in_turn(count, labels):
    """Also where they are sorted by class, and in their stored order."""
    part = LabelledImages(
        torch.arange(9.0).view(9, 1, 1, 1), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    )
    taken = take_in_turn(part, count)
    assert taken.labels.tolist() == labels
    assert taken.images.flatten().tolist() == sorted(taken.images.flatten().tolist())
