"""The four hooks. All register classes, take no arguments and are called once at start-up.

A plugin is a module with one of these functions, named in an entry point of group ``rdd_bench``::

    [project.entry-points.rdd_bench]
    mine = "my_package"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from rdd_bench.components import Architecture, Attack, Dataset, Distiller

PROJECT = "rdd_bench"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def rdd_bench_distillers() -> Iterable[type[Distiller[Any]]]:
    """Return the distillers this plugin offers."""
    return ()


@hookspec
def rdd_bench_architectures() -> Iterable[type[Architecture[Any]]]:
    """Return the architectures this plugin offers."""
    return ()


@hookspec
def rdd_bench_attacks() -> Iterable[type[Attack[Any]]]:
    """Return the attacks this plugin offers."""
    return ()


@hookspec
def rdd_bench_datasets() -> Iterable[type[Dataset[Any]]]:
    """Return the data sets this plugin offers."""
    return ()


HOOK_OF_KIND = {
    "distiller": "rdd_bench_distillers",
    "architecture": "rdd_bench_architectures",
    "attack": "rdd_bench_attacks",
    "dataset": "rdd_bench_datasets",
}
