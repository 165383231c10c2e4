"""PGD with early leaving, MIM, margin-PGD, CW, DeepFool, Square and noise, each by its own rule.

The references are slow programs written here, closed forms on linear networks, and foolbox.
What every attack must keep is in ``test_attacks.py``.
"""

import contextlib
import dataclasses
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import NotApplicable, Run, Threat, ascend, distance, project, random_start
from rdd_bench_builtin.attacks import (
    apgd_ce,
    apgd_t,
    autoattack,
    cw,
    deepfool,
    fgsm,
    margin_pgd,
    mim,
    noise,
    pgd,
    square,
    transfer,
)
from rdd_bench_builtin.attacks._autoattack_adapter import package_name
from rdd_bench_builtin.attacks._gradient import (
    broken,
    difference_of_logits_ratio,
    input_gradient,
    margin,
)
from rdd_bench_builtin.attacks.apgd_ce import APGDCE
from rdd_bench_builtin.attacks.apgd_t import APGDT
from rdd_bench_builtin.attacks.autoattack import AutoAttack
from rdd_bench_builtin.attacks.cw import CW
from rdd_bench_builtin.attacks.deepfool import DeepFool
from rdd_bench_builtin.attacks.fgsm import FGSM
from rdd_bench_builtin.attacks.margin_pgd import MarginPGD
from rdd_bench_builtin.attacks.mim import MIM
from rdd_bench_builtin.attacks.noise import Noise
from rdd_bench_builtin.attacks.pgd import PGD
from rdd_bench_builtin.attacks.square import Square
from rdd_bench_builtin.attacks.transfer import Transfer

