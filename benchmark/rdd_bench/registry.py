"""Find the plugins that are installed, and survive the broken ones.

The loader is our own, over ``importlib.metadata`` into pluggy: pluggy's stops at the first import
error and silently drops one of two plugins with the same name. Here a broken plugin becomes a
``Problem``, one line for the user, and is fatal only if it is asked for by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from rdd_bench import __version__, hookspecs
from rdd_bench.components import KINDS, Attack, Component
from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.hookspecs import HOOK_OF_KIND, PROJECT
from rdd_bench.types import Info, Norm

HOST = "rdd-bench"
ENTRY_POINT_GROUP = PROJECT
BLOCK_VARIABLE = "RDD_BENCH_BLOCK"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One class that one plugin offers."""

    kind: str
    cls: type[Component[Any]]
    distribution: str
    version: str
    entry_point: str

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def qualified(self) -> str:
        return f"{self.distribution}/{self.name}"

    @property
    def who(self) -> str:
        """How messages name it: kind, name, distribution and version."""
        return f"{self.kind} '{self.name}' ({self.distribution} {self.version})"

    @property
    def source_sha256(self) -> str:
        """Hash of the code behind the class: an edited plugin gets new results.

        That is the module that defines it and the private modules (``_name.py``) beside it.
        """
        source = inspect.getsourcefile(self.cls)
        if source is None:
            return ""
        module = Path(source)
        files = sorted({module, *module.parent.glob("_[!_]*.py")})
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True, slots=True)
class Problem:
    """A plugin, or a part of one, that was not loaded, and why."""

    plugin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.plugin}: {self.reason}"


@dataclass
class Registry:
    """What is on offer. Filled once by ``load_plugins``, read by everybody."""

    offers: list[Offer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Offer]:
        return sorted((o for o in self.offers if o.kind == kind), key=lambda o: o.qualified)

    def find(self, kind: str, text: str) -> Offer:
        """Return the offer that ``NAME``, ``DIST/NAME`` or ``NAME:ARGUMENT`` means.

        Raises:
            UnknownNameError: If nothing is called so, with the nearest name.
            RddBenchError: If two plugins offer the name, or the argument cannot be taken.
        """
        name, _, argument = text.partition(":")
        matches = [o for o in self.of_kind(kind) if name in (o.name, o.qualified)]
        if not matches:
            known = {o.name for o in self.of_kind(kind)}
            broken = ", ".join(sorted({p.plugin for p in self.problems}))
            hint = f" Not loaded: {broken} (see 'rdd-bench plugins')." if broken else ""
            raise UnknownNameError(kind, text, known, hint)
        if len(matches) > 1:
            choices = " or ".join(o.qualified for o in matches)
            raise RddBenchError(
                f"{kind} '{name}' is offered by {len(matches)} plugins: say {choices}"
            )
        offer = matches[0]
        if argument and offer.cls.argument is None:
            raise RddBenchError(f"{offer.who} takes no ':{argument}'; say '{name}'")
        return offer

    def build(self, kind: str, text: str, options: Mapping[str, Any]) -> Component[Any]:
        """Return the component with these options and, for 'name:VALUE', its argument."""
        offer = self.find(kind, text)
        return offer.cls.configured(with_argument(offer, text, options))


