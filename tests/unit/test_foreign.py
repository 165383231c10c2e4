"""Files of other programs: read whole, refused in one sentence, and never executed."""

from __future__ import annotations

import contextlib
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rdd_bench.artifacts import set_to_bytes
from rdd_bench.errors import RddBenchError
from rdd_bench.foreign import read_pickle, read_set, unfold
from rdd_bench.types import DistilledSet, Recipe

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def result_of_dc(repetitions: int = 2) -> dict[str, Any]:
    """Return what the programs of DC, DSA and DM save."""
    data = [[IMAGES + k, LABELS] for k in range(repetitions)]
    return {"data": data, "accs_all_exps": {"ConvNet": [0.4, np.float64(0.5)]}}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (result_of_dc(), "a result file of DC, DSA or DM"),
        ({"images": IMAGES, "labels": LABELS}, "a dictionary of images and labels"),
        ({"image_syn": IMAGES, "label_syn": LABELS, "lr": 0.01}, "a dictionary of images"),
        ([IMAGES, LABELS], "a list of images and labels"),
        ((IMAGES, LABELS.int()), "a list of images and labels"),
    ],
)
def test_what_other_programs_save_is_found(tmp_path, content, kind):
    found = read_set(saved(tmp_path / "res.pt", content))
    assert found.format.startswith(kind)
    assert torch.equal(found.images, IMAGES)
    assert torch.equal(found.labels, LABELS)
    assert found.normalised


def test_a_repetition_is_chosen_and_one_too_many_refused(tmp_path):
    path = saved(tmp_path / "res.pt", result_of_dc())
    assert torch.equal(read_set(path, 1).images, IMAGES + 1)
    with pytest.raises(RddBenchError, match="holds 2 repetitions; 2 is none"):
        read_set(path, 2)


def test_mtt_s_two_files_belong_together_and_the_choice_by_test_data_is_said(tmp_path):
    saved(tmp_path / "images_best.pt", IMAGES)
    saved(tmp_path / "labels_best.pt", LABELS)
    for path in (tmp_path / "images_best.pt", tmp_path):
        found = read_set(path)
        assert torch.equal(found.labels, LABELS)
        assert "chosen by accuracy on the test images" in found.remarks[0]
    saved(tmp_path / "images_5000.pt", IMAGES)
    with pytest.raises(RddBenchError, match=r"without labels; expected labels_5000\.pt beside it"):
        read_set(tmp_path / "images_5000.pt")
    saved(tmp_path / "pictures.pt", IMAGES)
    with pytest.raises(RddBenchError, match="holds one tensor"):
        read_set(tmp_path / "pictures.pt")


def test_pixels_of_zero_to_one_and_bytes_are_not_taken_for_normalised(tmp_path):
    found = read_set(saved(tmp_path / "a.pt", [IMAGES.sigmoid(), LABELS]))
    assert not found.normalised
    whole = (255 * IMAGES.sigmoid()).to(torch.uint8)
    found = read_set(saved(tmp_path / "b.pt", [whole, LABELS]))
    assert torch.equal(found.images, whole.float() / 255)
    assert not found.normalised


def test_a_column_of_labels_is_taken_for_what_it_is(tmp_path):
    found = read_set(saved(tmp_path / "a.pt", [IMAGES, LABELS.unsqueeze(1)]))
    assert torch.equal(found.labels, LABELS)
    with pytest.raises(RddBenchError, match=r"labels of shape \(\) for 6 images"):
        read_set(saved(tmp_path / "b.pt", [IMAGES, torch.tensor(3)]))


def test_a_page_that_was_saved_instead_is_not_accused_of_code(tmp_path):
    (tmp_path / "a.pt").write_text("<html><body>404</body></html>")
    with pytest.raises(RddBenchError, match=r"no file of torch\.save, or a truncated one"):
        read_set(tmp_path / "a.pt")


def test_a_set_of_a_newer_version_is_one_sentence(tmp_path):
    data = set_to_bytes(DistilledSet(IMAGES, LABELS, Recipe()), {})
    path = tmp_path / "set.safetensors"
    path.write_bytes(data.replace(b"epochs", b"ehcops"))
    with pytest.raises(RddBenchError, match="not whole, or from a newer rdd-bench"):
        read_set(path)


def test_tensors_that_share_their_storage_are_stored(tmp_path):
    both = torch.arange(6)
    made = DistilledSet(IMAGES, both, weights=IMAGES[:, 0, 0, 0])
    path = tmp_path / "set.safetensors"
    path.write_bytes(set_to_bytes(replace(made, labels=both[:]), {}))
    assert torch.equal(read_set(path).labels, both)


def test_logits_become_probabilities_and_probabilities_stay(tmp_path):
    logits = torch.randn(6, 3)
    found = read_set(saved(tmp_path / "a.pt", [IMAGES, logits]))
    assert torch.allclose(found.labels, logits.softmax(1))
    found = read_set(saved(tmp_path / "b.pt", [IMAGES, logits.softmax(1)]))
    assert torch.allclose(found.labels, logits.softmax(1))