SUITE: dict[Any, Any] = {
    fgsm: FGSM, pgd: PGD, margin_pgd: MarginPGD, mim: MIM, apgd_ce: APGDCE, apgd_t: APGDT,
    autoattack: AutoAttack, square: Square, noise: Noise, transfer: Transfer,
    deepfool: DeepFool, cw: CW,
}  # fmt: skip
"""Module and class."""
UNBOUNDED = Threat("l2", 1e6)


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(scratch: Path, batch_size: int = 500) -> Run:
    return Run(
        device=torch.device("cpu"),
        scratch=scratch,
        phase=lambda name: contextlib.nullcontext(),
        report=lambda what, done, total: None,
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def digits():
    """A small network with 60 test images of digits that it classifies correctly."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )
        for _ in range(150):
            batch = torch.randint(1400, (100,))
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                    parameter.sub_(0.2 * gradient)
    network.eval().requires_grad_(False)
    images, labels = images[1400:], labels[1400:]
    correct = (network(images).argmax(1) == labels).nonzero().flatten()[:60]
    return network, images[correct], labels[correct]


def perturb(
    kind: Any, victim: Any, threat: Threat, run: Run, **options: Any
) -> tuple[Tensor, list[str]]:
    """Attack with seed 1 and nothing in mind; return the images and the messages."""
    attack = kind.configured(options)
    run = dataclasses.replace(run, memo={}, surrogates=lambda count: [victim[0]] * count)
    torch.manual_seed(1)
    return attack.perturb(*victim, threat, run), list(attack.messages)


class Affine(nn.Module):
    """Logits ``images @ weight + bias``, for closed forms."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, images):
        return images.flatten(1) @ self.weight + self.bias


def affine(classes: int, shape: tuple[int, int, int], count: int) -> tuple[Affine, Tensor, Tensor]:
    """A random affine network and images in the middle of the box, far from 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(classes)
        features = shape[0] * shape[1] * shape[2]
        weight = torch.randn(features, classes)
        model = Affine(weight, -0.5 * weight.sum(dim=0))
        images = 0.4 + 0.2 * torch.rand(count, *shape)
    return model, images, model(images).argmax(1)


def boundary_distances(model: Affine, images: Tensor, labels: Tensor) -> Tensor:
    """Return the L2 distance of each image to the nearest other class of an affine network."""
    logits = model(images)
    slopes = (model.weight.T[labels].unsqueeze(1) - model.weight.T).norm(dim=2)
    gaps = (logits.gather(1, labels.unsqueeze(1)) - logits) / slopes
    nearest: Tensor = gaps.scatter(1, labels.unsqueeze(1), float("inf")).amin(dim=1)
    return nearest


# Everything -----------------------------------------------------------------------------------


TOO_FEW_CLASSES = {("apgd-t", 2), ("apgd-t", 3)}
NO_TILES = {("square", "l2", (12, 20)), ("autoattack", "l2", (12, 20))}


@pytest.mark.parametrize("kind", SUITE.values())
@pytest.mark.parametrize(
    ("classes", "shape"),
    [
        (2, (1, 8, 8)), (3, (3, 28, 28)), (10, (1, 12, 20)), (100, (3, 20, 12)),
        (10, (3, 8, 8)), (2, (3, 12, 20)), (3, (1, 20, 12)), (100, (1, 8, 8)),
    ],
)  # fmt: skip
def test_any_number_of_classes_channels_and_pixels_will_do_or_is_refused(kind, classes, shape, run):
    victim = affine(classes, shape, 12)
    for norm in sorted(kind.norms):
        threat = Threat(norm, {"linf": 0.2, "l2": 0.8}[norm])
        refused = (kind.name, classes) in TOO_FEW_CLASSES or (
            (kind.name, norm, shape[1:]) in NO_TILES
        )
        if refused:
            with pytest.raises(NotApplicable, match=f"^{kind.name}: .* use |leave it out") as error:
                perturb(kind, victim, threat, run, **kind.smoke)
            assert "\n" not in str(error.value)
            continue
        attacked, _ = perturb(kind, victim, threat, run, **kind.smoke)
        assert attacked.shape == victim[1].shape
        assert distance(attacked, victim[1], norm).max() <= threat.eps * (1 + 1e-4)
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert not torch.equal(attacked, victim[1])


@pytest.mark.parametrize("module", SUITE)
def test_every_module_offers_its_class_which_names_its_paper(module):
    assert module.rdd_bench_attacks() == [SUITE[module]]
    assert SUITE[module].info.paper or module is noise


def test_only_what_is_always_true_is_claimed():
    claims = {kind.name: kind.stronger_than for kind in SUITE.values() if kind.stronger_than}
    assert claims == {
        "pgd": {"fgsm"},
        "mim": {"fgsm"},
        "apgd-ce": {"fgsm"},
        "apgd-t": {"fgsm"},
        "autoattack": {"fgsm", "pgd", "margin-pgd", "mim", "apgd-ce", "apgd-t"},
    }


def test_access_is_what_the_attack_asks_of_the_network(digits, run):
    network, images, labels = digits
    asked = set()

    class Watched(nn.Module):
        def forward(self, pixels):
            asked.add("white" if pixels.requires_grad else "black")
            return network(pixels)

    for kind in SUITE.values():
        asked.clear()
        attack = kind.configured(kind.smoke | ({"draws": 1} if kind is Noise else {}))
        own = dataclasses.replace(run, memo={}, surrogates=lambda count: [network] * count)
        attack.perturb(Watched(), images[:5], labels[:5], Threat("l2", 0.1), own)
        if kind is Transfer:  # It may ask, and does not.
            assert (kind.access, asked) == ("black", set())
        else:
            assert kind.access in asked if asked else kind.access == "none"
            assert ("white" in asked) == (kind.access == "white")


@pytest.mark.parametrize("kind", SUITE.values())
def test_effort_is_an_option_that_can_be_doubled(kind):
    assert (kind.effort is None) == (kind in (FGSM, Noise, DeepFool, CW, AutoAttack))
    if kind.effort is not None:
        doubled = 2 * getattr(kind().config, kind.effort)
        assert getattr(kind.configured({kind.effort: doubled}).config, kind.effort) == doubled


# Being broken, and losses ---------------------------------------------------------------------


def test_broken_means_by_more_than_rounding():
    labels = torch.tensor([0, 0, 0, 0])
    logits = torch.tensor([[10.0, 9.0], [10.0, 10.0005], [10.0, 10.002], [0.010, 0.01001]])
    assert broken(logits, labels).tolist() == [False, False, True, True]


def test_the_dlr_loss_is_that_of_the_package():
    apgd = importlib.import_module(f"{package_name()}.autopgd_base").APGDAttack
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 10), torch.randint(10, (50,))
    torch.testing.assert_close(
        difference_of_logits_ratio(logits, labels), apgd.dlr_loss(None, logits, labels)
    )


def test_the_dlr_loss_ignores_scale_and_shift():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 5).double(), torch.randint(5, (50,))
    torch.testing.assert_close(
        difference_of_logits_ratio(1000 * logits - 7, labels),
        difference_of_logits_ratio(logits, labels),
    )


def test_the_dlr_loss_needs_three_classes(run):
    with pytest.raises(NotApplicable, match="needs three classes and the network has 2"):
        perturb(PGD, affine(2, (1, 4, 4), 3), Threat("linf", 0.1), run, loss="dlr")


# PGD: images leave when they are broken -------------------------------------------------------


def whole_batch_pgd(
    victim: Any, threat: Threat, loss: Any, restarts: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The structure without leaving: all steps of all restarts on all images.

    Returns the last point of the first restart, the last point of the last restart, and whether
    any point on the way, but the very last, was broken.
    """
    model, images, labels = victim
    torch.manual_seed(1)
    met = torch.zeros(len(images), dtype=torch.bool)
    first = points = images
    for restart in range(restarts):
        points = random_start(images, threat)
        for _ in range(steps):
            met |= broken(model(points), labels)
            gradient = input_gradient(model, points, labels, loss)
            moved = ascend(points, gradient, threat.norm, 2.5 * threat.eps / steps)
            points = project(moved, images, threat)
        if restart == 0:
            first = points
        if restart < restarts - 1:
            met |= broken(model(points), labels)
    return first, points, met


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.5)], ids=str)
@pytest.mark.parametrize(("loss", "restarts"), [("ce", 1), ("margin", 3), ("dlr", 2)])
def test_leaving_changes_no_other_image(threat, loss, restarts, digits, run):
    model, _, labels = digits
    ours, _ = perturb(PGD, digits, threat, run, loss=loss, restarts=restarts, steps=10)
    first, last, met = whole_batch_pgd(digits, threat, loss, restarts, 10)
    assert 5 < met.sum() < 55
    # Who was never broken on the way went all the way, to the same point.
    torch.testing.assert_close(ours[~met], last[~met], rtol=0, atol=1e-5)
    assert (model(ours).argmax(1) != labels)[met].all()
    # Nothing that the last iterates break is lost.
    lost = (model(first).argmax(1) != labels) & (model(ours).argmax(1) == labels)
    assert not lost.any()


