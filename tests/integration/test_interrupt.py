"""Ctrl-C: the run stops at once, says how to go on, and what is finished stays finished."""

from __future__ import annotations

import os
import signal
import time

import pytest

# The second distiller sleeps while this variable is set; variables are no part of an address.
SLOW = """\
if "SLOW" in os.environ:
    print("sleeping", file=sys.stderr, flush=True)
    time.sleep(100)
return good_set(task)
"""


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_runs_keep_what_is_finished_and_go_on(
    tiny, plant, process, protocol, out, records_of, workers
):
    plant("distiller", SLOW)
    chosen = ["--distillers", "random,planted", "--attacks", "fgsm"]
    running = process.start(
        *("run", "--protocol", protocol, "--out", out, "--device", "cpu", *chosen),
        *("--workers", workers),
        SLOW="1",
    )
    try:
        # With one worker the steps of 'random' come first; with two they run beside the sleeper.
        wait_for(lambda: running.poll() is not None or len(list(out.glob("records/*"))) >= 4)
        time.sleep(0.2)
        began = time.monotonic()
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, err
    assert seconds < 20
    assert "Interrupted. Finished steps are kept; run the same command again" in err
    assert "Traceback" not in err
    finished = records_of(out)
    assert [r.status for r in finished] == ["done"] * 3
    assert not list(out.rglob("*.part"))

    answer = tiny(*chosen)
    assert answer.code == 0
    assert "3 steps computed, 3 already there." in answer.out


def test_no_process_of_an_interrupted_run_is_left(plant, process, protocol, out):
    plant("distiller", SLOW)
    running = process.start(
        *("run", "--protocol", protocol, "--out", out, "--device", "cpu", "--workers", 2),
        *("--distillers", "planted"),
        SLOW="1",
    )
    try:
        wait_for(lambda: running.poll() is not None or out.exists())
        # While the workers are still importing.
        time.sleep(1)
        os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=60)
        assert running.returncode == 130
        with pytest.raises(ProcessLookupError):
            wait_for(lambda: os.killpg(running.pid, 0), seconds=5)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
