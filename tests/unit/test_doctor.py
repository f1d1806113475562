"""doctor: what measured facts mean, and that the measuring sees what is really there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from session_server import Server, make_key, serving
from typer.testing import CliRunner

from opsctl.cli import main
from opsctl.doctor import (
    HERE,
    Finding,
    Here,
    Level,
    There,
    clock_offset,
    counts,
    judge_here,
    judge_host,
    parse_disks,
    parse_ssh_version,
    parse_sshd,
)
from opsctl.engines.session import Session
from opsctl.fleet.model import Fleet, Host
from opsctl.measuring import measure_here, measure_host, measure_hosts, open_keys
from opsctl.releases.remote import HOST_PROGRAM

GB = 1_000_000_000
AGENT = "0.1.0+1a2b3c4d"
GOOD_HERE = Here(python=(3, 11), ansible="2.19.4", pyinfra="3.10.1", ssh=(9, 2), signs="", missing_programs=(),
                 free_bytes=50 * GB, clock_behind_s=0.0, open_keys=(), missing_keys=(), keys_in_git=(),
                 missing_trust=(), bundle="", not_pinned=())
GOOD_THERE = There(connect_s=0.2, command_s=0.02, profile_s=0.01, max_sessions=10, max_startups=10,
                   clock_offset_s=0.3, clock_error_s=0.01, agent=AGENT,
                   disks=(("/srv", 50 * GB, 1), ("/opt", 20 * GB, 2), ("/var", 20 * GB, 2)))
NO_SUDO = {"code": "host.no_sudo", "message": "gpu-1: ann cannot become root",
           "hint": "echo ... > /etc/sudoers.d/opsctl"}
SILENT = {"code": "host.unreachable", "message": "gpu-1 does not answer", "hint": "ssh -F .opsctl/ssh_config gpu-1"}


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.check, one.level.value) for one in findings if one.level is not Level.PASS]


def test_all_is_well() -> None:
    here, there = judge_here(GOOD_HERE), judge_host("gpu-1", GOOD_THERE, AGENT)
    assert wrong(here + there) == []
    assert {one.fix for one in here + there} == {""}
    assert {one.where for one in here} == {HERE}
    assert [one.check for one in here] == ["python", "ansible-core", "pyinfra", "ssh", "ssh-keygen", "gpg", "keys",
                                           "keys-mode", "keys-git", "trust", "disk", "clock", "bundle", "known-hosts"]
    assert [one.check for one in there] == ["connect", "command", "login-shell", "maxsessions", "maxstartups", "clock",
                                            "sudo", "disk/srv", "disk/opt", "agent"]


@pytest.mark.parametrize(("changes", "check", "level", "fix"), [
    ({"python": (3, 10)}, "python", "FIX", "3.11"),
    ({"ansible": ""}, "ansible-core", "FIX", "pip install"),
    ({"ansible": "2.20.0"}, "ansible-core", "FIX", "ansible-core==2.19.*"),
    ({"pyinfra": "3.1.0"}, "pyinfra", "FIX", "pyinfra==3.10.*"),
    ({"ssh": None}, "ssh", "FIX", "apt-get install openssh-client"),
    ({"ssh": (7, 9)}, "ssh", "FIX", "apt-get install openssh-client"),
    ({"signs": "unknown option -- Y"}, "ssh-keygen", "FIX", "openssh-client"),
    ({"missing_programs": ("gpgv",)}, "gpg", "FIX", "apt-get install gpg gpgv"),
    ({"missing_keys": ("keys/release",)}, "keys", "WARN", "opsctl init"),
    ({"open_keys": ("keys/release",)}, "keys-mode", "FIX", "chmod go= keys/release"),
    ({"open_keys": ("keys/my key",)}, "keys-mode", "FIX", "chmod go= 'keys/my key'"),
    ({"keys_in_git": ("keys/release",)}, "keys-git", "FIX", "git rm -r --cached keys/release"),
    ({"missing_trust": ("trust/bundle.asc",)}, "trust", "FIX", "opsctl init"),
    ({"free_bytes": 3 * GB}, "disk", "WARN", "du"),
    ({"free_bytes": GB // 2}, "disk", "FIX", "du"),
    ({"clock_behind_s": 7200.0}, "clock", "FIX", "timedatectl set-ntp true"),
    ({"bundle": "missing"}, "bundle", "WARN", "opsctl bundle build"),
    ({"bundle": "x is not the file that was signed."}, "bundle", "FIX", "opsctl bundle build"),
    ({"not_pinned": ("gpu-1",)}, "known-hosts", "FIX", "opsctl trust"),
])
def test_this_computer(changes: dict[str, Any], check: str, level: str, fix: str) -> None:
    findings = judge_here(dataclasses.replace(GOOD_HERE, **changes))
    assert wrong(findings) == [(check, level)]
    assert fix in next(one.fix for one in findings if one.check == check)


@pytest.mark.parametrize(("changes", "expected", "fix"), [
    ({"error": SILENT}, [("ssh", "FIX")], "ssh -F .opsctl/ssh_config gpu-1"),
    ({"connect_s": 5.0}, [("connect", "WARN")], "resolv.conf"),
    ({"command_s": 1.2}, [("command", "WARN")], "opsctl exec --limit gpu-1 --"),
    ({"profile_s": 0.51}, [("login-shell", "WARN")], "bash -lxc true"),
    ({"profile_s": 0.49}, [], ""),
    ({"profile_s": -0.1}, [], ""),
    ({"max_sessions": 1}, [("maxsessions", "WARN")], "echo MaxSessions 10 > /etc/ssh/sshd_config.d/"),
    ({"max_startups": 2}, [("maxstartups", "WARN")], "echo MaxStartups 10:30:100 >"),
    ({"max_sessions": None, "max_startups": None}, [], ""),
    ({"clock_offset_s": -2.5}, [("clock", "WARN")], "opsctl exec --limit gpu-1 -- timedatectl set-ntp true"),
    ({"clock_offset_s": 2.5, "clock_error_s": 1.0}, [], ""),  # the line is too slow to tell
    ({"sudo_error": NO_SUDO, "agent": None}, [("sudo", "FIX")], "sudoers.d"),
    ({"disks": (("/srv", 3 * GB, 1), ("/opt", 3 * GB, 1), ("/var", 3 * GB, 1))}, [("disk/srv", "WARN")], "opsctl gc"),
    ({"disks": (("/srv", 30 * GB, 1), ("/opt", 30 * GB, 1), ("/var", 1, 2))}, [("disk/var", "FIX")], "--vacuum-size"),
    ({"agent": ""}, [("agent", "WARN")], "opsctl provision --limit gpu-1"),
    ({"agent": "0.1.0+00000000"}, [("agent", "WARN")], "opsctl bundle build && opsctl provision --limit gpu-1"),
    ({"agent": None, "agent_error": "gpu-1: no answer"}, [("agent", "FIX")], "opsctl provision --limit gpu-1"),
    ({"deaf_instances": ("chat.0",)}, [("agent-port", "FIX")], "systemctl restart opsctl-agent"),
])
def test_a_host(changes: dict[str, Any], expected: list[tuple[str, str]], fix: str) -> None:
    findings = judge_host("gpu-1", dataclasses.replace(GOOD_THERE, **changes), AGENT)
    assert wrong(findings) == expected
    assert all(bool(one.fix) is (one.level is not Level.PASS) for one in findings)
    assert fix in "".join(one.fix for one in findings)


@pytest.mark.parametrize(("text", "expected"), [
    ("OpenSSH_9.2p1 Debian-2+deb12u5, OpenSSL 3.0.15", (9, 2)), ("OpenSSH_10.0p2 Debian-7", (10, 0)),
    ("OpenSSH_for_Windows_9.5p1", None), ("Sun_SSH_1.5", None), ("", None),
])
def test_versions_of_ssh(text: str, expected: tuple[int, int] | None) -> None:
    assert parse_ssh_version(text) == expected


def test_answers_of_programs() -> None:
    assert parse_sshd("port 22\nmaxsessions 4\nmaxstartups 10:30:100\nlistenaddress\n") == (4, 10)
    assert parse_sshd("sshd: no hostkeys available") == (None, None)
    assert parse_disks("/srv 10 4096 ff\n/opt x y z\nstat: cannot read\n") == (("/srv", 40960, 255),)
    assert clock_offset(100.0, 100.2, "102.600000000\n") == (pytest.approx(2.5), pytest.approx(0.1))
    assert clock_offset(1, 2, "date: invalid") is None


def test_counts() -> None:
    assert counts(judge_here(dataclasses.replace(GOOD_HERE, bundle="missing"))) == {"PASS": 13, "WARN": 1, "FIX": 0}


# From here on things are measured: a folder, and a real SSH server.

def test_private_keys_that_others_may_read_are_found(tmp_path: Path) -> None:
    for name, mode in (("release", 0o644), ("release.pub", 0o644), ("bundle/pubring.kbx", 0o644),
                       ("bundle/private-keys-v1.d/a.key", 0o600), ("bundle/b.rev", 0o640)):
        path = tmp_path / "keys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        path.chmod(mode)
    (tmp_path / "keys").chmod(0o700)
    assert list(open_keys(tmp_path)) == ["keys/bundle/b.rev", "keys/release"]
    (tmp_path / "keys").chmod(0o755)
    assert next(open_keys(tmp_path)) == "keys"


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


@pytest.fixture
def server(tmp_path: Path, client_key: Path) -> Iterator[Server]:
    with serving(tmp_path / "server", client_key) as running:
        play(running, tmp_path, "/usr/sbin/sshd", "echo maxsessions 7; echo maxstartups 20:30:100")
        running.environment["SHELL"] = "/bin/sh"
        yield running


def play(server: Server, folder: Path, program: str, text: str) -> None:
    """A program with an absolute path, played; a name alone is put on the host's PATH."""
    path = (folder if "/" in program else folder / "server" / "bin") / Path(program).name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    if "/" in program:
        server.programs[program] = path


