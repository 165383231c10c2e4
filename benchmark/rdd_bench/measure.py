"""Time, memory and passes, measured by the host around the calls it makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

TOTAL = "total"
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Meter:
    """Seconds by phase and the peak of memory, on one device.

    ``seconds["total"]`` is wall-clock time with the device synchronised at both ends; the phases
    of a plugin only divide it, and one inside another is booked under its own name alone. Peak
    memory is what torch allocated on a GPU, and the resident set of the process on a CPU (where
    Linux tells it; None elsewhere).
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    _nested: list[float] = field(default_factory=list)
    """For each phase that is running, the seconds of those inside it."""

    @contextmanager
    def total(self) -> Iterator[None]:
        """Measure everything inside as the whole call."""
        self._reset_peak()
        with self.phase(TOTAL):
            yield
        self.peak_bytes = self._read_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase of this name."""
        self._synchronise()
        start = time.perf_counter()
        self._nested.append(0.0)
        try:
            yield
        finally:
            self._synchronise()
            elapsed = time.perf_counter() - start
            inside = self._nested.pop()
            if self._nested:
                self._nested[-1] += elapsed
            own = elapsed if name == TOTAL else elapsed - inside
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            # Writing 5 resets the high-water mark of the resident set (proc(5)).
            _CLEAR_REFS.write_text("5")
        except OSError:
            return

    def _read_peak(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return None
        kilobytes = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kilobytes[0]) * 1024 if kilobytes else None


@dataclass
class PassCounter:
    """How many images went forward and backward through a network."""

    forward: int = 0
    backward: int = 0

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Count the passes through ``model`` made inside, by whoever makes them."""
        handle = model.register_forward_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        size = len(output)
        self.forward += size
        if output.requires_grad:
            # A hook on the output fires once for every gradient that flows back from it.
            output.register_hook(lambda _: self._count_backward(size))  # type: ignore[no-untyped-call]

    def attach(self, network: nn.Module) -> None:
        """Count every pass through a network, also through parts of it such as ``embed``.

        Passes are counted at the first layer that has weights of its own, which each of them
        goes through once.
        """
        for layer in network.modules():
            leaf = next(layer.children(), None) is None
            if leaf and next(layer.parameters(recurse=False), None) is not None:
                layer.register_forward_hook(self._count)
                return

    def _count_backward(self, size: int) -> None:
        self.backward += size
