"""From options to steps: what will be computed, decided before anything is. Pure, without torch.

A step's address is the hash of what decides its result, and contains the address of the step it
builds on. Device, paths and clocks never enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rdd_bench import __version__
from rdd_bench.components import Attack, Distiller
from rdd_bench.errors import RddBenchError
from rdd_bench.hashing import digest
from rdd_bench.protocol import TRACKS, Options, Protocol
from rdd_bench.records import Component
from rdd_bench.registry import HOST, Offer, Registry, with_argument
from rdd_bench.types import Recipe, Threat

KEY_VERSION = 1
"""Raised when the way an address is computed changes."""

T = TypeVar("T")

REFERENCE_TRACK = "reference"
"""References are trained by their own recipe and shown in the tables of every track."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A component as it will be run: the plugin and every option resolved."""

    kind: str
    offer_name: str
    """Qualified name, by which a worker finds the class again."""
    component: Component
    """What the record says; the label is how the user called it."""

    def key(self) -> list[Any]:
        """What of it decides a result."""
        c = self.component
        return [c.name, c.version, c.source_sha256, c.options]


@dataclass(frozen=True, slots=True)
class DistillStep:
    """Make one distilled set."""

    protocol_sha256: str
    dataset: Choice
    subset: tuple[int, int]
    distiller: Choice
    role: str
    control: bool
    """Whether the protocol compares every other row with this one."""
    ipc: int
    architecture: Choice
    seed: int
    address: str = field(init=False)

    def __post_init__(self) -> None:
        key = [
            self.protocol_sha256, self.dataset.key(), self.subset, self.distiller.key(), self.ipc,
            self.architecture.key(), self.seed,
        ]  # fmt: skip
        object.__setattr__(self, "address", _address("distill", key))

    def __str__(self) -> str:
        ipc = "" if self.role == "reference" else f" ipc {self.ipc}"
        seed = f" seed {self.seed}" if self.seed else ""
        return f"distil {self.distiller.component.label}{ipc}{seed}"


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Train one network on one set, in every seed, and test it."""

    distill: DistillStep
    architecture: Choice
    track: str
    recipe: Recipe | None
    """None: the set's own."""
    seeds: tuple[int, ...]
    batch_size: int
    address: str = field(init=False)

    def __post_init__(self) -> None:
        recipe = self.recipe.model_dump(mode="json", exclude_none=True) if self.recipe else None
        key = [self.distill.address, self.architecture.key(), recipe, self.seeds, self.batch_size]
        object.__setattr__(self, "address", _address("train", key))

    def __str__(self) -> str:
        return f"train {self.architecture.component.label} on {self.of()}"

    def of(self) -> str:
        """Say which set the network is trained on, and in which track."""
        d = self.distill
        ipc = "" if d.role == "reference" else f" ipc {d.ipc}"
        track = "" if self.track in ("natural", REFERENCE_TRACK) else f" ({self.track})"
        return f"{d.distiller.component.label}{ipc}{track}"


@dataclass(frozen=True, slots=True)
class AttackStep:
    """Attack those networks under one threat."""

    train: TrainStep
    attack: Choice
    threat: Threat
    ranked: bool
    standard: bool
    """Whether the protocol names this attack, with these options."""
    address: str = field(init=False)

    def __post_init__(self) -> None:
        key = [self.train.address, self.attack.key(), self.threat.norm, self.threat.eps]
        object.__setattr__(self, "address", _address("attack", key))

    def __str__(self) -> str:
        on = f"{self.train.architecture.component.label} of {self.train.of()}"
        return f"{self.attack.component.label} {self.threat} on {on}"


Step = DistillStep | TrainStep | AttackStep
StepT = TypeVar("StepT", DistillStep, TrainStep, AttackStep)


def parent(step: Step) -> Step | None:
    """Return the step whose result this one needs."""
    if isinstance(step, TrainStep):
        return step.distill
    return step.train if isinstance(step, AttackStep) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a run, each after the one it builds on, and the protocol they obey."""

    protocol: Protocol
    steps: tuple[Step, ...]

    def of(self, kind: type[StepT]) -> list[StepT]:
        return [step for step in self.steps if isinstance(step, kind)]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user asked for; None means what the protocol says."""

    distillers: Sequence[str] | None = None
    architectures: Sequence[str] | None = None
    attacks: Sequence[str] | None = None
    datasets: Sequence[str] | None = None
    ipc: Sequence[int] | None = None
    seeds: Sequence[int] | None = None
    distill_seeds: Sequence[int] | None = None
    tracks: Sequence[str] | None = None
    options: Options = field(default_factory=dict)
    """Overrides by component, from --config and --set."""


