"""The command line. Each command imports what it needs, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdd_bench import __version__
from rdd_bench.cli_compare import compare as compare_command
from rdd_bench.cli_judge import COMMANDS
from rdd_bench.cli_quarantine import quarantine
from rdd_bench.errors import RddBenchError, UnknownNameError
from rdd_bench.terminal import NAMES, NUMBERS, print_table, registry_for_users

if TYPE_CHECKING:
    from rdd_bench.registry import Offer

KIND_NAMES = ("distillers", "architectures", "attacks", "datasets", "protocols")
USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: rdd-bench run --dry-run, then rdd-bench run. "
    "Documentation: README.md and docs/.",
)
@click.version_option(__version__, prog_name="rdd-bench")
@click.pass_context
def cli(context: click.Context) -> None:
    """Distil, train, attack and rank: a benchmark of robust dataset distillation.

    Methods, networks, attacks and data sets are plugins; 'rdd-bench list' shows them.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.option(
    "--protocol",
    default="digits-v1",
    show_default=True,
    metavar="NAME|FILE.toml",
    help="The rules of the table; 'rdd-bench list protocols' shows them.",
)
@click.option("--distillers", type=NAMES, help="Methods to run, such as dm,random.")
@click.option(
    "--architectures",
    type=NAMES,
    help="Networks to train, such as convnet,timm:vit_tiny_patch16_224.",
)
@click.option("--attacks", type=NAMES, help="Attacks to run, such as pgd,autoattack.")
@click.option("--datasets", type=NAMES, help="Data sets, such as digits, cifar10 or folder:PATH.")
@click.option("--ipc", type=NUMBERS, help="Images per class, such as 1,10.")
@click.option("--seeds", type=NUMBERS, help="Training seeds, such as 0-4.")
@click.option(
    "--distill-seeds",
    type=NUMBERS,
    help="Distillation seeds, such as 0-2: several draws of every method.",
)
@click.option(
    "--tracks",
    type=NAMES,
    help="natural (one recipe for all sets), author (each set's own), adversarial (one recipe "
    "with adversarial training).",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME.OPTION=VALUE",
    help="Change one option of a component; may be repeated. dm@10.lr=1 holds at IPC 10 only.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TOML with options: tables [options.NAME].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run folder; finished steps in it are kept.  [default: runs/PROTOCOL]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes.  [default: one a core on a CPU, one on a GPU]",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    envvar="RDD_BENCH_DATA",
    show_envvar=True,
    help="Folder with data sets in torchvision's layout.",
)
@click.option("--download", is_flag=True, help="Fetch data sets that are missing in --data-root.")
@click.option("--fresh", is_flag=True, help="Compute everything again, also what is finished.")
@click.option("--dry-run", is_flag=True, help="Show what would be computed, and stop.")
def run(**given: Any) -> None:  # fmt: skip
    r"""Distil, train and attack, then print and write the leaderboard.

    Without options this runs the protocol 'digits-v1' on real images that need no download, in a
    few minutes on two CPU cores. The same command again resumes; with one more distiller only
    that one is computed.

    \b
    rdd-bench run
    rdd-bench run --distillers dm,random --attacks pgd,autoattack --ipc 10
    rdd-bench run --set dm.iterations=500 --architectures convnet
    """
    from rdd_bench.components import Source
    from rdd_bench.overrides import read_overrides
    from rdd_bench.plan import Selection, make_plan
    from rdd_bench.protocol import load_protocol
    from rdd_bench.runner import Settings, default_out
    from rdd_bench.session import run_and_report

    registry = registry_for_users()
    protocol = load_protocol(given["protocol"])
    selected = (
        "distillers",
        "architectures",
        "attacks",
        "datasets",
        "ipc",
        "seeds",
        "distill_seeds",
        "tracks",
    )
    selection = Selection(
        **{name: given[name] for name in selected},
        options=read_overrides(given["config"], given["assignments"]),
    )
    plan = make_plan(protocol, selection, registry)
    if given["dry_run"]:
        _show_plan(plan, given["out"])
        return
    settings = Settings(
        out=given["out"] or default_out(protocol.name),
        device=given["device"],
        workers=given["workers"],
        source=Source(given["data_root"], given["download"]),
        fresh=given["fresh"],
    )
    if status := run_and_report(plan, settings, registry):
        sys.exit(status)


