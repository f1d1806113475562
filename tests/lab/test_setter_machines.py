"""The setter on a real machine: in its sandbox it sets what the agent asks for, and nothing it set outlives it."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command import succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched

from opsctl.lab import state
from opsctl.lab.gpu import trees
from opsctl.lab.gpu.state_file import StateFile

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PYTHON = "/opt/opsctl/agent/bin/python3"
OURS = ("opsctl-setter.service", "opsctl-agent.service", "opsctl-recover.service", "inference@chat.0.service")
# Asks all its arguments on one connection, and keeps that.
HOLDER = """
import socket, sys, time
kept = socket.socket(socket.AF_UNIX)
kept.connect("/run/opsctl/setter/setter.sock")
for line in sys.argv[1:]:
    kept.sendall(line.encode() + b"\\n")
    print(kept.recv(9999).decode().strip(), flush=True)
"""
FOR_LONG = HOLDER + "time.sleep(600)\n"


@pytest.fixture(scope="module")
def fleet(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """One GPU host with two H200; nothing is served, and chat.0 is a process that sleeps."""
    with lab_of_a_module(f"{NAME}-setter", 1, tmp_path_factory.mktemp("setter") / "fleet", "gpu-1=2xH200") as lab:
        unwatched(lab.directory)
        services = lab.directory / "services.yml"
        services.write_text(re.sub(r"^ *first_release:.*\n", "", services.read_text(), flags=re.MULTILINE))
        succeeds("bundle", "build", inventory=lab.inventory)
        succeeds("provision", inventory=lab.inventory)
        yield lab


def sh(fleet: LabFleet, line: str) -> str:
    done = fleet.run("gpu-1", ["sudo", "-n", "sh", "-c", line])
    assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def ask(fleet: LabFleet, user: str = "opsctl-agent", **request: Any) -> dict[str, Any]:
    """One question on a connection of its own."""
    done = fleet.run("gpu-1", ["sudo", "-n", "-u", user, PYTHON, "-c", HOLDER, json.dumps(request)])
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def hold(fleet: LabFleet, unit: str, *requests: dict[str, Any]) -> None:
    """A process of the agent's user that asks, and keeps its connection."""
    done = fleet.run("gpu-1", ["sudo", "-n", "systemd-run", "--collect", f"--unit={unit}", "--uid=opsctl-agent",
                               "--gid=opsctl-agent", PYTHON, "-c", FOR_LONG, *map(json.dumps, requests)])
    assert done.returncode == 0, done.stderr


def gpu(fleet: LabFleet, index: int) -> Any:
    lab = state.find(fleet.name)
    return StateFile(trees.state_path(lab.place(lab.machine("gpu-1")))).machine.gpus[index]


