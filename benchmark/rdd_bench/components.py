"""The contract: what a distiller, an architecture, an attack and a data set are.

A plugin subclasses one of these, writes one method, and declares its options as a ``Config``::

    class Options(Config):
        iterations: int = 20_000
        \"\"\"Steps on the synthetic images.\"\"\"

    class MyDistiller(Distiller[Options]):
        \"\"\"Match what nobody matched before.\"\"\"

        name = "mine"
        info = Info(title="My method", licence="MIT")

        def distill(self, task: DistillTask, run: Run) -> DistilledSet: ...

Every option has a default, and **the default is the paper's**.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar, get_args

from pydantic import ValidationError

from rdd_bench.errors import NotApplicable, RddBenchError
from rdd_bench.types import (
    Config,
    DatasetSpec,
    DistilledSet,
    Info,
    LabelledImages,
    Norm,
    Splits,
    Threat,
    Whitening,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class NoOptions(Config):
    """The options of a component that has none."""


ConfigT = TypeVar("ConfigT", bound=Config)
Item = TypeVar("Item")

Role = Literal["method", "baseline", "reference"]
Access = Literal["white", "black", "none"]


class Component(ABC, Generic[ConfigT]):
    """What every plugin class shares: a name, a description, and options."""

    name: ClassVar[str]
    """Lower-case letters, digits, '-' and '_'; unique within the distribution."""
    info: ClassVar[Info]
    smoke: ClassVar[Mapping[str, Any]] = {}
    """Options for a run of seconds on one CPU core; the contract checks use them."""
    argument: ClassVar[str | None] = None
    """The option that 'name:VALUE' sets, such as the model of ``timm:resnet18``."""
    config_class: ClassVar[type[Config]] = NoOptions
    config: ConfigT

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, Config):
                    cls.config_class = argument

    def __init__(self, config: ConfigT | None = None) -> None:
        self.config = config if config is not None else self.config_class()  # type: ignore[assignment]

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> Self:
        """Build the component from plain options.

        Raises:
            RddBenchError: Naming each unknown option and each value of the wrong type.
        """
        return cls(cls.parse(options))  # type: ignore[arg-type]

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Config:
        """Check plain options and return them with every default filled in."""
        try:
            return cls.config_class.model_validate(dict(options))
        except ValidationError as error:
            known = ", ".join(cls.config_class.model_fields) or "none"
            problems = "; ".join(_explain(cls.name, problem) for problem in error.errors())
            raise RddBenchError(f"{problems}. Options of '{cls.name}': {known}.") from None

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


def _explain(name: str, problem: Any) -> str:
    option = ".".join([name, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        return f"{option} is not an option"
    return f"{option}={problem['input']!r}: {problem['msg'].lower()}"


@dataclass(frozen=True, slots=True)
class DistillTask:
    """What decides the result of a distillation; nothing of the machine it runs on."""

    spec: DatasetSpec
    train: LabelledImages
    ipc: int
    """Images per class of the set to return."""
    architecture: Architecture[Any]
    """The network to distil with."""
    seed: int
    """Which repetition this is. The host has already seeded the generators with it."""
    whitening: Whitening | None = None
    """What ``normalise`` does in place of mean and deviation; for methods that whiten, which set
    it with ``dataclasses.replace`` and return it with their set."""

    def build_network(self, device: torch.device) -> nn.Module:
        """Return a fresh random network on ``device``; it wants normalised images."""
        return self.architecture.build(self.spec).to(device)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels of [0, 1] as networks want them."""
        if self.whitening is not None:
            return self.whitening.apply(pixels)
        mean, std = self._constants(pixels)
        return (pixels - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """Return the pixels of normalised images; not clamped."""
        if self.whitening is not None:
            return self.whitening.invert(images)
        mean, std = self._constants(images)
        return images * std + mean

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = like.new_tensor(self.spec.mean).view(-1, 1, 1)
        std = like.new_tensor(self.spec.std).view(-1, 1, 1)
        return mean, std


def embedding_of(network: nn.Module, who: str) -> Callable[[Tensor], Tensor]:
    """Return the network's ``embed``: normalised images (n, c, h, w) to features (n, d).

    Raises:
        NotApplicable: If the architecture offers no features.
    """
    embed: Callable[[Tensor], Tensor] | None = getattr(network, "embed", None)
    if embed is None:
        raise NotApplicable(
            f"{who} needs an architecture with embed(); {type(network).__name__} has none"
        )
    return embed


@dataclass(frozen=True, slots=True)
class Run:
    """Where and how a call runs. Must not change its result."""

    device: torch.device
    scratch: Path
    """An empty folder, deleted after the call."""
    phase: Callable[[str], AbstractContextManager[None]]
    """``with run.phase("experts"):`` books the time under that name."""
    report: Callable[[str, int, int], None]
    """``report("matching", done, total)`` moves the progress bar; cheap to call often."""
    cache: Path | None = None
    """A folder of the run that is kept, for what several calls can share, such as expert
    trajectories. Files in it are named by a hash of what decides them and renamed into place.
    None where nothing is kept."""
    batch_size: int = 500
    """How many images at once where that is only a matter of memory. Part of the protocol,
    because the random draws of attacks depend on it."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What an attack leaves for its next call on the same network and images under another budget:
    a gradient, the nearest adversarials. Only what no budget and no random draw decides."""
    surrogates: Callable[[int], Sequence[nn.Module]] | None = None
    """``run.surrogates(count)`` returns networks like the attacked one, trained on the same
    distilled set by the same recipe in other seeds. None where the set is not known."""

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """Yield the items and show the progress through them."""
        total = len(items) if total is None else total  # type: ignore[arg-type]
        for done, item in enumerate(items):
            self.report(what, done, total)
            yield item
        self.report(what, total, total)

    def batches(self, count: int) -> Iterator[slice]:
        """Yield the slices that cut ``count`` images into batches."""
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))


