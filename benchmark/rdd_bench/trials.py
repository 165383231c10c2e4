"""What a distilled set teaches as it is stored, and what is left of it in pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdd_bench.checks import check_distilled_set
from rdd_bench.components import Architecture, Dataset, Distiller, DistillTask, Run, Source
from rdd_bench.data import load_splits
from rdd_bench.foreign import read_set
from rdd_bench.lint import Fact
from rdd_bench.pictures import in_eight_bits
from rdd_bench.plan import Choice, Selection, TrainStep, make_plan
from rdd_bench.protocol import Protocol
from rdd_bench.registry import Registry
from rdd_bench.robustness import clean_outcomes
from rdd_bench.training import fit
from rdd_bench.types import DistilledSet, LabelledImages, Splits

Report = Callable[[str, int, int], None]

NOTABLE = 0.01
"""Difference of accuracies that is remarked on."""


def accuracies(
    path: Path,
    importer: str,
    protocol: Protocol,
    registry: Registry,
    source: Source,
    *,
    datasets: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: torch.device,
    report: Report,
) -> list[Fact]:
    """Return the test accuracies of networks trained on a set as it is, clipped, and in 8 bits.

    The protocol's first architecture learns by the recipe of its natural track. Equal seeds have
    the same initial weights and the same order of batches, so differences are paired.

    Args:
        path: File or folder with the set.
        importer: Name of the distiller that reads files; it undoes what was done to pixels.
        protocol: Whose rules train and test.
        registry: Where components come from.
        source: Where the data set may come from.
        datasets: Its name, alone; None for the protocol's first.
        seeds: Training seeds; None for the protocol's.
        device: Where to train.
        report: Told of the progress.

    Raises:
        RddBenchError: If the set is not one for this data set, or training diverges.
    """
    labels = read_set(path).labels
    classes = labels.shape[1] if labels.ndim == 2 else len(set(labels.tolist()))
    selection = Selection(
        distillers=[f"{importer}:{path}"],
        ipc=[max(len(labels) // classes, 1)],
        attacks=[],
        datasets=datasets,
        seeds=seeds,
        tracks=["natural"],
    )
    steps = make_plan(protocol, selection, registry).steps
    step = next(s for s in steps if isinstance(s, TrainStep) and s.distill.role != "reference")
    dataset = _built(registry, step.distill.dataset)
    architecture = _built(registry, step.architecture)
    assert isinstance(dataset, Dataset)
    assert isinstance(architecture, Architecture)
    who = registry.find("dataset", step.distill.dataset.offer_name).who
    splits = load_splits(dataset, who, source, step.distill.subset)
    made = _import(step, architecture, splits, registry, device, report)
    images = made.images
    trials = {
        "as stored": images,
        "clipped to [0, 1]": images.clamp(0, 1),
        "as 8-bit pictures": in_eight_bits(images),
    }
    found = {
        name: _right(
            dataclasses.replace(made, images=changed, labels=made.hard_labels),
            step,
            architecture,
            splits,
            device,
            partial(_tell, report, name),
        )
        for name, changed in trials.items()
    }
    stored = found.pop("as stored")
    where = f"{step.architecture.component.label}, {step.distill.dataset.component.label}"
    facts = [("accuracy as stored", f"{_in_percent(stored)} % ({where})", "")]
    for name, mine in found.items():
        change = mine - stored
        notable = abs(change.mean().item()) > NOTABLE
        remark = "what holds of the set does not hold of its pictures" if notable else ""
        told = f"{_in_percent(mine)} %, changed by {_in_percent(change, sign='+')}"
        facts.append((f"accuracy {name}", told, remark))
    return facts


def _built(registry: Registry, choice: Choice) -> Any:
    return registry.build(choice.kind, choice.offer_name, choice.component.options)


def _tell(report: Report, name: str, what: str, done: int, total: int) -> None:
    report(f"{what}, {name}", done, total)


def _import(
    step: TrainStep,
    architecture: Architecture[Any],
    splits: Splits,
    registry: Registry,
    device: torch.device,
    report: Report,
) -> DistilledSet:
    """Return the set with the pixels of its data set."""
    distiller = _built(registry, step.distill.distiller)
    assert isinstance(distiller, Distiller)
    task = DistillTask(splits.spec, splits.train, step.distill.ipc, architecture, step.distill.seed)
    with tempfile.TemporaryDirectory(prefix="rdd-bench-") as scratch:
        run = Run(device, Path(scratch), lambda _: contextlib.nullcontext(), report)
        made = distiller.distill(task, run)
    who = registry.find("distiller", step.distill.distiller.offer_name).who
    return check_distilled_set(made, splits.spec, None, who)


def _right(
    distilled: DistilledSet,
    step: TrainStep,
    architecture: Architecture[Any],
    splits: Splits,
    device: torch.device,
    report: Report,
) -> Tensor:
    """Return the test accuracy of each seed, (s,)."""
    assert step.recipe is not None  # the natural track has one
    trained = fit(
        distilled, step.recipe, architecture, splits.spec, step.seeds, device=device, report=report
    )
    test = LabelledImages(splits.test.images.to(device), splits.test.labels.to(device))
    right = [clean_outcomes(model, test, step.batch_size) for model in trained.models]
    return torch.stack(right).float().mean(dim=1).cpu()


def _in_percent(values: Tensor, sign: str = "") -> str:
    """Return the mean over seeds, with the standard deviation if there are several."""
    spread = f" ± {100 * values.std():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():{sign}.1f}{spread}"
