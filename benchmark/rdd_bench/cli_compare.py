"""The command that compares two rows of the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.terminal import print_table

if TYPE_CHECKING:
    from rdd_bench.comparison import Difference
    from rdd_bench.standings import Table

HEADER = [
    "", "DIFFERENCE", "95 % (t)", "95 % (bootstrap)", "ONLY FIRST", "ONLY SECOND", "MEDIAN p",
    "p < 0.05",
]  # fmt: skip


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("first")
@click.argument("second")
@click.option("--protocol", metavar="NAME", help="Only the tables of this protocol.")
def compare(run: Path, first: str, second: str, protocol: str | None) -> None:
    r"""Compare two rows image by image, in every table that holds both.

    RUN is a run folder or published records; FIRST and SECOND are rows as the leaderboard calls
    them. Differences are FIRST minus SECOND in points. The images that only one of two networks
    has right are counted over all pairs of networks; McNemar's exact p is that of the median pair.

    \b
    rdd-bench compare leaderboard/results/digits-v1 mat mtt
    """
    from rdd_bench.board_text import heading, threat_text
    from rdd_bench.comparison import compare as compared
    from rdd_bench.results import join
    from rdd_bench.standings import make_tables
    from rdd_bench.store import read_records

    records, problems = read_records([run])
    for problem in problems:
        click.echo(f"ignored: {problem}", err=True)
    tables = make_tables(join(records))
    protocols = {table.protocol for table in tables}
    if protocol is not None and protocol not in protocols:
        raise UnknownNameError("protocol in these records", protocol, protocols)
    tables = [table for table in tables if protocol in (None, table.protocol)]
    for table in _tables_of_both(tables, first, second):
        rows = {row.label: row for row in table.all_rows()}
        if not table.ranked:
            click.echo(f"{table.protocol}, {heading(table)}: not compared, for lack of attacks\n")
        for threat in table.ranked:
            title = f"{table.protocol}, {heading(table)}, {threat_text(threat)}"
            found = compared(table, threat, rows[first], rows[second])
            if found is None:
                click.echo(f"{title}: not compared, because results or common seeds are missing\n")
                continue
            for label in (first, second):
                for reason in rows[label].quarantined():
                    click.echo(f"{title}: {label} is in quarantine: {reason}")
            title += f": {first} minus {second}, {len(found.seeds)} seeds"
            lines = [_line("clean", found.clean), _line("worst case", found.worst)]
            print_table(title, HEADER, lines)


def _tables_of_both(tables: list[Table], first: str, second: str) -> list[Table]:
    """Return the tables that hold both rows.

    Raises:
        RddBenchError: If there is none, or a row is in no table at all.
    """
    known = {row.label for table in tables for row in table.all_rows()}
    for label in (first, second):
        if label not in known:
            raise UnknownNameError("row of these tables", label, known)
    both = [t for t in tables if {first, second} <= {row.label for row in t.all_rows()}]
    if not both:
        raise RddBenchError(f"no table holds both '{first}' and '{second}'; nothing to compare")
    return both


def _line(name: str, found: Difference) -> list[str]:
    from rdd_bench.board_text import signed, signed_interval

    e, test = found.estimate, found.mcnemar
    return [
        name,
        signed(e.mean),
        signed_interval(e.low, e.high),
        signed_interval(*found.bootstrap),
        str(test.only_first),
        str(test.only_second),
        f"{test.median_p:.2g}",
        f"{test.significant} of {test.networks}",
    ]
