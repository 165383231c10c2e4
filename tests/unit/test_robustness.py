"""The evaluation of evaluations: planted bugs must raise their flags, sound runs none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdd_bench import audit
from rdd_bench.components import Attack, Run
from rdd_bench.consistency import NON_DETERMINISTIC
from rdd_bench.errors import ContractError, RddBenchError
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.robustness import Judgement, attack_models, clean_outcomes
from rdd_bench.testing import small_run
from rdd_bench.threats import ascend, distance, project, random_start
from rdd_bench.types import Config, DatasetSpec, Info, LabelledImages, Norm, Threat

SPEC = DatasetSpec(
    name="toy", shape=(1, 4, 4), class_names=("dark", "light"), mean=(0.4,), std=(0.25,)
)
LINF = Threat("linf", 0.1)
RUN = small_run(Path())
Behaviour = Callable[[nn.Module, Tensor, Tensor, Threat], Any]


class Linear(nn.Module):
    """Light or dark: positive where the sum of the normalised pixels is."""

    def __init__(self, batch_norm: bool = False, noise: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1) if batch_norm else nn.Identity()
        self.noise = noise

    def forward(self, images: Tensor) -> Tensor:
        light = self.norm(images).flatten(1).sum(dim=1)
        if self.noise:
            light = light + self.noise * torch.rand_like(light)
        return torch.stack([-light, light], dim=1)


def victim(**options: Any) -> Classifier:
    return Classifier(Normalise(SPEC), Linear(**options)).eval().requires_grad_(False)


def toy_images(count: int = 48) -> LabelledImages:
    """Return images that the victim gets right, but for every sixth."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 2
    # Around the decision at 0.4, at a distance between 0.02 and 0.3.
    offset = torch.linspace(0.02, 0.3, count) * (2 * labels - 1)
    noise = 0.1 * (torch.rand(count, 1, 4, 4, generator=generator) - 0.5)
    images = (0.4 + offset.view(-1, 1, 1, 1) + noise).clamp(0, 1)
    labels[::6] = 1 - labels[::6]
    return LabelledImages(images, labels)