def fleet_of(folder: Path, server: Server, client_key: Path, pins: str | None = None) -> Fleet:
    (folder / "known_hosts").write_text(server.pin if pins is None else pins, encoding="utf-8")
    host = Host("gpu-1", "127.0.0.1", ("gpu",), user="ann", port=server.port, identity_file=str(client_key))
    return Fleet(folder, folder / "inventory.ini", (host,), ())


def measured(folder: Path, server: Server, client_key: Path) -> There:
    (there,) = measure_hosts(fleet := fleet_of(folder, server, client_key), fleet.hosts).values()
    return there


def test_a_host_is_measured(tmp_path: Path, server: Server, client_key: Path) -> None:
    state = {"agent": AGENT, "instances": [{"instance": "chat.0", "voice": "up 100%"},
                                           {"instance": "chat.1", "voice": ""}]}
    play(server, tmp_path, HOST_PROGRAM, f"echo '{json.dumps(state)}'")
    there = measured(tmp_path, server, client_key)
    assert there.error is None
    assert (there.max_sessions, there.max_startups) == (7, 20)
    assert (there.agent, there.deaf_instances) == (AGENT, ("chat.1",))
    assert there.clock_offset_s is not None
    assert abs(there.clock_offset_s) <= there.clock_error_s + 0.01
    assert {path for path, *_ in there.disks} == {path for path in ("/srv", "/opt", "/var") if Path(path).is_dir()}
    assert there.connect_s is not None  # zero where a busy computer took longer for a command than for the way
    assert there.sudo_error is None


