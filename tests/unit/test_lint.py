"""What a set teaches in pictures, computed as a run would; pools of files, read if they are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rdd_bench.components import Source
from rdd_bench.data import load_splits
from rdd_bench.errors import RddBenchError
from rdd_bench.foreign import read_set
from rdd_bench.lint import lint
from rdd_bench.pictures import in_eight_bits
from rdd_bench.protocol import parse_protocol
from rdd_bench.registry import load_plugins
from rdd_bench.training import fit
from rdd_bench.trials import accuracies
from rdd_bench.types import DistilledSet

CPU = torch.device("cpu")
PROTOCOL = parse_protocol(
    {
        "name": "tiny-v1", "summary": "Seconds.", "datasets": ["digits"],
        "distillers": ["random"], "references": ["whole"], "architectures": ["mlp", "convnet"],
        "attacks": [], "ipc": [1], "seeds": [0, 1, 2],
        "subset": {"train_per_class": 10, "test_per_class": 10}, "recipe": {"epochs": 30},
        "threats": [{"norm": "linf", "eps": [0.1], "ranked": 0.1}],
        "options": {"mlp": {"width": 8}},
    },
    "here",
)  # fmt: skip
REGISTRY = load_plugins()
SPLITS = load_splits(
    REGISTRY.build("dataset", "digits", {}),  # type: ignore[arg-type]
    "digits", Source(None), (10, 10),
)  # fmt: skip
LABELS = torch.arange(10).repeat_interleave(2)
REAL = torch.cat([SPLITS.train.of_class(label)[:2] for label in range(10)])


def tried(path: Path, **given: Any) -> list[tuple[str, str, str]]:
    return accuracies(
        path, "file", PROTOCOL, REGISTRY, Source(None), device=CPU, **{"report": ignore, **given}
    )


def ignore(what: str, done: int, total: int) -> None:
    pass


def stored(path: Path, pixels: torch.Tensor, labels: torch.Tensor = LABELS) -> Path:
    """Save a set as other programs do: normalised."""
    torch.save([(pixels - SPLITS.spec.mean[0]) / SPLITS.spec.std[0], labels], path)
    return path


def expected(pixels: torch.Tensor, seeds: list[int]) -> torch.Tensor:
    architecture: Any = REGISTRY.build("architecture", "mlp", {"width": 8})
    trained = fit(
        DistilledSet(pixels, LABELS), PROTOCOL.recipe, architecture, SPLITS.spec, seeds,
        device=CPU, report=ignore,
    )  # fmt: skip
    test = SPLITS.test
    right = [(model(test.images).argmax(1) == test.labels) for model in trained.models]
    return torch.stack(right).double().mean(1)


# Accuracies -----------------------------------------------------------------------------------


def test_a_set_is_trained_on_in_three_forms_on_the_same_seeds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    wild = REAL + 1.5 * torch.randn(REAL.shape, generator=generator)
    path = stored(tmp_path / "set.pt", wild)
    facts = {name: (found, mind) for name, found, mind in tried(path, seeds=[3, 4])}
    # The pixels come back from the normalisation with a rounding of their own.
    pixels = read_set(path).images * SPLITS.spec.std[0] + SPLITS.spec.mean[0]
    whole, cut, rounded = (
        expected(images, [3, 4]) for images in (pixels, pixels.clamp(0, 1), in_eight_bits(pixels))
    )
    assert facts["accuracy as stored"][0] == (
        f"{100 * whole.mean():.1f} ± {100 * whole.std():.1f} % (mlp, digits)"
    )
    for name, values in (("clipped to [0, 1]", cut), ("as 8-bit pictures", rounded)):
        change = values - whole
        assert facts[f"accuracy {name}"][0] == (
            f"{100 * values.mean():.1f} ± {100 * values.std():.1f} %, "
            f"changed by {100 * change.mean():+.1f} ± {100 * change.std():.1f}"
        )
    assert abs(whole - cut).mean() > 0.01
    assert "does not hold of its pictures" in facts["accuracy clipped to [0, 1]"][1]


def test_pictures_lose_nothing_and_one_seed_has_no_spread(tmp_path):
    path = stored(tmp_path / "set.pt", in_eight_bits(REAL))
    (_, whole, _), *others = tried(path, seeds=[0])
    assert "±" not in whole
    for name, found, mind in others:
        assert found.endswith("changed by +0.0"), name
        assert mind == ""


def test_soft_labels_teach_by_their_most_probable_class(tmp_path):
    soft = torch.eye(10)[LABELS] * 0.6 + 0.04
    hard = tried(stored(tmp_path / "hard.pt", REAL), seeds=[0])
    assert tried(stored(tmp_path / "soft.pt", REAL, soft), seeds=[0]) == hard


def test_progress_is_told_of_each_form(tmp_path):
    told: dict[str, int] = {}
    tried(
        stored(tmp_path / "set.pt", REAL),
        seeds=[0],
        report=lambda what, done, total: told.update({what: done}),
    )
    assert told == {
        f"training, {name}": 30 for name in ("as stored", "clipped to [0, 1]", "as 8-bit pictures")
    }


def test_a_set_for_other_images_is_refused(tmp_path):
    torch.save([torch.rand(20, 1, 9, 9), LABELS], tmp_path / "set.pt")
    with pytest.raises(RddBenchError, match="has images of 9x9 and 1 channel; digits has 8x8"):
        tried(tmp_path / "set.pt")


# Pools of files -------------------------------------------------------------------------------


def test_a_folder_with_one_file_or_one_pair_is_that_set(tmp_path):
    for name in ("DC", "MTT"):
        (tmp_path / name).mkdir()
    data = [[REAL, LABELS], [REAL + 1, LABELS]]
    torch.save({"data": data}, tmp_path / "DC/res_DC_digits_ConvNet_2ipc.pt")
    (tmp_path / "DC/readme.txt").write_text("nothing to read")
    torch.save(REAL, tmp_path / "MTT/images_5000.pt")
    torch.save(LABELS, tmp_path / "MTT/labels_5000.pt")
    for name in ("DC", "MTT"):
        found = read_set(tmp_path / name)
        assert torch.equal(found.images, REAL)
        assert torch.equal(found.labels, LABELS)
        assert found.selected_on == ""
    assert torch.equal(read_set(tmp_path / "DC", repetition=1).images, REAL + 1)
    assert ("images", "20 of 8x8, 1 channel", "") in lint(tmp_path / "DC")


def test_a_folder_with_several_sets_lists_them(tmp_path):
    for name in ("images_1.pt", "labels_1.pt", "res_b.pt", "res_a.pt"):
        torch.save(REAL, tmp_path / name)
    with pytest.raises(RddBenchError, match="holds 3 sets: ") as caught:
        read_set(tmp_path)
    assert "images_1.pt, res_a.pt, res_b.pt; name one of them" in str(caught.value)
    for k in range(9):
        torch.save(REAL, tmp_path / f"x{k}.pt")
    with pytest.raises(RddBenchError, match=r"holds 12 sets: .* and 4 more; name one of them"):
        read_set(tmp_path)


def test_a_pair_of_the_best_images_was_selected_on_the_test_images(tmp_path):
    torch.save(REAL, tmp_path / "images_best.pt")
    torch.save(LABELS, tmp_path / "labels_best.pt")
    assert read_set(tmp_path).selected_on == "test"
