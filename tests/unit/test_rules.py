"""The rules of evaluation, one test each, in the order of docs/evaluation.md.

Every rule answers a mistake that published evaluations have made. The tests here show that the
mistake cannot be made, or is noticed; details are tested beside the code that obeys the rule.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rdd_bench import audit, robustness
from rdd_bench.checks import check_candidates, check_network
from rdd_bench.components import Access, Architecture, Attack, NoOptions, Run
from rdd_bench.consistency import BLACK_BOX, NON_DETERMINISTIC, Evidence, check_black_box
from rdd_bench.errors import ContractError, RddBenchError, UnknownNameError
from rdd_bench.leaderboard import render
from rdd_bench.networks import Classifier, Normalise, Whiten
from rdd_bench.numerics import numerical_settings
from rdd_bench.plan import AttackStep, Selection, make_plan
from rdd_bench.protocol import load_protocol, names
from rdd_bench.records import Flag, QuarantineRecord
from rdd_bench.registry import load_plugins
from rdd_bench.results import join
from rdd_bench.standings import make_tables
from rdd_bench.testing import small_run
from rdd_bench.threats import project
from rdd_bench.training import fit
from rdd_bench.types import (
    DatasetSpec,
    DistilledSet,
    Info,
    LabelledImages,
    Norm,
    Recipe,
    Threat,
    Whitening,
)

SPEC = DatasetSpec(
    name="toy", shape=(1, 4, 4), class_names=("dark", "light"), mean=(0.4,), std=(0.25,)
)
LINF = Threat("linf", 0.1)
RUN = small_run(Path())


class Light(nn.Module):
    """Light or dark, from normalised pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, images: Tensor) -> Tensor:
        light = images.flatten(1) @ self.weight
        return torch.stack([-light, light], dim=1)


class LightBuilder(Architecture[NoOptions]):
    """Builds the network above."""

    name = "light"
    info = Info(title="Light", licence="MIT")

    def build(self, spec: DatasetSpec) -> nn.Module:
        network = Light()
        with torch.no_grad():
            network.weight.copy_(torch.rand(16))
        return network


class Given(Attack[NoOptions]):
    """An attack that does what a test asks of it."""

    name = "given"
    info = Info(title="Given", licence="MIT")
    norms = frozenset[Norm]({"linf", "l2"})

    behaviour: Any = None

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        made: Tensor = type(self).behaviour(model, images, labels, threat, run)
        return made


def victim() -> Classifier:
    return Classifier(Normalise(SPEC), Light()).eval().requires_grad_(False)