@cli.command("list")
@click.argument("kinds", nargs=-1, type=click.Choice(KIND_NAMES))
def list_(kinds: tuple[str, ...]) -> None:
    """Show what can be run: distillers, architectures, attacks, data sets and protocols."""
    from rdd_bench.protocol import load_protocol, names

    registry = registry_for_users()
    for kind in kinds or KIND_NAMES:
        if kind == "protocols":
            rows = [(name, "", "", load_protocol(name).summary) for name in names()]
        else:
            rows = [_listing(offer) for offer in registry.of_kind(kind.removesuffix("s"))]
        print_table(kind, ["NAME", "PLUGIN", "PAPER", "DOES"], rows)


def _listing(offer: Offer) -> tuple[str, str, str, str]:
    name = f"{offer.name}:{offer.cls.argument.upper()}" if offer.cls.argument else offer.name
    paper = (offer.cls.info.paper or "").removeprefix("https://")
    return name, f"{offer.distribution} {offer.version}", paper, offer.cls.summary()


@cli.command()
@click.argument("name")
def show(name: str) -> None:
    """Explain one component or protocol: what it is, where it is from, its options."""
    from rdd_bench.components import KINDS
    from rdd_bench.protocol import load_protocol, names

    registry = registry_for_users()
    if name in names() or name.endswith(".toml"):
        _show_protocol(load_protocol(name))
        return
    found = 0
    for kind in KINDS:
        known = {o.name for o in registry.of_kind(kind)}
        if name.partition(":")[0].split("/")[-1] in known:
            _show_offer(registry.find(kind, name))
            found += 1
    if not found:
        everything = {offer.name for offer in registry.offers} | set(names())
        raise UnknownNameError("component or protocol", name, everything)


@cli.command()
def plugins() -> None:
    """Show which plugins loaded, and for each that did not, why."""
    registry = registry_for_users(quiet=True)
    by_plugin: dict[tuple[str, str, str], list[str]] = {}
    for offer in registry.offers:
        key = (offer.distribution, offer.version, offer.entry_point)
        by_plugin.setdefault(key, []).append(f"{offer.kind} {offer.name}")
    rows = [(f"{d} {v}", e, ", ".join(sorted(o))) for (d, v, e), o in sorted(by_plugin.items())]
    print_table("loaded", ["DISTRIBUTION", "ENTRY POINT", "OFFERS"], rows)
    problems = [(problem.plugin, problem.reason) for problem in registry.problems]
    print_table("not loaded", ["PLUGIN", "WHY"], problems)


