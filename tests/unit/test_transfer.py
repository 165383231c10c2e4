"""The transfer attack: as strong as its surrogates are alike, and without a single query."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench.api import NotApplicable, RddBenchError, Run, Threat
from rdd_bench_builtin.attacks.pgd import PGD
from rdd_bench_builtin.attacks.transfer import Transfer

THREATS = [Threat("linf", 0.1), Threat("l2", 0.6)]


@pytest.fixture(scope="module")
def trained():
    """Six networks of other seeds, and 120 test images of digits that the first gets right."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    networks = []
    for seed in range(6):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
            )
            for _ in range(200):
                # By hand, because the first use of torch.optim takes seconds to import.
                batch = torch.randint(1400, (100,))
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
                gradients = torch.autograd.grad(loss, list(network.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                        parameter.sub_(0.2 * gradient)
        networks.append(network.eval().requires_grad_(False))
    images, labels = images[1400:], labels[1400:]
    chosen = (networks[0](images).argmax(1) == labels).nonzero().flatten()[:120]
    return networks, images[chosen], labels[chosen]


def run_with(surrogates: Sequence[nn.Module] | None, batch_size: int = 50) -> Run:
    """A run that hands out the first of these networks, and no more than there are."""

    def first(count: int) -> Sequence[nn.Module]:
        assert surrogates is not None
        assert count <= len(surrogates)
        return surrogates[:count]

    return Run(
        device=torch.device("cpu"),
        scratch=Path(),
        phase=lambda name: contextlib.nullcontext(),
        report=lambda what, done, total: None,
        batch_size=batch_size,
        surrogates=None if surrogates is None else first,
    )


def survivors(
    trained: Any, threat: Threat, surrogates: Sequence[nn.Module], **options: Any
) -> Tensor:
    """Return which images the first network still gets right."""
    (network, *_), images, labels = trained
    attack = Transfer.configured({"surrogates": len(surrogates), **options})
    attacked = attack.perturb(Unasked(), images, labels, threat, run_with(surrogates))
    right: Tensor = network(attacked).argmax(1) == labels
    return right


class Unasked(nn.Module):
    """A network that may not be asked."""

    def forward(self, images):
        raise AssertionError("a query")


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_with_the_network_itself_as_surrogate_it_is_pgd(threat, loss, trained):
    (network, *_), images, labels = trained
    right = survivors(trained, threat, [network, network], loss=loss)
    pgd = PGD.configured({"loss": loss, "random_start": False})
    attacked = pgd.perturb(network, images, labels, threat, run_with(None))
    by_pgd = network(attacked).argmax(1) == labels
    assert 10 < by_pgd.sum() < 110
    # PGD keeps what any point on the way breaks; the last one may have stepped back.
    assert not (by_pgd & ~right).any()
    assert (right & ~by_pgd).sum() <= 2


@pytest.mark.parametrize("threat", [Threat("linf", 0.02), Threat("l2", 0.1)], ids=str)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_between_linear_networks_the_lead_falls_by_a_known_amount(threat, loss):
    # Two classes whose lead is w (x - 1/2) for the network and v (x - 1/2) for the surrogates'
    # mean. The attack ends at x - eps d with d the steepest direction of v, so the lead falls by
    # eps w d, which is eps times the dual norm of w only if both are parallel.
    torch.manual_seed(0)
    w = torch.randn(30)
    surrogates = [w + torch.randn(30) for _ in range(2)]
    v = sum(surrogates)
    assert isinstance(v, Tensor)
    images = 0.5 + 0.05 * torch.randn(60, 1, 5, 6).clamp(-2, 2)
    labels = Lead(w)(images).argmax(1)
    sign = 1 - 2 * labels
    # The cross-entropy weighs the surrogates image by image; with it both are one network.
    leads = surrogates if loss == "margin" else [v, v]
    attack = Transfer.configured({"surrogates": 2, "loss": loss})
    attacked = attack.perturb(
        Unasked(), images, labels, threat, run_with([Lead(each) for each in leads])
    )
    direction = v.sign() if threat.norm == "linf" else v / v.norm()
    before = sign * ((images - 0.5).flatten(1) @ w)
    expected = before - threat.eps * (w @ direction)
    torch.testing.assert_close(sign * ((attacked - 0.5).flatten(1) @ w), expected)
    robust = Lead(w)(attacked).argmax(1) == labels
    assert torch.equal(robust, expected > 0)
    assert 0 < robust.sum() < 60


class Lead(nn.Module):
    """Two classes, of which the first leads by ``(pixels - 0.5) . weight``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lead = weight

    def forward(self, images):
        lead = (images - 0.5).flatten(1) @ self.lead
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_more_surrogates_break_more_and_none_as_many_as_the_gradient(threat, trained):
    network, *others = trained[0]
    one = int(survivors(trained, threat, others[:1]).sum())
    five = int(survivors(trained, threat, others).sum())
    white = int(survivors(trained, threat, [network]).sum())
    assert white < five < one < 120


def test_it_goes_on_where_the_surrogate_is_broken_already(trained):
    # Far behind the boundary of the surrogate, an image is more likely to be behind that of others.
    (network, other, *_), images, labels = trained
    threat = Threat("linf", 0.1)
    pgd = PGD.configured({"loss": "margin", "random_start": False})
    stopped = pgd.perturb(other, images, labels, threat, run_with(None))
    right = network(stopped).argmax(1) == labels
    assert survivors(trained, threat, [other]).sum() < right.sum()


def test_it_finds_what_masked_gradients_hide(trained):
    networks, images, labels = trained

    class Masked(nn.Module):
        def forward(self, pixels):
            return networks[0]((255 * pixels).round() / 255)

    threat = Threat("linf", 0.15)
    pgd = PGD.configured({"loss": "margin", "random_start": False})
    by_gradient = pgd.perturb(Masked(), images, labels, threat, run_with(None))
    assert torch.equal(by_gradient, images)
    attack = Transfer.configured({"surrogates": 5})
    attacked = attack.perturb(Masked(), images, labels, threat, run_with(networks[1:]))
    assert (Masked()(attacked).argmax(1) != labels).sum() > 20


def test_batches_and_the_generator_do_not_matter(trained):
    networks, images, labels = trained
    attack = Transfer.configured({"surrogates": 2, "steps": 3})
    before = torch.get_rng_state()
    small, large = (
        attack.perturb(Unasked(), images, labels, THREATS[0], run_with(networks[1:], size))
        for size in (7, 500)
    )
    torch.testing.assert_close(small, large, rtol=0, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_surrogates_it_says_what_it_needs(trained):
    networks, images, labels = trained
    with pytest.raises(NotApplicable, match="needs the distilled set that the network was"):
        Transfer().perturb(networks[0], images, labels, THREATS[0], run_with(None))


@pytest.mark.parametrize("threat", [Threat("linf", 0.0), Threat("l2", 0.0)], ids=str)
def test_a_budget_of_zero_returns_the_very_images(threat, trained):
    networks, images, labels = trained
    attacked = Transfer().perturb(Unasked(), images, labels, threat, run_with(networks[1:]))
    assert torch.equal(attacked, images)


@pytest.mark.parametrize("options", [{"surrogates": 0}, {"steps": 0}, {"loss": "dlr"}])
def test_impossible_options_are_refused(options):
    with pytest.raises(RddBenchError, match=next(iter(options))):
        Transfer.configured(options)
