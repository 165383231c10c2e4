"""Carry out steps on this machine: in this process, or in several.

On a CPU several processes with one thread each are faster than one process with several threads,
because networks trained on distilled sets are small. A step's result does not depend on which
process ran it or beside what.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from typing import Protocol

from rdd_bench.plan import Step, parent
from rdd_bench.registry import Registry
from rdd_bench.steps import Place, Result, Worker, lost

REPORT_INTERVAL = 0.2
"""Seconds between two messages about the progress of one step."""


class Watcher(Protocol):
    """Who is told what happens; the progress display."""

    def reused(self, count: int) -> None: ...
    def started(self, step: Step) -> None: ...
    def progress_of(self, address: str, what: str, done: int, total: int) -> None: ...
    def finished(self, step: Step, status: str) -> None: ...


@dataclass
class Agenda:
    """Steps still to do, in order, each released when the step it builds on is done."""

    waiting: list[Step]
    done: set[str]
    dropped: list[Step] = field(default_factory=list)

    def next_ready(self) -> Step | None:
        """Take the first step whose parent is done."""
        for position, step in enumerate(self.waiting):
            before = parent(step)
            if before is None or before.address in self.done:
                return self.waiting.pop(position)
        return None

    def drop_dependants(self, failed: Step) -> None:
        """Give up the steps that need the result of a failed one."""
        lost = {failed.address}
        kept: list[Step] = []
        for step in self.waiting:
            before = parent(step)
            if before is not None and before.address in lost:
                lost.add(step.address)
                self.dropped.append(step)
            else:
                kept.append(step)
        self.waiting = kept


def run_steps(
    agenda: Agenda, place: Place, workers: int, watcher: Watcher, registry: Registry
) -> Iterator[tuple[Step, Result]]:
    """Carry out the agenda and yield every result as it comes.

    The caller must have stored a result when it asks for the next one: later steps read it.
    """
    if workers == 1:
        yield from _in_this_process(agenda, Worker(place, registry), watcher)
    else:
        yield from _in_processes(agenda, place, workers, watcher)


def _in_this_process(
    agenda: Agenda, worker: Worker, watcher: Watcher
) -> Iterator[tuple[Step, Result]]:
    while (step := agenda.next_ready()) is not None:
        watcher.started(step)
        throttled = _Throttle(step.address, watcher.progress_of)
        result = worker.carry_out(step, throttled)
        watcher.finished(step, result.record.status)
        yield step, result
        _settle(agenda, step, result)


def _settle(agenda: Agenda, step: Step, result: Result) -> None:
    if result.record.status == "done":
        agenda.done.add(step.address)
    else:
        agenda.drop_dependants(step)


class _Throttle:
    """Passes on reports at most a few times a second."""

    def __init__(self, address: str, send: Callable[[str, str, int, int], None]) -> None:
        self.address = address
        self.send = send
        self.last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self.last < REPORT_INTERVAL:
            return
        self.last = now
        self.send(self.address, what, done, total)


# Several processes ---------------------------------------------------------------------------

Message = tuple[str, str, int, int]

_worker: Worker | None = None
_messages: Queue[Message] | None = None


def _start_worker(place: Place, messages: Queue[Message]) -> None:
    """Prepare a fresh process: its own plugins, its own threads."""
    global _worker, _messages
    # Ctrl-C goes to every process of the terminal; the driver decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _messages = messages
    _worker = Worker(place)


def _carry_out(step: Step) -> Result:
    assert _worker is not None
    assert _messages is not None
    messages = _messages
    throttled = _Throttle(step.address, lambda *message: messages.put(message))
    return _worker.carry_out(step, throttled)


def _in_processes(
    agenda: Agenda, place: Place, workers: int, watcher: Watcher
) -> Iterator[tuple[Step, Result]]:
    # A forked process would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    messages: Queue[Message] = context.Queue()
    others = set(multiprocessing.active_children())

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers, mp_context=context, initializer=_start_worker, initargs=(place, messages)
        )

    pool, broken = new_pool(), False
    running: dict[Future[Result], Step] = {}
    try:
        while True:
            if broken and not running:
                pool.shutdown(wait=False)
                pool, broken = new_pool(), False
            while (
                not broken and len(running) < workers and (step := agenda.next_ready()) is not None
            ):
                running[pool.submit(_carry_out, step)] = step
                watcher.started(step)
            if not running:
                break
            ended, _ = wait(running, timeout=REPORT_INTERVAL, return_when=FIRST_COMPLETED)
            _pass_on(messages, watcher)
            for future in ended:
                step = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    # A process that dies takes the pool and the steps beside it with it.
                    result, broken = lost(step, place), True
                watcher.finished(step, result.record.status)
                yield step, result
                _settle(agenda, step, result)
    except BaseException:
        # Do not wait for steps that may take minutes: what they made would not be stored.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _pass_on(messages: Queue[Message], watcher: Watcher) -> None:
    while True:
        try:
            message = messages.get_nowait()
        except queue.Empty:
            return
        watcher.progress_of(*message)
