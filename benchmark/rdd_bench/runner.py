"""Run a plan: skip what is finished, carry out the rest, store every result as it comes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdd_bench.components import Source
from rdd_bench.errors import RddBenchError
from rdd_bench.plan import DistillStep, Plan, Selection, Step, TrainStep, make_plan
from rdd_bench.protocol import DEFAULT, load_protocol
from rdd_bench.records import AnyRecord, StepRecord
from rdd_bench.registry import Registry, load_plugins
from rdd_bench.store import Store, networks_path, set_path

if TYPE_CHECKING:
    import pandas as pd

    from rdd_bench.executors import Watcher


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how to run; nothing here changes a number."""

    out: Path
    device: str = "auto"
    workers: int | None = None
    """Processes; None: one a core on a CPU, one on a GPU."""
    source: Source = field(default_factory=lambda: Source(None))
    fresh: bool = False
    """Compute everything again, also what is finished."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened in a run."""

    records: list[AnyRecord]
    """Of every step of the plan that has one, and the environments they name."""
    computed: int
    reused: int
    failed: list[StepRecord]
    skipped: list[StepRecord]
    dropped: int
    """Steps not tried, because what they build on failed."""


class Silent:
    """A watcher that shows nothing."""

    def reused(self, count: int) -> None: ...

    def started(self, step: Step) -> None: ...

    def progress_of(self, address: str, what: str, done: int, total: int) -> None: ...

    def finished(self, step: Step, status: str) -> None: ...


def run(
    *,
    protocol: str = DEFAULT,
    distillers: Sequence[str] | None = None,
    architectures: Sequence[str] | None = None,
    attacks: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
    ipc: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    distill_seeds: Sequence[int] | None = None,
    tracks: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int = 1,
    data_root: str | Path | None = None,
    download: bool = False,
) -> pd.DataFrame:
    """Distil, train, attack; return the results as ``load_results`` does.

    The arguments are those of ``rdd-bench run``; what is not given is what the protocol says.
    Running it again with the same arguments resumes. More ``workers`` give the same numbers
    sooner; call it under ``if __name__ == "__main__":`` then, as everything that starts processes.

    Raises:
        RddBenchError: For a wrong name or option, before anything is computed, and at the end
            if steps failed; finished results are in the run folder in any case.
    """
    from rdd_bench.results import results_frame

    registry = load_plugins()
    rules = load_protocol(protocol)
    selection = Selection(
        distillers=_names(distillers),
        architectures=_names(architectures),
        attacks=_names(attacks),
        datasets=_names(datasets),
        ipc=ipc,
        seeds=seeds,
        distill_seeds=distill_seeds,
        tracks=_names(tracks),
        options={label: dict(values) for label, values in (options or {}).items()},
    )
    plan = make_plan(rules, selection, registry)
    settings = Settings(
        out=Path(out) if out is not None else default_out(rules.name),
        device=device,
        workers=workers,
        source=Source(Path(data_root) if data_root else None, download),
    )
    summary = run_plan(plan, settings, registry, Silent())
    if summary.failed:
        first = summary.failed[0]
        raise RddBenchError(
            f"{len(summary.failed)} steps failed, the first with: {first.error}; "
            f"the others are in {settings.out}"
        )
    return results_frame(summary.records)


def _names(given: Sequence[str] | None) -> Sequence[str] | None:
    """Take 'dm,random' as the command line does; a text is a sequence of letters otherwise."""
    return given.split(",") if isinstance(given, str) else given


def default_out(protocol: str) -> Path:
    """Return the run folder of a protocol where none is named."""
    return Path("runs") / protocol


def run_plan(plan: Plan, settings: Settings, registry: Registry, watcher: Watcher) -> Summary:
    """Carry out what is not finished yet; see ``Summary``.

    Raises:
        RddBenchError: If the folder cannot be written, the device is not there, or a worker dies.
    """
    store = Store(settings.out)
    store.create()
    finished = set() if settings.fresh else {s.address for s in plan.steps if is_finished(store, s)}
    open_steps = [step for step in plan.steps if step.address not in finished]
    watcher.reused(len(finished))
    dropped, unstored = 0, list[StepRecord]()
    if open_steps:
        dropped, unstored = _carry_out(
            plan, open_steps, finished, settings, registry, watcher, store
        )
    return _summarise(plan, store, finished, dropped, unstored)


def _carry_out(
    plan: Plan,
    open_steps: list[Step],
    finished: set[str],
    settings: Settings,
    registry: Registry,
    watcher: Watcher,
    store: Store,
) -> tuple[int, list[StepRecord]]:
    """Return how many steps were dropped, and failures that a finished result kept out."""
    # Only now: a run with nothing to do answers without torch.
    from rdd_bench.executors import Agenda, run_steps
    from rdd_bench.steps import Place, environment_record

    device = resolve_device(settings.device)
    workers = settings.workers or _default_workers(device, len(open_steps))
    place = Place(
        out=settings.out,
        device=device,
        # More threads would change the order of sums, and with it the numbers.
        threads=1,
        source=settings.source,
        protocol_name=plan.protocol.name,
        protocol_sha256=plan.protocol.sha256,
        protocol_test_sha256=tuple(sorted(plan.protocol.test_sha256.items())),
    )
    import torch

    store.write_record(environment_record(torch.device(device), place.threads))
    agenda = Agenda(open_steps, set(finished))
    unstored: list[StepRecord] = []
    for _, result in run_steps(agenda, place, workers, watcher, registry):
        for path, data in result.files.items():
            store.write_file(path, data)
        # With --fresh a step may fail that was finished before: what is finished is not lost.
        if result.record.status != "done" and store.is_done(result.record.address):
            unstored.append(result.record)
        else:
            store.write_record(result.record)
    return len(agenda.dropped), unstored


def is_finished(store: Store, step: Step) -> bool:
    """Whether a step is recorded as done in a run folder, and what it made is there."""
    if isinstance(step, DistillStep):
        return store.is_done(step.address, [set_path(step.address)])
    if isinstance(step, TrainStep):
        return store.is_done(step.address, [networks_path(step.address)])
    return store.is_done(step.address)


def _summarise(
    plan: Plan, store: Store, finished: set[str], dropped: int, unstored: list[StepRecord]
) -> Summary:
    records: dict[str, AnyRecord] = {}
    failed = [record for record in unstored if record.status == "failed"]
    skipped = [record for record in unstored if record.status == "skipped"]
    for step in plan.steps:
        record = store.record(step.address)
        if not isinstance(record, StepRecord):
            continue
        records[record.address] = record
        environment = store.record(record.environment)
        if environment is not None:
            records[environment.address] = environment
        if record.status == "failed":
            failed.append(record)
        elif record.status == "skipped":
            skipped.append(record)
    steps = [r for r in records.values() if isinstance(r, StepRecord)]
    return Summary(
        records=[*records.values(), *store.quarantines()],
        computed=sum(1 for r in steps if r.address not in finished and r.status == "done"),
        reused=len(finished),
        failed=failed,
        skipped=skipped,
        dropped=dropped,
    )


def resolve_device(text: str) -> str:
    """Return the device of a --device value: 'auto', 'cpu', 'cuda' or 'cuda:1'.

    Raises:
        RddBenchError: If torch does not know it or cannot see it.
    """
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise RddBenchError(f"--device {text}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise RddBenchError(f"--device {text}: rdd-bench runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RddBenchError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return str(device)


def _default_workers(device: str, steps: int) -> int:
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, steps))
