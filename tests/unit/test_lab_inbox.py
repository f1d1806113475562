"""What the alerts of a lab told: read, waited for, and why nothing can have come."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsctl.cli.main import app
from opsctl.lab import inbox, layers, state
from opsctl.lab.gpu.profiles import Gpus
from opsctl.lab.processes import identify
from opsctl.lab.state import Lab, Machine, save

HOT = "GpuThermalMarginLow"
WEBHOOK = {"at": "10:00", "by": "webhook", "status": "firing", "alerts": [
    {"alertname": HOT, "status": "firing", "summary": "gpu-1 is hot", "action": "opsctl drain gpu-1"}]}
MAIL = {"at": "10:01", "by": "mail", "status": "firing", "to": ["oncall@lab.invalid"], "subject": f"[now] {HOT} gpu-1",
        "text": "gpu-1 is hot\n"}
OVER = {**MAIL, "at": "10:09", "status": "resolved", "subject": f"[over] {HOT} gpu-1"}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """ops-1 runs (this process stands for it), gpu-1 has a GPU, and nothing has arrived."""
    monkeypatch.setattr(state, "STATE_ROOT", tmp_path / "labs")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labs/hot").mkdir(parents=True)
    here = identify(os.getpid())
    found = Lab(name="hot", number=3, suite="bookworm", subnet=IPv4Network("10.91.0.0/24"), fleet=tmp_path / "hot",
                machines=(Machine("ops-1", "10.91.0.10", ("lb", "gateway", "monitor"), prepared=True, keeper=here),
                          Machine("gpu-1", "10.91.0.11", ("gpu",), prepared=True, keeper=here, gpus=Gpus("H200", 2))))
    kept_by(found).parent.mkdir(parents=True)
    return save(found)


def kept_by(lab: Lab) -> Path:
    return layers.root(lab.place(lab.machine("ops-1"))) / inbox.KEPT


def arrive(lab: Lab, *messages: dict[str, Any]) -> None:
    with kept_by(lab).open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in messages)


def said(*words: str) -> Any:
    return CliRunner().invoke(app, ["lab", "inbox", *words])


def patient(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Seconds pass with each pause, and no time does; ``meanwhile`` is what happens in each."""
    seconds = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr("time.sleep", lambda _: meanwhile())


def test_what_arrived(lab: Lab) -> None:
    assert said().stdout == "nothing has arrived\n"
    arrive(lab, WEBHOOK, MAIL, OVER)
    done = said()
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:3] == [f"10:00  webhook: firing {HOT}", "  gpu-1 is hot",
                                            "  do: opsctl drain gpu-1"]
    assert json.loads(said("--alert", "AnotherOne", "--json").stdout)["messages"] == []


def test_what_is_there_is_not_waited_for(lab: Lab) -> None:
    arrive(lab, MAIL, WEBHOOK, MAIL)
    document = json.loads(said("--alert", HOT, "--until", "firing", "--json").stdout)
    assert document["messages"] == [WEBHOOK, MAIL], "the last of each"


def test_it_waits_and_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal too: two minutes without a word look like a hang."""
    late = iter([*[()] * 20, (WEBHOOK, MAIL)])
    patient(monkeypatch, lambda: arrive(lab, *next(late)))
    done = said("--alert", HOT, "--until", "firing")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if f"ops-1      waiting for {HOT} to be firing: " in line]
    assert len(lines) > 2, done.stderr


def test_what_does_not_come_is_exit_9(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(lab, WEBHOOK, OVER)
    patient(monkeypatch)
    done = said("--alert", HOT, "--until", "firing", "--within", "30")
    assert done.exit_code == 9
    assert f"{HOT} was not firing by webhook and mail within 30 s" in done.stderr


@pytest.mark.parametrize("words", [["--until", "firing"], ["--until", "hot", "--alert", HOT]])
def test_what_cannot_be_waited_for(lab: Lab, words: list[str]) -> None:
    done = said(*words)
    assert done.exit_code == 2
    assert "inbox.bad_until" in done.stderr


def without_gpus(lab: Lab) -> None:
    save(replace(lab, machines=tuple(replace(machine, gpus=None) for machine in lab.machines)))


def without_power(lab: Lab) -> None:
    save(lab.with_machine(replace(lab.machine("ops-1"), keeper=None)))


def without_monitor(lab: Lab) -> None:
    save(lab.with_machine(replace(lab.machine("ops-1"), groups=("lb", "gateway"))))


@pytest.mark.parametrize(("takes_away", "code", "hint"), [
    (without_gpus, "lab.no_inbox", "--gpus 8xH200"),
    (without_monitor, "lab.no_inbox", "--gpus 8xH200"),
    (without_power, "lab.off", "opsctl lab power-on ops-1 --name hot"),
])
def test_where_nothing_can_arrive_that_is_said(lab: Lab, takes_away: Callable[[Lab], None], code: str, hint: str
                                               ) -> None:
    takes_away(lab)
    done = said()
    assert done.exit_code == 5, done.output
    assert f"code: {code}" in done.stderr
    assert hint in done.stderr