def toy_images(count: int = 40) -> LabelledImages:
    """Return images of both classes at various distances from the decision at 0.4."""
    labels = torch.arange(count) % 2
    offset = torch.linspace(0.02, 0.3, count) * (2 * labels - 1)
    texture = 0.1 * (torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    return LabelledImages((0.4 + offset.view(-1, 1, 1, 1) + texture).clamp(0, 1), labels)


def judge(
    behaviour: Any, model: nn.Module | None = None, test: LabelledImages | None = None
) -> robustness.Judgement:
    # A class of its own, because the null control builds another instance.
    attack: Any = type("Here", (Given,), {"behaviour": staticmethod(behaviour)})
    models = [model or victim()]
    return robustness.attack_models(
        models, test or toy_images(), attack(), LINF, [0], RUN, "attack 'given'"
    )


def flags(judged: robustness.Judgement) -> set[str]:
    return {flag.name for flag in judged.flags}


def untouched(_model: nn.Module, images: Tensor, *_: Any) -> Tensor:
    return images


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


# ----------------------------------------------------------------------------------------------


def test_rule_01_budgets_are_in_pixels_and_normalisation_is_inside_the_network():
    pixels = torch.rand(3, 1, 4, 4, requires_grad=True)
    for preprocess in (
        Normalise(SPEC),
        Whiten(Whitening(torch.full((16,), 0.4), torch.eye(16) * 2)),
    ):
        model = Classifier(preprocess, Light()).eval().requires_grad_(False)
        (slope,) = torch.autograd.grad(model(pixels)[:, 1].sum(), pixels)
        per_pixel = 1 / 0.25 if isinstance(preprocess, Normalise) else 2.0
        torch.testing.assert_close(slope, torch.full_like(slope, per_pixel))
    # The published mistake: normalised images, an attack that clamps them to [0, 1].
    test = toy_images()
    world = LabelledImages(Normalise(SPEC)(test.images), test.labels)
    judged = judge(lambda _m, x, *_: x.clamp(0, 1), Light().eval(), world)
    assert {audit.INPUT_RANGE, audit.BUDGET, audit.NULL_ATTACK} <= flags(judged)
    # A budget of 8 is refused and not taken for the whole range.
    with pytest.raises(RddBenchError, match="write 8/255"):
        Threat("linf", 8)


def test_rule_02_attacks_never_see_mean_and_deviation():
    given = set(inspect.signature(Attack.perturb).parameters)
    assert given == {"self", "model", "images", "labels", "threat", "run"}
    assert not any("Spec" in str(field.type) for field in dataclasses.fields(Run))
    seen: list[Tensor] = []
    test = toy_images()

    def look(_model: nn.Module, images: Tensor, *_: Any) -> Tensor:
        seen.append(images)
        return images

    judge(look, test=test)
    assert torch.equal(seen[-1], test.images)  # pixels, as they are


def test_rule_03_networks_are_attacked_in_eval_mode_and_come_back_unchanged():
    network = nn.Sequential(nn.BatchNorm2d(1), Light())
    model = Classifier(Normalise(SPEC), network).eval().requires_grad_(False)
    before = audit.state_hash(model)

    def train(model: nn.Module, images: Tensor, *_: Any) -> Tensor:
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        model.train()
        model(images)
        return images

    judged = judge(train, model)
    assert {audit.STATE_CHANGED, audit.TRAIN_MODE} <= flags(judged)
    assert audit.state_hash(model) == before
    assert not model.training


def test_rule_04_tables_are_ranked_by_autoattack_and_pgd_is_no_toy(registry):
    for name in names():
        protocol = load_protocol(name)
        ranking = [protocol.alias.get(attack, attack) for attack in protocol.attacks]
        assert "autoattack" in ranking, name
    options = registry.build("attack", "pgd", {}).config
    assert options.steps >= 20
    assert options.restarts >= 1
    assert options.random_start


def test_rule_05_masked_gradients_are_noticed_and_planted_adversarials_found():
    """The test of Zimmermann et al. 2022: a defence with adversarials that an attack must find."""

    class Steps(nn.Module):
        """Counts grey levels, so that its gradient is zero everywhere."""

        def forward(self, images: Tensor) -> Tensor:
            light = ((images * 4).round() / 4).flatten(1).sum(dim=1)
            return torch.stack([-light, light], dim=1)

    stairs = Classifier(Normalise(SPEC), Steps()).eval().requires_grad_(False)
    test = toy_images()
    clean = robustness.clean_outcomes(stairs, test, 16)
    (flag,) = robustness.audit_networks([stairs], test, [clean], None, 16)
    assert flag.name == audit.ZERO_GRADIENT

    def with_gradients(model: nn.Module, images: Tensor, labels: Tensor, *_: Any) -> Tensor:
        leaf = images.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels)
        (slope,) = torch.autograd.grad(loss, leaf)
        return project(images + LINF.eps * slope.sign(), images, LINF)

    def blind(_model: nn.Module, images: Tensor, labels: Tensor, *_: Any) -> Tensor:
        return (images + LINF.eps * (1 - 2 * labels.view(-1, 1, 1, 1))).clamp(0, 1)

    def evidence(access: Access, attack: Any) -> Evidence:
        robust = judge(attack, stairs).robust[0].numpy()
        return Evidence(access, access, access, frozenset(), [robust])

    left, found = evidence("white", with_gradients), evidence("black", blind)
    assert left.right > found.right  # the gradients lead nowhere, the planted ones are there
    assert [flag.name for flag in check_black_box(found, [left, found])] == [BLACK_BOX]


