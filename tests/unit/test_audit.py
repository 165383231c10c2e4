"""Every flag with a planted defect that raises it and a sound case that raises no flag at all.

That a network is right on more images under attack than without cannot be seen in an audit: what
is wrong clean is never handed to an attack and counts as lost, so no record can say it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from rdd_bench import audit, consistency
from rdd_bench.components import Attack, Run
from rdd_bench.consistency import NON_DETERMINISTIC, Evidence, contradictions
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.pictures import in_eight_bits
from rdd_bench.records import Flag
from rdd_bench.robustness import attack_models, audit_networks, clean_outcomes
from rdd_bench.step_records import set_facts
from rdd_bench.testing import small_run
from rdd_bench.threats import ascend, project
from rdd_bench.types import Config, DatasetSpec, DistilledSet, Info, LabelledImages, Norm, Threat

SPEC = DatasetSpec(
    name="toy", shape=(1, 4, 4), class_names=("dark", "light"), mean=(0.4,), std=(0.25,)
)
LINF = Threat("linf", 0.1)
RUN = small_run(Path())


# A small world --------------------------------------------------------------------------------


class Light(nn.Module):
    """Light or dark: positive where the sum of the normalised pixels is."""

    def __init__(self, scale: float = 1.0, levels: int = 0, noise: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.scale, self.levels, self.noise = scale, levels, noise

    def forward(self, images: Tensor) -> Tensor:
        seen = self.norm(images)
        if self.levels:
            seen = (seen * self.levels).round() / self.levels
        light = self.scale * seen.flatten(1).sum(dim=1)
        if self.noise:
            light = light + self.noise * torch.rand_like(light)
        return torch.stack([-light, light], dim=1)


def network(**options: Any) -> Classifier:
    return Classifier(Normalise(SPEC), Light(**options)).eval().requires_grad_(False)


def toy_images(count: int = 80) -> LabelledImages:
    """Return dark and light images at a distance between 0.02 and 0.3 from the decision."""
    labels = torch.arange(count) % 2
    offset = torch.linspace(0.02, 0.3, count) * (2 * labels - 1)
    texture = 0.1 * (torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    return LabelledImages((0.4 + offset.view(-1, 1, 1, 1) + texture).clamp(0, 1), labels)


class AscentOptions(Config):
    """Options of the attack below."""

    steps: int = 20
    """Steps of a tenth of the budget."""


class Ascent(Attack[AscentOptions]):
    """As PGD, from the image, in steps whose length does not depend on their number."""

    name = "ascent"
    info = Info(title="Ascent", licence="MIT")
    norms = frozenset[Norm]({"linf", "l2"})
    effort = "steps"

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        points = images
        for _ in range(self.config.steps):
            leaf = points.detach().requires_grad_()
            loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            moved = ascend(points, gradient, threat.norm, threat.eps / 10)
            points = project(moved, images, threat)
        return points


def doing(step: Callable[[nn.Module, Tensor, Threat], Tensor]) -> Attack[Any]:
    """Return the attack, but for what it does with the images at last."""

    class Planted(Ascent):
        def perturb(
            self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
        ) -> Tensor:
            return step(model, super().perturb(model, images, labels, threat, run), threat)

    return Planted()


def attacked(
    attack: Attack[Any] | None = None,
    model: nn.Module | None = None,
    threat: Threat = LINF,
    test: LabelledImages | None = None,
) -> list[Flag]:
    return attack_models(
        [model or network()], test or toy_images(), attack or Ascent(), threat, [0], RUN,
        "attack 'ascent'", probe_strength=True,
    ).flags  # fmt: skip


def normalised() -> list[Flag]:
    """Hand over normalised images, as BEARD's evaluation does."""
    test = toy_images()
    images = Normalise(SPEC)(test.images)
    return attacked(model=Light().eval(), test=LabelledImages(images, test.labels))


def trained(images: Tensor | None = None, **options: Any) -> list[Flag]:
    model, test = network(**options), toy_images()
    clean = clean_outcomes(model, test, 16)
    return audit_networks([model], test, [clean], images, 16)


def made(images: Tensor, labels: Tensor, role: str = "method", **notes: Any) -> list[Flag]:
    found: list[Flag] = set_facts(DistilledSet(images, labels, notes=notes), SPEC, role)["flags"]
    return found


GREY = torch.full((4, 1, 4, 4), 0.5)
FOUR = torch.tensor([0, 0, 1, 1])
UNEVEN = torch.eye(2)[torch.tensor([0, 0, 0, 1])]
BEYOND = torch.cat([torch.full((4, 1, 2, 4), -2.0), torch.full((4, 1, 2, 4), 2.0)], dim=2)
"""Dark as it is and light when clipped."""


