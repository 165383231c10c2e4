"""Result lines. One record is one line of JSON; any line ever published must load.

Three steps leave a record: a distillation, the training of a network in several seeds (with its
clean accuracy), and an attack on those networks under one threat. A record names what it was made
from by address, so the tables are a join and nothing is said twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from rdd_bench.errors import RddBenchError
from rdd_bench.outcomes import Outcomes, unpack
from rdd_bench.types import Norm, Recipe

SCHEMA: Literal[1] = 1

QUARANTINE = "quarantine"
"""How addresses of quarantine records begin."""

Status = Literal["done", "failed", "skipped"]


class Flag(BaseModel):
    """A check of the audit that failed, in words, with the value that made it fail."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    message: str
    value: float | None = None


class Component(BaseModel):
    """Which plugin ran, with every option resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Qualified: distribution/name."""
    label: str
    """How tables call it; says the options that differ from the protocol's."""
    version: str
    source_sha256: str
    options: dict[str, Any]


class _Record(BaseModel):
    # Older readers must survive fields that newer writers add.
    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    address: str
    """Hash of what decides the result."""
    status: Status = "done"
    error: str | None = None
    """One sentence, for a step that failed or was skipped."""
    protocol: str
    protocol_sha256: str
    environment: str
    """Address of the environment record."""
    created: str
    """UTC, ISO 8601."""


class _StepRecord(_Record):
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall-clock time by phase, device synchronised."""
    peak_bytes: int | None = None
    """Allocated on a GPU, resident on a CPU."""
    forward: int = 0
    """Images that went through networks."""
    backward: int = 0
    """Images for which a gradient was computed."""
    architecture: Component
    """What the set was distilled with, or the network that was trained and attacked."""


class EnvironmentRecord(BaseModel):
    """The machine and the versions; referred to by the others."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["environment"] = "environment"
    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    address: str
    facts: dict[str, Any]


class DistillRecord(_StepRecord):
    """A distilled set: what made it, what it is, what it cost."""

    kind: Literal["distill"] = "distill"
    dataset: str
    train_sha256: str = ""
    num_classes: int = 0
    ipc: int
    """Images per class asked for; 0 for a reference, which has any number."""
    role: Literal["method", "baseline", "reference"]
    control: bool = False
    """Whether the protocol compares every other row with this one."""
    distiller: Component
    seed: int
    set_sha256: str = ""
    images: int = 0
    bytes: int = 0
    labels: Literal["hard", "soft", "views"] = "hard"
    pixel_range: tuple[float, float] | None = None
    out_of_range: float = 0.0
    """Fraction of pixels outside [0, 1]."""
    own_recipe: bool = False
    flags: list[Flag] = Field(default_factory=list)
    notes: dict[str, Any] = Field(default_factory=dict)


class _Judged(_StepRecord):
    distill: str
    """Address of the distillation."""
    track: str
    seeds: list[int]
    """Training seeds; the lists below have one entry for each."""
    test_sha256: str = ""
    n: int = 0
    """Test images."""
    correct: list[int] = Field(default_factory=list)
    outcomes: list[str] = Field(default_factory=list)
    """Bitmaps of the images that are right (and, for an attack, stay right)."""
    flags: list[Flag] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> _Judged:
        if self.status == "done":
            if not len(self.seeds) == len(self.correct) == len(self.outcomes):
                raise ValueError("seeds, correct and outcomes differ in length")
            if not self.seeds or self.n < 1:
                raise ValueError("a finished step without a seed or a test image")
            for count, bitmap in zip(self.correct, self.outcomes, strict=True):
                if int(unpack(bitmap, self.n).sum()) != count:
                    raise ValueError(f"a bitmap does not hold the {count} correct images it should")
        return self

    def bitmaps(self) -> list[Outcomes]:
        """Return the outcomes of each seed, (n,) booleans."""
        return [unpack(bitmap, self.n) for bitmap in self.outcomes]


class TrainRecord(_Judged):
    """Networks trained on a set, and which test images they get right."""

    kind: Literal["train"] = "train"
    recipe: Recipe | None = None
    final_loss: list[float] = Field(default_factory=list)


class AttackRecord(_Judged):
    """Which test images the networks get right clean **and** under one attack."""

    kind: Literal["attack"] = "attack"
    train: str
    """Address of the training."""
    attack: Component
    stronger_than: list[str] = Field(default_factory=list)
    """Names of the attacks that this one should never lose to."""
    access: Literal["white", "black", "none"] = "white"
    """What the attack needs of the network: gradients, answers, or nothing."""
    median_distance: list[float | None] = Field(default_factory=list)
    """Of an attack that looks for the nearest adversarial: the median distance over the images
    that each network gets right; None where fewer than half of them have one."""
    norm: Norm
    eps: float
    ranked: bool = False
    """Whether the protocol ranks this threat."""
    standard: bool = False
    """Whether the protocol names this attack, with these options."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """Which library ran, where the attack uses one."""
    messages: list[str] = Field(default_factory=list)
    """What that library had to say."""


class QuarantineRecord(BaseModel):
    """Somebody's finding that a result must not be trusted. The result itself stays."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["quarantine"] = "quarantine"
    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    address: str
    """Of this record."""
    target: str
    """Address of the distillation, training or attack; what builds on it is meant too."""
    reason: str
    """One sentence, shown on the board."""
    created: str
    """UTC, ISO 8601."""


Record = Annotated[
    DistillRecord | TrainRecord | AttackRecord | EnvironmentRecord | QuarantineRecord,
    Field(discriminator="kind"),
]
AnyRecord = DistillRecord | TrainRecord | AttackRecord | EnvironmentRecord | QuarantineRecord
StepRecord = DistillRecord | TrainRecord | AttackRecord

_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Record)


def to_line(record: AnyRecord) -> str:
    """Return a record as one line of JSON, with a line end."""
    return record.model_dump_json(by_alias=True, exclude_defaults=False) + "\n"


def from_line(line: str) -> AnyRecord:
    """Read one line.

    Raises:
        RddBenchError: Saying what is wrong with it.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise RddBenchError(f"not a complete line of JSON ({reason})") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise RddBenchError(
            f"schema {schema} is newer than this rdd-bench reads ({SCHEMA}); upgrade rdd-bench"
        )
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RddBenchError(f"not a record: {place}: {first['msg']}") from None


def parse_lines(lines: Iterable[str]) -> tuple[list[AnyRecord], list[str]]:
    """Read many lines; return the records and, for each bad line, its number and what is wrong."""
    records: list[AnyRecord] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(from_line(line))
        except RddBenchError as error:
            problems.append(f"line {number}: {error}")
    return records, problems
