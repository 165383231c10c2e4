"""The run folder: nothing is ever half there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from rdd_bench.errors import RddBenchError
from rdd_bench.records import to_line
from rdd_bench.store import Store, read_records


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "run")
    made.create()
    return made


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(store, monkeypatch, failing):
    store.write_file(Path("sets/a.bin"), b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(RddBenchError, match=r"cannot write .*a.bin: No space left on device"):
        store.write_file(Path("sets/a.bin"), b"new")
    assert store.read_file(Path("sets/a.bin")) == b"old"
    assert visible(store.root) == ["a.bin"]


def test_a_write_that_is_killed_leaves_the_old_content(store, monkeypatch, book):
    store.write_record(book.environment())
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_record(book.environment(python="4"))
    monkeypatch.undo()
    assert store.record("environment-1") == book.records[0]
    assert read_records([store.root]) == ([book.records[0]], [])


def test_the_new_content_takes_the_place_of_the_old(store):
    for data in (b"old", b"new and longer", b""):
        store.write_file(Path("sets/a.bin"), data)
        assert store.read_file(Path("sets/a.bin")) == data


def test_a_folder_that_cannot_be_made_is_told_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RddBenchError, match=r"cannot write to the run folder .*; name another"):
        Store(tmp_path / "file" / "run").create()


def test_a_file_in_the_place_of_a_folder_is_told_so(store):
    (store.root / "sets").write_text("in the way")
    with pytest.raises(RddBenchError, match=r"cannot write .*a\.bin"):
        store.write_file(Path("sets/a.bin"), b"new")


def test_a_missing_file_is_told_so(store):
    with pytest.raises(RddBenchError, match=r"cannot read .*a\.bin: No such file"):
        store.read_file(Path("sets/a.bin"))


def test_a_folder_may_be_created_twice_and_keeps_what_it_holds(store, book):
    store.write_record(book.environment())
    store.create()
    assert visible(store.root) == ["environment-1.json"]


# Being done -----------------------------------------------------------------------------------


def test_a_step_is_done_when_its_record_and_its_files_are_there(store, book):
    record = book.distill("dm", address="d1")
    files = [Path("sets/d1.safetensors")]
    assert not store.is_done("d1", files)
    store.write_record(record)
    assert store.is_done("d1")
    assert not store.is_done("d1", files)
    whole = save({"images": np.zeros((2, 3), np.float32)})
    for broken in (b"", whole[:-1], whole[:20], b"no tensors at all"):
        store.write_file(files[0], broken)
        assert not store.is_done("d1", files)
    store.write_file(files[0], whole)
    assert store.is_done("d1", files)


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_a_step_that_failed_is_not_done(store, book, status):
    store.write_record(book.distill("dm", address="d1", status=status, error="why"))
    assert not store.is_done("d1")
    record = store.record("d1")
    assert record is not None
    assert record.kind != "environment"
    assert record.status == status


@pytest.mark.parametrize("length", [0, 1, 50, -2])
def test_a_truncated_record_means_not_done(store, book, length):
    record = book.distill("dm", address="d1")
    store.write_record(record)
    path = store.root / "records" / "d1.json"
    path.write_text(path.read_text()[:length])
    assert store.record("d1") is None
    assert not store.is_done("d1")
    store.write_record(record)
    assert store.is_done("d1")


def test_records_come_back_as_they_were_written(store, book):
    """Also with what some programs take for the end of a line."""
    notes = {"text": "a\u2028b\u2029c\x85d\x0be\r\nf", "é": [1, None, {"x": 0.1}]}
    record = book.distill("dm", address="d1", notes=notes)
    store.write_record(record)
    assert store.record("d1") == record
    assert read_records([store.root]) == ([record], [])


# Reading --------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Return a function that writes records to a file of its own."""

    def write(name: str, *lines: str) -> Path:
        path: Path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))
        return path

    return write


def test_of_two_records_of_a_step_the_later_one_counts(book, write):
    old = book.distill("dm", address="d1", created="2026-01-01T00:00:00+00:00")
    new = book.distill("dm", address="d1", created="2026-01-02T00:00:00+00:00", images=7)
    a, b = write("a.jsonl", to_line(old)), write("b.jsonl", to_line(new))
    assert read_records([a, b])[0] == read_records([b, a])[0] == [new]


def test_what_is_done_counts_before_what_failed_later(book, write):
    done = book.distill("dm", address="d1", created="2026-01-01T00:00:00+00:00")
    late = "2026-01-02T00:00:00+00:00"
    failed = book.distill("dm", address="d1", created=late, status="failed", error="why")
    for lines in ([to_line(done), to_line(failed)], [to_line(failed), to_line(done)]):
        assert read_records([write("a.jsonl", *lines)])[0] == [done]


def test_folders_of_files_and_run_folders_are_read_alike(book, store, write, tmp_path):
    for record in (book.cell("dm", ["1"], ["1"]), book.cell("random", ["1"], ["0"])):
        store.write_record(record)
    for record in book.records:
        store.write_record(record)
    lines = [to_line(record) for record in reversed(book.records)]
    write("published/digits/one.jsonl", *lines[:2])
    write("published/digits/two.jsonl", *lines[2:])
    (tmp_path / "published" / "README.md").write_text("no record")
    ran, problems = read_records([store.root])
    assert problems == []
    assert len(ran) == 6
    assert read_records([tmp_path / "published"]) == (ran, [])


def test_bad_lines_are_named_and_the_others_read(book, write):
    good = to_line(book.distill("dm"))
    path = write("a.jsonl", good, '{"kind": "dream"}\n', good[:30])
    records, problems = read_records([path])
    assert records == [book.records[0]]
    assert len(problems) == 2
    assert problems[0].startswith(f"{path}, line 2: not a record")
    assert problems[1].startswith(f"{path}, line 3: not a complete line of JSON")


def test_a_binary_file_is_a_list_of_problems(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(bytes(range(256)))
    records, problems = read_records([tmp_path / "a.jsonl"])
    assert records == []
    assert problems


def test_a_path_without_records_is_an_error(tmp_path, store):
    with pytest.raises(RddBenchError, match=r"none does not exist; expected a run folder or"):
        read_records([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", store.root):
        with pytest.raises(RddBenchError, match="holds no records; expected a run folder"):
            read_records([folder])


def test_files_of_a_killed_write_are_not_read(store, book):
    store.write_record(book.environment())
    (store.root / "records" / ".d1.json.99.part").write_text("{half")
    assert read_records([store.root]) == ([book.records[0]], [])