def said(label: str, left: int, access: Any = "white", stronger_than: str = "") -> Evidence:
    """Return an attack that leaves the first of 100 images."""
    names = frozenset({stronger_than} - {""})
    return Evidence(label, label, access, names, [np.arange(100) < left])


def compared(*evidence: Evidence, clean: int = 90) -> list[Flag]:
    before = [np.arange(100) < clean]
    return [flag for mine in evidence for flag in contradictions(mine, evidence, before)]


# The catalogue --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    planted: Callable[[], list[Flag]]
    healthy: Callable[[], list[Flag]]
    says: str
    """What the sentence has to contain: a value, where there is one."""


def through_train_mode(model: nn.Module, images: Tensor, _: Threat) -> Tensor:
    model.train()
    model(images)
    model.eval()
    return images


def left_in_train_mode(model: nn.Module, images: Tensor, _: Threat) -> Tensor:
    model.train()
    return images


CATALOGUE = {
    audit.BUDGET: Entry(
        lambda: attacked(doing(lambda _, x, t: (x + 3 * t.eps).clamp(0, 1))),
        attacked,
        "(linf); eps is 0.1",
    ),
    audit.BOX: Entry(lambda: attacked(doing(lambda _, x, t: x - 6 * t.eps)), attacked, "outside"),
    audit.NULL_ATTACK: Entry(
        lambda: attacked(doing(lambda _, x, __: 0.8 - x)), attacked, "outcome of 32 of 32 images"
    ),
    NON_DETERMINISTIC: Entry(
        lambda: attacked(model=network(noise=1e-2)), attacked, "two forward passes differ by"
    ),
    audit.STATE_CHANGED: Entry(
        lambda: attacked(doing(through_train_mode)), attacked, "parameters or buffers"
    ),
    audit.TRAIN_MODE: Entry(
        lambda: attacked(doing(left_in_train_mode)), attacked, "in train mode under attack"
    ),
    audit.INPUT_RANGE: Entry(normalised, attacked, "not [0, 1]"),
    audit.MORE_STEPS: Entry(
        lambda: attacked(Ascent(AscentOptions(steps=3))), attacked, "with twice the steps breaks"
    ),
    # What it sees of an image changes in steps, so no gradient of it says where they are.
    audit.LARGE_BUDGET: Entry(
        lambda: attacked(model=network(levels=4)), attacked, "leaves 64 of 64 images right"
    ),
    audit.SATURATED_GRADIENT: Entry(lambda: trained(scale=1e4), trained, "at 100 % of the right"),
    audit.ZERO_GRADIENT: Entry(lambda: trained(levels=4), trained, "at 100 % of the right"),
    audit.EIGHT_BIT: Entry(
        lambda: trained(BEYOND), lambda: trained(GREY), "100.0 % of the distilled images"
    ),
    audit.OUT_OF_RANGE: Entry(
        lambda: made(BEYOND, FOUR), lambda: made(GREY, FOUR), "100.0 % of the pixels"
    ),
    # Hard labels of methods are checked before, and a set with wrong ones is refused.
    audit.CLASS_BALANCE: Entry(
        lambda: made(GREY, UNEVEN), lambda: made(GREY, FOUR), "from 1 to 3 images (class 1"
    ),
    audit.TEST_SELECTION: Entry(
        lambda: made(GREY, FOUR, selected_on="test"),
        lambda: made(GREY, FOUR, selected_on="train"),
        "chose it by accuracy on the test images",
    ),
    consistency.WEAKER_THAN: Entry(
        lambda: compared(said("ensemble", 60, stronger_than="pgd"), said("pgd", 50)),
        lambda: compared(said("ensemble", 51, stronger_than="pgd"), said("pgd", 50)),
        "ensemble leaves 10.0 points more than pgd",
    ),
    consistency.BLACK_BOX: Entry(
        lambda: compared(said("pgd", 60), said("fgsm", 70), said("square", 50, "black")),
        lambda: compared(said("pgd", 40), said("fgsm", 70), said("square", 50, "black")),
        "square, which sees no gradients, leaves 10.0 points less",
    ),
    consistency.NOISE_CONTROL: Entry(
        lambda: compared(said("pgd", 60), said("noise", 70, "none")),
        lambda: compared(said("pgd", 60), said("noise", 80, "none")),
        "noise breaks 20.0 points, where all attacks that see gradients together break 30.0",
    ),
}


