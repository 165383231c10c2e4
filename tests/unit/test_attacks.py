"""What every attack must keep, and FGSM and PGD, on a network trained on real digits."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import RddBenchError, Run, Threat, distance
from rdd_bench_builtin.attacks._gradient import (
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

BUDGETS = {"linf": 0.1, "l2": 0.6}
ATTACKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fgsm": (FGSM, {}),
    "pgd": (PGD, {}),
    "pgd-margin-restarts": (PGD, {"loss": "margin", "restarts": 3, "steps": 5}),
    "apgd-ce": (APGDCE, {"iterations": 10}),
    "apgd-t": (APGDT, {"iterations": 5, "targets": 3}),
    "autoattack": (AutoAttack, {"iterations": 3, "square_queries": 10}),
    "transfer": (Transfer, {"surrogates": 2}),
    "margin-pgd": (MarginPGD, {"steps": 10}),
    "mim": (MIM, {}),
    "square": (Square, {"queries": 100}),
    "noise": (Noise, {"draws": 3}),
    "deepfool": (DeepFool, {}),
    "cw": (CW, {"searches": 3, "steps": 30, "learning_rate": 0.05, "initial_c": 1.0}),
}
CASES = [(name, norm) for name, (kind, _) in ATTACKS.items() for norm in sorted(kind.norms)]
STRONG = [case for case in CASES if case[0] != "noise"]


@pytest.fixture(scope="module")
def digits():
    """A small network with 120 test images that it classifies correctly."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        train(network, images[:1400], labels[:1400])
    network.eval().requires_grad_(False)
    images, labels = images[1400:], labels[1400:]
    correct = (network(images).argmax(1) == labels).nonzero().flatten()[:120]
    return network, images[correct], labels[correct]


