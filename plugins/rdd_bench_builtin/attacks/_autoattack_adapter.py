"""The one place that knows the two packages with the code of AutoAttack.

``autoattack`` is the authors' own, installable from git only; ``pyautoattack`` is a repackaging on
PyPI whose numerical files are the same functions. The authors' is used when it is there. Both
have habits that a benchmark cannot live with, and each is mended here:

- their constructors, methods and ways of reporting differ;
- with fewer than ten classes the targeted attacks ask for targets that do not exist and crash;
- they reseed the global generators, and crash under ``inference_mode``;
- their check for dynamic defences removes the process's trace function (coverage, debuggers) and
  remembers one model's fault for ever, so every later model is accused as well;
- FAB's backward pass fills the parameters' ``.grad``;
- images out of [0, 1] are clamped without a word; channels-last images crash them;
- a seed of None is the time of day. ``state_path`` is broken in both and never used;
- APGD goes on with images that are broken, and takes one target after the other. The engine 'fast'
  puts our own in its place, which gives the same verdicts (see ``_apgd``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rdd_bench.api import NotApplicable, RddBenchError
from rdd_bench_builtin.attacks._apgd import APGD
from rdd_bench_builtin.attacks._undisturbed import undisturbed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rdd_bench.api import Norm

PACKAGES = ("autoattack", "pyautoattack")
"""In order of preference."""

NORM_NAMES = {"linf": "Linf", "l2": "L2"}
PUBLISHED_ITERATIONS = 100


def package_name() -> str:
    """Return the package that will run.

    Raises:
        RddBenchError: If there is none.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            return name
    raise RddBenchError(
        "autoattack: neither 'autoattack' nor 'pyautoattack' is installed; "
        "run 'pip install pyautoattack'"
    )


def provenance() -> dict[str, str]:
    """Return the package's name, its version, and its commit if it was installed from git."""
    name = package_name()
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return {"package": name, "version": "unknown"}
    found = {"package": name, "version": distribution.version}
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        found["commit"] = commit
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run on every batch."""

    norm: Norm
    eps: float
    version: str
    attacks: tuple[str, ...] | None
    """None for the version's own list."""
    seed: int
    iterations: int
    square_queries: int
    batch_size: int
    engine: str
    """'fast' for our own APGD, 'package' for the package's."""


class Flags:
    """Collect what the packages would print or log; stands in for the logger of either."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, text: str) -> None:
        """Keep a flag once. All that pyautoattack logs at this level are flags."""
        # The adapter has already fitted the ensemble to the number of classes; the packages
        # would still say that targeted DLR is impossible although it is not going to run.
        if not text.startswith("with only ") and text not in self.messages:
            self.messages.append(text)

    def log(self, text: str) -> None:
        """Keep a flag among the lines of the authors' package."""
        if text.startswith("Warning: "):
            self.warning(text.removeprefix("Warning: "))

    def debug(self, text: str) -> None:
        """Drop progress; the host has its own."""

    info = debug


def run_autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    report: Callable[[str, int, int], None],
) -> tuple[Tensor, list[str]]:
    """Attack the images and return them (n, c, h, w) with the flags that the package raised.

    Args:
        model: Pixels of [0, 1] to logits (n, k).
        images: Float32 pixels of [0, 1], (n, c, h, w), n > 0.
        labels: True classes (n,).
        settings: What to run.
        report: Told a sub-attack's name, how many are done and how many there are, as each
            batch of it starts.

    Raises:
        RddBenchError: If the images are not what the packages can attack.
        NotApplicable: If no sub-attack fits the number of classes or the shape.
    """
    _check_images(images)
    name = package_name()
    package = importlib.import_module(name)
    checks = importlib.import_module(f"{name}.checks")
    flags = Flags()
    with undisturbed(model):
        images = images.detach().clone(memory_format=torch.contiguous_format)
        labels = labels.detach().clone().long()
        with torch.no_grad():
            classes = model(images[:1]).shape[1]

        adversary = _build(package, model, images.device, settings, flags)
        _fit_to_classes(adversary, classes, flags)
        if "square" in adversary.attacks_to_run and settings.norm == "l2":
            _check_square_fits(*images.shape[2:])
        if settings.engine == "fast":
            _replace_apgd(adversary, model, settings, checks, flags)
        _announce(adversary, report)

        for function in checks.funcs:
            checks.funcs[function] = 0
        evaluate = adversary.run_standard_evaluation
        size = "bs" if "bs" in inspect.signature(evaluate).parameters else "batch_size"
        result = evaluate(images, labels, **{size: settings.batch_size})
        count = len(adversary.attacks_to_run)
        report(adversary.attacks_to_run[-1], count, count)
    # pyautoattack returns the new predictions as well; the host makes its own.
    attacked: Tensor = result[0] if isinstance(result, tuple) else result
    return attacked.detach(), flags.messages


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.float32 or images.ndim != 4:
        raise RddBenchError(
            f"autoattack: images are {images.dtype} of shape {tuple(images.shape)}; "
            "expected float32 of shape (n, c, h, w)"
        )
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise RddBenchError(
            f"autoattack: images range from {low:g} to {high:g}; expected pixels in [0, 1], "
            "with the normalisation inside the model"
        )