def test_a_slow_profile_and_a_wrong_clock_are_seen(tmp_path: Path, server: Server, client_key: Path) -> None:
    play(server, tmp_path, "slow-shell", 'sleep 1.2; exec /bin/sh "$@"')
    play(server, tmp_path, "date", f"echo {time.time() + 3600}")
    server.environment["SHELL"] = str(tmp_path / "server" / "bin" / "slow-shell")
    findings = judge_host("gpu-1", measured(tmp_path, server, client_key), AGENT)
    assert {("login-shell", "WARN"), ("clock", "WARN")} <= set(wrong(findings))
    assert "ahead" in next(one.message for one in findings if one.check == "clock")


def test_a_bare_host_an_agent_that_broke_and_a_host_that_is_silent(tmp_path: Path, server: Server, client_key: Path
                                                                   ) -> None:
    server.programs[HOST_PROGRAM] = tmp_path / "nothing"
    assert measured(tmp_path, server, client_key).agent == ""
    play(server, tmp_path, HOST_PROGRAM, "echo ImportError >&2; exit 1")
    broken = measured(tmp_path, server, client_key)
    assert broken.agent is None
    assert ("agent", "FIX") in wrong(judge_host("gpu-1", broken, AGENT))
    server.close()
    assert wrong(judge_host("gpu-1", measured(tmp_path, server, client_key), AGENT)) == [("ssh", "FIX")]


