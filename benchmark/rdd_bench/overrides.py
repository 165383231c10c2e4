"""Options from the command line: ``--config FILE`` and ``--set name.option=value``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdd_bench.errors import RddBenchError
from rdd_bench.protocol import Options, read_toml


def read_overrides(config: Path | None, assignments: Sequence[str]) -> Options:
    """Return options by component; an assignment wins over the file.

    Raises:
        RddBenchError: If the file is not TOML or has other tables than [options.NAME], or an
            assignment is not ``name.option=value``.
    """
    options: Options = {}
    if config is not None:
        values = read_toml(config)
        tables = values.pop("options", {})
        if values or not isinstance(tables, dict):
            wrong = next(iter(values), "options")
            raise RddBenchError(
                f"{config}: '{wrong}' is not expected here; "
                "write options as tables such as [options.dm]"
            )
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise RddBenchError(
                    f"{config}: options.{name} is not a table; write [options.{name}]"
                )
            options.setdefault(name, {}).update(table)
    for text in assignments:
        name, option, value = parse_assignment(text)
        options.setdefault(name, {})[option] = value
    return options


def parse_assignment(text: str) -> tuple[str, str, Any]:
    """Split ``name.option=value``; the value is JSON if it reads as JSON, else plain text.

    The name may contain dots (``timm:resnet10t.a1_in1k``): the option starts after the last one.
    """
    target, equals, value = text.partition("=")
    name, dot, option = target.rpartition(".")
    if not (equals and dot and name and option):
        raise RddBenchError(f"--set {text}: expected name.option=value, such as dm.iterations=500")
    try:
        return name, option, json.loads(value)
    except json.JSONDecodeError:
        return name, option, value