def until(what: Callable[[], Any], within_s: float = 15) -> float:
    """Seconds until it is true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < within_s, f"not within {within_s:.0f} s"
        subprocess.run(["sleep", "0.1"], check=True)
    return time.monotonic() - began


def uuids(fleet: LabFleet) -> list[str]:
    return sh(fleet, "nvidia-smi --query-gpu=uuid --format=csv,noheader").split()


def test_it_runs_and_units_expose_little(fleet: LabFleet) -> None:
    assert sh(fleet, f"systemctl is-active {OURS[0]} {OURS[1]}").split() == ["active"] * 2
    sh(fleet, f"systemd-analyze security --no-pager --threshold=30 {' '.join(OURS)}")
    assert sh(fleet, "stat -c '%a %U %G' /run/opsctl/setter/setter.sock") == "660 root opsctl-agent"
    refused = fleet.run("gpu-1", ["sudo", "-n", "-u", "nobody", PYTHON, "-c", HOLDER, '{"verb":"state"}'])
    assert "PermissionError" in refused.stderr


def test_clocks_and_power_are_set_and_a_killed_setter_leaves_nothing(fleet: LabFleet) -> None:
    first, second = uuids(fleet)
    hold(fleet, "holder", {"verb": "clocks", "gpu": first, "max_mhz": 900},
         {"verb": "power", "gpu": second, "watts": 300})
    until(lambda: gpu(fleet, 0).settings.locked_max_mhz == 900 and gpu(fleet, 1).settings.power_limit_mw == 300_000)
    assert ask(fleet, verb="state")["gpus"][first] == {"max_mhz": 900, "watts": None}
    sh(fleet, "systemctl kill --signal=KILL opsctl-setter.service")
    until(lambda: gpu(fleet, 0).settings.locked_max_mhz == 0 and gpu(fleet, 1).settings.power_limit_mw == 700_000)
    until(lambda: sh(fleet, "systemctl show --property=ActiveState --value opsctl-setter") == "active")
    assert ask(fleet, verb="state")["gpus"] == {}
    assert f'"gpu": "{first}"' in sh(fleet, "journalctl --identifier=opsctl-audit --output=cat --no-pager")


def test_when_the_holder_is_gone_for_five_seconds_clocks_are_given_back(fleet: LabFleet) -> None:
    first, _ = uuids(fleet)
    hold(fleet, "another-holder", {"verb": "clocks", "gpu": first, "max_mhz": 800})
    until(lambda: gpu(fleet, 0).settings.locked_max_mhz == 800)
    sh(fleet, "systemctl kill --signal=KILL another-holder.service")
    took_s = until(lambda: gpu(fleet, 0).settings.locked_max_mhz == 0)
    assert took_s > 3, "an agent that comes back finds what it had set"
    hold(fleet, "third-holder", {"verb": "clocks", "gpu": first, "max_mhz": 700})
    until(lambda: gpu(fleet, 0).settings.locked_max_mhz == 700)
    sh(fleet, "systemctl stop opsctl-setter && systemctl stop third-holder")
    assert gpu(fleet, 0).settings.locked_max_mhz == 0, "also when it is stopped in order"
    sh(fleet, "systemctl start opsctl-setter")


def test_an_instance_is_stopped_and_started_from_within_the_sandbox(fleet: LabFleet) -> None:
    dropin = "/etc/systemd/system/inference@chat.0.service.d/zz-test.conf"
    sh(fleet, f"printf '[Unit]\\nConditionPathExists=\\n[Service]\\nExecStart=\\nExecStart=/bin/sleep 600\\n' >{dropin}"
       " && systemctl daemon-reload")

    def main_pid() -> int:
        return int(sh(fleet, "systemctl show --property=MainPID --value inference@chat.0"))

    try:
        for how in ("drain", "now"):
            assert ask(fleet, verb="start", instance="chat.0") == {"ok": True}
            until(main_pid)
            assert ask(fleet, verb="stop", instance="chat.0", how=how) == {"ok": True, "how": how}
            until(lambda: not main_pid())
        sh(fleet, "mkdir -p /var/lib/opsctl/undo && touch /var/lib/opsctl/undo/chat.0.json")
        assert "cutover" in ask(fleet, verb="start", instance="chat.0")["words"]
        assert ask(fleet, verb="start", instance="sshd.0")["code"] == "unknown_instance"
    finally:
        sh(fleet, f"rm -f /var/lib/opsctl/undo/chat.0.json {dropin} && systemctl daemon-reload && "
           "systemctl reset-failed inference@chat.0.service")


def test_what_undoes_cutovers_works_in_its_sandbox(fleet: LabFleet) -> None:
    record = json.dumps({"instance": "chat.0", "from": "", "to": "v1-0", "owner": "run:x", "ran": False,
                         "touched": True, "boot": "another"})
    sh(fleet, "mkdir -p /srv/opsctl/chat /var/lib/opsctl/undo && ln -s releases/v1-0 /srv/opsctl/chat/current.0 && "
       f"printf '%s' '{record}' >/var/lib/opsctl/undo/chat.0.json && systemctl restart opsctl-recover")
    assert sh(fleet, "ls /srv/opsctl/chat /var/lib/opsctl/undo") == "/srv/opsctl/chat:\n\n/var/lib/opsctl/undo:"


def test_the_load_balancers_page_is_named_and_answers_the_agent(fleet: LabFleet) -> None:
    placement = sh(fleet, "cat /etc/opsctl/instances/chat.0.toml")
    assert "min_serving = 1" in placement
    url = json.loads(next(line for line in placement.splitlines() if line.startswith("statistics")).partition("=")[2])
    page = sh(fleet, f"runuser -u opsctl-agent -- {PYTHON} -c 'import sys, urllib.request; "
              f"print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())' '{url[0]}'")
    assert "chat,gpu-1.chat.0," in page


def test_provision_again_changes_nothing(fleet: LabFleet) -> None:
    assert "nothing to do: zero changes" in succeeds("provision", inventory=fleet.inventory).stdout