def test_sudo_that_asks_is_a_finding_and_the_rest_is_measured(tmp_path: Path, client_key: Path) -> None:
    with serving(tmp_path / "server", client_key, sudo="asking") as asking:
        there = measured(tmp_path, asking, client_key)
    assert there.sudo_error is not None
    assert there.command_s is not None
    assert ("sudo", "FIX") in wrong(judge_host("gpu-1", there, AGENT))


def test_this_machine_as_a_host_has_no_way_to_measure(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, tmp_path / "inventory.ini", (Host("this", "this", (), connection="local"),), ())
    with Session(fleet, "this") as session:
        there = measure_host(session)
    assert (there.connect_s, there.profile_s, there.clock_offset_s, there.max_sessions) == (None, None, None, None)
    assert there.disks


def test_this_computer_is_measured(tmp_path: Path, server: Server, client_key: Path) -> None:
    fleet = fleet_of(tmp_path, server, client_key, pins="")
    (tmp_path / "services.yml").write_text("", encoding="utf-8")
    os.utime(tmp_path / "services.yml", (time.time() + 900,) * 2)
    (tmp_path / "keys").mkdir(mode=0o700)
    make_key(tmp_path / "keys" / "release")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "add", "-f", "keys"], check=True)
    here = measure_here(fleet, fleet.hosts)
    assert (here.signs, here.bundle) == ("", "missing")
    assert here.ansible.startswith("2.")
    assert here.ssh is not None
    assert here.keys_in_git == ("keys/release",)
    assert here.missing_trust == ("trust/allowed_signers", "trust/bundle.asc")
    assert here.not_pinned == ("gpu-1",)
    assert 800 < here.clock_behind_s < 1000


def test_an_ssh_keygen_that_cannot_sign_is_found(tmp_path: Path, server: Server, client_key: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = fleet_of(tmp_path, server, client_key)
    old = tmp_path / "old"
    old.mkdir()
    (old / "ssh-keygen").write_text('#!/bin/sh\ncase "$1" in -Y) echo "unknown option -- Y" >&2; exit 1;; esac\n'
                                    'exec /usr/bin/ssh-keygen "$@"\n', encoding="utf-8")
    (old / "ssh-keygen").chmod(0o755)
    monkeypatch.setenv("PATH", f"{old}:{os.environ['PATH']}")
    assert measure_here(fleet, fleet.hosts).signs == "unknown option -- Y"


@pytest.mark.parametrize(("there", "exit_code"), [(GOOD_THERE, 0), (dataclasses.replace(GOOD_THERE, command_s=3.0), 0),
                                                  (There(error=SILENT), 9)])
def test_the_exit_code_is_9_when_something_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: There,
                                                       exit_code: int) -> None:
    inventory = tmp_path / "inventory.ini"
    inventory.write_text("[gpu]\ngpu-1 ansible_connection=local service_address=127.0.0.1 "
                         "management_address=127.0.0.1\n[lb]\ngpu-1\n[gateway]\ngpu-1\n[monitor]\ngpu-1\n")
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n", encoding="utf-8")
    monkeypatch.setattr("opsctl.measuring.measure_here", lambda _fleet, _hosts: GOOD_HERE)
    monkeypatch.setattr("opsctl.measuring.measure_hosts", lambda _fleet, _hosts: {"gpu-1": there})
    said = CliRunner().invoke(main.app, ["doctor", str(inventory), "--json"])
    assert said.exit_code == exit_code, said.stderr
    document = json.loads(said.stdout)
    assert document["schema"] == "opsctl.doctor/v1"
    assert set(document) == {"schema", "findings", "counts", "measured"}
    assert set(document["findings"][0]) == {"where", "check", "level", "message", "fix"}
    said = CliRunner().invoke(main.app, ["doctor", str(inventory)])
    assert all(line.startswith(("PASS", "WARN", "FIX", "      ")) for line in said.stdout.splitlines())
    assert ("$ ssh -F" in said.stdout) is (exit_code == 9)