def _build(
    package: Any, model: nn.Module, device: torch.device, settings: Settings, flags: Flags
) -> Any:
    """Return the package's AutoAttack, set up alike whichever package it is."""
    arguments: dict[str, Any] = {"norm": NORM_NAMES[settings.norm], "eps": settings.eps}
    accepted = inspect.signature(package.AutoAttack).parameters
    arguments["attacks_to_run" if "attacks_to_run" in accepted else "attacks"] = []
    if "verbose" in accepted:
        arguments["verbose"] = False
    # 'custom' keeps the constructor from setting the version, and from logging about it.
    adversary = package.AutoAttack(
        model, seed=settings.seed, device=device, version="custom", **arguments
    )
    adversary.logger = adversary.apgd.logger = adversary.apgd_targeted.logger = flags
    set_version = getattr(adversary, "set_version", None) or adversary._set_version
    set_version(settings.version)
    adversary.version = settings.version
    if settings.attacks is not None:
        adversary.attacks_to_run = list(settings.attacks)
    adversary.square.n_queries = settings.square_queries
    if settings.iterations != PUBLISHED_ITERATIONS:
        _set_iterations(adversary, settings.iterations)
    return adversary


def _set_iterations(adversary: Any, iterations: int) -> None:
    adversary.fab.n_iter = iterations
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        apgd.n_iter = iterations
        # The checkpoints of the step size, which the constructor derives from the iterations
        # (Croce and Hein 2020, section 3.1).
        apgd.n_iter_2 = max(int(0.22 * iterations), 1)
        apgd.n_iter_min = max(int(0.06 * iterations), 1)
        apgd.size_decr = max(int(0.03 * iterations), 1)


def _fit_to_classes(adversary: Any, classes: int, flags: Flags) -> None:
    """Leave out targets and attacks that need more classes than there are.

    The targeted DLR loss looks at four logits and the untargeted one at three, so with three
    classes the untargeted stands in for the targeted, and with two there is neither.
    """
    wanted: Sequence[str] = adversary.attacks_to_run
    possible = list(wanted)
    if classes == 3:
        possible = ["apgd-dlr" if name == "apgd-t" else name for name in possible]
    if classes < 3:
        possible = [name for name in possible if name not in ("apgd-t", "apgd-dlr")]
    if classes < 2 or not possible:
        raise NotApplicable(
            f"autoattack: none of {', '.join(wanted)} works with {classes} classes; "
            "choose others with the option 'attacks'"
        )
    adversary.attacks_to_run = list(dict.fromkeys(possible))
    for targeted in (adversary.apgd_targeted, adversary.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    if adversary.attacks_to_run != list(wanted):
        flags.messages.append(
            f"with {classes} classes {', '.join(adversary.attacks_to_run)} "
            f"ran instead of {', '.join(wanted)}"
        )


def square_tiles(height: int, width: int) -> bool:
    """Whether the packages' first L2 pattern of Square fits an image.

    They lay tiles of a fifth of the height from a margin on, one more than fits for some sizes.
    Tiles of one pixel may fall off the image; larger ones may not.
    """
    tile = height // 5
    margin = (height - 5 * tile) // 2
    return tile == 1 or (
        tile > 1 and all(margin + side // tile * tile <= side for side in (height, width))
    )


def _check_square_fits(height: int, width: int) -> None:
    """Refuse the shapes on which the packages' first L2 pattern of Square crashes."""
    if not square_tiles(height, width):
        raise NotApplicable(
            f"autoattack: Square cannot tile {height}x{width} images in L2; "
            "leave it out with the option 'attacks'"
        )


def _replace_apgd(
    adversary: Any, model: nn.Module, settings: Settings, checks: Any, flags: Flags
) -> None:
    """Let our own APGD do the work of the package's, except where that averages gradients."""

    def perturb(component: Any, images: Tensor, labels: Tensor) -> Tensor:
        return APGD(
            model=model,
            norm=settings.norm,
            eps=settings.eps,
            loss=component.loss,
            iterations=settings.iterations,
            restarts=component.n_restarts,
            targets=adversary.apgd_targeted.n_target_classes,
            seed=settings.seed,
            max_rows=settings.batch_size,
            # The package looks for gradients that are zero; their lengths serve as well.
            check=lambda lengths: checks.check_zero_gradients(lengths, logger=flags),
        ).perturb(images, labels)

    for component in (adversary.apgd, adversary.apgd_targeted):
        if component.eot_iter == 1:
            component.perturb = partial(perturb, component)


def _announce(adversary: Any, report: Callable[[str, int, int], None]) -> None:
    """Call ``report`` whenever a sub-attack begins on a batch."""
    names: list[str] = adversary.attacks_to_run

    def announced(component: Any, name_of: Callable[[Any], str]) -> None:
        perturb = component.perturb

        def perturb_and_tell(images: Tensor, labels: Tensor) -> Any:
            name = name_of(component)
            report(name, names.index(name), len(names))
            return perturb(images, labels)

        component.perturb = perturb_and_tell

    announced(adversary.apgd, lambda apgd: f"apgd-{apgd.loss}")
    announced(adversary.apgd_targeted, lambda _: "apgd-t")
    announced(adversary.fab, lambda fab: "fab-t" if fab.targeted else "fab")
    announced(adversary.square, lambda _: "square")
