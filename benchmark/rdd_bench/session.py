"""Run a plan for somebody who watches, and say how it went."""

from __future__ import annotations

from pathlib import Path

import click

from rdd_bench.display import Display
from rdd_bench.leaderboard import render_files, summary_rows
from rdd_bench.plan import Plan
from rdd_bench.registry import Registry
from rdd_bench.results import join
from rdd_bench.runner import Settings, Summary, run_plan
from rdd_bench.standings import make_tables
from rdd_bench.store import Store
from rdd_bench.terminal import console, print_table


def run_and_report(plan: Plan, settings: Settings, registry: Registry) -> int:
    """Carry out a plan with progress, write and print the table; return the exit status."""
    with Display(console(stderr=True), len(plan.steps)) as display:
        summary = run_plan(plan, settings, registry, display)
    out = settings.out
    for path, text in render_files(summary.records, "leaderboard.md").items():
        Store(out).write_file(Path(path), text.encode())
    _show_tables(summary)
    for status, records in (("failed", summary.failed), ("skipped", summary.skipped)):
        # Steps that fail for one reason, such as missing data, say it once.
        for error in dict.fromkeys(record.error for record in records):
            click.echo(f"{status}: {error}", err=True)
    done = f"{summary.computed} steps computed, {summary.reused} already there"
    if summary.failed:
        done += f", {len(summary.failed)} failed, {summary.dropped} not tried because of that"
        done += f"; tracebacks are in {out / 'errors'}"
    click.echo(f"{done}.\nResults: {out}, table: {out / 'leaderboard.md'}")
    return 1 if summary.failed else 0


def _show_tables(summary: Summary) -> None:
    """Print the ranked rows of every table."""
    for table in make_tables(join(summary.records)):
        for title, rows in summary_rows(table):
            print_table(title, list(rows[0]), [list(row.values()) for row in rows])
