"""Progress on a terminal, and plain lines where there is none."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from rdd_bench.plan import Step


class Display:
    """A bar for the whole run and, under it, one for each step that is running."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.count = 0
        self.began: dict[str, float] = {}
        self.bars: dict[str, TaskID] = {}
        self.names: dict[str, str] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.whole = self.progress.add_task("steps", total=total)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def reused(self, count: int) -> None:
        self.count = count
        self.progress.update(self.whole, completed=count)

    def started(self, step: Step) -> None:
        self.began[step.address] = time.monotonic()
        self.names[step.address] = str(step)
        self.bars[step.address] = self.progress.add_task(f"  {step}", total=None)

    def progress_of(self, address: str, what: str, done: int, total: int) -> None:
        # A last message of a step may arrive after its result.
        if address in self.bars:
            bar = self.bars[address]
            described = f"  {self.names[address]}: {what}"
            self.progress.update(bar, completed=done, total=total, description=described)

    def report(self, what: str, done: int, total: int) -> None:
        """Show the progress of one piece of work in place of steps."""
        self.progress.update(self.whole, description=what, completed=done, total=total)

    def finished(self, step: Step, status: str) -> None:
        self.count += 1
        seconds = time.monotonic() - self.began.pop(step.address)
        self.progress.remove_task(self.bars.pop(step.address))
        self.progress.update(self.whole, completed=self.count)
        outcome = "" if status == "done" else f"{status} after "
        if not self.console.is_terminal:
            self.console.print(
                f"[{self.count}/{self.total}] {step}, {outcome}{seconds:.1f} s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