def test_the_gradient_is_asked_for_unbroken_images_only(digits, run):
    network, images, labels = digits
    seen = 0

    class Counting(nn.Module):
        def forward(self, pixels):
            nonlocal seen
            seen += len(pixels)
            return network(pixels)

    perturb(PGD, (Counting(), images, labels), Threat("linf", 0.1), run, steps=10)
    *_, met = whole_batch_pgd(digits, Threat("linf", 0.1), "ce", 1, 10)
    unbroken = int((~met).sum())
    assert 0 < unbroken < 40
    # Every image is looked at once more than it takes steps, and half of the steps break most.
    assert unbroken * 10 <= seen < unbroken * 10 + (60 - unbroken) * 8


def test_margin_pgd_is_pgd_on_the_margin(digits, run):
    threat = Threat("linf", 0.1)
    ours, _ = perturb(MarginPGD, digits, threat, run)
    same, _ = perturb(PGD, digits, threat, run, loss="margin", steps=30)
    assert torch.equal(ours, same)


# MIM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Threat("linf", 0.08), Threat("l2", 0.4)], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_mim_is_the_papers_algorithm_image_by_image(threat, decay, digits, run):
    model, images, labels = digits
    expected = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        point, velocity = image, torch.zeros_like(image)
        for _ in range(10):
            if broken(model(point), label):
                break
            gradient = input_gradient(model, point, label, "ce")
            velocity = decay * velocity + gradient / gradient.abs().sum()
            if threat.norm == "linf":
                point = point + threat.eps / 10 * velocity.sign()
            else:
                point = point + threat.eps / 10 * velocity / velocity.norm()
            point = project(point, image, threat)
        expected.append(point)
    ours, _ = perturb(MIM, digits, threat, run, decay=decay)
    assert 0 < (model(ours).argmax(1) == labels).sum() < len(labels)
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=1e-5)