def test_rule_06_networks_answer_with_logits_the_same_ones_twice(book):
    class Probabilities(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)  # sixteen answers for two classes

    with pytest.raises(ContractError, match=r"logits \(2, 2\)"):
        check_network(Probabilities(), SPEC, "architecture 'given'")

    class Rolling(Light):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + 0.01 * torch.rand(1)

    rolling = Classifier(Normalise(SPEC), Rolling()).eval().requires_grad_(False)
    assert NON_DETERMINISTIC in flags(judge(untouched, rolling))
    rolled = book.cell("rolling", ["1111"], ["1111"])
    flag = Flag(name=NON_DETERMINISTIC, message="two forward passes differ")
    book.records[-1] = rolled.model_copy(update={"flags": [flag]})
    book.cell("steady", ["1111"], ["1100"])
    standings = make_tables(join(book.records))[0].standings(("linf", 0.1))
    assert [(s.row.label, s.rank) for s in standings] == [("steady", (1, 1)), ("rolling", None)]


def test_rule_07_every_norm_and_budget_is_a_ranking_of_its_own(book):
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1100"], norm="linf", eps=0.1)
    book.attack(train, ["1000"], norm="l2", eps=0.5)
    book.attack(train, ["0000"], norm="linf", eps=0.2, ranked=False)
    (table,) = make_tables(join(book.records))
    assert table.ranked == [("l2", 0.5), ("linf", 0.1)]
    found = {threat: table.standings(threat)[0].worst.mean for threat in table.ranked}
    assert found == {("l2", 0.5): 0.25, ("linf", 0.1): 0.5}


def test_rule_08_the_worst_case_is_taken_image_by_image(book):
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1100"], "pgd")
    book.attack(train, ["0011"], "square")
    (standing,) = make_tables(join(book.records))[0].standings(("linf", 0.1))
    assert standing.worst.mean == 0  # and neither the mean nor the smallest of two halves


def test_rule_09_the_denominator_is_all_test_images():
    test = toy_images()
    wrong = LabelledImages(test.images, test.labels.clone())
    wrong.labels[::4] = 1 - wrong.labels[::4]
    (robust,) = judge(untouched, test=wrong).robust
    assert len(robust) == 40
    assert robust.float().mean() == 0.75  # what is wrong clean is lost, whatever an attack does


def test_rule_10_robustness_is_compared_at_equal_clean_accuracy(book):
    """A network that is right less often may keep a larger share of it and prove nothing."""
    for ipc, clean, robust in ((1, 50, 20), (10, 100, 40)):
        book.cell(
            "random", ["1" * clean + "0" * (100 - clean)], ["1" * robust + "0" * (100 - robust)],
            ipc=ipc, role="baseline", control=True,
        )  # fmt: skip
    book.cell("weak", ["1" * 50 + "0" * 50], ["1" * 20 + "0" * 80], ipc=10)
    table = next(t for t in make_tables(join(book.records)) if t.ipc == 10)
    weak = next(s for s in table.standings(("linf", 0.1)) if s.row.label == "weak")
    assert (weak.clean.mean, weak.worst.mean) == (0.5, 0.2)  # absolute figures, always
    assert weak.gain is not None
    assert weak.matched is not None
    assert weak.gain.mean == pytest.approx(-0.2)
    assert weak.matched.mean == pytest.approx(0)