def test_our_own_files_come_back_whole(tmp_path):
    made = DistilledSet(IMAGES.sigmoid(), LABELS, weights=torch.ones(6))
    path = tmp_path / "set.safetensors"
    path.write_bytes(set_to_bytes(made, {}))
    found = read_set(path)
    assert found.complete is not None
    assert found.complete.weights is not None
    assert torch.equal(found.complete.images, made.images)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_folder_of_pictures_is_read_class_by_class(tmp_path, mode):
    shape = (5, 4) if mode == "L" else (5, 4, 3)
    rng = np.random.default_rng(0)
    for label in (0, 2, 10):
        (tmp_path / str(label)).mkdir()
        for k in range(2):
            array = rng.integers(0, 256, shape, dtype=np.uint8)
            array[0, 0] = label
            Image.fromarray(array).save(tmp_path / str(label) / f"{k}.png")
    found = read_set(tmp_path)
    assert found.images.shape == (6, len(mode), 5, 4)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.class_names == ("0", "2", "10")  # as numbers, not as texts
    assert (found.images[::2, 0, 0, 0] * 255).round().tolist() == [0, 2, 10]


def test_folders_that_are_no_set_are_refused(tmp_path):
    with pytest.raises(RddBenchError, match="holds no pictures; expected one folder a class"):
        read_set(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(RddBenchError, match=r"0\.png is no picture, or a truncated one"):
        read_set(tmp_path)
    for k, size in enumerate((4, 5)):
        Image.new("L", (size, size)).save(tmp_path / "cat" / f"{k}.png")
    with pytest.raises(RddBenchError, match="pictures of 2 sizes"):
        read_set(tmp_path)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "0" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RddBenchError, match="far too large"):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"net": {"w": torch.ones(3)}}, "holds net; expected images and labels"),
        (3, "holds int; expected tensors"),
        ([IMAGES, LABELS[:4]], r"labels of shape \(4,\) for 6 images"),
        ([IMAGES[0], LABELS], r"images of shape \(3, 8, 8\)"),
        ([IMAGES * torch.nan, LABELS], "NaN or infinite"),
        ([IMAGES.to(torch.complex64), LABELS], "expected floats or bytes"),
        ([IMAGES.to_sparse(), LABELS], "images are torch.sparse_coo; expected a dense tensor"),
        ([IMAGES, LABELS + 0.5], "hard labels span 0.5 to "),
        ([IMAGES, LABELS + 10**12], "expected the numbers of classes, from 0"),
        ([IMAGES, torch.full((6, 3), torch.nan)], "labels have NaN or infinite"),
        (
            [torch.zeros(1).expand(10**7, 3, 32, 32), torch.zeros(1).expand(10**7)],
            "take 114.4 GiB; a distilled set has at most 4",
        ),
    ],
)
def test_what_is_no_set_is_refused_in_one_sentence(tmp_path, content, says):
    with pytest.raises(RddBenchError, match=says) as error:
        read_set(saved(tmp_path / "x.pt", content))
    assert "\n" not in str(error.value)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_file_is_not_run_and_the_file_refused(tmp_path, plain):
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    if plain:
        path.write_bytes(pickle.dumps(Bomb(trap)))
    else:
        torch.save({"data": [[IMAGES, LABELS]], "x": Bomb(trap)}, path)
    with pytest.raises(RddBenchError, match=r"refused|no file of torch.save") as error:
        read_set(path)
    assert not trap.exists()
    if not plain:
        assert "would run code from the file" in str(error.value)


def test_missing_and_huge_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RddBenchError, match=r"cannot read .*No such file"):
        read_set(tmp_path / "nothing.pt")
    path = saved(tmp_path / "x.pt", [IMAGES, LABELS])
    monkeypatch.setattr("rdd_bench.foreign.LARGEST_FILE", 100)
    with pytest.raises(RddBenchError, match="GiB; a distilled set or a network has at most"):
        read_set(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_one_sentence_or_the_set(tmp_path, data):
    whole = saved(tmp_path / "whole.pt", result_of_dc(1)).read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            place = data.draw(st.integers(0, len(damaged) - 1))
            damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pt"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(RddBenchError):
        read_set(path)


def test_numbers_of_numpy_are_read(tmp_path):
    path = saved(tmp_path / "x.pt", {"acc": np.float32(0.5), "n": np.int64(3)})
    assert read_pickle(path)["n"] == 3


# Several images in one ------------------------------------------------------------------------


def test_parts_of_an_image_are_found_in_rows_and_enlarged():
    stored = torch.zeros(2, 1, 4, 4)
    stored[0, 0, :2, :2], stored[0, 0, :2, 2:] = 1.0, 2.0
    stored[0, 0, 2:, :2], stored[0, 0, 2:, 2:] = 3.0, 4.0
    stored[1] = 5.0
    parts = unfold(stored, 2)
    assert parts.shape == (8, 1, 4, 4)
    assert [part.unique().tolist() for part in parts] == [[1.0], [2.0], [3.0], [4.0], *[[5.0]] * 4]


def test_a_part_is_enlarged_bilinearly():
    stored = torch.rand(1, 2, 8, 8)
    small = stored[:, :, :4, 4:]
    expected = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    assert torch.allclose(unfold(stored, 2)[1], expected[0])


def test_an_image_that_cannot_be_divided_is_refused():
    with pytest.raises(RddBenchError, match="images of 7x8 have no 2x2 parts"):
        unfold(torch.zeros(1, 1, 7, 8), 2)
