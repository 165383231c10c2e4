"""rdd-bench: distil, train, attack and rank, for robust dataset distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdd_bench.runner import run as run
    from rdd_bench.store import load_results as load_results

__version__ = "0.1.0"
__all__ = ["__version__", "load_results", "run"]

# The command line answers --help without importing torch, so these come on first use.
_HOME = {"run": "rdd_bench.runner", "load_results": "rdd_bench.store"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rdd_bench' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