def test_rule_11_few_images_mean_wide_intervals_and_shared_ranks(book):
    rng = np.random.default_rng(0)
    for label, rate in (("a", 0.35), ("b", 0.30)):
        bits = "".join("1" if u < rate else "0" for u in rng.random(200))
        book.cell(label, ["1" * 200], [bits])
    standings = make_tables(join(book.records))[0].standings(("linf", 0.1))
    assert {s.rank for s in standings} == {(1, 2)}
    assert all(s.worst.high - s.worst.low > 0.12 for s in standings)  # ±6.4 points at 200 images
    for name in names():
        protocol = load_protocol(name)
        assert set(protocol.test_sha256) == set(protocol.datasets), name  # the images are pinned


def test_rule_12_at_least_three_training_seeds_and_no_clock_decides_a_weight():
    assert all(len(load_protocol(name).seeds) >= 3 for name in names())
    made = DistilledSet(toy_images().images, toy_images().labels)
    first, second = (
        fit(
            made,
            Recipe(epochs=2),
            LightBuilder(),
            SPEC,
            [0, 1],
            device=torch.device("cpu"),
            report=lambda *_: None,
        ).models
        for _ in range(2)
    )
    assert audit.state_hash(first[0]) == audit.state_hash(second[0])
    assert audit.state_hash(first[0]) != audit.state_hash(first[1])


def test_rule_13_training_never_sees_a_test_image_and_keeps_its_last_epoch():
    assert not any("test" in name for name in inspect.signature(fit).parameters)
    images = toy_images()
    made = DistilledSet(images.images, images.labels)

    def train(epochs: int) -> nn.Module:
        recipe = Recipe(epochs=epochs, schedule="constant", batch_size=100)
        cpu = torch.device("cpu")
        trained = fit(made, recipe, LightBuilder(), SPEC, [0], device=cpu, report=lambda *_: None)
        return trained.models[0]

    weights = [audit.state_hash(train(epochs)) for epochs in (1, 2, 3)]
    assert len(set(weights)) == 3  # every further epoch counts, the best one is nowhere kept
    (flag,) = audit.check_selection({"selected_on": "test"})  # what a reader of files notes
    assert flag.name == audit.TEST_SELECTION


def test_rule_14_the_headline_track_has_hard_labels_and_no_teacher(registry):
    for name in names():
        protocol = load_protocol(name)
        assert protocol.tracks[0] == "natural"
        assert not protocol.recipe.uses
        assert protocol.recipe_of("natural") == protocol.recipe
    soft = torch.tensor([[0.4, 0.6], [0.9, 0.1]])
    made = DistilledSet(torch.rand(2, 1, 4, 4), soft)
    assert made.hard_labels.tolist() == [1, 0]


def test_rule_15_all_rows_of_a_track_share_one_recipe(registry):
    protocol = load_protocol("digits-v1")
    plan = make_plan(protocol, Selection(tracks=["natural"]), registry)
    recipes = {
        step.train.recipe
        for step in plan.steps
        if isinstance(step, AttackStep) and step.train.distill.role != "reference"
    }
    assert recipes == {protocol.recipe}


def test_rule_16_images_and_bytes_stand_beside_the_images_per_class(book):
    book.cell("dm", ["1111"], ["1100"], images=100, bytes=25600)
    text = render(book.records)
    assert "| Images |" in text.replace("   ", " ").replace("  ", " ")
    assert "25,600" in text
    views = DistilledSet(torch.rand(4, 1, 4, 4), torch.full((4, 2), 0.5))
    assert views.num_bytes == 4 * 16 * 4 + 4 * 2 * 4  # soft labels are stored, so they count


