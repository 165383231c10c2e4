"""A trained network from elsewhere, judged as every network of this suite is."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdd_bench import artifacts, robustness
from rdd_bench.components import Architecture, Attack, Run
from rdd_bench.consistency import Evidence, contradictions
from rdd_bench.errors import NotApplicable, RddBenchError
from rdd_bench.foreign import read_weights
from rdd_bench.metrics import binomial_interval
from rdd_bench.networks import Classifier, Normalise
from rdd_bench.outcomes import pack
from rdd_bench.records import Flag
from rdd_bench.seeding import seeded
from rdd_bench.types import DatasetSpec, LabelledImages, Threat

NESTED = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where programs put the weights among other things."""
PREFIXES = ("module.", "_orig_mod.", "network.", "model.")
"""What wrappers put before every name."""


@dataclass
class Verdict:
    """What one attack under one threat left of a network."""

    attack: str
    threat: Threat | None
    """None for the clean images."""
    correct: Tensor
    """Which test images are right, (n,) booleans."""
    flags: list[Flag] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """What the attack has to say, such as a library's warnings or a median distance."""
    error: str = ""
    """Why the attack could not be run."""
    failed: bool = False
    """Whether that is a fault, and not that it does not apply."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of an attack its plugin, every option, the library that ran, and its median distance."""

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()

    def interval(self) -> tuple[float, float]:
        """Return the exact 95 % interval of the accuracy (Clopper and Pearson 1934)."""
        return binomial_interval(int(self.correct.sum()), len(self.correct))

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values, image by image."""
        return {
            "attack": self.attack,
            "norm": self.threat.norm if self.threat else None,
            "eps": self.threat.eps if self.threat else None,
            "n": len(self.correct),
            "correct": int(self.correct.sum()),
            "outcomes": pack(self.correct.cpu().numpy()),
            "flags": [flag.model_dump(mode="json") for flag in self.flags],
            "messages": self.messages,
            "error": self.error,
            **self.about,
        }


def load_network(
    path: Path,
    architecture: Architecture[Any],
    spec: DatasetSpec,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Return the network of a ``state_dict`` behind the normalisation it was trained with.

    Args:
        path: File of ``torch.save`` or a safetensors file; nothing in it is executed. Of a run's
            networks, which bring their normalisation along, it is that of the first seed.
        architecture: What the weights are for.
        spec: The data set; its mean and deviation serve where none are given.
        mean: What was subtracted, per channel.
        std: What was divided by, per channel.

    Raises:
        RddBenchError: If the file holds no weights, or those of another architecture.
    """
    with seeded(0):
        network = architecture.build(spec)
    if _is_of_a_run(path):
        if mean is not None or std is not None:
            raise RddBenchError(f"{path} says how it normalises; leave --mean and --std out")
        fresh = Classifier(Normalise(spec), network)
        return artifacts.networks_from_bytes(path.read_bytes(), [fresh], str(path))[0]
    state = _state_in(read_weights(path), path)
    wanted = network.state_dict()
    state = _without_prefix(state, set(wanted))
    problems = _misfits(state, wanted)
    if problems:
        raise RddBenchError(
            f"{path} does not fit {architecture.name}: {'; '.join(problems)}. Name the "
            "architecture and its options that it was trained with"
        )
    lost = [name for name in wanted if not torch.isfinite(state[name]).all()]
    if lost:
        raise RddBenchError(f"{path} has NaN or infinite numbers in {', '.join(lost[:3])}")
    network.load_state_dict(dict(state))
    preprocess = Normalise(spec)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            if len(values) != spec.shape[0]:
                raise RddBenchError(
                    f"--{name} has {len(values)} numbers; {spec.name} has {spec.shape[0]} channels"
                )
            if not all(math.isfinite(value) for value in values):
                raise RddBenchError(f"--{name} has a number that is not finite")
            if name == "std" and min(values) <= 0:
                raise RddBenchError(f"--std has {min(values):g}; expected numbers above 0")
            getattr(preprocess, name).copy_(torch.tensor(values).view(-1, 1, 1))
    return Classifier(preprocess, network).eval().requires_grad_(requires_grad=False)


def _is_of_a_run(path: Path) -> bool:
    """Whether a file holds the networks of all seeds, as run folders do."""
    if path.suffix != ".safetensors":
        return False
    return any(name.startswith("preprocess/") for name in read_weights(path))