def test_mim_without_momentum_is_pgd_from_the_image(digits, run):
    threat = Threat("linf", 0.08)
    ours, _ = perturb(MIM, digits, threat, run, decay=0.0)
    iterative = {"random_start": False, "steps": 10, "relative_step": 1.0}
    assert torch.equal(ours, perturb(PGD, digits, threat, run, **iterative)[0])


def test_mim_does_not_stop_at_a_tiny_gradient(run):
    # A saturated softmax leaves a gradient of about 1e-26, which the normalisation brings back.
    model, images, labels = affine(2, (1, 4, 4), 1)
    scale = -60 / margin(model(images), labels).item()
    loud = Affine(model.weight * scale, model.bias * scale)
    assert 0 < input_gradient(loud, images, labels, "ce").abs().max() < 1e-20
    attacked, _ = perturb(MIM, (loud, images, labels), Threat("l2", 0.01), run)
    assert distance(attacked, images, "l2").item() == pytest.approx(0.01, rel=1e-3)


# Nearest adversarials -------------------------------------------------------------------------


CW_SHORT = {"searches": 3, "steps": 40, "learning_rate": 0.05, "initial_c": 1.0}


@pytest.mark.parametrize("classes", [2, 10])
def test_cw_finds_the_analytic_distance(classes, run):
    victim = affine(classes, (1, 4, 4), 15)
    exact = {"searches": 5, "steps": 400, "learning_rate": 0.002, "initial_c": 0.1}
    attacked, _ = perturb(CW, victim, UNBOUNDED, run, **exact)
    assert (victim[0](attacked).argmax(1) != victim[2]).all()
    ratio = distance(attacked, victim[1], "l2") / boundary_distances(*victim)
    assert ratio.median().item() == pytest.approx(1, abs=1e-3)
    # Nothing is nearer than the boundary.
    assert (ratio >= 1 - 1e-4).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("overshoot", [0.0, 0.02])
def test_deepfool_finds_the_analytic_distance(classes, overshoot, run):
    victim = affine(classes, (3, 4, 5), 30)
    attacked, _ = perturb(DeepFool, victim, UNBOUNDED, run, overshoot=overshoot)
    assert (victim[0](attacked).argmax(1) != victim[2]).all()
    expected = (1 + overshoot) * (boundary_distances(*victim) + 1e-4)
    found = distance(attacked, victim[1], "l2")
    if classes == 100:  # The nearest of 100 classes need not be among the ten likeliest.
        found, expected = found.clamp(min=expected), expected
        assert (found <= 1.5 * expected).all()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "options"), [(DeepFool, {}), (CW, CW_SHORT)])
def test_an_image_counts_as_broken_if_its_distance_is_within_the_budget(kind, options, digits, run):
    network, images, labels = digits
    everything, (message,) = perturb(kind, digits, UNBOUNDED, run, **options)
    moved = distance(everything, images, "l2")
    eps = moved.median().item()
    within, (same,) = perturb(kind, digits, Threat("l2", eps), run, **options)
    assert same == message
    inside = moved <= eps
    assert torch.equal(within[inside], everything[inside])
    assert torch.equal(within[~inside], images[~inside])
    assert torch.equal(network(within).argmax(1) != labels, inside)


@pytest.mark.parametrize(("kind", "options"), [(DeepFool, {}), (CW, CW_SHORT)])
def test_the_median_distance_is_said(kind, options, digits, run):
    _, images, labels = digits
    attacked, messages = perturb(kind, digits, UNBOUNDED, run, **options)
    median = distance(attacked, images, "l2").quantile(0.5).item()
    assert messages == [
        f"found an adversarial for 60 of 60 images, at a median L2 distance of {median:.4f}"
    ]

    constant = Affine(torch.zeros(64, 2), torch.tensor([1.0, 0.0]))
    nowhere = (constant, images, torch.zeros_like(labels))
    attacked, messages = perturb(kind, nowhere, UNBOUNDED, run, **options)
    assert torch.equal(attacked, images)
    assert messages == ["found no adversarial for any of 60 images"]
    assert perturb(kind, (constant, images[:0], labels[:0]), UNBOUNDED, run)[1] == []