def test_rule_17_sets_are_trained_on_as_they_are_stored(tmp_path):
    from rdd_bench.artifacts import set_from_bytes, set_to_bytes
    from rdd_bench.training import Lesson

    images = torch.tensor([-1.5, 0.3, 2.25, 0.1]).view(-1, 1, 1, 1).expand(4, 1, 4, 4).contiguous()
    made = DistilledSet(images, torch.tensor([0, 1, 0, 1]))
    kept = set_from_bytes(set_to_bytes(made, {}), "here")
    lesson = Lesson(kept, Recipe(), torch.device("cpu"))
    assert torch.equal(lesson.pixels, images)


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_rule_18_no_number_of_classes_is_taken_for_granted(registry, classes):
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(classes, 64))

        def forward(self, images: Tensor) -> Tensor:
            return (images.flatten(1) - 0.5) @ self.weight.T

    torch.manual_seed(0)
    model = Many().eval().requires_grad_(False)
    images = torch.rand(6, 1, 8, 8)
    test = LabelledImages(images, model(images).argmax(dim=1))
    options = {"attacks": ["apgd-ce", "apgd-t"], "iterations": 5}
    attack = registry.build("attack", "autoattack", options)
    judged = robustness.attack_models(
        [model], test, attack, Threat("linf", 0.3), [0], RUN, "attack 'autoattack'"
    )
    assert not judged.robust[0].any()
    assert not judged.flags


def test_rule_19_time_is_in_no_score(book):
    for seconds in (1.0, 1000.0):
        book.cell(f"dm{seconds:.0f}", ["1111"], ["1100"], seconds={"total": seconds})
    (table,) = make_tables(join(book.records))
    first, second = table.standings(("linf", 0.1))
    assert first.worst == second.worst
    assert first.rank == second.rank == (1, 2)


def test_rule_20_verdicts_are_float32_without_tf32_and_no_number_is_lost():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with numerical_settings(threads=1):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    images = torch.rand(2, 1, 4, 4)
    with pytest.raises(ContractError, match="NaN"):
        check_candidates(images * torch.nan, images, "attack 'given'")
    with pytest.raises(ContractError, match="float16"):
        check_candidates(images.half(), images, "attack 'given'")
    drawn = [judge(lambda _m, x, *_: x + 0.1 * torch.rand_like(x)).robust[0] for _ in range(2)]
    assert torch.equal(*drawn)


def test_rule_21_an_attack_is_named_with_all_its_parameters(book):
    train = book.train(book.distill("dm"), ["1111"])
    book.attack(train, ["1100"], "pgd steps=7")
    book.attack(train, ["1000"], "pgd steps=70")
    text = render(book.records)
    for options in ("changed=steps=7 ", "changed=steps=70"):
        assert options in text
    (table,) = make_tables(join(book.records))
    assert len(table.attacks(("linf", 0.1))) == 2


def test_rule_22_whole_data_with_its_own_recipe_and_seeds_is_in_every_protocol(registry):
    for name in names():
        protocol = load_protocol(name)
        assert {"whole", "whole-at"} <= set(protocol.references), name
        for reference in protocol.references:
            assert registry.find("distiller", reference).cls.role == "reference"


def test_rule_23_unlike_rules_never_share_a_table_and_wrong_results_are_struck_through(book):
    book.cell("dm", ["1111"], ["1100"])
    wrong = book.cell("dc", ["1111"], ["1110"])
    book.cell("dm", ["1111"], ["1111"], protocol="toy-v2", protocol_sha256="b" * 64)
    tables = make_tables(join(book.records))
    assert [(t.protocol, len(t.rows)) for t in tables] == [("toy-v1", 2), ("toy-v2", 1)]
    book.records.append(
        QuarantineRecord(address="q", target=wrong.address, reason="a bug", created="2026")
    )
    assert "~~dc~~" in render(book.records)
    assert "a bug" in render(book.records)


def test_rule_24_an_unknown_name_is_an_error_with_a_suggestion(registry):
    protocol = load_protocol("digits-v1")
    with pytest.raises(UnknownNameError, match="pgd"):
        make_plan(protocol, Selection(attacks=["SPSA", "pdg"]), registry)
    with pytest.raises(RddBenchError, match="stepz is not an option"):
        make_plan(protocol, Selection(options={"pgd": {"stepz": 1}}), registry)