def _state_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise RddBenchError(f"{path} holds {type(content).__name__}; expected a state_dict")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise RddBenchError(
            f"{path} is no state_dict: it holds {', '.join(map(str, list(content)[:6]))}"
        )
    return content


def _without_prefix(state: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    """Take off what wrappers such as DataParallel put before every name."""
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if not set(state) & wanted and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for title, names in (
        ("it lacks", sorted(set(wanted) - set(state))),
        ("it has unknown", sorted(set(state) - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{title} {', '.join(names[:3])}{more}")
    shapes = [
        f"{name} is {tuple(state[name].shape)} and not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    return problems + shapes[:3]


def judge(
    model: Classifier,
    test: LabelledImages,
    attacks: Sequence[tuple[str, Attack[Any]]],
    threats: Sequence[Threat],
    device: torch.device,
    *,
    batch_size: int = 500,
    report: Callable[[str, int, int], None] = lambda *_: None,
    keep: Callable[[Sequence[Verdict]], None] = lambda _: None,
) -> list[Verdict]:
    """Return the clean verdict and that of every attack under every threat that it knows.

    ``keep`` is called with all there are whenever a threat is done, so that nothing is lost.
    """
    model.to(device)
    test = LabelledImages(test.images.to(device), test.labels.to(device))
    outcome = robustness.clean_outcomes(model, test, batch_size)
    # Where the network's own set is not known, there is no set to look at.
    flags = robustness.audit_networks([model], test, [outcome], None, batch_size)
    clean = Verdict("clean", None, outcome, flags)
    verdicts = [clean]
    memos: dict[str, dict[str, Any]] = {label: {} for label, _ in attacks}
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as scratch:
        run = Run(
            device=device,
            scratch=Path(scratch),
            phase=lambda _: contextlib.nullcontext(),
            report=report,
            batch_size=batch_size,
        )
        for threat in threats:
            found = {
                label: _verdict(model, test, label, attack, threat, run, memos[label])
                for label, attack in attacks
            }
            _compare(found, dict(attacks), clean)
            verdicts += found.values()
            keep(verdicts)
    return verdicts


def _verdict(
    model: Classifier,
    test: LabelledImages,
    label: str,
    attack: Attack[Any],
    threat: Threat,
    run: Run,
    memo: dict[str, Any],
) -> Verdict:
    nothing = torch.zeros(0, dtype=torch.bool)
    if threat.norm not in attack.norms:
        known = ", ".join(sorted(attack.norms))
        return Verdict(label, threat, nothing, error=f"works in {known}")
    who = f"attack '{label}'"
    try:
        judged = robustness.attack_models(
            [model], test, attack, threat, [0], run, who, [memo], probe_strength=True
        )
    except NotApplicable as reason:
        return Verdict(label, threat, nothing, error=str(reason))
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything; the others go on
        sentence = str(error)
        if not isinstance(error, RddBenchError):
            sentence = f"{who} raised {type(error).__name__}: {error}"
        return Verdict(label, threat, nothing, error=" ".join(sentence.split()), failed=True)
    about = {
        "name": attack.name,
        "options": attack.config.model_dump(mode="json"),
        "provenance": attack.provenance(),
        "median_distance": next(iter(judged.median_distance), None),
    }
    robust = judged.robust[0]
    return Verdict(label, threat, robust, judged.flags, judged.messages, about=about)


def _compare(
    verdicts: Mapping[str, Verdict], attacks: Mapping[str, Attack[Any]], clean: Verdict
) -> None:
    """Add to the verdicts of one threat, by label of the attack, what they say of each other."""
    evidence = {
        label: Evidence(
            label=label,
            name=attacks[label].name,
            access=attacks[label].access,
            stronger_than=attacks[label].stronger_than,
            outcomes=[verdict.correct.cpu().numpy()],
        )
        for label, verdict in verdicts.items()
        if not verdict.error
    }
    same = list(evidence.values())
    for label, mine in evidence.items():
        verdicts[label].flags += contradictions(mine, same, [clean.correct.cpu().numpy()])


def worst_cases(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return, for every threat, the images that no attack breaks."""
    found = []
    for threat in dict.fromkeys(v.threat for v in verdicts if v.threat is not None):
        of_threat = [v.correct for v in verdicts if v.threat == threat and not v.error]
        if of_threat:
            found.append(Verdict("worst case", threat, torch.stack(of_threat).all(dim=0)))
    return found


def percent(value: float) -> str:
    """Return an accuracy as a table shows it."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
