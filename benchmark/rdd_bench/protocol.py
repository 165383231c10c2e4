"""The frozen rules of a table: data, seeds, recipe, threats. TOML in, values out.

A protocol that a published result uses never changes; a change is a new name and a new table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.hashing import digest
from rdd_bench.types import AdversarialTraining, Config, Eps, Norm, Recipe, Threat

DEFAULT = "digits-v1"
TRACKS = ("natural", "author", "adversarial")

Options = dict[str, dict[str, Any]]


class ThreatCurve(Config):
    """One norm and the budgets at which every attack that knows it is run."""

    norm: Norm
    """Norm of the perturbation."""
    eps: list[Eps]
    """Budgets in pixels of [0, 1], written as 8/255 or 0.1."""
    ranked: Eps
    """The budget that ranks the table; one of the list."""

    @model_validator(mode="after")
    def _ranked_is_listed(self) -> ThreatCurve:
        if self.ranked not in self.eps:
            raise ValueError(f"ranked eps {self.ranked:g} is not among the eps {self.eps}")
        return self

    def threats(self) -> list[Threat]:
        return [Threat(self.norm, eps) for eps in self.eps]


class Subset(Config):
    """A smaller part of a data set, chosen by a fixed rule; 0 takes everything."""

    train_per_class: int = Field(default=0, ge=0)
    """Training images of every class."""
    test_per_class: int = Field(default=0, ge=0)
    """Test images of every class."""


class Protocol(Config):
    """Everything that two results must share to stand in one table."""

    name: str
    """With a version at its end, such as digits-v1."""
    summary: str
    """One sentence."""
    datasets: list[str]
    """Data sets, each with tables of its own."""
    subset: Subset = Subset()
    """Which part of them is used."""
    test_sha256: dict[str, str] = Field(default_factory=dict)
    """Hash of the test images in their order, by data set; checked before anything runs."""
    distillers: list[str]
    """Methods and baselines run when none are named."""
    references: list[str] = Field(default_factory=list)
    """Distillers of role 'reference' that every table shows."""
    control: str = ""
    """The distiller with which every other row is compared."""
    distill_architecture: str = "convnet"
    """The network that distillers use."""
    architectures: list[str]
    """Networks trained on every set."""
    attacks: list[str]
    """Attacks run when none are named."""
    ranked_only: list[str] = Field(default_factory=list)
    """Attacks run only at the ranked budget, because they are slow."""
    ipc: list[int]
    """Images per class."""
    matched_ipc: list[int] = Field(default_factory=list)
    """Further sizes of the control, attacked at the ranked budgets only: real subsets that are as
    accurate on clean images as a method is, to tell robustness from a low accuracy."""
    seeds: list[int]
    """Training seeds."""
    distill_seeds: list[int] = Field(default_factory=lambda: [0])
    """Distillation seeds."""
    tracks: list[str] = Field(default_factory=lambda: ["natural"])
    """'natural': the recipe below for every set; 'author': each set's own; 'adversarial': the
    recipe below with adversarial training, for every set."""
    batch_size: int = Field(default=500, ge=1)
    """Images at once when networks are tested and attacked."""
    recipe: Recipe
    """Training of the natural track."""
    adversarial: AdversarialTraining | None = None
    """What the adversarial track adds to it."""
    threats: list[ThreatCurve]
    """What the attackers may do."""
    alias: dict[str, str] = Field(default_factory=dict)
    """Further names for a component, to run it with other options."""
    options: Options = Field(default_factory=dict)
    """Options by component; 'dm@10' holds what differs at 10 images per class."""

    @model_validator(mode="after")
    def _known_tracks(self) -> Protocol:
        for track in self.tracks:
            if track not in TRACKS:
                raise ValueError(f"unknown track '{track}'; known: {', '.join(TRACKS)}")
        if "adversarial" in self.tracks and self.adversarial is None:
            raise ValueError("the track 'adversarial' needs a section [adversarial]")
        return self

    def recipe_of(self, track: str) -> Recipe | None:
        """Return how a track trains; None for each set's own recipe.

        Raises:
            RddBenchError: If the protocol does not say.
        """
        if track == "natural":
            return self.recipe
        if track != "adversarial":
            return None
        if self.adversarial is None:
            raise RddBenchError(
                f"protocol {self.name} has no section [adversarial], so no track 'adversarial'"
            )
        return self.recipe.model_copy(update={"adversarial": self.adversarial})

    @property
    def sha256(self) -> str:
        """Hash of the rules: data, seeds, recipe, threats.

        What is run under them may grow: the lists of names, aliases and options are not in it.
        Every record holds its options resolved, and tables tell apart what differs in them.
        """
        open_ended = {
            "summary", "distillers", "references", "architectures", "attacks", "ranked_only",
            "ipc", "matched_ipc", "tracks", "alias", "options",
        }  # fmt: skip
        # Without what is not set, so that a new key changes no protocol that does not use it.
        rules = self.model_dump(mode="json", exclude=open_ended, exclude_none=True)
        # A check and no rule: every record holds the hash of its test images, and tables with
        # other images are other tables.
        rules["test_sha256"] = {}
        return digest(rules)

    def is_ranked(self, threat: Threat) -> bool:
        return any(c.norm == threat.norm and c.ranked == threat.eps for c in self.threats)


def names() -> list[str]:
    """Return the names of the protocols that come with rdd-bench."""
    folder = resources.files("rdd_bench") / "protocols"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def load_protocol(text: str) -> Protocol:
    """Return the protocol of a name, or of a path that ends in .toml.

    Raises:
        RddBenchError: If there is none, or the file breaks a rule, saying which.
    """
    if text.endswith(".toml"):
        path = Path(text)
        return parse_protocol(read_toml(path), str(path))
    if text not in names():
        hint = " A file of your own must end in .toml."
        raise UnknownNameError("protocol", text, names(), hint)
    source = (resources.files("rdd_bench") / "protocols" / f"{text}.toml").read_text()
    return parse_protocol(tomllib.loads(source), text)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of the user's; every failure is one sentence."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RddBenchError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RddBenchError(f"{path} is not TOML: {error}") from None


def parse_protocol(values: Mapping[str, Any], origin: str) -> Protocol:
    """Check the values of a protocol file."""
    try:
        return Protocol.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'protocol'}: {e['msg'].lower()}"
            for e in error.errors()
        )
        raise RddBenchError(f"protocol {origin}: {problems}") from None
