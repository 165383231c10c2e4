"""The command that strikes a result through, and says why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from rdd_bench.errors import RddBenchError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("address")
@click.option("--reason", required=True, help="One sentence, shown on the board.")
def quarantine(folder: Path, address: str, reason: str) -> None:
    r"""Strike a result through that must not be trusted, and say why.

    FOLDER is a run folder or a folder of published .jsonl records; ADDRESS is the beginning of the
    address of a distillation, a training or an attack. What builds on it is struck through too:
    it stays on the board with the reason, and is not ranked. The record of this is a line in
    FOLDER/quarantine.jsonl, or a file in the run folder's records; deleting it takes it back.

    \b
    rdd-bench quarantine leaderboard/results/digits-v1 3f2a9c01 --reason "trained on test images"
    """
    from rdd_bench.hashing import digest
    from rdd_bench.records import QUARANTINE, QuarantineRecord, StepRecord, to_line
    from rdd_bench.store import RECORDS, Store, read_records

    reason = " ".join(reason.split())
    if not reason:
        raise RddBenchError("--reason is empty; say in one sentence what is wrong")
    records, _ = read_records([folder])
    steps = [record for record in records if isinstance(record, StepRecord)]
    found = [record for record in steps if record.address.startswith(address)]
    if len(found) != 1:
        known = "no result" if not found else f"{len(found)} results"
        raise RddBenchError(f"{known} in {folder} with an address that begins with '{address}'")
    target = found[0].address
    record = QuarantineRecord(
        address=f"{QUARANTINE}-{digest([target, reason])[:16]}",
        target=target,
        reason=reason,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store = Store(folder)
    if (folder / RECORDS).is_dir():
        store.write_record(record)
    else:
        path = Path(f"{QUARANTINE}.jsonl")
        before = store.read_file(path) if (folder / path).exists() else b""
        if before and not before.endswith(b"\n"):  # as editors leave it
            before += b"\n"
        store.write_file(path, before + to_line(record).encode())
    click.echo(f"quarantined {found[0].kind} {target}: {reason}")
