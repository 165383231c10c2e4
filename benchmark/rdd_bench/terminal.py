"""What the commands share: kinds of arguments, the registry, tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from rdd_bench.registry import Registry

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # older versions of click do not let it be subscripted


class NameList(ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        names = [part.strip() for part in str(value).split(",")]
        if not all(names):
            self.fail(f"'{value}' has an empty name; separate names by single commas", param, ctx)
        return names


class NumberList(ParamType):
    """Whole numbers separated by commas; A-B counts through."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            try:
                low = int(first)
                numbers += range(low, (int(last) if dash else low) + 1)
            except ValueError:
                self.fail(f"'{part}' is no whole number; write 1,10 or 0-4", param, ctx)
        return numbers


class FractionList(ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"'{value}' is no list of numbers; write 0.49,0.48,0.45", param, ctx)


NAMES, NUMBERS, FRACTIONS = NameList(), NumberList(), FractionList()


def registry_for_users(*, quiet: bool = False) -> Registry:
    from rdd_bench.lazy import imported_on_use
    from rdd_bench.registry import load_plugins

    with imported_on_use("torch"):
        registry = load_plugins()
    if not quiet:
        for problem in registry.problems:
            click.echo(f"plugin not loaded: {problem}", err=True)
    return registry


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_table(title: str, header: list[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in header:
        table.add_column(column, overflow="fold", no_wrap=column == "NAME")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    target = console()
    if not target.is_terminal:
        # A pipe has no width: do not cut what somebody may search.
        target.width = 200
    target.print(table)
    target.print()
