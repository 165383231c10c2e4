"""The run folder: what is finished stays finished.

::

    runs/digits-v1/
        records/<address>.json     one result line a file; a step is done when its file is there
        sets/<address>.safetensors        distilled sets
        networks/<address>.safetensors    trained networks of every seed
        errors/<address>.txt              tracebacks of failed steps
        artefacts/                        what distillers share, such as expert trajectories
        pictures/<what>-<address>.png     distilled images, and what attacks did to a few images
        leaderboard.md

Files are written under a temporary name and renamed, so a killed run leaves no half of one. Only
the process that drives a run writes. This module does not import torch.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rdd_bench.errors import RddBenchError
from rdd_bench.records import QUARANTINE, AnyRecord, StepRecord, parse_lines, to_line

if TYPE_CHECKING:
    import pandas as pd

RECORDS, SETS, NETWORKS, ERRORS = "records", "sets", "networks", "errors"
ARTEFACTS, PICTURES = "artefacts", "pictures"


class Store:
    """One run folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Make the folder.

        Raises:
            RddBenchError: If it cannot be written.
        """
        try:
            (self.root / RECORDS).mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise RddBenchError(
                f"cannot write to the run folder {self.root}: {error.strerror}; "
                "name another one with --out"
            ) from None

    def record(self, address: str) -> AnyRecord | None:
        """Return the record of a step, None if there is none that can be read."""
        path = self._record_path(address)
        if not path.exists():
            return None
        records, _ = parse_lines(path.read_text(encoding="utf-8", errors="replace").split("\n"))
        return records[0] if records else None

    def is_done(self, address: str, files: Iterable[Path] = ()) -> bool:
        """Whether a step is recorded as done and the files that it made are there."""
        record = self.record(address)
        done = record is not None and getattr(record, "status", "done") == "done"
        return done and all(_is_complete(self.root / path) for path in files)

    def quarantines(self) -> list[AnyRecord]:
        """Return what somebody found wrong with results of this folder."""
        paths = sorted((self.root / RECORDS).glob(f"{QUARANTINE}-*.json"))
        found = (self.record(path.stem) for path in paths)
        return [record for record in found if record is not None]

    def write_record(self, record: AnyRecord) -> None:
        """Put a record in its place, over an earlier one of the same step."""
        self.write_file(
            self._record_path(record.address).relative_to(self.root), to_line(record).encode()
        )

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a file in one piece."""
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise RddBenchError(f"cannot write {target}: {error.strerror}") from None

    def read_file(self, path: Path) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise RddBenchError(f"cannot read {self.root / path}: {error.strerror}") from None

    def _record_path(self, address: str) -> Path:
        return self.root / RECORDS / f"{address}.json"


def _is_complete(path: Path) -> bool:
    """Whether a safetensors file has all the bytes that its header announces."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry]
        return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, MemoryError, OverflowError, TypeError, AttributeError):
        return False


def set_path(address: str) -> Path:
    """Where a distilled set lies in its run folder."""
    return Path(SETS) / f"{address}.safetensors"


def last_good_path(address: str) -> Path:
    """Where the last good set of a distillation that diverged lies in its run folder."""
    return Path(SETS) / f"{address}.last-good.safetensors"


def picture_path(address: str, what: str) -> Path:
    """Where a picture lies in its run folder; ``what`` is for the people who look."""
    readable = re.sub(r"[^a-z0-9.]+", "-", what.lower()).strip("-")[:80]
    return Path(PICTURES) / f"{readable}-{address[:8]}.png"


def networks_path(address: str) -> Path:
    """Where the networks of a training lie in their run folder."""
    return Path(NETWORKS) / f"{address}.safetensors"


def error_path(address: str) -> Path:
    """Where the traceback of a failed step lies in its run folder."""
    return Path(ERRORS) / f"{address}.txt"


def read_records(paths: Sequence[Path]) -> tuple[list[AnyRecord], list[str]]:
    """Read run folders, folders of .jsonl files, and single files.

    Of two records of one step the later one counts, and one that is done before one that is not.

    Returns:
        The records in a fixed order, and a sentence for every line that could not be read.

    Raises:
        RddBenchError: If a path does not exist or holds no records at all.
    """
    found: dict[str, AnyRecord] = {}
    problems: list[str] = []
    for path in paths:
        files = _record_files(path)
        for file in files:
            try:
                # Not splitlines(): text in a record may hold other line ends, such as U+2028.
                lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            except OSError as error:
                raise RddBenchError(f"cannot read {file}: {error.strerror}") from None
            records, bad = parse_lines(lines)
            problems += [f"{file}, {problem}" for problem in bad]
            for record in records:
                known = found.get(record.address)
                if known is None or _rank(record) >= _rank(known):
                    found[record.address] = record
        if not files:
            raise RddBenchError(
                f"{path} holds no records; expected a run folder or .jsonl files in it"
            )
    return [found[address] for address in sorted(found)], problems


def _rank(record: AnyRecord) -> tuple[bool, str]:
    if not isinstance(record, StepRecord):
        return True, ""
    return record.status == "done", record.created


def _record_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise RddBenchError(f"{path} does not exist; expected a run folder or a .jsonl file")
    if (path / RECORDS).is_dir():
        return sorted((path / RECORDS).glob("*.json"))
    return sorted(path.rglob("*.jsonl"))


def load_results(path: str | Path) -> pd.DataFrame:
    """Return the results of a run folder, or of published records, as a table.

    One row a network (training seed), attack and budget; ``attack`` is ``none`` for the clean
    accuracy. Accuracies are fractions of all test images. Failed and skipped steps are not in it.
    """
    from rdd_bench.results import results_frame

    records, problems = read_records([Path(path)])
    for problem in problems:
        warnings.warn(f"ignored: {problem}", stacklevel=2)
    return results_frame(records)
