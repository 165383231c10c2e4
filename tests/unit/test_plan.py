"""From options to steps: which results a change makes new, and which it leaves alone."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.plan import AttackStep, DistillStep, Plan, Selection, TrainStep, make_plan, parent
from rdd_bench.protocol import Protocol, load_protocol, parse_protocol
from rdd_bench.registry import Registry, load_plugins

RULES: dict[str, Any] = {
    "name": "toy-v1",
    "summary": "For tests.",
    "datasets": ["pictures"],
    "distillers": ["quick", "slow"],
    "references": ["everything"],
    "control": "quick",
    "distill_architecture": "net",
    "architectures": ["net", "net-wide"],
    "attacks": ["push", "shove"],
    "ranked_only": ["shove"],
    "ipc": [1, 10],
    "seeds": [0, 1],
    "recipe": {"epochs": 5},
    "threats": [
        {"norm": "linf", "eps": ["4/255", "8/255"], "ranked": "8/255"},
        {"norm": "l2", "eps": [0.5], "ranked": 0.5},
    ],
    "alias": {"net-wide": "net"},
    "options": {"net-wide": {"width": 64}, "slow": {"steps": 50}, "slow@10": {"lr": 10.0}},
}


def rules(**changes: Any) -> Protocol:
    return parse_protocol({**RULES, **changes}, "toy")


@pytest.fixture
def plan(toy_registry: Registry):
    """Return a function from what is asked for to the plan of it."""

    def plan(protocol: Protocol | None = None, **selected: Any) -> Plan:
        return make_plan(protocol or rules(), Selection(**selected), toy_registry)

    return plan


def distills(plan: Plan) -> list[DistillStep]:
    return [step for step in plan.steps if isinstance(step, DistillStep)]


def attacks(plan: Plan) -> list[AttackStep]:
    return [step for step in plan.steps if isinstance(step, AttackStep)]


def addresses(plan: Plan, kind: type = object) -> set[str]:
    return {step.address for step in plan.steps if isinstance(step, kind)}


def options_of(plan: Plan, label: str, ipc: int) -> dict[str, Any]:
    (step,) = [
        s for s in distills(plan)
        if s.distiller.component.label.split(" ")[0] == label and s.ipc == ipc
    ]  # fmt: skip
    return step.distiller.component.options


def test_every_step_comes_after_the_one_it_builds_on(plan):
    seen: set[str] = set()
    for step in plan().steps:
        before = parent(step)
        assert before is None or before.address in seen
        seen.add(step.address)
    # 2 distillers at 2 IPC and a reference, 2 networks each; push at 3 budgets, shove at one.
    assert len(seen) == len(plan().steps) == 5 + 5 * 2 + 5 * 2 * 4


def test_planning_twice_gives_the_same_plan(plan):
    assert plan() == plan()


# What an address depends on -------------------------------------------------------------------

ONE: dict[str, Any] = {"distillers": ["slow"], "architectures": ["net"], "attacks": ["push"]}
CHANGES: dict[str, dict[str, Any]] = {
    "an option of the distiller": {"options": {"slow": {"steps": 51}}},
    "an option of the architecture": {"options": {"net": {"width": 9}}},
    "another distiller": {"distillers": ["quick"]},
    "images per class": {"ipc": [2]},
}


def test_options_decide_every_later_result(plan):
    rule = rules(references=[], ipc=[10])
    before = addresses(plan(rule, **ONE))
    for what, change in CHANGES.items():
        after = addresses(plan(rule, **{**ONE, **change}))
        assert not before & after, what


def test_what_is_in_the_protocol_decides_every_result(plan):
    before = addresses(plan(rules(), **ONE))
    threats = [{"norm": "linf", "eps": ["4/255", "8/255"], "ranked": "4/255"}]
    for change in (
        {"recipe": {"epochs": 6}},
        {"batch_size": 100},
        {"distill_seeds": [1]},
        {"subset": {"train_per_class": 5}},
        {"threats": threats},
        {"name": "toy-v2"},
    ):
        changed = plan(rules(**change), **ONE)
        methods = {s.address for s in changed.steps}
        assert not before & methods, change


def test_training_seeds_decide_networks_but_not_sets(plan):
    one, two = plan(seeds=[0]), plan(seeds=[0, 1])
    assert addresses(one, DistillStep) == addresses(two, DistillStep)
    assert not addresses(one, TrainStep) & addresses(two, TrainStep)
    assert not addresses(one, AttackStep) & addresses(two, AttackStep)


def test_an_option_of_an_attack_decides_only_that_attack(plan):
    before, after = plan(), plan(options={"push": {"steps": 11}})
    assert addresses(before, TrainStep) == addresses(after, TrainStep)
    changed = addresses(before) - addresses(after)
    pushes = {s.address for s in attacks(before) if s.attack.component.name == "toys/push"}
    assert changed == pushes


def test_an_option_of_one_network_leaves_the_other_alone(plan):
    before, after = plan(), plan(options={"net-wide": {"width": 65}})
    kept = addresses(before, TrainStep) & addresses(after, TrainStep)
    assert len(kept) == len(addresses(before, TrainStep)) // 2
    assert addresses(before, DistillStep) == addresses(after, DistillStep)


def test_every_budget_has_an_attack_of_its_own(plan):
    made = attacks(plan(distillers=["slow"], ipc=[1], architectures=["net"], attacks=["push"]))
    methods = [s for s in made if s.train.distill.role == "method"]
    assert len({s.address for s in methods}) == len({(s.threat) for s in methods}) == 3


def test_the_norm_of_a_budget_decides_the_attack(plan):
    threats = [{"norm": norm, "eps": [0.5], "ranked": 0.5} for norm in ("linf", "l2")]
    made = attacks(plan(rules(threats=threats), attacks=["push"]))
    assert len({s.address for s in made}) == len(made) == 5 * 2 * 2


def test_networks_are_tested_in_the_batches_of_the_protocol(plan):
    trains = [s for s in plan(rules(batch_size=7)).steps if isinstance(s, TrainStep)]
    assert {s.batch_size for s in trains} == {7}


def test_a_new_version_or_source_of_a_plugin_decides_its_results(plan, toy_registry):
    before = plan()
    slow = toy_registry.find("distiller", "slow")
    toy_registry.offers.remove(slow)
    toy_registry.offers.append(dataclasses.replace(slow, version="1.1"))
    after = plan()
    kept = {s.distiller.component.label for s in distills(before) if s.address in addresses(after)}
    assert kept == {"quick", "everything"}


def test_the_order_of_names_decides_no_address(plan):
    swapped = plan(
        distillers=["slow", "quick"],
        architectures=["net-wide", "net"],
        attacks=["shove", "push"],
        ipc=[10, 1],
    )
    assert addresses(swapped) == addresses(plan())


def test_lists_of_what_is_run_decide_no_address(plan):
    fewer = rules(distillers=["slow"], attacks=["push"], ipc=[10], summary="Other words.")
    assert addresses(plan(fewer)) < addresses(plan())


def test_adding_a_distiller_leaves_the_others_as_they_were(plan):
    assert addresses(plan(distillers=["quick"])) < addresses(plan(distillers=["quick", "slow"]))


def test_adding_an_attack_leaves_everything_as_it_was(plan):
    assert addresses(plan(attacks=["push"])) < addresses(plan(attacks=["push", "shove"]))


def test_a_component_named_twice_is_run_once(plan):
    once = plan(distillers=["quick"])
    twice = plan(rules(alias={"net-wide": "net"}), distillers=["quick", "quick", "toys/quick"])
    assert len(twice.steps) == len(addresses(twice))
    assert twice == once


# Options --------------------------------------------------------------------------------------


def test_options_come_from_plugin_then_protocol_then_ipc_then_user(plan):
    assert options_of(plan(), "quick", 1) == {"steps": 100, "lr": 1.0}
    assert options_of(plan(), "slow", 1) == {"steps": 50, "lr": 1.0}
    assert options_of(plan(), "slow", 10) == {"steps": 50, "lr": 10.0}
    asked = plan(options={"slow": {"lr": 3.0}, "slow@1": {"steps": 7}})
    assert options_of(asked, "slow", 1) == {"steps": 7, "lr": 3.0}
    assert options_of(asked, "slow", 10) == {"steps": 50, "lr": 3.0}


def test_a_label_says_what_differs_from_the_protocol_and_nothing_else(plan):
    def labels(made: Plan) -> list[str]:
        return [s.distiller.component.label for s in distills(made) if s.role != "reference"]

    assert labels(plan(distillers=["slow"])) == ["slow", "slow"]
    made = plan(distillers=["slow"], options={"slow": {"steps": 50, "lr": 10.0}})
    assert labels(made) == ["slow [lr=10.0]", "slow"]


def test_an_alias_is_shown_by_its_own_name_and_runs_the_real_one(plan):
    trains = [s for s in plan().steps if isinstance(s, TrainStep)]
    shown = {(s.architecture.component.label, s.architecture.component.name) for s in trains}
    assert shown == {("net", "toys/net"), ("net-wide", "toys/net")}
    widths = {s.architecture.component.options["width"] for s in trains}
    assert widths == {8, 64}


@pytest.mark.parametrize("key", ["quick", "slow@2", "shove", "typo"])
def test_options_for_what_is_not_run_are_refused(plan, key):
    with pytest.raises(RddBenchError, match=f"for '{key}', which this run does not use; it uses"):
        plan(distillers=["slow"], attacks=["push"], options={key: {"steps": 3}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow": {"stepz": 3}}, r"slow.stepz is not an option. Options of 'slow': steps, lr"),
        ({"slow": {"steps": "many"}}, r"slow.steps='many': input should be a valid integer"),
        ({"slow": {"lr": float("nan")}}, r"slow.lr=nan"),
        ({"push": {"steps": None}}, r"push.steps=None"),
    ],
)
def test_wrong_options_are_named_in_one_sentence(plan, options, message):
    with pytest.raises(RddBenchError, match=message) as caught:
        plan(options=options)
    assert "\n" not in str(caught.value)


def test_a_wrong_option_of_the_protocol_is_an_error_too(plan):
    with pytest.raises(RddBenchError, match=r"slow\.stepz is not an option"):
        plan(rules(options={"slow": {"stepz": 3}}))


# What is run ----------------------------------------------------------------------------------


def test_a_slow_attack_is_run_at_the_ranked_budget_only(plan):
    shoves = [s for s in attacks(plan()) if s.attack.component.label == "shove"]
    assert {str(s.threat) for s in shoves} == {"linf 8/255"}
    assert all(s.ranked for s in shoves)
    pushes = [s for s in attacks(plan()) if s.attack.component.label == "push"]
    assert {(str(s.threat), s.ranked) for s in pushes} == {
        ("linf 4/255", False), ("linf 8/255", True), ("l2 0.5", True),
    }  # fmt: skip


def test_references_are_made_once_whatever_the_ipc_and_the_track(plan):
    made = plan(rules(tracks=["natural", "author"], distill_seeds=[0, 1]))
    references = [s for s in distills(made) if s.role == "reference"]
    assert len(references) == 1
    trains = [s for s in made.steps if isinstance(s, TrainStep)]
    theirs = [s for s in trains if s.distill.role == "reference"]
    assert len(theirs) == 2  # one a network
    assert {s.recipe for s in theirs} == {None}
    others = [s for s in trains if s.distill.role != "reference"]
    assert {(s.track, s.recipe is None) for s in others} == {("natural", False), ("author", True)}


def test_references_stay_when_only_a_method_is_named(plan):
    roles = [s.role for s in distills(plan(distillers=["slow"], ipc=[1]))]
    assert roles == ["reference", "method"]


def test_only_the_control_of_the_protocol_is_marked(plan):
    marked = {s.distiller.component.label for s in distills(plan()) if s.control}
    assert marked == {"quick"}


def test_no_attack_may_be_asked_for(plan):
    assert attacks(plan(attacks=[])) == []


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ({"tracks": ["autor"]}, "there is no track 'autor'; the tracks are natural, author"),
        ({"ipc": [0]}, "--ipc 0: images per class are 1 or more"),
        ({"seeds": []}, "no seeds are named"),
        ({"architectures": []}, "no architectures are named; give at least one"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(plan, selected, message):
    with pytest.raises(RddBenchError, match=message):
        plan(**selected)


@pytest.mark.parametrize("kind", ["distillers", "architectures", "attacks", "datasets"])
def test_an_unknown_name_is_refused_before_anything_runs(plan, kind):
    with pytest.raises(UnknownNameError, match="'quik' is not the name of a"):
        plan(**{kind: ["quik"]})


def test_a_budget_in_grey_levels_is_refused_with_a_hint(plan):
    threats = [{"norm": "linf", "eps": ["8"], "ranked": "8"}]
    with pytest.raises(RddBenchError, match="write 8/255 if you meant 8 grey levels"):
        plan(rules(threats=threats))


def test_steps_read_as_sentences_and_all_differ(plan):
    made = plan()
    words = [str(step) for step in made.steps]
    assert "distil slow ipc 10" in words
    assert "train net-wide on everything" in words
    assert "push linf 8/255 on net of slow ipc 1" in words
    assert all(a != b for a, b in itertools.combinations(words, 2))


# A plugin that offers the name of a built-in ---------------------------------------------------


@pytest.fixture
def clash():
    """The built-in plugins, and another distribution that offers 'dm' too."""
    registry = load_plugins()
    dm = registry.find("distiller", "dm")
    other = dataclasses.replace(dm, distribution="other")
    return Registry([*registry.offers, other], registry.problems)


def test_a_clash_of_names_does_not_stop_a_protocol_that_means_the_built_in(clash):
    protocol = load_protocol("digits-v1")
    plan = make_plan(protocol, Selection(), clash)
    assert plan == make_plan(protocol, Selection(), load_plugins())


def test_a_name_that_the_user_types_must_say_whose_it_is(clash):
    with pytest.raises(RddBenchError, match=r"other/dm or rdd-bench/dm|rdd-bench/dm or other/dm"):
        make_plan(load_protocol("digits-v1"), Selection(distillers=["dm"]), clash)


def test_a_built_in_spelt_out_keeps_the_options_of_the_protocol(clash):
    protocol = load_protocol("digits-v1")
    plan = make_plan(protocol, Selection(distillers=["rdd-bench/dm"]), clash)
    (options,) = {
        step.distiller.component.options["iterations"]
        for step in plan.of(DistillStep)
        if step.role == "method"
    }
    assert options == protocol.options["dm"]["iterations"]