def train(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    # By hand, because the first use of torch.optim takes seconds to import.
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for _ in range(12):
        order = torch.randperm(len(images))
        for batch in (order[start : start + 64] for start in range(0, len(order), 64)):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient, speed in zip(
                    network.parameters(), gradients, velocity, strict=True
                ):
                    parameter.sub_(0.05 * speed.mul_(0.9).add_(gradient))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def make_run(
    tmp_path: Path,
    batch_size: int = 50,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Run:
    return Run(
        device=torch.device("cpu"),
        scratch=tmp_path,
        phase=lambda name: contextlib.nullcontext(),
        report=report,
        batch_size=batch_size,
    )


def robust(model: Any, attacked: Tensor, labels: Tensor) -> Tensor:
    correct: Tensor = model(attacked).argmax(1) == labels
    return correct


def attack(name: str, digits: Any, threat: Threat, run: Run, **options: Any) -> Tensor:
    """Attack with seed 1 and nothing in mind; surrogates are the network itself."""
    kind, given = ATTACKS[name]
    run = dataclasses.replace(run, memo={}, surrogates=lambda count: [digits[0]] * count)
    torch.manual_seed(1)
    attacked: Tensor = kind.configured(given | options).perturb(*digits, threat, run)
    return attacked


@pytest.mark.parametrize(("name", "norm"), CASES)
class TestEveryAttack:
    def test_stays_within_the_budget_and_the_pixel_range(self, name, norm, digits, run):
        threat = Threat(norm, BUDGETS[norm])
        attacked = attack(name, digits, threat, run)
        assert attacked.shape == digits[1].shape
        assert attacked.dtype == torch.float32
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert distance(attacked, digits[1], norm).max() <= threat.eps * (1 + 1e-4) + 1e-6

    def test_without_a_budget_returns_the_very_images(self, name, norm, digits, run):
        assert torch.equal(attack(name, digits, Threat(norm, 0.0), run), digits[1])

    def test_an_empty_batch_works(self, name, norm, digits, run):
        network, images, labels = digits
        empty = attack(name, (network, images[:0], labels[:0]), Threat(norm, 0.1), run)
        assert empty.shape == (0, 1, 8, 8)

    def test_one_image_works(self, name, norm, digits, run):
        network, images, labels = digits
        one = attack(name, (network, images[:1], labels[:1]), Threat(norm, 0.1), run)
        assert one.shape == (1, 1, 8, 8)

    def test_same_seed_same_bits(self, name, norm, digits, run):
        threat = Threat(norm, BUDGETS[norm])
        network, images, labels = digits
        few = (network, images[:40], labels[:40])
        assert torch.equal(attack(name, few, threat, run), attack(name, few, threat, run))

    def test_leaves_the_caller_as_it_was(self, name, norm, digits, run):
        network, images, labels = digits
        images, labels = images[:20].clone(), labels[:20].clone()
        before = images.clone(), labels.clone()
        weights = {key: value.clone() for key, value in network.state_dict().items()}
        trace = sys.gettrace()
        marker = lambda frame, event, argument: None  # noqa: E731
        sys.settrace(marker)
        try:
            attack(name, (network, images, labels), Threat(norm, 0.1), run)
            assert sys.gettrace() is marker
        finally:
            sys.settrace(trace)
        assert torch.equal(images, before[0])
        assert torch.equal(labels, before[1])
        assert not images.requires_grad
        assert not any(module.training for module in network.modules())
        for key, parameter in network.named_parameters():
            assert torch.equal(parameter, weights[key])
            assert parameter.grad is None
            assert not parameter.requires_grad

    def test_works_under_inference_mode(self, name, norm, digits, run):
        network, images, labels = digits
        few = (network, images[:20], labels[:20])
        expected = attack(name, few, Threat(norm, 0.1), run)
        with torch.inference_mode():
            inside = attack(
                name, (network, images[:20].clone(), labels[:20].clone()), Threat(norm, 0.1), run
            )
        assert torch.equal(inside, expected)

    def test_the_memory_layout_does_not_matter(self, name, norm, digits, run):
        network, images, labels = digits
        colour = nn.Sequential(Grey(), network)
        images = images[:20].expand(-1, 3, -1, -1).contiguous()
        last = images.to(memory_format=torch.channels_last)
        expected = attack(name, (colour, images, labels[:20]), Threat(norm, 0.1), run)
        got = attack(name, (colour, last, labels[:20]), Threat(norm, 0.1), run)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    def test_reports_its_progress(self, name, norm, digits, tmp_path):
        seen = []
        run = make_run(tmp_path, report=lambda what, done, total: seen.append((done, total)))
        attack(name, digits, Threat(norm, 0.1), run)
        assert seen[0][0] == 0
        assert seen[-1][0] == seen[-1][1] > 1


@pytest.mark.parametrize(("name", "norm"), STRONG)
def test_a_larger_budget_breaks_more(name, norm, digits, run):
    network, images, labels = digits
    few = (network, images[:60], labels[:60])
    counts = [
        int(
            robust(
                network, attack(name, few, Threat(norm, part * BUDGETS[norm]), run), few[2]
            ).sum()
        )
        for part in (0.5, 1.0, 2.0)
    ]
    assert 60 >= counts[0] > counts[2]
    # An attack that does nothing would pass most of the tests above.
    assert counts[1] < 54


class Grey(nn.Module):
    def forward(self, images):
        return images.mean(dim=1, keepdim=True)


class Linear(nn.Module):
    """Logits ``(pixels - 0.5) . weight`` of k classes, all equal for a grey image."""

    weight: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        self.register_buffer("weight", 5 * torch.randn(25, classes, generator=generator))

    def forward(self, images):
        return (images - 0.5).flatten(1) @ self.weight


def smallest_budgets(model: Linear, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Return the budget from which on each image can be broken, away from 0 and 1, (n,).

    A budget of eps lowers the lead over class j by at most eps times the dual norm of the
    difference of the weights.
    """
    logits = model(images)
    slopes = model.weight.T[labels].unsqueeze(1) - model.weight.T
    steepness = slopes.abs().sum(dim=2) if norm == "linf" else slopes.norm(dim=2)
    needed = (logits.gather(1, labels.unsqueeze(1)) - logits) / steepness
    smallest: Tensor = needed.scatter(1, labels.unsqueeze(1), float("inf")).amin(dim=1)
    return smallest


CW_EXACT = {"searches": 6, "steps": 100, "learning_rate": 0.005, "initial_c": 0.01}
ON_A_LINEAR_NETWORK: dict[str, tuple[Any, dict[str, Any], set[int]]] = {
    # With two classes every gradient has the direction of the only boundary. With more, that of
    # the cross-entropy is a mixture, and that of the margin follows the class that leads at the
    # moment; the optimum is for those who try every class.
    "fgsm": (FGSM, {}, {2}),
    "pgd": (PGD, {}, {2}),
    "pgd-from-the-image": (PGD, {"random_start": False}, {2}),
    "pgd-dlr": (PGD, {"loss": "dlr"}, set()),
    "margin-pgd": (MarginPGD, {}, {2}),
    "mim": (MIM, {}, {2}),
    "apgd-ce": (APGDCE, {"iterations": 30}, {2}),
    "apgd-t": (APGDT, {"iterations": 50}, {10}),
    "autoattack": (AutoAttack, {"iterations": 50, "square_queries": 20}, {2, 10}),
    "transfer": (Transfer, {"surrogates": 2}, {2}),
    # Without the overshoot, which is a deliberate part of its distance.
    "deepfool": (DeepFool, {"overshoot": 0.0}, {2, 10}),
    "cw": (CW, CW_EXACT, {2}),
    # Searches at random, of which Square never looks at the last row and column.
    "square": (Square, {"queries": 100}, set()),
    "noise": (Noise, {"draws": 3}, set()),
}
NEED_MORE_CLASSES = {("apgd-t", 2), ("pgd-dlr", 2)}


@pytest.mark.parametrize(
    ("name", "norm", "classes"),
    [
        (name, norm, classes)
        for name, (kind, *_) in ON_A_LINEAR_NETWORK.items()
        for norm in sorted(kind.norms)
        for classes in (2, 10)
        if (name, classes) not in NEED_MORE_CLASSES
    ],
)
def test_on_a_linear_network_nothing_is_broken_but_what_can_be(name, norm, classes, run):
    kind, options, exact = ON_A_LINEAR_NETWORK[name]
    model: Any = Linear(classes)
    generator = torch.Generator().manual_seed(1)
    images = 0.4 + 0.2 * torch.rand(200, 1, 5, 5, generator=generator)
    labels = model(images).argmax(1)
    needed = smallest_budgets(model, images, labels, norm)
    eps = needed.median().item()
    assert eps < 0.4, "the box would bind"
    clear = (needed - eps).abs() > 0.01 * eps
    images, labels, breakable = images[clear], labels[clear], needed[clear] < eps
    assert 0.4 < breakable.float().mean() < 0.6
    # Surrogates are the network itself, louder.
    run = dataclasses.replace(run, surrogates=lambda n: [nn.Sequential(model, Times(3.0))] * n)
    torch.manual_seed(0)
    attacked = kind.configured(options).perturb(model, images, labels, Threat(norm, eps), run)
    broken = ~robust(model, attacked, labels)
    if classes in exact:
        assert torch.equal(broken, breakable)
    else:
        assert not (broken & ~breakable).any()
        assert broken.any() or kind is Noise


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
        return pytest.importorskip("foolbox")


class TestAgainstFoolbox:
    def test_fgsm(self, foolbox, digits, run):
        network, _, labels = digits
        theirs = self.theirs(foolbox, foolbox.attacks.LinfFastGradientAttack(), digits, 0.1)
        ours = attack("fgsm", digits, Threat("linf", 0.1), run)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert torch.equal(robust(network, ours, labels), robust(network, theirs, labels))

    def test_fgm_in_l2(self, foolbox, digits, run):
        theirs = self.theirs(foolbox, foolbox.attacks.L2FastGradientAttack(), digits, 0.6)
        ours = attack("fgsm", digits, Threat("l2", 0.6), run)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("norm", BUDGETS)
    def test_pgd(self, norm, foolbox, digits, run):
        network, _, labels = digits
        kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
        theirs = self.theirs(
            foolbox,
            kind(steps=20, rel_stepsize=2.5 / 20, random_start=False),
            digits,
            BUDGETS[norm],
        )
        ours = attack("pgd", digits, Threat(norm, BUDGETS[norm]), run, random_start=False)
        tolerance = {"linf": 1e-6, "l2": 1e-3}[norm]
        # Ours leaves an image where it breaks, theirs goes on.
        unbroken = robust(network, ours, labels)
        assert torch.equal(unbroken, robust(network, theirs, labels))
        torch.testing.assert_close(ours[unbroken], theirs[unbroken], rtol=0, atol=tolerance)

    @staticmethod
    def theirs(foolbox: Any, method: Any, digits: Any, eps: float) -> Tensor:
        network, images, labels = digits
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
        attacked: Tensor = method(model, images, labels, epsilons=eps)[0]
        return attacked


class TestPGD:
    @pytest.mark.parametrize("norm", BUDGETS)
    def test_is_at_least_as_strong_as_fgsm(self, norm, digits, run):
        threat = Threat(norm, BUDGETS[norm])
        network, _, labels = digits
        weak = robust(network, attack("fgsm", digits, threat, run), labels).sum()
        strong = robust(network, attack("pgd", digits, threat, run, steps=40), labels).sum()
        assert strong <= weak + 1
        assert PGD.stronger_than == {"fgsm"}

    def test_a_restart_keeps_what_was_broken_and_breaks_more(self, digits, run, tmp_path):
        threat = Threat("linf", 0.08)
        network, images, labels = digits
        # One batch, so that the first restart draws the same start in both runs.
        whole = make_run(tmp_path, batch_size=len(images))
        once = attack("pgd", digits, threat, whole, steps=2, relative_step=1.0)
        often = attack("pgd", digits, threat, whole, steps=2, relative_step=1.0, restarts=8)
        broken = ~robust(network, once, labels)
        assert torch.equal(often[broken], once[broken])
        assert (~robust(network, often, labels)).sum() > broken.sum()

    def test_a_broken_image_is_not_attacked_again(self, digits, tmp_path):
        network, images, labels = digits
        seen = []

        class Counting(nn.Module):
            def forward(self, pixels):
                seen.append(len(pixels))
                return network(pixels)

        threat = Threat("linf", 1.0)
        whole = make_run(tmp_path, batch_size=len(images))
        attack("pgd", (Counting(), images, labels), threat, whole, restarts=5)
        # The first look is at the random starts; after a few, no image is left to look at.
        assert seen[0] == 120
        assert seen == sorted(seen, reverse=True)
        assert len(seen) < 20

    def test_the_step_follows_the_budget(self, run):
        # From the image, against a gradient of ones, each step of two goes half of relative_step.
        model = Slope()
        images = torch.full((1, 1, 2, 2), 0.5)
        options = {"steps": 2, "relative_step": 0.5, "random_start": False}
        attack: Any = PGD.configured(options)
        got = attack.perturb(
            model, images, torch.ones(1, dtype=torch.long), Threat("linf", 0.2), run
        )
        torch.testing.assert_close(got, torch.full((1, 1, 2, 2), 0.4))

    def test_random_starts_differ_between_images_and_calls(self, digits, run):
        network, images, labels = digits
        same = images[:1].expand(2, -1, -1, -1)
        got = attack("pgd", (network, same, labels[:1].expand(2)), Threat("l2", 0.6), run, steps=1)
        assert not torch.equal(got[0], got[1])

    def test_over_confidence_hides_from_the_cross_entropy_but_not_from_the_margin(
        self, digits, run
    ):
        network, images, labels = digits
        loud = nn.Sequential(network, Times(1000.0))
        threat = Threat("linf", 0.1)

        def survivors(model: nn.Module, loss: str) -> int:
            attacked = attack("pgd", (model, images, labels), threat, run, loss=loss)
            return int(robust(network, attacked, labels).sum())

        assert survivors(loud, "ce") > survivors(network, "ce") + 10
        assert abs(survivors(loud, "margin") - survivors(network, "margin")) <= 1

    def test_equal_restarts_are_refused(self):
        with pytest.raises(RddBenchError, match="restarts without random_start"):
            PGD.configured({"restarts": 2, "random_start": False})

    @pytest.mark.parametrize(
        "options",
        [{"steps": 0}, {"relative_step": 0}, {"restarts": 0}, {"loss": "hinge"}, {"x": 1}],
    )
    def test_impossible_options_are_refused(self, options):
        with pytest.raises(RddBenchError, match=next(iter(options))):
            PGD.configured(options)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


class Slope(nn.Module):
    """The second logit is the sum of the pixels."""

    def forward(self, images):
        total = images.flatten(1).sum(1)
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_batches_do_not_change_fgsm(digits, tmp_path):
    threat = Threat("linf", 0.1)
    small = attack("fgsm", digits, threat, make_run(tmp_path, batch_size=7))
    whole = attack("fgsm", digits, threat, make_run(tmp_path, batch_size=500))
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-6)


def test_the_margin_of_known_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2])).tolist() == [-1.0, 4.0]


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_the_gradient_is_that_of_finite_differences(loss):
    torch.manual_seed(0)
    double: Any = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    point = torch.linspace(0.1, 0.8, 4, dtype=torch.float64).view(1, 1, 2, 2)
    label = torch.tensor([1])

    def value(pixels: Tensor) -> float:
        logits = double(pixels)
        if loss == "margin":
            return margin(logits, label).item()
        if loss == "dlr":
            return difference_of_logits_ratio(logits, label).item()
        return nn.functional.cross_entropy(logits, label).item()

    expected = torch.stack(
        [
            torch.tensor((value(point + unit) - value(point - unit)) / 2e-6)
            for unit in 1e-6 * torch.eye(4, dtype=torch.float64).view(4, 1, 1, 2, 2)
        ]
    )
    got = input_gradient(double, point, label, loss).flatten()
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-5, atol=1e-8)
    assert double[1].weight.grad is None
