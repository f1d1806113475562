"""GPUs in status: the worst first, stale said, a lost, missing or unseen GPU wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_status import FLEET

from opsctl.agent.gpu.verdict import FRESH_STATES
from opsctl.cli.status import render
from opsctl.errors import OpsctlError
from opsctl.status import Seen, wrong
from opsctl.status_gpus import GPU_STATES, Line, gpus_of, lines, seen_wrong

SNAPSHOT = Path(__file__).parent / "snapshots" / "status-gpus.txt"


def device(index: int, **changes: Any) -> dict[str, Any]:
    return {"index": index, "uuid": f"GPU-{index}", "model": "NVIDIA H200", "pci": "", "state": "ok", "words": "",
            "temperature_c": 60 + index, "margin_c": 27 - index, "power_w": 412.3, "power_limit_w": 700.0,
            "utilisation_percent": 93, "memory_used_mib": 122_880.0, "memory_total_mib": 143_771.0, "reasons": [],
            "xids": [], "instance": "chat.0"} | changes


def told(*devices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"state": "ok", "words": "", "driver": "580.126.09", "expected": len(devices), "missing": [], "age_s": 0.4,
            "devices": list(devices)} | changes


LOST = device(1, state="lost", words="fell off the bus", temperature_c=None, margin_c=None,
              xids=[{"xid": 79, "count": 2, "at": 0.0}])

UNREADABLE = device(1, state="unreadable", words="nvmlDeviceGetPowerUsage: Unknown Error", temperature_c=None,
                    margin_c=None)


def shown(what: dict[str, Any], *, each: bool = False) -> list[Line]:
    return lines(gpus_of({"gpu-1": {"gpus": what}}), each=each)


@pytest.mark.parametrize(("devices", "first"), [
    ([device(0), device(1)], "61 °C (margin 26)"),
    ([device(0, margin_c=3), device(1)], "60 °C (margin 3)"),
    ([device(0, margin_c=None), device(1)], "61 °C (margin 26)"),
    ([device(0, margin_c=2), device(1, reasons=["thermal slowdown"])], "61 °C (margin 26)"),
    ([device(0, margin_c=2), device(1, reasons=["power brake"])], "61 °C (margin 26)"),
    ([device(0, margin_c=-2), device(1, reasons=["thermal slowdown"])], "60 °C (margin -2)"),
    ([device(0), device(1, margin_c=3), device(2, xids=[{"xid": 79, "count": 1, "at": 0.0}])], "62 °C (margin 25)"),
    ([device(0, words="nvmlDeviceGetFanSpeed: Unknown Error"), device(1, margin_c=3)], "60 °C (margin 27)"),
    ([device(0, margin_c=None, temperature_c=70), device(1, margin_c=None, temperature_c=71)], "71 °C"),
])
def test_the_worst_is_shown(devices: list[dict[str, Any]], first: str) -> None:
    (line,) = shown(told(*devices))
    assert (line.gpus, line.temperature) == (f"{len(devices)} x H200", first)
    assert shown(told(*devices), each=True)[0].temperature == first


def test_one_line_of_a_host() -> None:
    (line,) = shown(told(device(0, reasons=["thermal slowdown"], margin_c=-1)))
    assert line == Line("gpu-1", "1 x H200", "60 °C (margin -1)", "412/700 W", "93 %", "120/140 GiB",
                        "thermal slowdown", "warning")


@pytest.mark.parametrize(("what", "level", "note"), [
    (told(device(0)), "good", ""),
    (told(device(0), LOST), "bad", "GPU 1: lost: fell off the bus, XID 79 x 2"),
    (told(device(0), UNREADABLE), "bad", "GPU 1: unreadable: nvmlDeviceGetPowerUsage: Unknown Error"),
    (told(device(0, words="nvmlDeviceGetFanSpeed: Unknown Error")), "warning", "nvmlDeviceGetFanSpeed: Unknown Error"),
    (told(device(0, reasons=["power brake"])), "warning", "power brake"),
    (told(device(0, reasons=["power cap"])), "good", "power cap"),
    (told(device(0), device(1, xids=[{"xid": 48, "count": 1, "at": 0.0}], temperature_c=30, margin_c=60)), "warning",
     "GPU 1: XID 48"),
    (told(device(0), expected=2, missing=["GPU-9"]), "bad", "1 of 2 missing"),
    (told(device(0), age_s=16.0), "bad", "stale, last seen 16 s ago: "),
    (told(device(0), age_s=40.0, state="hung", words="it hangs"), "bad", "hung, last seen 40 s ago: it hangs"),
    (told(age_s=None, state="no_agent", words="systemctl status", expected=8), "bad", "no agent: systemctl status"),
    (told(age_s=None, state="no_driver", words="not loaded", expected=8), "bad", "no driver: not loaded"),
])
def test_what_is_said_of_a_host(what: dict[str, Any], level: str, note: str) -> None:
    (line,) = shown(what)
    assert (line.level, line.note) == (level, note)


@pytest.mark.parametrize(("what", "expected"), [
    (told(device(0)), []),
    (told(device(0, margin_c=-1, reasons=["thermal slowdown"])), []),  # an alert's business
    (told(device(0), LOST), ["GPU 1 lost"]),
    (told(device(0), UNREADABLE), ["GPU 1 unreadable"]),
    (told(device(0), expected=2, missing=["GPU-9"]), ["1 of 2 GPUs missing"]),
    (told(device(0), age_s=16.0), ["GPUs stale"]),
    (told(age_s=None, state="mismatch"), ["GPUs mismatch"]),
    (told(device(0), LOST, age_s=60.0, state="hung"), ["GPUs hung"]),
])
def test_what_strict_counts(what: dict[str, Any], expected: list[str]) -> None:
    found = wrong([], (), gpus_of({"gpu-1": {"gpus": what}}))
    assert found == [{"host": "gpu-1", "instance": "", "what": one} for one in expected]


@pytest.mark.parametrize(("what", "placed", "expected"), [
    (told(device(0, users=["chat.0"]), device(1, users=["chat.1", "python3"])), ["GPU-0"], ""),
    (told(device(0, users=[])), ["GPU-0"], ""),
    (told(device(0, users=[]), device(1, users=["chat.0"])), ["GPU-0"], "chat.0 computes on GPU-1"),
    (told(device(0, users=["chat.0"]), device(1, users=[])), ["GPU-0", "GPU-1"], "chat.0 does not compute on GPU-1"),
    (told(device(0, users=[])), ["GPU-0", "GPU-9"], "no GPU-9"),
    (told(device(0, users=[], state="lost", words="fell off the bus")), ["GPU-0"], "GPU-0 fell off the bus"),
    (told(device(0, users=[]), age_s=90.0, words="x"), ["GPU-0"], "stale: x"),
])
def test_an_instance_has_the_gpus_placed_to_it(what: dict[str, Any], placed: list[str], expected: str) -> None:
    assert seen_wrong(gpus_of({"gpu-1": {"gpus": what}})["gpu-1"], "chat.0", placed) == expected


def test_hosts_without_gpus_or_without_an_answer_show_none() -> None:
    assert gpus_of({"ops-1": {"schema": "x"}, "gpu-1": {}, "gpu-2": OpsctlError("x", "y")}) == {}


def test_both_sides_mean_the_same_states() -> None:
    assert GPU_STATES == FRESH_STATES


def test_the_table() -> None:
    """The default, and ``--gpus`` below; OPSCTL_SNAPSHOT=1 writes it anew."""
    gpus = gpus_of({"gpu-1": {"gpus": told(device(0), device(1, reasons=["thermal slowdown"], margin_c=-1))},
                    "gpu-2": {"gpus": told(device(0), LOST, expected=3, missing=["GPU-9"], state="lost")}})
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        for each in (False, True):
            console.print(render(FLEET, Seen([], gpus=gpus), each_gpu=each))
    text = "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
    if os.environ.get("OPSCTL_SNAPSHOT"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text()