@pytest.mark.parametrize(("kind", "options"), [(DeepFool, {}), (CW, CW_SHORT)])
def test_neighbours_change_neither_distance_nor_verdict(kind, options, digits, run, tmp_path):
    network, images, labels = digits
    few = (network, images[:10], labels[:10])
    together, _ = perturb(kind, few, UNBOUNDED, run, **options)
    alone, _ = perturb(kind, few, UNBOUNDED, make_run(tmp_path, batch_size=1), **options)
    torch.testing.assert_close(
        distance(together, few[1], "l2"), distance(alone, few[1], "l2"), rtol=1e-3, atol=0
    )
    # Scored in the batch of the other: no adversarial lies on the boundary itself.
    assert (network(alone).argmax(1) != few[2]).all()
    one_by_one = torch.cat([network(image) for image in torch.split(together, 1)])
    assert (one_by_one.argmax(1) != few[2]).all()


NEAREST: list[tuple[Any, dict[str, Any]]] = [
    (DeepFool, {"overshoot": 0.0}),
    (CW, {"searches": 5, "steps": 200, "learning_rate": 0.005, "initial_c": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), NEAREST)
def test_distances_are_the_analytic_ones_and_infinite_where_there_is_no_adversarial(
    kind, options, run
):
    model, images, labels = affine(10, (1, 4, 4), 15)

    class DeafToLight(nn.Module):
        def forward(self, pixels):
            light = pixels.flatten(1).mean(dim=1, keepdim=True) > 0.9
            return model(pixels).where(~light, torch.eye(10)[0])

    images = torch.cat([images, torch.full((5, 1, 4, 4), 0.95)])
    labels = torch.cat([labels, torch.zeros(5).long()])
    attack = kind.configured(options)
    attacked = attack.perturb(DeafToLight(), images, labels, Threat("l2", 0.0), run)
    assert torch.equal(attacked, images)
    assert attack.distances[15:].isinf().all()
    expected = boundary_distances(model, images[:15], labels[:15])
    beyond = attack.distances[:15] - expected
    assert (beyond >= -1e-4 * expected).all()
    assert beyond.median() < 2e-4
    assert attack.messages[0].startswith("found an adversarial for 15 of 20 images")
    # An instance remembers nothing of its last call.
    attack.perturb(model, images[:0], labels[:0], Threat("l2", 0.1), make_run(run.scratch))
    assert attack.distances.shape == (0,)


SHARED: list[tuple[Any, dict[str, Any], Any]] = [
    (FGSM, {}, "linf"), (FGSM, {}, "l2"), (DeepFool, {}, "l2"), (CW, CW_SHORT, "l2"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "norm"), SHARED)
class TestTheNextBudget:
    def test_costs_no_pass_and_changes_no_bit(self, kind, options, norm, digits, run):
        network, images, labels = digits
        passes = 0

        class Counting(nn.Module):
            def forward(self, pixels):
                nonlocal passes
                passes += 1
                return network(pixels)

        shared = kind.configured(options)
        after, broken = [], []
        for eps in (0.3, 0.1, 0.5):
            attacked = shared.perturb(Counting(), images, labels, Threat(norm, eps), run)
            after.append(passes)
            alone, messages = perturb(kind, digits, Threat(norm, eps), run, **options)
            assert torch.equal(attacked, alone)
            assert list(shared.messages) == messages
            broken.append(int((network(attacked).argmax(1) != labels).sum()))
        assert after[0] == after[1] == after[2] > 0
        assert broken[1] < broken[0] < broken[2]

    def test_other_images_or_labels_are_searched_anew(self, kind, options, norm, digits, run):
        network, images, labels = digits
        images, labels = images[:20], labels[:20]
        threat = Threat(norm, 0.3)
        attack = kind.configured(options)
        attack.perturb(network, images, labels, threat, run)
        others = images.clone()
        others[3, 0, 4, 4] += 0.01
        for seen, true in [(others, labels), (images, labels.roll(1)), (images[:10], labels[:10])]:
            got = attack.perturb(network, seen, true, threat, run)
            assert torch.equal(got, perturb(kind, (network, seen, true), threat, run, **options)[0])
        assert len(run.memo["images"]) == 10  # One memory, of the last images.

    def test_what_the_caller_does_to_its_images_does_not_matter(
        self, kind, options, norm, digits, run
    ):
        network, images, labels = digits
        images, labels = images[:20].clone(), labels[:20].clone()
        attack = kind.configured(options)
        threat = Threat(norm, 0.3)
        first = attack.perturb(network, images, labels, threat, run)
        expected = first.clone()
        first.zero_()
        before = images.clone()
        images.zero_()
        assert torch.equal(attack.perturb(network, before, labels, threat, run), expected)


def test_cw_moves_pixels_that_are_exactly_black_or_white(run):
    model, images, _ = affine(3, (1, 4, 4), 15)
    images = (images > 0.5).float()
    victim = (model, images, model(images).argmax(1))
    options = {"searches": 5, "steps": 160, "learning_rate": 0.05, "initial_c": 0.1}
    attacked, _ = perturb(CW, victim, UNBOUNDED, run, **options)
    assert (model(attacked).argmax(1) != victim[2]).all()


def test_the_confidence_of_cw_is_the_lead_it_asks_for(digits, run):
    network, images, labels = digits
    few = (network, images[:10], labels[:10])
    near, _ = perturb(CW, few, UNBOUNDED, run, **CW_SHORT)
    sure, _ = perturb(CW, few, UNBOUNDED, run, **CW_SHORT, confidence=2.0)
    assert (margin(network(sure), few[2]) >= 2 - 1e-4).all()
    assert (margin(network(near), few[2]) < 2).all()
    assert (distance(sure, few[1], "l2") > distance(near, few[1], "l2")).all()


class TestAgainstFoolbox:
    @staticmethod
    def distances(name: str, victim: Any, **options: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
            foolbox = pytest.importorskip("foolbox")
        network, images, labels = victim
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        attacked = getattr(foolbox.attacks, name)(**options)(model, images, labels, epsilons=None)
        assert (network(attacked[0]).argmax(1) != labels).all()
        return distance(attacked[0], images, "l2")

    def test_deepfool(self, digits, run):
        theirs = self.distances("L2DeepFoolAttack", digits)
        attacked, _ = perturb(DeepFool, digits, UNBOUNDED, run)
        ours = distance(attacked, digits[1], "l2")
        assert ours.median().item() == pytest.approx(theirs.median().item(), rel=1e-3)
        self.equal_verdicts(ours, theirs)

    def test_cw(self, digits, run):
        network, images, labels = digits
        few = (network, images[:20], labels[:20])
        theirs = self.distances(
            "L2CarliniWagnerAttack",
            few,
            binary_search_steps=6,
            steps=150,
            stepsize=0.05,
            initial_const=0.1,
        )
        options = {"searches": 6, "steps": 150, "learning_rate": 0.05, "initial_c": 0.1}
        attacked, _ = perturb(CW, few, UNBOUNDED, run, **options)
        ours = distance(attacked, few[1], "l2")
        assert ours.median().item() == pytest.approx(theirs.median().item(), rel=1e-2)
        self.equal_verdicts(ours, theirs)

    @staticmethod
    def equal_verdicts(ours: Tensor, theirs: Tensor) -> None:
        for share in (0.25, 0.5, 0.75):
            # Between two images, so that rounding cannot decide.
            low, high = theirs.sort().values[int(share * len(theirs)) :][:2]
            eps = (low + high) / 2
            assert torch.equal(ours <= eps, theirs <= eps)


# Square ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.6)], ids=str)
def test_square_is_the_packages(threat, digits, run):
    network, images, labels = digits
    ours, _ = perturb(Square, digits, threat, run, queries=60)
    torch.manual_seed(1)
    package = importlib.import_module(f"{package_name()}.square").SquareAttack(
        network,
        norm={"linf": "Linf", "l2": "L2"}[threat.norm],
        eps=threat.eps,
        n_queries=60,
        seed=int(torch.randint(2**31, ())),
        resc_schedule=True,
    )
    with torch.random.fork_rng():
        theirs = package.perturb(images.clone(), labels)
    assert torch.equal(ours, theirs)
    assert 0 < (network(ours).argmax(1) != labels).sum() < len(labels)


def test_square_needs_no_gradient(digits, run):
    network, images, labels = digits

    class Hidden(nn.Module):
        def forward(self, pixels):
            return network((pixels * 255).round() / 255)

    hidden = (Hidden(), images, labels)
    threat = Threat("linf", 0.15)
    by_gradient, _ = perturb(PGD, hidden, threat, run, random_start=False)
    by_queries, _ = perturb(Square, hidden, threat, run, queries=200)
    assert torch.equal(by_gradient, images)
    assert (network(by_queries).argmax(1) != labels).sum() > 20


@pytest.mark.parametrize("sides", [(5, 5), (4, 7), (7, 4)])
def test_square_reaches_the_analytic_verdicts(sides, run):
    # The package's small squares never lie in the last row and column, so these count nothing.
    model, images, _ = affine(2, (1, *sides), 100)
    inside = torch.ones(sides)
    inside[-1] = inside[:, -1] = 0
    weight = model.weight * inside.flatten().unsqueeze(1)
    model = Affine(weight, -0.5 * weight.sum(dim=0))
    logits = model(images)
    gap, slope = (logits[:, 0] - logits[:, 1]).abs(), (weight[:, 0] - weight[:, 1]).abs().sum()
    threat = Threat("linf", float(gap.median() / slope))
    clear = (gap - threat.eps * slope).abs() > 0.01 * threat.eps * slope
    victim = (model, images[clear], logits.argmax(1)[clear])
    attacked, _ = perturb(Square, victim, threat, run, queries=400)
    right = model(attacked).argmax(1) == victim[2]
    assert torch.equal(right, gap[clear] > threat.eps * slope)


def test_square_draws_anew_for_every_batch(tmp_path):
    model, images, labels = affine(2, (1, 6, 6), 1)
    twice = (model, images.expand(2, -1, -1, -1), labels.expand(2))
    attacked, _ = perturb(
        Square, twice, Threat("linf", 0.3), make_run(tmp_path, batch_size=1), queries=50
    )
    assert not torch.equal(attacked[0], attacked[1])


def test_square_refuses_exactly_the_shapes_that_crash_the_package(run):
    model = affine(2, (1, 1, 1), 1)[0]
    package = importlib.import_module(f"{package_name()}.square").SquareAttack

    class Mean(nn.Module):
        def forward(self, images):
            return model(images.mean(dim=(1, 2, 3)).unsqueeze(1))

    def crashes(images: Tensor, labels: Tensor) -> bool:
        try:
            package(Mean(), norm="L2", eps=0.0, n_queries=1).perturb(images, labels)
        except (RuntimeError, ZeroDivisionError):
            return True
        return False

    refused = 0
    with torch.random.fork_rng():
        for height in range(3, 34):
            for width in (height, height + 7):
                images = torch.full((1, 1, height, width), 0.4)
                labels = Mean()(images).argmax(1)
                victim = (Mean(), images, labels)
                if crashes(images, labels):
                    refused += 1
                    with pytest.raises(NotApplicable, match=f"{height}x{width} images cannot"):
                        perturb(Square, victim, Threat("l2", 0.1), run, queries=1)
                else:
                    perturb(Square, victim, Threat("l2", 0.0), run, queries=1)
    assert refused > 5
    # L-inf has no tiles.
    four = affine(2, (1, 4, 4), 2)
    assert perturb(Square, four, Threat("linf", 0.1), run, queries=1)[0].shape == (2, 1, 4, 4)


# Noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.1)], ids=str)
def test_noise_breaks_as_many_as_the_volume_says(threat, run):
    from scipy.special import betainc

    # One image many times, three pixels, of which L-inf sees only the first.
    weight = torch.zeros(3, 2)
    weight[0, 1] = 1.0
    model = Affine(weight, torch.tensor([0.54, 0.0]))
    images = torch.full((4000, 1, 1, 3), 0.5)
    attacked, _ = perturb(Noise, (model, images, torch.zeros(4000).long()), threat, run)
    share = (model(attacked).argmax(1) == 1).double().mean().item()
    # The rest of an interval, or the cap of a ball in three dimensions, beyond 0.4 of the way.
    expected = 0.3 if threat.norm == "linf" else 0.5 * betainc(2, 0.5, 1 - 0.4**2)
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)


def test_more_draws_keep_what_was_broken_and_break_more(digits, run):
    network, _, labels = digits
    threat = Threat("linf", 0.3)
    once, _ = perturb(Noise, digits, threat, run)
    often, _ = perturb(Noise, digits, threat, run, draws=20)
    gone = network(once).argmax(1) != labels
    assert torch.equal(often[gone], once[gone])
    assert (network(often).argmax(1) != labels).sum() > gone.sum()
