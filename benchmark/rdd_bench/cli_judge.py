"""Commands about what is there already: files made elsewhere, networks, cells of a run."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rdd_bench.errors import RddBenchError
from rdd_bench.terminal import FRACTIONS, NAMES, NUMBERS, console, print_table, registry_for_users

if TYPE_CHECKING:
    from rdd_bench.foreign import ForeignSet
    from rdd_bench.registry import Registry
    from rdd_bench.types import DatasetSpec

DIFFERENT = FAILED = 1

FILE = click.Path(path_type=Path, exists=True)
PROTOCOL = click.option(
    "--protocol", default="digits-v1", show_default=True, metavar="NAME|FILE.toml",
    help="The rules of the table.",
)  # fmt: skip
DATA_ROOT = click.option(
    "--data-root", type=click.Path(path_type=Path), metavar="DIR", envvar="RDD_BENCH_DATA",
    show_envvar=True, help="Folder with data sets in torchvision's layout.",
)  # fmt: skip
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)


@click.command()
@click.argument("path", metavar="FILE", type=FILE)
@PROTOCOL
@click.option("--beside", type=NAMES, help="Rows to compare it with.  [default: the control]")
@click.option("--no-references", is_flag=True, help="Leave the protocol's references out.")
@click.option("--datasets", type=NAMES, help="Data set it was distilled from.")
@click.option("--architectures", type=NAMES, help="Networks to train on it.")
@click.option("--attacks", type=NAMES, help="Attacks to run.")
@click.option("--tracks", type=NAMES, help="natural, author, adversarial.")
@click.option("--seeds", type=NUMBERS, help="Training seeds, such as 0-4.")
@click.option("--factor", type=int, help="Small images along each side of a stored one: 2 for IDM.")
@click.option(
    "--space",
    type=click.Choice(["auto", "pixels", "normalised", "whitened"]),
    help="What the stored numbers are.  [default: auto]",
)
@click.option("--repetition", type=int, help="Which one of a file with several.")
@click.option("--lr", type=float, help="Learning rate of the author track, as MTT learns one.")
@click.option("--augment", help="Operations of DSA in the author track.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.")
@DEVICE
@DATA_ROOT
def evaluate(path: Path, **given: Any) -> None:
    r"""Judge a distilled set that another program made, beside random real images.

    Reads result files of DC, DSA and DM (res_*.pt), pairs as MTT's images_best.pt and
    labels_best.pt, lists and dictionaries of images and labels, folders with exactly one of
    these or with one folder of pictures a class, and this suite's .safetensors. Nothing in a
    file is executed.

    \b
    rdd-bench evaluate res_DM_CIFAR10_ConvNet_10ipc.pt --protocol cifar10-v1
    rdd-bench evaluate images_best.pt --space whitened --lr 0.02 --tracks author
    rdd-bench evaluate idm.pt --factor 2 --beside random,random-decoded
    """
    from rdd_bench.components import Source
    from rdd_bench.foreign import read_set
    from rdd_bench.plan import DistillStep, Selection, make_plan
    from rdd_bench.protocol import load_protocol
    from rdd_bench.runner import Settings, default_out
    from rdd_bench.session import run_and_report

    found = read_set(path, given["repetition"] or 0)
    options = {
        name: given[name]
        for name in ("factor", "space", "repetition", "lr", "augment")
        if given[name] is not None
    }
    ipc = _images_per_class(found.labels, path) * (given["factor"] or 1) ** 2
    protocol, registry = load_protocol(given["protocol"]), registry_for_users()
    if given["no_references"]:
        protocol = protocol.model_copy(update={"references": []})
    label = f"{_importer(registry)}:{path}"
    beside = [protocol.control] if given["beside"] is None else given["beside"]
    methods = [label, *filter(None, beside)]
    changed = {label: options} if options else {}
    for name in filter(None, beside):
        # The decoder of the set decides that of the real images beside it.
        decodes = "factor" in registry.find("distiller", name).cls.config_class.model_fields
        if given["factor"] and decodes:
            changed[name] = {"factor": given["factor"]}
    selected = ("datasets", "architectures", "attacks", "tracks", "seeds")
    selection = Selection(
        distillers=methods,
        ipc=[ipc],
        options=changed,
        **{name: given[name] for name in selected},
    )
    settings = Settings(
        out=given["out"] or default_out(protocol.name),
        device=given["device"],
        workers=given["workers"],
        source=Source(given["data_root"]),
    )
    plan = make_plan(protocol, selection, registry)
    for choice in {step.dataset.offer_name: step.dataset for step in plan.of(DistillStep)}.values():
        data: Any = registry.build("dataset", choice.offer_name, choice.component.options)
        _refuse_misfit(found, data.load(settings.source).spec, path)
    size = f"{ipc} image{'s'[: ipc > 1]} per class"
    for line in (f"{path}: {found.format}, {size}", *found.remarks):
        click.echo(line, err=True)
    if status := run_and_report(plan, settings, registry):
        sys.exit(status)


def _refuse_misfit(found: ForeignSet, spec: DatasetSpec, path: Path) -> None:
    """Say before anything is computed that a set is not of this data set."""
    channels, height, width = found.images.shape[1:]
    if (channels, height, width) != spec.shape:
        raise RddBenchError(
            f"{path} has images of {height}x{width} with {channels} channel{'s'[: channels > 1]}; "
            f"{spec.name} has {spec.shape[1]}x{spec.shape[2]} with {spec.shape[0]}"
        )
    labels = found.labels
    classes = labels.shape[1] if labels.ndim == 2 else len(set(labels.tolist()))
    if classes != spec.num_classes:
        raise RddBenchError(f"{path} has {classes} classes; {spec.name} has {spec.num_classes}")


def _importer(registry: Registry) -> str:
    """Return the name of the distiller that reads files."""
    found = [o.name for o in registry.of_kind("distiller") if getattr(o.cls, "imports", False)]
    if not found:
        raise RddBenchError(
            "no plugin reads distilled sets from files; 'rdd-bench plugins' says why"
        )
    return found[0]


def _images_per_class(labels: Any, file: Path) -> int:
    hard = labels if labels.ndim == 1 else labels.argmax(dim=1)
    if int(hard.min()) < 0:
        raise RddBenchError(f"{file} has labels from {int(hard.min())}; expected 0 or more")
    counts = hard.bincount()
    if int(counts.min()) != int(counts.max()):
        rarest = int(counts.argmin())
        raise RddBenchError(
            f"{file} has {int(counts.min())} images of class {rarest} and up to "
            f"{int(counts.max())} of others; a table is about one number of images per class"
        )
    return int(counts.max())


@click.command()
@click.argument("checkpoint", type=FILE)
@click.option("--architecture", required=True, help="What the weights are for, such as convnet.")
@click.option("--dataset", required=True, help="What it was trained on, such as cifar10.")
@click.option("--attacks", type=NAMES, default="fgsm,pgd,autoattack", show_default=True)
@click.option(
    "--eps", "budgets", type=NAMES, default="2/255,8/255", show_default=True,
    help="Budgets in pixels of [0, 1].",
)  # fmt: skip
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Only N test images, as many of each class."
)
@click.option("--mean", type=FRACTIONS, help="What was subtracted in training, per channel.")
@click.option("--std", type=FRACTIONS, help="What was divided by in training, per channel.")
@click.option("--set", "assignments", multiple=True, metavar="NAME.OPTION=VALUE")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Also as JSON.")
@DEVICE
@DATA_ROOT
def attack(checkpoint: Path, **given: Any) -> None:
    r"""Attack a trained network, given its state_dict, or one of a run folder.

    The network sees pixels of [0, 1] through the normalisation it was trained with: the data
    set's, or --mean and --std. Every attack is checked and audited as in a run. Nothing in the
    file is executed.

    \b
    rdd-bench attack net.pt --architecture convnet --dataset cifar10 --eps 2/255,8/255
    rdd-bench attack net.pt --architecture resnet18 --dataset cifar10 --limit 1000
    """
    from rdd_bench.components import Source
    from rdd_bench.overrides import read_overrides
    from rdd_bench.types import Threat, parse_eps

    registry = registry_for_users()
    options = read_overrides(None, given["assignments"])
    threats = [Threat(given["norm"], parse_eps(text)) for text in given["budgets"]]

    def build(kind: str, text: str) -> Any:
        return registry.build(kind, text, options.pop(text, {}))

    architecture = build("architecture", given["architecture"])
    attacks = [(name, build("attack", name)) for name in dict.fromkeys(given["attacks"])]
    if not any(given["norm"] in each.norms for _, each in attacks):
        raise RddBenchError(f"none of {', '.join(given['attacks'])} works in {given['norm']}")
    dataset = build("dataset", given["dataset"])
    if options:
        raise RddBenchError(f"--set names '{next(iter(options))}', which is not used here")

    import torch

    from rdd_bench.checkpoint import Verdict, judge, load_network, percent, worst_cases
    from rdd_bench.data import load_splits, take_in_turn
    from rdd_bench.display import Display
    from rdd_bench.numerics import numerical_settings
    from rdd_bench.runner import resolve_device
    from rdd_bench.store import Store

    device = torch.device(resolve_device(given["device"]))
    who = registry.find("dataset", given["dataset"]).who
    splits = load_splits(dataset, who, Source(given["data_root"]), (0, 0))
    model = load_network(checkpoint, architecture, splits.spec, given["mean"], given["std"])
    test = splits.test
    if given["limit"]:
        test = take_in_turn(test, given["limit"])

    def write(verdicts: Sequence[Verdict]) -> None:
        """Keep what there is, so that nothing finished is lost."""
        target: Path | None = given["output"]
        if target is not None:
            content = {"test_sha256": splits.spec.test_sha256, "n": len(test)}
            text = json.dumps({**content, "verdicts": [v.as_json() for v in verdicts]}, indent=1)
            Store(target.parent).write_file(Path(target.name), text.encode())

    with Display(console(stderr=True), 1) as display, numerical_settings(threads=1):
        verdicts = judge(model, test, attacks, threats, device, report=display.report, keep=write)
    rows = []
    for verdict in [*verdicts, *worst_cases(verdicts)]:
        low, high = verdict.interval()
        said = [*(flag.message for flag in verdict.flags), *verdict.messages, verdict.error]
        notes = "; ".join(filter(None, said))
        rows.append(
            (
                verdict.attack,
                str(verdict.threat or ""),
                "–" if verdict.error else percent(verdict.accuracy),
                "" if verdict.error else f"[{percent(low)}, {percent(high)}]",
                notes,
            )
        )
    title = f"{checkpoint} on {len(test)} test images of {given['dataset']}, accuracy in %"
    print_table(title, ["Attack", "Threat", "Right", "95 % interval", "Notes"], rows)
    if given["output"]:
        click.echo(f"wrote {given['output']}")
    if any(verdict.failed for verdict in verdicts):
        sys.exit(FAILED)


@click.command()
@click.argument("path", metavar="FILE", type=FILE)
@click.option("--accuracy", is_flag=True, help="Also train on it: as stored, clipped, in 8 bits.")
@click.option(
    "--protocol", metavar="NAME|FILE.toml", help="Whose rules train and test.  [default: digits-v1]"
)
@click.option("--dataset", help="What it was distilled from.  [default: the protocol's first]")
@click.option("--seeds", type=NUMBERS, help="Training seeds, such as 0-2.  [default: protocol's]")
@DEVICE
@DATA_ROOT
def lint(path: Path, accuracy: bool, **given: Any) -> None:
    r"""Look at a distilled set, without training on it unless asked to.

    Says its format, size, class balance, pixel range, what clipping and 8-bit pictures would
    change, its recipe and its hash. Exits 1 if something is to be minded.

    \b
    rdd-bench lint runs/digits-v1/sets/ADDRESS.safetensors
    rdd-bench lint res_DM_CIFAR10_ConvNet_10ipc.pt --accuracy --protocol cifar10-v1 --seeds 0-2
    """
    from rdd_bench.lint import lint as facts_of

    idle = [name for name in ("protocol", "dataset", "seeds") if given[name] is not None]
    if idle and not accuracy:
        raise RddBenchError(f"--{idle[0]} says how to train on the set; give --accuracy with it")
    facts = facts_of(path)
    if accuracy:
        facts += _accuracies(path, **given)
    print_table(str(path), ["Fact", "Found", "Mind"], facts)
    if any(mind for _, _, mind in facts):
        sys.exit(DIFFERENT)


def _accuracies(path: Path, **given: Any) -> list[tuple[str, str, str]]:
    import torch

    from rdd_bench.components import Source
    from rdd_bench.display import Display
    from rdd_bench.numerics import numerical_settings
    from rdd_bench.protocol import DEFAULT, load_protocol
    from rdd_bench.runner import resolve_device
    from rdd_bench.trials import accuracies

    registry = registry_for_users()
    with Display(console(stderr=True), 1) as display, numerical_settings(threads=1):
        return accuracies(
            path,
            _importer(registry),
            load_protocol(given["protocol"] or DEFAULT),
            registry,
            Source(given["data_root"]),
            datasets=[given["dataset"]] if given["dataset"] else None,
            seeds=given["seeds"],
            device=torch.device(resolve_device(given["device"])),
            report=display.report,
        )


@click.command()
@click.argument("run_folder", type=FILE)
@click.argument("cell")
@click.option("--protocol", metavar="FILE.toml", help="The protocol, if it does not come along.")
def explain(run_folder: Path, cell: str, protocol: str | None) -> None:
    r"""Say what one number is, and print the command that makes it again.

    CELL is the beginning of an address: of a record, or the eight letters at the end of a
    picture's name.

    \b
    rdd-bench explain runs/digits-v1 3f2a9c01
    """
    from rdd_bench.plan import make_plan
    from rdd_bench.protocol import load_protocol
    from rdd_bench.recall import (
        cells_of,
        command_of,
        find_cell,
        matching_step,
        protocol_path,
        selection_of,
    )
    from rdd_bench.records import QuarantineRecord
    from rdd_bench.store import read_records

    records, _ = read_records([run_folder])
    found = find_cell(cells_of(records), cell)
    named = protocol_path(protocol, records)
    rules, registry = load_protocol(named), registry_for_users()
    selection = selection_of(found, rules, registry)
    step = matching_step(found, make_plan(rules, selection, registry))
    attack = found.attack
    right = ", ".join(
        f"seed {seed}: {correct}"
        for seed, correct in zip(attack.seeds, attack.correct, strict=True)
    )
    click.echo(f"{found}\n  right of {attack.n} test images: {right}")
    click.echo(f"  distilled set {found.distill.set_sha256[:16]}, {found.distill.bytes:,} bytes")
    for flag in (*found.distill.flags, *found.train.flags, *attack.flags):
        click.echo(f"  flag {flag.name}: {flag.message}")
    made_of = {record.address for record in (found.distill, found.train, attack)}
    for record in records:
        if isinstance(record, QuarantineRecord) and record.target in made_of:
            click.echo(f"  in quarantine: {record.reason}")
    if step.address != attack.address:
        click.echo(
            "  made by other code than is installed now (or other seeds beside it): the number "
            "may differ"
        )
    click.echo(f"\n{command_of(selection, named)}")


@click.command()
@click.argument("run_folder", type=FILE)
@click.option("--cells", "count", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Which cells are drawn.")
@click.option("--protocol", metavar="FILE.toml", help="The protocol, if it does not come along.")
@DEVICE
@DATA_ROOT
def verify(run_folder: Path, count: int, seed: int, **given: Any) -> None:
    r"""Compute random cells again from scratch and compare them image by image.

    RUN_FOLDER may be a run folder or published .jsonl records. Exits 1 if a verdict differs.

    \b
    rdd-bench verify leaderboard/results/digits-v1 --cells 5
    """
    from rdd_bench.components import Source
    from rdd_bench.display import Display
    from rdd_bench.plan import make_plan
    from rdd_bench.protocol import load_protocol
    from rdd_bench.recall import (
        cells_of,
        choose_cells,
        differences,
        matching_step,
        only,
        protocol_path,
        selection_of,
    )
    from rdd_bench.runner import Settings, run_plan
    from rdd_bench.store import read_records

    records, _ = read_records([run_folder])
    cells = cells_of(records)
    if not cells:
        raise RddBenchError(f"{run_folder} holds no finished cell")
    rules = load_protocol(protocol_path(given["protocol"], records))
    registry = registry_for_users()
    wrong = 0
    chosen = choose_cells(cells, count, seed)
    with tempfile.TemporaryDirectory(prefix="rdd-bench-verify-") as folder:
        settings = Settings(
            out=Path(folder), device=given["device"], workers=1,
            source=Source(given["data_root"]),
        )  # fmt: skip
        for cell in chosen:
            plan = make_plan(rules, selection_of(cell, rules, registry), registry)
            part = only(plan, matching_step(cell, plan))
            with Display(console(stderr=True), len(part.steps)) as display:
                summary = run_plan(part, settings, registry, display)
            found = differences(cell, summary.records)
            wrong += bool(found)
            click.echo(
                f"{'differs' if found else 'equal  '}  {cell}" + "".join(f"; {f}" for f in found)
            )
    click.echo(f"{len(chosen) - wrong} of {len(chosen)} cells are equal, image by image")
    if wrong:
        sys.exit(DIFFERENT)


COMMANDS = (evaluate, attack, lint, explain, verify)