@dataclass(frozen=True, slots=True)
class Source:
    """Where data may come from."""

    root: Path | None
    """The folder that ``--data-root`` names."""
    download: bool = False
    """Whether ``--download`` was given; without it nothing is fetched."""


class Dataset(Component[ConfigT]):
    """Real images for training and testing."""

    @abstractmethod
    def load(self, source: Source) -> Splits:
        """Return both splits: images float32 (n, c, h, w) in [0, 1], labels int64 in 0..k-1.

        Raises:
            RddBenchError: If the data are not there, saying what to do.
        """


class Architecture(Component[ConfigT]):
    """A network."""

    @abstractmethod
    def build(self, spec: DatasetSpec) -> nn.Module:
        """Return a fresh network: normalised images (n, c, h, w) to logits (n, k).

        It may offer ``embed(images) -> (n, d)``, the features before the classifier, which
        feature-matching distillers need.
        """


class Distiller(Component[ConfigT]):
    """A method that makes a small training set out of a large one."""

    role: ClassVar[Role] = "method"
    """'baseline' for coresets; 'reference' for rows that are no distilled set at all (whole
    data): made once whatever the IPC, and trained by their own recipe in every track."""
    imports: ClassVar[bool] = False
    """Whether it only reads a set, from the path that its argument names: what
    ``rdd-bench evaluate`` uses."""

    @abstractmethod
    def distill(self, task: DistillTask, run: Run) -> DistilledSet:
        """Return exactly ``task.ipc`` images of every class (any number for a reference).

        Raises:
            NotApplicable: If this combination cannot be served; the reason is recorded.
        """


class Attack(Component[ConfigT]):
    """A search for images close to the given ones that the network gets wrong."""

    norms: ClassVar[frozenset[Norm]]
    """The norms it can respect."""
    stronger_than: ClassVar[frozenset[str]] = frozenset()
    """Names of attacks that never beat this one unless something is wrong with the run."""
    access: ClassVar[Access] = "white"
    """What it needs of the network: 'white' its gradients, 'black' at most its answers, 'none'
    nothing, such as noise. Less access never gives a stronger attack, or gradients are masked."""
    effort: ClassVar[str | None] = None
    """The option that says how long it searches, a whole number such as 'steps': the audit doubles
    it on a few images and sees whether that would have helped. None for an attack of one step."""
    distances: Tensor | None = None
    """After a call of an attack that looks for the nearest adversarial: how far that of each image
    is, (n,), infinite where none was found. The record keeps the median."""
    messages: Sequence[str] = ()
    """What an instance has to say about its last call; kept in the record."""

    def provenance(self) -> dict[str, str]:
        """Return which library computes it and in which version; empty for code of its own."""
        return {}

    @abstractmethod
    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, run: Run
    ) -> Tensor:
        """Return attacked images, (n, c, h, w), within the threat and within [0, 1].

        ``model`` maps **pixels in [0, 1]** to logits: normalisation is inside it. It is in eval
        mode with frozen parameters; gradients with respect to its input are available. All
        images are ones that it classifies correctly. Cut them with ``run.batches``.
        """


KINDS: Mapping[str, type[Component[Any]]] = {
    "distiller": Distiller,
    "architecture": Architecture,
    "attack": Attack,
    "dataset": Dataset,
}