def make_plan(protocol: Protocol, selection: Selection, registry: Registry) -> Plan:
    """Resolve every name and option and lay out the steps.

    Raises:
        RddBenchError: For an unknown name or option, before anything is computed.
    """
    chooser = _Chooser(protocol, selection.options, registry, _own_names(protocol, selection))
    architectures = [
        chooser.choose("architecture", name)
        for name in _chosen(selection.architectures, protocol.architectures, "architectures")
    ]
    attacks = [
        (name, chooser.choose("attack", name))
        for name in _chosen(selection.attacks, protocol.attacks, "attacks", may_be_empty=True)
    ]
    seeds = tuple(_chosen(selection.seeds, protocol.seeds, "seeds"))
    tracks = _chosen(selection.tracks, protocol.tracks, "tracks")
    for track in tracks:
        if track not in TRACKS:
            raise RddBenchError(f"there is no track '{track}'; the tracks are {', '.join(TRACKS)}")
    ipcs = _chosen(selection.ipc, protocol.ipc, "ipc")
    distills = list(_distill_steps(protocol, selection, ipcs, chooser))
    chooser.refuse_unused()

    # By address: two names for the same thing are one step.
    steps: dict[str, Step] = {}
    for distill in distills:
        steps.setdefault(distill.address, distill)
        reference = distill.role == "reference"
        for track in [REFERENCE_TRACK] if reference else tracks:
            recipe = protocol.recipe_of(track)
            for architecture in architectures:
                train = TrainStep(distill, architecture, track, recipe, seeds, protocol.batch_size)
                steps.setdefault(train.address, train)
                for attack in _attack_steps(protocol, train, attacks, registry):
                    if attack.ranked or reference or distill.ipc in ipcs:
                        steps.setdefault(attack.address, attack)
    return Plan(protocol, tuple(steps.values()))


def _own_names(protocol: Protocol, selection: Selection) -> set[str]:
    """Return the names that the protocol chose and not the user."""
    kinds = ("distillers", "architectures", "attacks", "datasets")
    own = {protocol.distill_architecture, *protocol.references}
    for kind in kinds:
        if getattr(selection, kind) is None:
            own.update(getattr(protocol, kind))
    return own


def _distill_steps(
    protocol: Protocol, selection: Selection, ipcs: Sequence[int], chooser: _Chooser
) -> Iterable[DistillStep]:
    named = _chosen(selection.distillers, protocol.distillers, "distillers")
    # References come first: they take longest, so the other workers are busy beside them.
    labels = list(dict.fromkeys([*protocol.references, *named]))
    subset = (protocol.subset.train_per_class, protocol.subset.test_per_class)
    seeds = _chosen(selection.distill_seeds, protocol.distill_seeds, "distill-seeds")
    for ipc in ipcs:
        if ipc < 1:
            raise RddBenchError(f"--ipc {ipc}: images per class are 1 or more")
    for name in _chosen(selection.datasets, protocol.datasets, "datasets"):
        dataset = chooser.choose("dataset", name)
        for label in labels:
            role = chooser.distiller_role(label)
            reference = role == "reference"
            control = label.removeprefix(f"{HOST}/") == protocol.control
            sizes = [*ipcs, *protocol.matched_ipc] if control else ipcs
            for ipc in [0] if reference else sizes:
                for seed in [0] if reference else seeds:
                    yield DistillStep(
                        protocol_sha256=protocol.sha256,
                        dataset=dataset,
                        subset=subset,
                        distiller=chooser.choose("distiller", label, ipc),
                        role=role,
                        control=control,
                        ipc=ipc,
                        architecture=chooser.choose("architecture", protocol.distill_architecture),
                        seed=seed,
                    )


