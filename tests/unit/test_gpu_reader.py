"""The reader's life: when it is started, asked to end, replaced; what the agent says meanwhile. Real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.gpu.child import EXIT_LOCKED, hurry
from opsctl.agent.gpu.reader import Reader, View, next_step
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
    (view(gpus=({**GPU, "state": "unreadable", "words": "nvmlDeviceGetPowerUsage: Unknown Error"},)), True,
     "unreadable", "GPU 0 (GPU-0) nvmlDeviceGetPowerUsage: Unknown Error", True),
    (view(gpus=()), True, "missing", "1 of 1 GPUs not there: GPU-0", True),
    (view(gpus=({**GPU, "uuid": "GPU-9", "mig": [{"uuid": "GPU-0"}]},)), True, "ok", "", True),
])
def test_what_the_agent_makes_of_it(found: View, wanted: bool, state: str, words: str, healthy: bool) -> None:
    verdict = judge(found, NOW, wanted, ["GPU-0"], lambda: "580.126.09")
    assert (verdict.state, verdict.healthy) == (state, healthy)
    assert words in verdict.words


def test_a_reader_that_leaves_somebody_behind_holds_nobody_up(tmp_path: Path) -> None:
    """Its child has its end of the pipe, so there is no end to read to: the agent's loop, and the voice, go on."""
    sample = json.dumps({"kind": "sample", "at": 1.0, "state": "ok", "words": "", "took_s": 0.0, "gpus": []})
    left = tmp_path / "left"
    script = f"sleep 60 & echo $! > {left}; echo '{sample}'; exec sleep 60"
    said: list[str] = []
    reader = Reader(tmp_path / "lock", said.append, lambda *_: None, command=("sh", "-c", script))

    async def work() -> None:
        reader.tick(True, False)
        while reader.view.samples == 0:
            await asyncio.sleep(0.01)
        os.kill(reader.view.pid, signal.SIGKILL)
        while reader.view.began is not None:
            await asyncio.sleep(0.01)
            reader.tick(True, False)
        assert reader.view.exit_status == -signal.SIGKILL

    def too_long(*_: object) -> None:
        raise TimeoutError("the loop stands still")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(10)  # asyncio's own timeout needs the loop
    try:
        asyncio.run(work())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.kill(int(left.read_text()), signal.SIGTERM)
    assert any("ended by signal 9" in words for words in said)


WAITS = """
import os, signal, time
from opsctl.agent.gpu.child import Stop

stop, parent = Stop(), os.getpid()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
if (other := os.fork()) == 0:
    while os.getppid() == parent:
        os.kill(parent, signal.SIGTERM)
    os._exit(0)
until = time.monotonic() + 2
while time.monotonic() < until:
    stop.wait(0.001)
assert stop.is_set()
os.kill(other, signal.SIGKILL)
"""


def test_it_can_be_told_to_end_at_any_moment() -> None:
    """Also in the one in which it begins to wait, or ends waiting: who holds a lock then is not asked for it again."""
    subprocess.run([sys.executable, "-c", WAITS], check=True, timeout=30)