def with_argument(offer: Offer, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with the value of 'name:VALUE' under the option that takes it."""
    argument = text.partition(":")[2]
    if argument and offer.cls.argument:
        return {**options, offer.cls.argument: argument}
    return dict(options)


def load_plugins() -> Registry:
    """Read every installed plugin of the entry-point group ``rdd_bench``."""
    registry = Registry()
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    blocked = {name for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name}
    for distribution, entry_point in _entry_points(registry.problems):
        dist_name = canonicalize_name(distribution.metadata["Name"])
        plugin = f"{dist_name}:{entry_point.name}"
        if blocked & {plugin, dist_name, entry_point.name}:
            registry.problems.append(Problem(plugin, f"blocked by {BLOCK_VARIABLE}"))
            continue
        refusal = _requirement_refusal(dist_name, distribution.requires or [])
        if refusal:
            registry.problems.append(Problem(plugin, refusal))
            continue
        try:
            module = entry_point.load()
            manager.register(module, plugin)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
            if manager.has_plugin(plugin):
                manager.unregister(name=plugin)
            registry.problems.append(Problem(plugin, _reason(error)))
            continue
        _collect(registry, manager, plugin, distribution.version)
    return registry


def _entry_points(
    problems: list[Problem],
) -> Iterator[tuple[importlib.metadata.Distribution, importlib.metadata.EntryPoint]]:
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        # A name found again further down the path is shadowed, as it is for imports.
        if not name or canonicalize_name(name) in seen:
            continue
        seen.add(canonicalize_name(name))
        try:
            entry_points = list(distribution.entry_points)
        except Exception:  # noqa: BLE001 - importlib.metadata raises anything for a malformed file
            problems.append(Problem(canonicalize_name(name), "its entry points cannot be read"))
            continue
        for entry_point in entry_points:
            if entry_point.group == ENTRY_POINT_GROUP:
                yield distribution, entry_point


def _requirement_refusal(dist_name: str, requires: Iterable[str]) -> str | None:
    """Say why a distribution may not be imported, judged by its metadata alone."""
    if dist_name == HOST:
        return None
    declared = []
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) == HOST:
            declared.append(requirement)
    if not declared:
        return f"does not declare a dependency on {HOST}; add '{HOST}>={__version__}' to it"
    for requirement in declared:
        if not requirement.specifier.contains(__version__, prereleases=True):
            return f"needs {HOST}{requirement.specifier}; this is {HOST} {__version__}"
    return None


def _collect(registry: Registry, manager: pluggy.PluginManager, plugin: str, version: str) -> None:
    """Call the hooks of one plugin and keep the classes that fulfil the contract."""
    module = manager.get_plugin(plugin)
    dist_name, entry_point = plugin.split(":", 1)
    for caller in manager.get_hookcallers(module) or []:
        if not caller.has_spec():
            known = ", ".join(HOOK_OF_KIND.values())
            registry.problems.append(
                Problem(plugin, f"unknown hook '{caller.name}'; the hooks are {known}")
            )
    for kind, hook in HOOK_OF_KIND.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is not module:
                continue
            try:
                classes = list(implementation.function())
            except (Exception, SystemExit) as error:  # noqa: BLE001
                registry.problems.append(Problem(plugin, f"{hook} raised {_reason(error)}"))
                continue
            for cls in classes:
                refusal = class_refusal(kind, cls)
                if refusal:
                    registry.problems.append(Problem(plugin, refusal))
                    continue
                offer = Offer(
                    kind=kind,
                    cls=cls,
                    distribution=dist_name,
                    version=version,
                    entry_point=entry_point,
                )
                if any(o.qualified == offer.qualified for o in registry.of_kind(kind)):
                    twice = f"{cls.__name__}: {kind} '{cls.name}' is offered by {dist_name} already"
                    registry.problems.append(Problem(plugin, twice))
                    continue
                registry.offers.append(offer)


def class_refusal(kind: str, cls: Any) -> str | None:
    """Say what a class lacks to be a component of this kind; None if it lacks nothing."""
    base = KINDS[kind]
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        return f"{HOOK_OF_KIND[kind]} returned {cls!r}, which is not a subclass of {base.__name__}"
    missing = sorted(cls.__abstractmethods__)
    if missing:
        return f"{cls.__name__} does not implement {', '.join(missing)}"
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and NAME_PATTERN.fullmatch(name)):
        return f"{cls.__name__}.name is {name!r}; expected lower-case letters, digits, '-' and '_'"
    if not isinstance(getattr(cls, "info", None), Info):
        return f"{cls.__name__} has no info; expected info = Info(title=..., licence=...)"
    if not cls.summary():
        return f"{cls.__name__} has no docstring; its first line is what 'rdd-bench list' shows"
    undocumented = [
        option
        for option, info in cls.config_class.model_fields.items()
        if info.is_required() or not info.description
    ]
    if undocumented:
        return (
            f"{cls.__name__}: option '{undocumented[0]}' needs a default and a docstring under it"
        )
    if issubclass(cls, Attack) and not getattr(cls, "norms", None):
        return f"{cls.__name__} names no norms; expected norms = frozenset({{'linf'}}) or more"
    if issubclass(cls, Attack) and not cls.norms <= set(get_args(Norm)):
        return f"{cls.__name__}.norms is {set(cls.norms)}; expected {', '.join(get_args(Norm))}"
    return None


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
