"""Ctrl-C: the run stops at once, says how to go on, and what is finished stays finished."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

# The training sleeps while this variable is set; variables are no part of an address.
SLOW = """\
if "SLOW" in os.environ:
    open(os.environ["SLOW"], "w").close()
    time.sleep(100)
return good_network(spec)
"""


SENTENCE = "Interrupted. Finished steps are kept; run the same command again to go on."


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Undo what a shell does to commands in the background: they ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def nobody_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(
    tiny, plant, out, records_of, monkeypatch
):
    plant(
        "architecture",
        "if 'SLOW' in os.environ: __import__('signal').raise_signal(2)\nreturn good_network(spec)",
    )
    monkeypatch.setenv("SLOW", "1")
    answer = tiny("--architectures", "planted")
    assert answer.code == 130
    assert SENTENCE in answer.err
    assert "Traceback" not in answer.err
    (finished,) = records_of(out)
    assert (finished.kind, finished.status) == ("distill", "done")
    monkeypatch.delenv("SLOW")
    answer = tiny("--architectures", "planted")
    assert answer.code == 0
    assert "3 steps computed, 1 already there." in answer.out


def test_ctrl_c_stops_every_worker_at_once(
    tiny, plant, process, protocol, out, tmp_path, records_of
):
    plant("architecture", SLOW)
    asleep = tmp_path / "asleep"
    running = process.start(
        *("run", "--protocol", protocol, "--out", out, "--device", "cpu"),
        *("--architectures", "planted", "--workers", 2),
        SLOW=str(asleep),
    )
    try:
        wait_for(lambda: asleep.exists() or running.poll() is not None)
        began = time.monotonic()
        # To the whole group, as a terminal does.
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
        seconds = time.monotonic() - began
        assert running.returncode == 130, err
        assert seconds < 20
        assert SENTENCE in err
        assert "Traceback" not in err
        wait_for(lambda: nobody_in(running.pid), seconds=10)
    finally:
        if not nobody_in(running.pid):
            os.killpg(running.pid, signal.SIGKILL)
    (finished,) = records_of(out)
    assert (finished.kind, finished.status) == ("distill", "done")
    assert not list(out.rglob("*.part"))

    answer = tiny("--architectures", "planted")
    assert answer.code == 0
    assert "3 steps computed, 1 already there." in answer.out
