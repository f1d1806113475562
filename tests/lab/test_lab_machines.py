"""The lab keeps its word: side by side, gone without a trace, power cuts that hurt, snapshots that heal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import opsctl, refused, succeeds
from leftovers import leftovers

from opsctl.lab import machines, processes, state

pytestmark = pytest.mark.lab

FIRST, SECOND = "test-first", "test-second"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """A verb as a process that is not waited for."""
    return subprocess.Popen([sys.executable, "-m", "opsctl", *map(str, arguments)], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def status(name: str) -> dict[str, Any]:
    return succeeds("lab", "status", "--name", name, "--json").document["labs"][0]


def test_two_labs_coexist_and_leave_nothing(computer: None, tmp_path: Path) -> None:
    before = leftovers(FIRST, SECOND)
    try:
        starting = [start("lab", "up", "--name", name, "--gpu-hosts", "1", "--fleet", tmp_path / name)
                    for name in (FIRST, SECOND)]
        for process in starting:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said
        labs = {name: status(name) for name in (FIRST, SECOND)}
        assert labs[FIRST]["subnet"] != labs[SECOND]["subnet"]
        other = labs[SECOND]["machines"][0]["address"]
        for name in (FIRST, SECOND):
            assert [machine["state"] for machine in labs[name]["machines"]] == ["running", "running"]
            assert ssh(name, "gpu-1", "ping", "-c1", "-W2", "ops-1").returncode == 0
            assert "default" not in ssh(name, "gpu-1", "ip", "route").stdout
        assert ssh(FIRST, "gpu-1", "ping", "-c1", "-W1", other).returncode != 0
        assert leftovers(FIRST, SECOND) - before, "the comparison sees nothing of a lab that runs"
    finally:
        for name in (FIRST, SECOND):
            succeeds("lab", "down", "--name", name)
    left = leftovers(FIRST, SECOND) - before
    assert not left, "\n".join(sorted(left))
    assert list(tmp_path.iterdir()) == []


def ssh(name: str, host: str, *command: str) -> subprocess.CompletedProcess[str]:
    """``opsctl lab ssh``, as a person types it."""
    return subprocess.run([sys.executable, "-m", "opsctl", "lab", "ssh", "--name", name, host, "--", *command],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("moment", ["== Lab", "answers SSH"], ids=["disks are being made", "machines boot"])
def test_a_lab_killed_while_it_is_made_goes_without_a_trace(computer: None, tmp_path: Path, moment: str) -> None:
    name = FIRST
    before = leftovers(name)
    making = start("lab", "up", "--name", name, "--gpu-hosts", "2", "--fleet", tmp_path / "fleet")
    assert making.stderr is not None
    for line in making.stderr:
        if moment in line:
            break
    making.send_signal(signal.SIGKILL)
    making.communicate(timeout=30)
    assert leftovers(name) - before
    succeeds("lab", "down", "--name", name)
    left = leftovers(name) - before
    assert not left, "\n".join(sorted(left))
    assert not (tmp_path / "fleet").exists()


def test_a_power_cut_loses_what_was_not_synced_and_nothing_else(own_lab) -> None:
    script = ("import os\n"
              "kept = os.open('/root/kept', os.O_CREAT | os.O_WRONLY); os.write(kept, b'kept'); os.fsync(kept)\n"
              "os.fsync(os.open('/root', os.O_RDONLY))\n"
              "lost = os.open('/root/lost', os.O_CREAT | os.O_WRONLY); os.write(lost, b'lost')\n")
    written = own_lab.run("gpu-1", ["python3", "-"], stdin=script)
    assert written.returncode == 0, written.stderr
    assert own_lab.run("gpu-1", ["cat", "/root/lost"]).stdout == "lost", "before the cut it can be read"
    succeeds("lab", "power-cut", "gpu-1", "--name", own_lab.name)
    states = {machine["name"]: machine["state"] for machine in status(own_lab.name)["machines"]}
    assert states == {"ops-1": "running", "gpu-1": "off"}
    succeeds("lab", "power-on", "gpu-1", "--name", own_lab.name)
    assert own_lab.run("gpu-1", ["cat", "/root/kept"]).stdout == "kept"
    assert own_lab.run("gpu-1", ["test", "-e", "/root/lost"]).returncode == 1


def test_a_snapshot_brings_disks_and_machines_back(own_lab) -> None:
    assert own_lab.run("gpu-1", ["cp", "/etc/hostname", "/root/early"]).returncode == 0
    succeeds("lab", "snapshot", "early", "--name", own_lab.name)
    assert own_lab.run("gpu-1", ["mv", "/root/early", "/root/late"]).returncode == 0
    succeeds("lab", "power-cut", "ops-1", "--name", own_lab.name)
    succeeds("lab", "restore", "early", "--name", own_lab.name)
    assert own_lab.run("gpu-1", ["ls", "/root"]).stdout.split() == ["early"]
    assert own_lab.run("ops-1", ["hostname"]).stdout == "ops-1\n"
    said = opsctl("lab", "restore", "never-taken", "--name", own_lab.name, "--json")
    assert "early" in refused(said, 2, "lab.no_such_snapshot")


def test_a_machine_that_reboots_comes_back(own_lab) -> None:
    boots = ["journalctl", "--quiet", "--list-boots", "--no-pager"]
    assert len(own_lab.run("gpu-1", boots).stdout.splitlines()) == 1
    lab = state.find(own_lab.name)
    machine = lab.machine("gpu-1")
    init = machines.find_init(machine)
    assert init is not None
    own_lab.run("gpu-1", ["systemctl", "reboot"])
    assert processes.wait_gone(init, 60)
    rebooted = machines.wait_until_up(lab, machine, time.monotonic() + 60)
    assert rebooted.init not in (None, init)
    assert len(own_lab.run("gpu-1", boots).stdout.splitlines()) == 2


@pytest.mark.parametrize("own_lab", [3], indirect=True)
def test_the_three_ways_to_log_in(own_lab) -> None:
    assert own_lab.run("gpu-1", ["id", "-un"]).stdout == "root\n"
    for host in ("gpu-2", "gpu-3"):
        assert own_lab.run(host, ["id", "-un"]).stdout == "operator\n"
        assert own_lab.run(host, ["sudo", "-n", "id", "-un"]).stdout == "root\n"
    configured = subprocess.run(["ssh", "-F", own_lab.directory / ".opsctl/ssh_config", "-G", "gpu-3"],
                                capture_output=True, text=True, check=True).stdout
    assert "proxyjump ops-1" in configured
    assert "stricthostkeychecking true" in configured
    assert (own_lab.directory / "keys/login").stat().st_mode & 0o777 == 0o600
    assert own_lab.run("gpu-1", ["systemctl", "is-system-running", "--wait"]).stdout == "running\n"
    assert own_lab.run("gpu-1", ["find", "/etc/apt", "-name", "*.list", "-o", "-name", "*.sources"]).stdout == ""
    again = succeeds("lab", "up", "--name", own_lab.name, "--json").document
    assert again["changed"] is False


def test_a_boot_that_fails_shows_the_console(own_lab) -> None:
    damage = own_lab.run("gpu-1", ["sh", "-c", "rm /usr/lib/systemd/systemd /sbin/init && sync"])
    assert damage.returncode == 0, damage.stderr
    succeeds("lab", "power-cut", "gpu-1", "--name", own_lab.name)
    said = opsctl("lab", "power-on", "gpu-1", "--name", own_lab.name, "--json")
    words = refused(said, 1, "lab.boot_failed")
    assert "gpu-1" in words
    assert said.document["error"]["log_tail"], "the console's last lines are missing"


def test_a_fleet_directory_of_somebody_is_left_alone(computer: None, tmp_path: Path) -> None:
    mine = tmp_path / "inventory.ini"
    mine.write_text("[gpu]\nreal ansible_host=192.0.2.7\n")
    before = leftovers(FIRST)
    refused(opsctl("lab", "up", "--name", FIRST, "--fleet", tmp_path, "--json"), 5, "lab.fleet_taken")
    assert mine.read_text() == "[gpu]\nreal ansible_host=192.0.2.7\n"
    assert leftovers(FIRST) == before