@cli.command()
@click.argument("distribution")
def check(distribution: str) -> None:
    """Test everything an installed distribution offers against the plugin contract."""
    from unittest import SkipTest

    from packaging.utils import canonicalize_name

    from rdd_bench.testing import checks_of

    distribution = canonicalize_name(distribution)
    passed = skipped = failed = 0
    for item in checks_of(distribution):
        try:
            item.run()
        except SkipTest as reason:
            skipped += 1
            click.echo(f"skipped {item}: {reason}")
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything
            failed += 1
            click.echo(f"FAILED  {item}: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            passed += 1
            click.echo(f"ok      {item}")
    skips = f", {skipped} skipped" if skipped else ""
    click.echo(f"{distribution}: {passed} checks passed{skips}, {failed} failed")
    if failed:
        sys.exit(FAILED)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the Markdown there instead of printing it, and its charts beside it.",
)
@click.option(
    "--check",
    "compare",
    is_flag=True,
    help="Compare with the --output file instead of writing it; exit 1 if it differs.",
)
@click.option(
    "--publish",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the records there, one .jsonl a distiller.",
)
@click.option(
    "--compatibility",
    type=NAMES,
    help="Also show the scores of other benchmarks: beard, dd-ranking. They rank nothing.",
)
def leaderboard(
    runs: Sequence[Path],
    output: Path | None,
    compare: bool,
    publish: Path | None,
    compatibility: Sequence[str] | None,
) -> None:
    r"""Render run folders or published .jsonl records as one Markdown leaderboard.

    \b
    rdd-bench leaderboard runs/digits-v1
    rdd-bench leaderboard leaderboard/results --output leaderboard/README.md --check
    """
    from rdd_bench.leaderboard import publish as published
    from rdd_bench.leaderboard import render, render_files
    from rdd_bench.store import Store, read_records

    records, problems = read_records(runs)
    for problem in problems:
        click.echo(f"ignored: {problem}", err=True)
    if output is None:
        if compare:
            raise RddBenchError("--check needs --output FILE, the file to compare with")
        click.echo(render(records, compatibility or ()))
    else:
        files = render_files(records, output.name, compatibility or ())
        for name, text in files.items():
            path = output.parent / name
            if not compare:
                Store(output.parent).write_file(Path(name), text.encode())
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                click.echo(f"{path} is not what its records say; render it again without --check")
                sys.exit(FAILED)
        click.echo(f"{output} is what its records say" if compare else f"wrote {output}")
    if publish is not None:
        lines_of = published(records)
        for name, lines in lines_of.items():
            Store(publish).write_file(Path(name), lines.encode())
        click.echo(f"wrote {len(lines_of)} files of records to {publish}")


for command in (*COMMANDS, compare_command, quarantine):
    cli.add_command(command)


def main() -> None:
    """Entry point: the user's mistakes are one line and exit 2, ours keep their traceback."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "rdd-bench"
        sentence = error.format_message().rstrip(".")
        click.echo(f"rdd-bench: {sentence} (see '{command} --help')", err=True)
        sys.exit(USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "\nInterrupted. Finished steps are kept; run the same command again to go on.", err=True
        )
        sys.exit(INTERRUPTED)
    except RddBenchError as error:
        click.echo(f"rdd-bench: {error}", err=True)
        sys.exit(USER_ERROR)


# Showing ----------------------------------------------------------------------------------------


def _show_offer(offer: Offer) -> None:
    import inspect

    info = offer.cls.info
    click.echo(f"{offer.kind} {offer.name}: {info.title}")
    click.echo(f"from {offer.distribution} {offer.version}, licence {info.licence}, {info.origin}")
    if info.paper:
        click.echo(f"paper {info.paper}")
    click.echo(f"\n{inspect.cleandoc(offer.cls.__doc__ or '')}\n")
    fields = offer.cls.config_class.model_fields
    rows = [
        (option, _type_name(field.annotation), str(field.default), field.description or "")
        for option, field in fields.items()
    ]
    print_table("options", ["NAME", "TYPE", "DEFAULT", "MEANING"], rows)
    if rows:
        click.echo(f"Change one with --set {offer.name}.{rows[0][0]}=VALUE\n")


def _type_name(annotation: Any) -> str:
    from typing import Literal, get_args, get_origin

    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _show_protocol(protocol: Any) -> None:
    import json

    click.echo(f"protocol {protocol.name}: {protocol.summary}\n")
    for name, value in protocol.model_dump(mode="json", exclude={"name", "summary"}).items():
        click.echo(f"{name}: {json.dumps(value)}")


def _show_plan(plan: Any, out: Path | None) -> None:
    from rdd_bench.plan import AttackStep, DistillStep, TrainStep
    from rdd_bench.runner import default_out, is_finished
    from rdd_bench.store import Store

    for step in plan.steps:
        indent = {DistillStep: "", TrainStep: "  ", AttackStep: "    "}[type(step)]
        click.echo(f"{indent}{step}")
    store = Store(out or default_out(plan.protocol.name))
    finished = sum(is_finished(store, step) for step in plan.steps)
    counts = [len(plan.of(kind)) for kind in (DistillStep, TrainStep, AttackStep)]
    click.echo(
        f"{counts[0]} distillations, {counts[1]} trainings, {counts[2]} attacks; "
        f"{finished} of these are finished in {store.root}. Nothing was run."
    )


if __name__ == "__main__":
    main()