def gradient_step(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    images = images.detach().requires_grad_()
    loss = nn.functional.cross_entropy(model(images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    moved = ascend(images.detach(), gradient, threat.norm, threat.eps)
    return project(moved, images.detach(), threat)


class Planted(Attack[Any]):
    """An attack that does what a test asks of it."""

    name = "planted"
    info = Info(title="Planted", licence="MIT")
    norms = frozenset[Norm]({"linf", "l2"})
    behaviour: Behaviour = staticmethod(gradient_step)

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        made: Tensor = type(self).behaviour(model, images, labels, threat)
        return made


def judge(
    behaviour: Behaviour = gradient_step,
    model: nn.Module | None = None,
    test: LabelledImages | None = None,
    threat: Threat = LINF,
) -> Judgement:
    attack: Any = type("Here", (Planted,), {"behaviour": staticmethod(behaviour)})
    return attack_models(
        [model or victim()], test or toy_images(), attack(), threat, [0], RUN, "attack 'planted'"
    )


def flags(judgement: Judgement) -> set[str]:
    return {flag.name for flag in judgement.flags}


# A sound evaluation ---------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.5)], ids=str)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_sound_evaluation_raises_no_flag(threat, batch_norm):
    judged = judge(threat=threat, model=victim(batch_norm=batch_norm))
    assert judged.flags == []
    assert 0 < judged.robust[0].sum() < 40


def test_robust_images_are_right_clean_and_under_attack():
    test, model = toy_images(), victim()
    clean = clean_outcomes(model, test, 7)
    assert clean.sum() == 40  # every sixth label is wrong
    (robust,) = judge(model=model, test=test).robust
    assert not (robust & ~clean).any()
    # This network can be computed by hand: an image falls if its mean is within eps of 0.4.
    margins = (test.images.flatten(1).mean(dim=1) - 0.4).abs()
    assert torch.equal(robust, clean & (margins > LINF.eps))


def test_an_attack_that_corrects_the_network_earns_nothing():
    """Images that are wrong clean are never handed over, and count as lost."""
    handed: list[int] = []

    def count(_model: nn.Module, images: Tensor, _labels: Tensor, _threat: Threat) -> Tensor:
        handed.append(len(images))
        return images

    (robust,) = judge(count).robust
    assert handed[-1] == 40
    assert robust.sum() == 40
    assert len(robust) == 48


def test_a_network_that_is_never_right_is_not_attacked():
    test = toy_images()
    wrong = LabelledImages(test.images, 1 - (victim()(test.images).argmax(dim=1)))
    judged = judge(lambda *_: pytest.fail("attacked"), test=wrong)
    assert judged.robust[0].sum() == 0
    assert judged.flags == []


def test_each_network_has_its_outcomes_and_each_flag_is_noted_once():
    models = [victim(), victim()]
    attack: Any = type(
        "Far", (Planted,), {"behaviour": staticmethod(lambda _m, x, *_: (x + 0.5).clamp(0, 1))}
    )
    judged = attack_models(models, toy_images(), attack(), LINF, [0, 1], RUN, "attack 'planted'")
    assert len(judged.robust) == 2
    assert [flag.name for flag in judged.flags].count(audit.BUDGET) == 1


def test_the_draws_of_an_attack_depend_on_the_seed_and_on_nothing_else():
    def at_random(_model: nn.Module, images: Tensor, _labels: Tensor, threat: Threat) -> Tensor:
        return random_start(images, threat)

    attack: Any = type("Drawn", (Planted,), {"behaviour": staticmethod(at_random)})
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the state outside must not matter
        seen: list[Tensor] = []
        model = victim()
        model.register_forward_hook(lambda _m, inputs, _o, seen=seen: seen.append(inputs[0]))
        attack_models([model], toy_images(), attack(), LINF, [seed], RUN, "attack")
        drawn.append(seen[-1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# Planted evaluator bugs -----------------------------------------------------------------------


def normalised_world() -> tuple[nn.Module, LabelledImages]:
    """Return the published mistake: normalised test images, a network without normalisation."""
    test = toy_images()
    return Linear().eval(), LabelledImages(Normalise(SPEC)(test.images), test.labels)


def clamp_only(_model: nn.Module, images: Tensor, _labels: Tensor, _threat: Threat) -> Tensor:
    """Search for nothing; keep 'pixels' in [0, 1] as attack libraries do."""
    return images.clamp(0, 1)


def test_normalised_images_and_an_attack_that_clamps_are_noticed():
    model, test = normalised_world()
    judged = judge(clamp_only, model, test)
    assert {audit.INPUT_RANGE, audit.BUDGET, audit.NULL_ATTACK} <= flags(judged)
    said = {flag.name: flag.message for flag in judged.flags}
    assert "look normalised, so the budget is not in pixels" in said[audit.INPUT_RANGE]
    assert "clamps or rescales what it is given" in said[audit.NULL_ATTACK]


def test_normalised_images_and_an_attack_that_does_not_clamp_are_noticed():
    model, test = normalised_world()
    judged = judge(lambda _m, x, _y, t: x + t.eps, model, test)
    assert {audit.INPUT_RANGE, audit.BOX} <= flags(judged)


def test_an_attack_that_rescales_its_input_is_noticed_by_the_null_control():
    judged = judge(lambda _m, x, _y, _t: 0.4 + (x - 0.4) * -1)
    assert audit.NULL_ATTACK in flags(judged)


def test_the_budget_of_the_null_control_is_zero_and_the_images_few():
    asked: list[tuple[float, int]] = []

    def note(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        asked.append((threat.eps, len(images)))
        return gradient_step(model, images, labels, threat)

    judge(note)
    assert asked == [(0.0, 32), (0.1, 40)]


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.5)], ids=str)
def test_an_attack_that_exceeds_its_budget_is_flagged_and_judged_within_it(threat):
    test = toy_images()

    def far(_model: nn.Module, images: Tensor, labels: Tensor, _threat: Threat) -> Tensor:
        return images + (0.35 * (1 - 2 * labels)).view(-1, 1, 1, 1)

    def to_the_edge(_m: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        return project(far(_m, images, labels, threat), images, threat)

    beyond, within = (
        judge(far, test=test, threat=threat),
        judge(to_the_edge, test=test, threat=threat),
    )
    assert audit.BUDGET in flags(beyond)
    assert "moved images by up to" in beyond.flags[-1].message + beyond.flags[0].message
    assert within.flags == []
    assert torch.equal(beyond.robust[0], within.robust[0])
    assert beyond.robust[0].any()


def test_an_attack_that_leaves_the_box_is_flagged_and_judged_in_it():
    dark = LabelledImages(torch.full((4, 1, 4, 4), 0.02), torch.zeros(4, dtype=torch.long))
    judged = judge(lambda _m, x, _y, t: x - t.eps, test=dark)
    assert flags(judged) == {audit.BOX}
    assert judged.robust[0].all()


def test_an_attack_that_trains_batch_normalisation_is_flagged():
    def in_train_mode(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        model.train()
        model(images)
        model.eval()
        return images

    assert flags(judge(in_train_mode, victim(batch_norm=True))) == {audit.STATE_CHANGED}


def test_an_attack_that_changes_the_parameters_is_flagged():
    def shift(model: nn.Module, images: Tensor, *_: object) -> Tensor:
        for parameter in model.parameters():
            parameter.data.add_(0.01)
        return images

    assert flags(judge(shift, victim(batch_norm=True))) == {audit.STATE_CHANGED}


def test_an_attack_that_leaves_train_mode_is_flagged_and_judged_in_eval_mode():
    """A verdict in train mode would depend on the batch."""

    def leave(model: nn.Module, images: Tensor, _labels: Tensor, threat: Threat) -> Tensor:
        model.train()
        return images

    model = victim(batch_norm=True)
    expected = clean_outcomes(model, toy_images(), 16)
    verdicts: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: verdicts.append(module.training))
    judged = judge(leave, model)
    assert flags(judged) == {audit.TRAIN_MODE}
    assert not any(verdicts)
    assert not any(module.training for module in model.modules())
    assert torch.equal(judged.robust[0], expected)


def test_a_network_that_draws_at_random_is_flagged():
    judged = judge(model=victim(noise=1e-3))
    assert NON_DETERMINISTIC in flags(judged)
    assert NON_DETERMINISTIC not in flags(judge(model=victim()))


@pytest.mark.parametrize("only_in_earnest", [False, True])
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (
            lambda x: torch.full_like(x, torch.nan),
            "perturb returned NaN or infinite pixels; expected finite",
        ),
        (lambda x: x + torch.inf, "perturb returned NaN or infinite pixels"),
        (lambda x: x[:-1], r"perturb returned \(\d+, 1, 4, 4\); expected images"),
        (lambda x: x.flatten(1), r"perturb returned \(\d+, 16\); expected images"),
        (lambda x: x.double(), "perturb returned torch.float64; expected torch.float32"),
        (lambda x: None, "perturb returned NoneType; expected images"),
        (lambda x: x.numpy(), "perturb returned ndarray; expected images"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(behaviour, message, only_in_earnest):
    """Whether it comes back from the null control or from the attack itself."""

    def broken(_model: nn.Module, images: Tensor, _labels: Tensor, threat: Threat) -> Any:
        return images if only_in_earnest and not threat.eps else behaviour(images)

    with pytest.raises(ContractError, match=f"attack 'planted': {message}") as caught:
        judge(broken)
    assert "\n" not in str(caught.value)


def test_an_attack_that_writes_into_its_input_does_not_change_the_test():
    test = toy_images()
    before = test.images.clone()

    def in_place(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        moved = gradient_step(model, images, labels, threat)
        images.copy_(moved)
        labels.zero_()
        return images

    there, here = judge(in_place, test=test), judge(test=test)
    assert torch.equal(there.robust[0], here.robust[0])
    assert there.flags == []
    assert torch.equal(test.images, before)


# The checks by themselves ---------------------------------------------------------------------


def test_the_projection_of_the_judge_is_within_what_the_check_allows():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 3, 32, 32, generator=generator)
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5), ("l2", 4.0)):
        threat = Threat(norm, eps)  # type: ignore[arg-type]
        far = images + 3 * torch.randn(images.shape, generator=generator)
        assert audit.check_budget(project(far, images, threat), images, threat) == []
        assert audit.check_budget(random_start(images, threat), images, threat) == []


def test_a_step_beyond_the_budget_is_seen_however_small_it_is_in_grey_levels():
    images = torch.full((2, 1, 4, 4), 0.5)
    threat = Threat("linf", 8 / 255)
    (flag,) = audit.check_budget(images + 8.1 / 255, images, threat)
    assert flag.name == audit.BUDGET
    assert flag.value == pytest.approx(8.1 / 255, rel=1e-4)
    assert audit.check_budget(images + 8 / 255, images, threat) == []


def test_no_images_have_no_flags():
    assert audit.check_budget(torch.empty(0, 1, 4, 4), torch.empty(0, 1, 4, 4), LINF) == []


def test_distances_are_per_image():
    images = torch.zeros(2, 1, 2, 2)
    moved = images.clone()
    moved[0] += 0.5
    assert distance(moved, images, "linf").tolist() == [0.5, 0.0]
    assert distance(moved, images, "l2").tolist() == [1.0, 0.0]


# Passes ---------------------------------------------------------------------------------------


def test_passes_are_counted_in_images_for_the_attack_alone():
    def three_steps(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
        for _ in range(3):
            gradient_step(model, images, labels, threat)
        with torch.no_grad():
            model(images[:5])
        return images

    passes = judge(three_steps).passes
    assert (passes.forward, passes.backward) == (3 * 40 + 5, 3 * 40)


def test_a_pass_without_a_gradient_is_only_forward():
    passes = judge(lambda model, images, *_: (model(images), images)[1]).passes
    assert (passes.forward, passes.backward) == (40, 0)


# Probes of its strength -----------------------------------------------------------------------


class SearchOptions(Config):
    """Options of the attack below."""

    steps: int = 3
    """Steps."""


class Searching(Planted):
    """An attack that says how long it searches, and writes down what it is asked."""

    config_class = SearchOptions
    effort = "steps"
    asked: list[tuple[int, float, Tensor, dict[str, Any]]]

    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        steps = getattr(self.config, "steps", 0)
        type(self).asked.append((steps, threat.eps, labels, run.memo))
        run.memo["seen"] = len(images)
        made: Tensor = type(self).behaviour(model, images, labels, threat)
        return made


def probed(probe: bool = True, networks: int = 2, **attributes: Any) -> tuple[Judgement, Any]:
    """Return the judgement of an attack, and the calls after the null controls."""
    attack: Any = type("Here", (Searching,), {"asked": [], **attributes})
    phases: list[str] = []

    @contextmanager
    def phase(name: str) -> Any:
        phases.append(name)
        yield

    models, seeds = [victim(batch_norm=True) for _ in range(networks)], range(networks)
    judged = attack_models(
        models,
        toy_images(),
        attack(),
        LINF,
        list(seeds),
        replace(RUN, phase=phase),
        "attack 'here'",
        probe_strength=probe,
    )
    assert phases.count("attack") == networks
    return judged, [call for call in attack.asked if call[1]]


def test_the_first_network_is_attacked_twice_as_long_and_with_a_large_budget():
    _, calls = probed()
    asked = [(steps, eps) for steps, eps, *_ in calls]
    assert asked == [(3, 0.1), (3, 0.1), (6, 0.1), (3, 0.5), (3, 0.1)]
    # What the attack had left, once as long as before to know what chance does.
    assert len(calls[1][2]) == len(calls[2][2]) == int(judge().robust[0].sum())
    assert len(calls[3][2]) == 40  # all that are right
    assert len(probed(probe=False)[1]) == 2


@pytest.mark.parametrize(
    ("attributes", "probes"),
    [
        ({"effort": None}, []),
        ({"access": "black"}, [(3, 0.1), (6, 0.1)]),
        ({"access": "none"}, [(3, 0.1), (6, 0.1)]),
    ],
)
def test_what_an_attack_says_of_itself_decides_how_it_is_probed(attributes, probes):
    _, calls = probed(networks=1, **attributes)
    assert [(steps, eps) for steps, eps, *_ in calls[1:]] == probes


def test_probes_change_neither_the_verdict_nor_the_passes_nor_the_memory():
    def at_random(model: nn.Module, images: Tensor, _labels: Tensor, threat: Threat) -> Tensor:
        model(images)
        model.train()  # a probe may leave the network in any state
        model(images)
        return random_start(images, threat)

    with_probes, calls = probed(behaviour=staticmethod(at_random))
    without, _ = probed(probe=False, behaviour=staticmethod(at_random))
    for one, other in zip(with_probes.robust, without.robust, strict=True):
        assert torch.equal(one, other)
    assert with_probes.passes == without.passes
    (first, *probes, second) = [memo for *_, memo in calls]
    assert (first, second) == ({"seen": 40}, {"seen": 40})
    assert len({id(memo) for memo in (first, *probes, second)}) == 5


def test_probes_take_images_of_all_classes_where_they_are_sorted():
    test = toy_images(600)
    order = test.labels.argsort(stable=True)
    attack: Any = type("Here", (Searching,), {"asked": []})
    attack_models(
        [victim()], test.subset(order), attack(), LINF, [0], RUN, "attack", probe_strength=True
    )
    for _, eps, labels, _ in attack.asked[2:]:
        assert len(labels) == 64
        assert min(labels.bincount().tolist()) > 20, eps


@pytest.mark.parametrize("effort", ["restarts", "config_class"])
def test_an_effort_that_is_no_option_is_one_sentence(effort):
    with pytest.raises(RddBenchError, match=f"attack 'here': effort names '{effort}'") as caught:
        probed(effort=effort)
    assert "expected an option that is a whole number" in str(caught.value)


def test_an_attack_that_breaks_everything_is_not_run_for_longer():
    dark = LabelledImages(torch.full((4, 1, 4, 4), 0.35), torch.zeros(4, dtype=torch.long))
    attack: Any = type("Here", (Searching,), {"asked": []})
    judged = attack_models(
        [victim()], dark, attack(), LINF, [0], RUN, "attack", probe_strength=True
    )
    assert not judged.robust[0].any()
    assert [steps for steps, eps, *_ in attack.asked if eps == 0.1] == [3]


class Wrong(nn.Module):
    """Never names the class that the victim names."""

    def __init__(self) -> None:
        super().__init__()
        self.right = victim()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = -self.right(images)
        return logits


@pytest.mark.parametrize("place", [0, 1])
def test_a_network_with_nothing_to_attack_has_no_median_distance(place):
    class Far(Planted):
        def perturb(self, *given: Any) -> Tensor:
            self.distances = torch.ones(len(given[1]))
            images: Tensor = given[1]
            return images

    models: list[nn.Module] = [victim().eval()]
    models.insert(place, Wrong().eval())
    test = toy_images()
    test = test.subset(victim()(test.images).argmax(dim=1) == test.labels)
    judged = attack_models(models, test, Far(), LINF, [0, 1], RUN, "attack")
    assert not judged.robust[place].any()
    assert judged.median_distance == ([None, 1.0] if place == 0 else [1.0, None])
