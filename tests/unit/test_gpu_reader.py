"""The reader's life: when it is started, asked to end, replaced; what the agent says meanwhile. Real processes."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.gpu.child import EXIT_LOCKED
from opsctl.agent.gpu.reader import View, next_step
from opsctl.agent.gpu.verdict import judge

NOW = 1000.0
GPU: dict[str, Any] = {"index": 0, "uuid": "GPU-0", "pci": "p", "state": "ok", "words": ""}


def view(*, good: float | None = NOW - 1, gpus: tuple[dict[str, Any], ...] = (GPU,), **changes: Any) -> View:
    """A reader that runs well."""
    sample = {"kind": "sample", "at": good, "state": "ok", "words": "", "took_s": 0.01, "gpus": list(gpus)}
    return View(**{"wanted_since": 900.0, "began": 900.0, "heard": good, "good": good, "pid": 7,  # type: ignore[arg-type]
                   "sample": sample if good is not None else None, **changes})


def call(age_s: float) -> dict[str, Any]:
    return {"name": "nvmlDeviceGetPowerUsage", "gpu": 3, "since": NOW - age_s}


@pytest.mark.parametrize(("found", "wanted", "incomplete", "step"), [
    (View(), False, False, "wait"),
    (View(), True, False, "start"),
    (view(), True, False, "wait"),
    (view(), False, False, "stop"),
    (view(heard=NOW - 14), True, False, "wait"),
    (view(heard=NOW - 16), True, False, "replace"),
    (view(call=call(14)), True, False, "wait"),
    (view(call=call(16)), True, False, "replace"),
    (view(call=call(900), told_to_end=NOW - 800), True, False, "wait"),  # it hangs: never killed, never doubled
    (view(began=NOW - 10, good=None, heard=None), True, False, "wait"),
    (view(began=NOW - 20, good=None, heard=None), True, False, "replace"),
    (view(began=NOW - 100), True, True, "wait"),
    (view(began=NOW - 301), True, True, "stop"),  # a lost GPU may be back
    (View(ended=NOW - 0.5, exit_status=-9, failures=0), True, False, "wait"),
    (View(ended=NOW - 3, exit_status=-9, failures=1), True, False, "start"),
    (View(ended=NOW - 20, exit_status=-9, failures=9), True, False, "wait"),
    (View(ended=NOW - 61, exit_status=-9, failures=99), True, False, "start"),
    (View(ended=NOW - 9, exit_status=EXIT_LOCKED), True, False, "wait"),
    (View(ended=NOW - 11, exit_status=EXIT_LOCKED), True, False, "start"),
    (View(ended=NOW - 9, exit_status=0, sample={"state": "no_driver"}), True, False, "wait"),
])
def test_what_to_do_with_it(found: View, wanted: bool, incomplete: bool, step: str) -> None:
    assert next_step(found, NOW, wanted, incomplete) == step


def gone(state: str, words: str = "") -> View:
    return view(good=None, began=None, sample={"at": NOW - 3, "state": state, "words": words, "gpus": []})


@pytest.mark.parametrize(("found", "wanted", "state", "words", "healthy"), [
    (View(), False, "none", "no GPUs", True),
    (view(good=None, wanted_since=NOW - 3), True, "starting", "no sample yet", False),
    (view(), True, "ok", "", True),
    (view(good=NOW - 14.9), True, "ok", "", True),
    (view(good=NOW - 15.1), True, "stale", "15 s old: the reader is silent", False),
    (view(good=None, wanted_since=NOW - 20), True, "stale", "20 s old", False),
    (view(call=call(5)), True, "ok", "", True),
    (view(good=NOW - 17, call=call(17)), True, "hung", "nvmlDeviceGetPowerUsage of GPU 3 has not returned for 17 s",
     False),
    (view(good=NOW - 90, told_to_end=NOW - 60, call=None), True, "stale", "was told to end and does not", False),
    (view(good=None, began=None, exit_status=EXIT_LOCKED), True, "stale", "a reader of an agent before", False),
    (gone("no_driver"), True, "no_driver", "not loaded", False),
    (gone("mismatch"), True, "mismatch", "another version than the loaded driver 580.126.09", False),
    (gone("no_library", "no module"), True, "no_library", "no module", False),
    (view(gpus=({**GPU, "state": "lost", "words": "fell off the bus"},)), True, "lost",
     "GPU 0 (GPU-0) fell off the bus", True),
    (view(gpus=()), True, "missing", "1 of 1 GPUs not there: GPU-0", True),
    (view(gpus=({**GPU, "uuid": "GPU-9", "mig": [{"uuid": "GPU-0"}]},)), True, "ok", "", True),
])
def test_what_the_agent_makes_of_it(found: View, wanted: bool, state: str, words: str, healthy: bool) -> None:
    verdict = judge(found, NOW, wanted, ["GPU-0"], "580.126.09")
    assert (verdict.state, verdict.healthy) == (state, healthy)
    assert words in verdict.words


def test_a_second_reader_waits_for_the_first(tmp_path: Path) -> None:
    import subprocess

    orders = tmp_path / "orders.json"
    orders.write_text(json.dumps({}))
    command = [sys.executable, str(Path(__file__).with_name("played_nvml.py")), str(orders), str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert json.loads(first.stdout.readline())["state"] == "ok"
        assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == EXIT_LOCKED
        assert int((tmp_path / "lock").read_text()) == first.pid
        first.send_signal(signal.SIGTERM)
        first.stdout.read()
        assert first.wait(10) == 0
