"""Sessions with real sshd, real sudo and real power cuts, in every kind of login that the lab has."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from typing import Any

import pytest

from opsctl.engines.ansible_programs import ansible_program
from opsctl.engines.events import discard
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.lab import laboratory

pytestmark = [pytest.mark.lab, pytest.mark.parametrize("own_lab", [3], indirect=True)]

SOON_S = 25.0  # ALIVE_INTERVAL_S * ALIVE_COUNT is 12, and a busy computer adds to it


def test_root_sudo_and_jump_answer_alike(own_lab: Any) -> None:
    fleet = read_fleet(own_lab.inventory)
    assert {(host.name, host.user == "root", bool(host.proxy_jump)) for host in fleet.group("gpu")} == {
        ("gpu-1", True, False), ("gpu-2", False, False), ("gpu-3", False, True)}

    def ask(session: Session) -> tuple[str, str]:
        return session.run(["id", "-u"]).stdout.strip(), session.run(["hostname"], sudo=False).stdout.strip()

    assert on_each(fleet, fleet.hosts, ask) == {host.name: ("0", host.name) for host in fleet.hosts}

    block = os.urandom(1 << 20)
    whole = hashlib.sha256(block * 50).hexdigest()

    def send(session: Session) -> str:
        return session.send(["sha256sum"], (block for _ in range(50)), timeout_s=60).stdout.split()[0]

    assert set(on_each(fleet, fleet.group("gpu"), send).values()) == {whole}, "50 MB through standard input"

    for host in fleet.hosts:
        plain = own_lab.run(host.name, ["hostname"])
        assert (plain.returncode, plain.stdout.strip()) == (0, host.name), plain.stderr
    pinged = subprocess.run(
        [ansible_program("ansible"), "all", "-m", "ansible.builtin.command", "-a", "id -u", "-b", "-o"],
        cwd=own_lab.directory, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert pinged.returncode == 0, pinged.stdout + pinged.stderr
    assert pinged.stdout.count("rc=0 | (stdout) 0") == len(fleet.hosts), pinged.stdout


def test_user_whose_sudo_is_taken_away_is_refused(own_lab: Any) -> None:
    fleet = read_fleet(own_lab.inventory)
    with Session(fleet, "gpu-2") as session:
        user = session.run(["id", "-un"], sudo=False).stdout.strip()
        session.run(["sh", "-c", "rm -f /etc/sudoers.d/*"])
        with pytest.raises(RefusedError) as caught:
            session.run(["id", "-u"])
        assert caught.value.code == "host.no_sudo"
        assert f"'{user} ALL=(ALL) NOPASSWD: ALL'" in caught.value.hint
        assert session.run(["true"], sudo=False).returncode == 0


def test_power_cut_is_noticed_soon_by_sessions_and_by_shared_connections(own_lab: Any) -> None:
    fleet = read_fleet(own_lab.inventory)
    config = write_ssh_config(fleet)
    cut = threading.Timer(2.0, laboratory.power_cut, (own_lab.name, ["gpu-1"], discard))
    shared = subprocess.Popen(["ssh", "-F", str(config), "gpu-1", "sleep", "600"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Session(fleet, "gpu-1") as session:
        session.run(["true"])
        cut.start()
        started = time.monotonic()
        with pytest.raises(OpsctlError) as caught:
            session.run(["sleep", "600"], timeout_s=300)
        assert caught.value.code == "host.connection_lost"
        assert time.monotonic() - started < SOON_S
        assert shared.wait(SOON_S) == 255
        cut.join()
        answers = on_each(fleet, fleet.hosts, lambda other: other.run(["true"]).returncode)
    gone = answers.pop("gpu-1")
    assert isinstance(gone, RefusedError)
    assert gone.code == "host.unreachable"
    assert set(answers.values()) == {0}
    laboratory.power_on(own_lab.name, ["gpu-1"], discard)
    with Session(fleet, "gpu-1") as session:
        assert session.run(["hostname"]).stdout == "gpu-1\n"
    assert own_lab.run("gpu-1", ["hostname"], timeout_s=SOON_S).stdout == "gpu-1\n"
