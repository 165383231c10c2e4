"""Our APGD gives the verdicts of the package's, image by image, with fewer passes."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from rdd_bench.api import NotApplicable, RddBenchError, Run, Threat
from rdd_bench_builtin.attacks._apgd import APGD, FEW, _checkpoints
from rdd_bench_builtin.attacks.apgd_ce import APGDCE
from rdd_bench_builtin.attacks.apgd_t import APGDT
from rdd_bench_builtin.attacks.autoattack import AutoAttack

NAMES = {"linf": "Linf", "l2": "L2"}
BUDGETS = {"linf": 0.1, "l2": 0.6}
MANY = 500


class Silent:
    def warning(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def digits():
    """The network trained normally or adversarially on the first k digits, with 60 test images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    made: dict[tuple[int, bool], tuple[nn.Module, Tensor, Tensor]] = {}

    def of(classes: int, adversarial: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
        if (classes, adversarial) not in made:
            chosen = data.target < classes
            images = torch.tensor(data.images[chosen] / 16, dtype=torch.float32).unsqueeze(1)
            labels = torch.tensor(data.target[chosen])
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = nn.Sequential(
                    nn.Conv2d(1, 8, 3, padding=1),
                    nn.GroupNorm(4, 8),
                    nn.ReLU(),
                    nn.AvgPool2d(2),
                    nn.Flatten(),
                    nn.Linear(128, classes),
                )
                train(network, images[:600], labels[:600], 0.1 if adversarial else 0)
            network.eval().requires_grad_(False)
            made[classes, adversarial] = network, images[-60:], labels[-60:]
        return made[classes, adversarial]

    return of


def train(network: nn.Module, images: Tensor, labels: Tensor, eps: float) -> None:
    """Train by hand, because the first use of torch.optim takes seconds to import."""
    parameters = list(network.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for _ in range(20):
        for batch in torch.split(torch.randperm(len(images)), 64):
            seen, true = images[batch], labels[batch]
            for _ in range(3 if eps else 0):
                leaf = seen.clone().requires_grad_()
                loss = nn.functional.cross_entropy(network(leaf), true)
                gradient = torch.autograd.grad(loss, leaf)[0]
                step = (seen + eps / 2 * gradient.sign()).clamp(
                    images[batch] - eps, images[batch] + eps
                )
                seen = step.clamp(0, 1)
            loss = nn.functional.cross_entropy(network(seen), true)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient, speed in zip(parameters, gradients, velocity, strict=True):
                    parameter.sub_(0.05 * speed.mul_(0.9).add_(gradient))


def ours(network: nn.Module, norm: Any, loss: Any = "ce", **options: Any) -> APGD:
    settings: dict[str, Any] = {
        "eps": BUDGETS[norm],
        "iterations": 100,
        "restarts": 1,
        "targets": 9,
        "seed": 0,
    }
    settings |= {"max_rows": MANY, "check": lambda lengths: None} | options
    return APGD(model=network, norm=norm, loss=loss, **settings)


def theirs(network: nn.Module, norm: str, loss: str = "ce", **options: Any) -> Any:
    targets = options.pop("targets", 9)
    settings: dict[str, Any] = {"norm": NAMES[norm], "eps": BUDGETS[norm]}
    settings |= {"n_iter": options.pop("iterations", 100)}
    settings |= {"n_restarts": options.pop("restarts", 1), "seed": 0, "device": "cpu"} | options
    if loss == "dlr-targeted":
        return APGDAttack_targeted(network, n_target_classes=targets, logger=Silent(), **settings)
    return APGDAttack(network, loss=loss, logger=Silent(), **settings)


def assert_same_verdicts(
    task: tuple[nn.Module, Tensor, Tensor], norm: str, loss: str, rows: int = MANY, **options: Any
) -> Tensor:
    """Return which images withstood both."""
    network, images, labels = task
    mine = ours(network, norm, loss, max_rows=rows, **options).perturb(images, labels)
    package = theirs(network, norm, loss, **options).perturb(images, labels)
    right: Tensor = network(mine).argmax(1) == labels
    assert torch.equal(right, network(package).argmax(1) == labels)
    # What is not broken comes back as it was, from both.
    assert torch.equal(mine[right], package[right])
    assert torch.equal(mine[right], images[right])
    return right


@pytest.mark.parametrize("norm", NAMES)
@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(
    ("classes", "loss"),
    [(10, "ce"), (10, "dlr"), (10, "dlr-targeted"), (3, "ce"), (3, "dlr")],
)
def test_verdicts_are_the_packages(classes, loss, adversarial, norm, digits):
    right = assert_same_verdicts(
        digits(classes, adversarial), norm, loss, targets=classes - 1, iterations=20
    )
    assert 0 < right.sum() < len(right)


def test_so_they_are_with_the_published_number_of_iterations(digits):
    right = assert_same_verdicts(digits(10), "linf", "dlr-targeted", targets=4)
    assert 0 < right.sum() < len(right)


@pytest.mark.parametrize("seed", [1, 2**40])
@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_so_they_are_for_every_seed_and_however_many_rounds_run_side_by_side(seed, rows, digits):
    assert_same_verdicts(digits(10), "linf", "dlr-targeted", rows, seed=seed, iterations=20)


@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_so_they_are_with_restarts(loss, digits):
    assert_same_verdicts(digits(10), "linf", loss, restarts=3, targets=3, iterations=10)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_so_they_are_with_few_iterations(iterations, digits):
    assert_same_verdicts(digits(10), "linf", "ce", iterations=iterations)


@pytest.mark.parametrize(("eps", "survive"), [(0.9, 0), (1e-4, 59)])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_so_they_are_where_all_break_at_once_and_where_none_does(loss, eps, survive, digits):
    network, images, labels = digits(10)
    labels = network(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # One is wrong from the beginning.
    right = assert_same_verdicts((network, images, labels), "linf", loss, eps=eps, iterations=10)
    assert right.sum() == survive


@pytest.mark.parametrize("norm", NAMES)
def test_the_whole_path_of_an_image_that_withstands_is_the_packages(norm, digits):
    # Not only the verdicts: the points that the network is shown are the same, to the last bit.
    network, images, labels = digits(10, adversarial=True)
    first = ours(network, norm).perturb(images, labels)
    kept = network(first).argmax(1) == labels
    images, labels = images[kept], labels[kept]
    mine, package = Watched(network), Watched(network)
    ours(mine, norm, seed=5).perturb(images, labels)
    theirs(package, norm, seed=5).perturb(images, labels)
    same = min(len(points) for points in mine.seen)
    assert same == len(images), "choose a seed under which none breaks"
    assert len(mine.seen) == len(package.seen) == 101
    for left, right in zip(mine.seen, package.seen, strict=True):
        assert torch.equal(left, right)


class Watched(nn.Module):
    """Remembers the points at which gradients are taken."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []
        self.passes = 0

    def forward(self, images):
        self.passes += len(images)
        if images.requires_grad:
            self.seen.append(images.detach().clone())
        return self.network(images)


@pytest.mark.parametrize("norm", NAMES)
def test_a_linear_network_is_broken_exactly_where_it_can_be(norm):
    # Two classes whose margin is w x + b. Inside the box an attacker lowers it by eps times the
    # dual norm of w, and no more.
    torch.manual_seed(0)
    weight = torch.randn(64)
    linear = nn.Linear(64, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([weight / 2, -weight / 2]))
        linear.bias.copy_(torch.tensor([-weight.sum() / 4, weight.sum() / 4]))
    network = nn.Sequential(nn.Flatten(), linear).requires_grad_(False)
    images = 0.5 + 0.15 * torch.randn(200, 1, 8, 8).clamp(-1.9, 1.9)
    labels = network(images).argmax(1)
    margin = ((images.flatten(1) - 0.5) @ weight).abs()
    eps = 0.02 if norm == "linf" else 0.2
    reach = eps * (weight.abs().sum() if norm == "linf" else weight.norm())
    attacked = ours(network, norm, eps=eps, iterations=30).perturb(images, labels)
    robust = network(attacked).argmax(1) == labels
    clear = (margin - reach).abs() > 1e-3 * reach
    assert clear.sum() > 190
    assert torch.equal(robust[clear], (margin > reach)[clear])
    assert 20 < robust.sum() < 180


class TestLeaving:
    @pytest.mark.parametrize("norm", NAMES)
    def test_changes_no_verdict_of_the_others(self, norm, digits):
        # Whoever leaves from the batch, the rest is where it would have been.
        network, images, labels = digits(10)
        right = network(images).argmax(1) == labels
        images, labels = images[right][:48], labels[right][:48]
        eps = 0.5 * BUDGETS[norm]
        start = (images + BUDGETS[norm] / 6 * (2 * torch.rand(images.shape) - 1)).clamp(0, 1)
        fixed = FixedStart(start, ours(network, norm, eps=eps, iterations=20))
        whole = network(fixed.perturb(images, labels)).argmax(1) == labels
        assert 5 < whole.sum() < 43
        torch.manual_seed(1)
        for size in (4, 9, 16, 25, 36):
            part = torch.randperm(48)[:size]
            some = FixedStart(start[part], ours(network, norm, eps=eps, iterations=20))
            attacked = some.perturb(images[part], labels[part])
            assert torch.equal(network(attacked).argmax(1) == labels[part], whole[part])

    def test_spares_passes(self, digits):
        network, images, labels = digits(10)
        counted, package = Watched(network), Watched(network)
        ours(counted, "linf", eps=0.25).perturb(images, labels)
        theirs(package, "linf", eps=0.25).perturb(images, labels)
        assert counted.passes < 0.2 * package.passes

    def test_the_last_ones_keep_company(self):
        # Of 40 images three withstand; in a batch of three, libraries round differently.
        class Brightness(nn.Module):
            def forward(self, images):
                level = images[:, 0, 0, 0]
                return torch.stack([level, torch.full_like(level, 0.5)], dim=1)

        images = torch.full((40, 1, 8, 8), 0.55)
        images[:3] = 0.9
        labels = torch.zeros(40, dtype=torch.long)
        watched = Watched(Brightness())
        attacked = ours(watched, "linf", iterations=20).perturb(images, labels)
        assert (Brightness()(attacked).argmax(1) == 0).sum() == 3
        assert len(watched.seen) == 21
        assert len(watched.seen[-1]) == FEW

    def test_a_point_that_does_not_hold_up_is_not_accepted(self, digits):
        # A network that answers wrongly only while gradients are taken.
        network, images, labels = digits(10)
        labels = network(images).argmax(1)

        class TwoFaced(nn.Module):
            def forward(self, points):
                logits = network(points)
                return logits.roll(1, dims=1) if points.requires_grad else logits

        attack = ours(TwoFaced(), "linf", eps=0.0, iterations=5)
        assert torch.equal(attack.perturb(images, labels), images)


class FixedStart:
    """APGD that starts where it is told."""

    def __init__(self, start: Tensor, apgd: APGD) -> None:
        self.start, self.apgd = start, apgd

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(APGD, "_start", lambda *_: self.start)
            return self.apgd.perturb(images, labels)


def test_rounds_side_by_side_need_fewer_passes_than_one_after_the_other(digits):
    network, images, labels = digits(10, adversarial=True)
    one, many = Watched(network), Watched(network)
    few = {"iterations": 30}
    first = ours(one, "linf", "dlr-targeted", max_rows=1, **few).perturb(images, labels)
    second = ours(many, "linf", "dlr-targeted", **few).perturb(images, labels)
    assert torch.equal(first, second)
    assert len(many.seen) < 0.7 * len(one.seen)
    # And hardly more images.
    assert many.passes < 1.2 * one.passes


def test_no_more_images_at_once_than_allowed(digits):
    network, images, labels = digits(10, adversarial=True)
    watched = Watched(network)
    ours(watched, "linf", "dlr-targeted", max_rows=200, iterations=5).perturb(images, labels)
    assert 60 < max(len(points) for points in watched.seen) <= 200


def test_the_global_generator_neither_matters_nor_moves(digits):
    network, images, labels = digits(10)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ours(network, "l2", iterations=3).perturb(images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(ours(network, "l2", iterations=3).perturb(images, labels), first)


def test_checkpoints_are_the_papers():
    # Section 3.1: p0 = 0, p1 = 0.22, each period 0.03 shorter than the last, at least 0.06.
    assert list(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert _checkpoints(1) == {1: 1}


class TestWithinAutoAttack:
    @pytest.mark.parametrize("norm", NAMES)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"version": "plus", "iterations": 2},
            {"attacks": ("apgd-ce", "apgd-t"), "iterations": 20},
            {"version": "rand", "iterations": 2},
        ],
    )
    def test_both_engines_give_the_same_verdicts_and_messages(
        self, norm, options, digits, tmp_path
    ):
        network, images, labels = digits(10)
        right = network(images).argmax(1) == labels
        images, labels = images[right][:40], labels[right][:40]
        outcomes, messages = [], []
        for engine in ("fast", "package"):
            attack = AutoAttack.configured(
                {"iterations": 5, "square_queries": 30, "seed": 3, "engine": engine, **options}
            )
            attacked = attack.perturb(
                network, images, labels, Threat(norm, BUDGETS[norm]), run_in(tmp_path)
            )
            outcomes.append(network(attacked).argmax(1) == labels)
            messages.append(attack.messages)
        assert torch.equal(*outcomes)
        assert messages[0] == messages[1]
        assert 0 < outcomes[0].sum() < len(images)

    def test_the_flag_of_zero_gradients_is_the_packages(self, digits, tmp_path):
        network, images, labels = digits(10)

        class Deaf(nn.Module):
            def forward(self, points):
                return network((4 * points).round() / 4)

        labels = Deaf()(images).argmax(1)
        messages = []
        for engine in ("fast", "package"):
            attack = AutoAttack.configured(
                {"attacks": ("apgd-t",), "iterations": 2, "seed": 3, "engine": engine}
            )
            attack.perturb(Deaf(), images, labels, Threat("linf", 0.02), run_in(tmp_path))
            messages.append(attack.messages)
        assert messages[0] == messages[1]
        assert "zero gradient" in messages[0][0]


ALONE: list[Any] = [APGDCE, APGDT]


class TestAlone:
    @pytest.mark.parametrize("norm", NAMES)
    @pytest.mark.parametrize(
        ("kind", "restarts", "adversarial"),
        [(APGDCE, 1, True), (APGDCE, 5, False), (APGDT, 1, True)],
    )
    def test_verdicts_are_those_of_the_package_running_this_part_only(
        self, kind, norm, restarts, adversarial, digits, tmp_path
    ):
        network, images, labels = digits(10, adversarial)
        kept = network(images).argmax(1) == labels
        images, labels = images[kept], labels[kept]
        torch.manual_seed(1)
        attacked = kind.configured({"restarts": restarts}).perturb(
            network, images, labels, Threat(norm, BUDGETS[norm]), run_in(tmp_path)
        )
        torch.manual_seed(1)
        package = pyautoattack.AutoAttack(
            network,
            norm=NAMES[norm],
            eps=BUDGETS[norm],
            seed=int(torch.randint(2**31, ())),
            version="custom",
            attacks=[kind.name],
        )
        package.apgd.n_restarts = package.apgd_targeted.n_restarts = restarts
        with torch.random.fork_rng():
            theirs, _ = package.run_standard_evaluation(images, labels, batch_size=30)
        right = network(attacked).argmax(1) == labels
        assert torch.equal(right, network(theirs).argmax(1) == labels)
        assert torch.equal(attacked[right], images[right])
        assert 0 < right.sum() < len(right)
        assert len(right) > 30, "choose more images than a batch"

    @pytest.mark.parametrize("kind", ALONE)
    def test_the_published_setting_is_the_default(self, kind):
        published = {"iterations": 100, "restarts": 1}
        assert kind().config.model_dump() == published | ({"targets": 9} if kind is APGDT else {})
        with pytest.raises(RddBenchError, match="iterations=0"):
            kind.configured({"iterations": 0})

    @pytest.mark.parametrize(
        ("classes", "instead"),
        [(2, "apgd-ce"), (3, "apgd-ce, or autoattack with attacks=apgd-dlr")],
    )
    def test_four_classes_are_needed_for_targets(self, classes, instead, digits, tmp_path):
        network, images, labels = digits(classes)
        threat, run = Threat("linf", 0.1), run_in(tmp_path)
        with pytest.raises(NotApplicable, match=f"the network has {classes}; use {instead}$"):
            APGDT().perturb(network, images, labels, threat, run)
        # What it says does work.
        APGDCE.configured(APGDCE.smoke).perturb(network, images, labels, threat, run)
        if classes == 3:
            dlr = AutoAttack.configured({"attacks": ["apgd-dlr"], "iterations": 2})
            dlr.perturb(network, images, labels, threat, run)

    def test_with_four_classes_all_three_others_are_targets(self, tmp_path):
        # Only the last-ranked class is within reach.
        class Ranked(nn.Module):
            def forward(self, images):
                step = images[:, 0, 0, 0] - 0.5
                zero = torch.zeros_like(step)
                return torch.stack([zero + 1, zero + 0.9, zero + 0.8, zero + 0.7 + 2.1 * step], 1)

        images, labels = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
        for targets, broken in [(9, True), (2, False)]:
            torch.manual_seed(0)  # Starts from which none is broken already.
            attack = APGDT.configured({"targets": targets, "iterations": 10})
            attacked = attack.perturb(
                Ranked(), images, labels, Threat("linf", 0.15), run_in(tmp_path)
            )
            assert ((Ranked()(attacked).argmax(1) == 3) == broken).all()

    def test_gradients_of_zero_are_said(self, digits, tmp_path):
        network, images, labels = digits(10)

        class Deaf(nn.Module):
            def forward(self, points):
                return network((4 * points).round() / 4)

        kept = Deaf()(images).argmax(1) == labels
        few = images[kept][:10], labels[kept][:10]
        attack = APGDT.configured({"iterations": 2, "targets": 3})
        attack.perturb(Deaf(), *few, Threat("linf", 0.02), run_in(tmp_path))
        (message,) = attack.messages
        assert re.fullmatch(
            r"the gradient is zero at (\d+) of \1 random starts: it may be masked", message
        )
        attack.perturb(network, *few, Threat("linf", 0.02), run_in(tmp_path))
        assert attack.messages == []


def run_in(folder: Path) -> Run:
    return Run(
        device=torch.device("cpu"),
        scratch=folder,
        phase=lambda name: contextlib.nullcontext(),
        report=lambda what, done, total: None,
        batch_size=30,
    )