def constants(module: Any) -> set[str]:
    return {v for k, v in vars(module).items() if k.isupper() and isinstance(v, str)}


def test_every_flag_is_in_the_catalogue():
    assert set(CATALOGUE) == constants(audit) | constants(consistency)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_planted_defect_raises_its_flag_with_a_sentence(name):
    (flag,) = [flag for flag in CATALOGUE[name].planted() if flag.name == name]
    assert CATALOGUE[name].says in flag.message
    assert "\n" not in flag.message


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_sound_case_raises_no_flag(name):
    assert CATALOGUE[name].healthy() == []


# What the thresholds mean ---------------------------------------------------------------------


def test_only_a_budget_in_which_all_is_grey_has_nothing_left():
    """In L2 as in L-inf, and a network that a small budget does not break is no reason."""
    assert attacked(threat=Threat("l2", 0.2)) == []
    assert attacked(threat=Threat("linf", 1e-3)) == []


class Restarted(Ascent):
    """Half of the images find nothing, whatever the steps: chance decides which."""

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        found = super().perturb(model, images, labels, threat, run)
        lucky = torch.rand(len(images)) < 0.5
        return torch.where(lucky.view(-1, 1, 1, 1), found, images)


def test_what_other_random_starts_break_is_not_owed_to_more_steps():
    assert audit.MORE_STEPS not in {flag.name for flag in attacked(Restarted())}


def test_what_more_steps_break_counts_in_points_of_all_toy_images():
    def gain(newly: int, tried: int, survivors: int) -> list[Flag]:
        return audit.check_more_steps("pgd", "steps", newly, tried, survivors, total=100)

    (flag,) = gain(8, 64, 50)
    assert flag.value == pytest.approx(8 / 64 * 0.5)
    assert gain(8, 64, 16) == []  # exactly two points
    assert gain(0, 64, 100) == []


@pytest.mark.parametrize(("counts", "rate"), [([32, 32], 0.5), ([16] * 4, 0.25), ([60, 4], 0.9375)])
def test_what_chance_leaves_is_the_quantile_of_the_largest_class(counts, rate):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    most = max(k for k in range(65) if k == 0 or stats.binom.cdf(k - 1, 64, rate) < 0.999)
    assert most >= max(counts)  # so a perfect attack is never accused
    assert audit.check_large_budget("pgd", labels, most) == []
    if most < 64:
        assert audit.check_large_budget("pgd", labels, most + 1)


def test_a_gradient_counts_as_gone_for_each_image():
    """Of ten right images one has no gradient in either loss, three only in the margin."""

    class Mixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            light = images.flatten(1).sum(dim=1)
            scale = torch.tensor([0.0] + [1e4] * 3 + [1.0] * 6)
            return torch.stack([scale * light, -scale * light], dim=1)

    images, labels = torch.full((10, 1, 4, 4), 0.5), torch.zeros(10, dtype=torch.long)
    found = {f.name: f.value for f in audit.check_gradients(Mixed(), images, labels, 10)}
    assert found[audit.SATURATED_GRADIENT] == pytest.approx(0.3)
    assert found[audit.ZERO_GRADIENT] == pytest.approx(0.1)
    assert audit.check_gradients(Mixed(), images[:0], labels[:0], 10) == []


def test_a_network_that_lets_no_gradient_through_has_none():
    class Cut(Light):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.detach())

    model = Cut().eval().requires_grad_(False)
    test = toy_images(10)
    found = audit.check_gradients(model, test.images, test.labels, 10)
    assert [flag.name for flag in found] == [audit.ZERO_GRADIENT]


def test_eight_bits_are_what_a_picture_holds():
    images = torch.tensor([-0.3, 0.0, 0.3999, 0.4016, 0.5, 1.0, 1.7])
    expected = torch.tensor([0, 0, 102, 102, 128, 255, 255]) / 255
    assert torch.equal(in_eight_bits(images), expected)
    assert torch.equal(in_eight_bits(expected), expected)


def test_a_reference_is_as_balanced_as_its_data_set():
    uneven = torch.tensor([0, 0, 0, 1])
    assert made(GREY, uneven, role="reference") == []
    assert [flag.name for flag in made(GREY, uneven)] == [audit.CLASS_BALANCE]


def test_of_each_name_the_first_flag_is_kept():
    flags = [Flag(name=name, message=str(k)) for k, name in enumerate("abab")]
    assert [flag.message for flag in audit.first_of_each(flags)] == ["0", "1"]