def heard(*samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a view makes of the last of several samples."""
    found = View()
    for gpus in samples:
        found.hear({"kind": "sample", "at": NOW, "state": "ok", "words": "", "took_s": 0.0, "gpus": gpus}, NOW)
    assert found.sample is not None
    return list(found.sample["gpus"])


def gpu(index: int, **more: Any) -> dict[str, Any]:
    return {"index": index, "uuid": f"GPU-{index}", "pci": f"p{index}", "name": "H200", "temperature_c": 60,
            "state": "ok", "words": "", **more}


def nameless(index: int) -> dict[str, Any]:
    """As a reader finds a lost GPU that was begun after it was lost."""
    return {"index": index, "state": "lost", "words": "GPU is lost"}


@pytest.mark.parametrize(("before", "now", "uuids"), [
    ([gpu(0), gpu(1)], [gpu(0), nameless(1)], ["GPU-0", "GPU-1"]),
    ([gpu(0), gpu(1), gpu(2)], [nameless(0), gpu(1), nameless(2)], ["GPU-0", "GPU-1", "GPU-2"]),
    ([gpu(0), gpu(1), gpu(2)], [gpu(0), nameless(1)], ["GPU-0", ""]),  # one more is not there: whose place is it?
    ([gpu(0), gpu(1)], [{**gpu(1), "index": 0}, nameless(1)], ["GPU-1", ""]),  # they were counted anew
    ([], [gpu(0), nameless(1)], ["GPU-0", ""]),
])
def test_a_lost_gpu_keeps_its_name_when_another_reader_looks(
        before: list[dict[str, Any]], now: list[dict[str, Any]], uuids: list[str]) -> None:
    found = heard(before, now)
    assert [one.get("uuid", "") for one in found] == uuids
    lost = [one for one in found if one["state"] == "lost"]
    assert all(one["words"] == "GPU is lost" and "temperature_c" not in one for one in lost)
    assert heard(before, now, now) == found


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


def near(index: int, **more: Any) -> dict[str, Any]:
    return {"index": index, "uuid": f"GPU-{index}", "pci": f"p{index}", "temperature_c": 80, "margin_c": 7,
            "margin_source": "margin_api", "reasons": 0x20, "state": "ok", "words": "", **more}


def both(sample: list[dict[str, Any]], thermal: list[dict[str, Any]]) -> View:
    """A view that heard a sample at 1000 and a thermal line at 1000.25."""
    found = View(began=900.0, wanted_since=900.0)
    found.hear({"kind": "sample", "at": NOW, "state": "ok", "words": "", "took_s": 0.0, "gpus": sample}, NOW)
    found.hear({"kind": "thermal", "at": NOW + 0.25, "gpus": thermal}, NOW + 0.25)
    return found


def test_a_thermal_line_is_younger_than_the_sample_until_the_next_one() -> None:
    found = both([gpu(0, power_w=400.0, memory_temperature_c=70, margin_c=9), gpu(1)], [near(0), near(1)])
    first, second = found.gpus_now()
    assert first == {**near(0), "name": "H200", "power_w": 400.0}  # the memory's was not told again: it is not there
    assert second["margin_c"] == 7
    assert (found.good, found.samples) == (NOW + 0.25, 1)
    assert found.age(NOW + 1.25) == 1.0
    assert judge(found, NOW + 15.2, True, ["GPU-0", "GPU-1"]).state == "ok"
    found.hear({"kind": "sample", "at": NOW + 1, "state": "ok", "words": "", "took_s": 0.0, "gpus": [gpu(0)]}, NOW + 1)
    assert found.gpus_now() == [gpu(0)]


@pytest.mark.parametrize("state", ["lost", "unreadable"])
def test_a_gpu_keeps_its_parts_when_a_quick_line_has_only_errors(state: str) -> None:
    part = {"id": 1, "profile": "1g.18gb", "uuid": "MIG-1"}
    found = both([gpu(0, mig=[{**part, "memory_used_mib": 100.0}])],
                 [{"index": 0, "uuid": "GPU-0", "pci": "p0", "state": state, "words": "Unknown Error"}])
    (one,) = found.gpus_now()
    assert (one["state"], one["mig"]) == (state, [part])  # and no old values of theirs


def test_a_gpu_that_is_lost_between_two_samples_has_no_old_values() -> None:
    found = both([gpu(0, power_w=400.0), gpu(1, power_w=400.0, thresholds_c={"slowdown": 89})],
                 [near(0), {"index": 1, "state": "lost", "words": "fell off the bus"}])
    assert found.gpus_now()[1] == {"index": 1, "uuid": "GPU-1", "pci": "p1", "name": "H200", "state": "lost",
                                   "thresholds_c": {"slowdown": 89}, "words": "fell off the bus"}
    assert judge(found, NOW + 1, True, ["GPU-0", "GPU-1"]).state == "lost"


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, False), ({"margin_c": 16}, False), ({"margin_c": 15}, True), ({"margin_c": -3}, True),
    ({"margin_c": 30, "memory_temperature_c": 79, "thresholds_c": {"memory_max": 95}}, False),
    ({"margin_c": 30, "memory_temperature_c": 80, "thresholds_c": {"memory_max": 95}}, True),
    ({"margin_c": 30, "memory_temperature_c": 99}, False),  # nobody knows its limit
    ({"temperature_c": 67}, False), ({"temperature_c": 68}, True),  # no margin: 83 is taken for its limit
    ({"margin_c": 3, "state": "lost"}, False),
])
def test_when_a_second_is_a_long_time(changes: dict[str, Any], expected: bool) -> None:
    assert hurry([{"index": 0, "state": "ok", "margin_c": 40}, {"index": 1, "state": "ok", **changes}]) is expected
    assert hurry([]) is False


def test_who_listens_is_told_of_good_lines_and_breaks_nothing(tmp_path: Path) -> None:
    lines = [{"kind": "sample", "at": 1.0, "state": "ok", "words": "", "took_s": 0.0, "gpus": [gpu(0)]},
             {"kind": "thermal", "at": 1.25, "gpus": [near(0)]}, {"kind": "xid", "at": 1.3, "pci": "p0", "xid": 79},
             {"kind": "waiting", "at": 2.0, "call": "nvmlInit", "gpu": -1, "since": 1.3},
             {"kind": "sample", "at": 2.5, "state": "failed", "words": "", "gpus": []}]
    said: list[str] = []
    seen: list[float | None] = []

    def listen() -> None:
        seen.append(reader.view.good)
        raise KeyError("margin")

    reader = Reader(tmp_path / "lock", said.append, lambda *_: None, on_sample=listen)
    for line in lines:
        reader._hear(json.dumps(line).encode())
    assert seen == [1.0, 1.25]
    assert said == ["what listens to the GPU reader: unexpected KeyError: 'margin'"]