def _attack_steps(
    protocol: Protocol,
    train: TrainStep,
    attacks: Sequence[tuple[str, Choice]],
    registry: Registry,
) -> Iterable[AttackStep]:
    for name, attack in attacks:
        cls = registry.find("attack", attack.offer_name).cls
        assert issubclass(cls, Attack)
        norms = {curve.norm for curve in protocol.threats}
        if not norms & cls.norms:
            raise RddBenchError(
                f"attack '{name}' works in {', '.join(sorted(cls.norms))}; protocol "
                f"{protocol.name} has budgets in {', '.join(sorted(norms))} only"
            )
        for curve in protocol.threats:
            for threat in curve.threats():
                ranked = protocol.is_ranked(threat)
                if threat.norm in cls.norms and (ranked or name not in protocol.ranked_only):
                    standard = attack.component.label in protocol.attacks
                    yield AttackStep(train, attack, threat, ranked, standard)


def _address(kind: str, key: Sequence[Any]) -> str:
    return digest([KEY_VERSION, __version__, kind, key])[:32]


def _chosen(
    asked: Sequence[T] | None, default: Sequence[T], what: str, *, may_be_empty: bool = False
) -> list[T]:
    chosen = list(dict.fromkeys(default if asked is None else asked))
    if not chosen and not may_be_empty:
        raise RddBenchError(f"no {what} are named; give at least one with --{what}")
    return chosen


class _Chooser:
    """Resolves names and options: plugin's default < protocol < the user's."""

    def __init__(
        self, protocol: Protocol, overrides: Options, registry: Registry, own: set[str]
    ) -> None:
        self.protocol = protocol
        self.overrides = overrides
        self.registry = registry
        self.own = own
        self.used: set[str] = set()

    def choose(self, kind: str, label: str, ipc: int | None = None) -> Choice:
        """Return the component of a label with its options checked and filled in."""
        offer = self._offer(kind, label)
        # A protocol that sets options of 'dm' means the built-in, which may be spelt out.
        plain = label.removeprefix(f"{HOST}/")
        names = list(dict.fromkeys([plain, label]))
        keys = names if ipc is None else [*names, *(f"{name}@{ipc}" for name in names)]
        self.used.update(keys)
        ruled: dict[str, Any] = {}
        asked: dict[str, Any] = {}
        for key in keys:
            ruled |= self.protocol.options.get(key, {})
            asked |= self.overrides.get(key, {})
        by_rule = self._resolve(offer, label, ruled)
        options = self._resolve(offer, label, ruled | asked)
        changed = [f"{k}={v}" for k, v in options.items() if by_rule.get(k) != v]
        shown = f"{label} [{', '.join(changed)}]" if changed else label
        component = Component(
            name=offer.qualified,
            label=shown,
            version=offer.version,
            source_sha256=offer.source_sha256,
            options=options,
        )
        return Choice(kind, offer.qualified, component)

    def distiller_role(self, label: str) -> str:
        cls = self._offer("distiller", label).cls
        return cls.role if issubclass(cls, Distiller) else "method"

    def refuse_unused(self) -> None:
        """Refuse options for a component that this run does not use: most likely a typo."""
        for key in self.overrides:
            if key not in self.used:
                running = ", ".join(sorted(k for k in self.used if "@" not in k))
                raise RddBenchError(
                    f"options are given for '{key}', which this run does not use; it uses {running}"
                )

    def _offer(self, kind: str, label: str) -> Offer:
        return self.registry.find(kind, self._text(kind, label))

    def _text(self, kind: str, label: str) -> str:
        """Return what a label stands for: an alias, or a built-in that the protocol means.

        A plugin that offers the name of a built-in must not stop protocols that name it.
        """
        text = self.protocol.alias.get(label, label)
        if label in self.own or label in self.protocol.alias:
            offers = {offer.qualified for offer in self.registry.of_kind(kind)}
            if f"{HOST}/{text.partition(':')[0]}" in offers:
                return f"{HOST}/{text}"
        return text

    def _resolve(self, offer: Offer, label: str, options: Mapping[str, Any]) -> dict[str, Any]:
        text = self._text(offer.kind, label)
        config = offer.cls.parse(with_argument(offer, text, options))
        resolved: dict[str, Any] = config.model_dump(mode="json")
        return resolved
