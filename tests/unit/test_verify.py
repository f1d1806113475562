"""What verify asks of whom, what it calls wrong, and that a broken expectation reaches the operator as one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opsctl.accepting import verify
from opsctl.agent.ledger import Line
from opsctl.cli.verify import verify_view
from opsctl.engines.events import Event, TaskResult, discard
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import place
from opsctl.resources import resource
from opsctl.verifying import (
    Check,
    Doubtful,
    Wrong,
    check_clock,
    check_hold,
    check_placements,
    check_release,
    check_server,
    check_voice,
    chunks,
    codename_in,
    expected_placement,
    first_difference,
    haproxy_configuration,
    properties,
    release_file,
    targets,
    versions_in,
)

FLEET = Fleet(
    Path("/fleet"), Path("/fleet/inventory.ini"),
    (Host("ops-1", "10.0.0.2", ("gateway", "lb", "monitor"), service_address="10.0.0.2", management_address="10.9.0.2"),
     Host("gpu-1", "10.0.0.11", ("gpu",), service_address="10.0.0.11", management_address="10.9.0.11")),
    (Service("chat", "gpu", port=8100, listen=8000, instances_per_host=2),),
)
OPS, GPU = FLEET.hosts
LINES = [Line(1, "v1", "1" * 64, "2026", "ann"), Line(2, "v2", "2" * 64, "2026", "ann")]


@pytest.mark.parametrize(("kind", "expected"), [
    ("host", [("ops-1", ""), ("gpu-1", "")]),
    ("unit", [("ops-1", "nginx.service"), ("ops-1", "opsctl-recover.service"), ("ops-1", "opsctl-setter.service"),
              ("ops-1", "opsctl-agent.service"),
              ("ops-1", "prometheus-node-exporter.service"), ("ops-1", "haproxy.service"),
              ("ops-1", "prometheus.service"), ("ops-1", "prometheus-alertmanager.service"),
              ("gpu-1", "opsctl-recover.service"), ("gpu-1", "opsctl-setter.service"),
              ("gpu-1", "opsctl-agent.service"),
              ("gpu-1", "prometheus-node-exporter.service")]),
    ("hold", [("ops-1", "nginx"), ("ops-1", "nginx-common"), ("ops-1", "nginx-light"),
              ("ops-1", "prometheus-node-exporter"), ("ops-1", "haproxy"), ("ops-1", "prometheus"),
              ("ops-1", "prometheus-alertmanager"), ("gpu-1", "prometheus-node-exporter")]),
    ("monitor", [("ops-1", "")]),
    ("instance", [("gpu-1", "chat.0"), ("gpu-1", "chat.1")]),
    ("balancer", [("ops-1", "")]),
    ("server", [("ops-1", "gpu-1.chat.0"), ("ops-1", "gpu-1.chat.1")]),
    ("endpoint", [("ops-1", "chat")]),
])
def test_who_is_asked(kind: Any, expected: list[tuple[str, str]]) -> None:
    assert [(target.host, target.what) for target in targets(FLEET, FLEET.hosts, kind)] == expected


def test_nobody_is_asked_of_haproxy_where_there_is_none() -> None:
    hooked = replace(FLEET, load_balancer="hook")
    assert not [target for kind in ("balancer", "server", "endpoint") for target in targets(hooked, hooked.hosts, kind)]


INSTANCE = {"instance": "chat.0", "release": "v2", "digest": "2" * 64, "voice": "up 100%"}
ROW = {"server": "gpu-1.chat.0", "status": "UP", "weight": 100, "agent": "L7OK"}
FILES = {one.instance: expected_placement(one) for one in place(FLEET)}
BUNDLE = versions_in("Package: haproxy\nVersion: 2.6\n\nPackage: haproxy\nArchitecture: amd64\nVersion: 2.7\n")


@pytest.mark.parametrize("check", [
    lambda: check_hold("haproxy", "hold", "2.6", BUNDLE),
    lambda: check_hold("haproxy", "hold", "2.9", None),  # package_source=upstream
    lambda: check_hold("nginx", "hold", "", BUNDLE),  # held, and not installed
    lambda: check_placements(place(FLEET), FILES),
    lambda: check_release(INSTANCE, LINES),
    lambda: check_release(INSTANCE, []),
    lambda: check_voice(INSTANCE, []),
    lambda: check_voice(INSTANCE, [{"instance": "chat.1", "weight": 0}]),
    lambda: check_voice({**INSTANCE, "voice": "up 30%"}, [{"instance": "chat.0", "weight": 30}]),
    lambda: check_server("gpu-1.chat.0", [ROW], 100),
    lambda: check_server("gpu-1.chat.0", [{**ROW, "status": "DRAIN (agent)", "weight": 0}], 0),
    lambda: check_clock({"NTPSynchronized": "yes"}, ["chrony"]),
])
def test_good(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(("check", "expected", "found", "hint"), [
    (lambda: check_hold("haproxy", "install", "2.6", BUNDLE), "on hold", "install", "opsctl provision"),
    (lambda: check_hold("haproxy", "", "", BUNDLE), "on hold", "not known to dpkg", "opsctl provision"),
    (lambda: check_hold("haproxy", "hold", "2.9", BUNDLE), "2.6, 2.7", "2.9", "apt-get install"),
    (lambda: check_placements(place(FLEET)[:1], FILES), "placements of chat.0", "chat.0, chat.1", "provision"),
    (lambda: check_placements(place(FLEET), {}), "chat.0, chat.1", "nobody", "provision"),
    (lambda: check_placements(place(FLEET), {**FILES, "chat.1": {**FILES["chat.1"], "port": 1}}),
     "chat.1: port = 8101", "port = 1", "provision"),
    (lambda: check_release({**INSTANCE, "release": "v1", "digest": "1" * 64}, LINES), "release v2", "release v1",
     "opsctl update-model --version v2"),
    (lambda: check_release({**INSTANCE, "release": "", "digest": ""}, LINES), "release v2", "no release",
     "opsctl provision"),
    (lambda: check_voice({**INSTANCE, "voice": ""}, []), "port 9777: up 100%", "no word", "provision"),
    (lambda: check_voice(INSTANCE, [{"instance": "chat.0", "weight": 0}]), "up 0%", "up 100%", "provision"),
    (lambda: check_server("gpu-1.chat.0", [{**ROW, "status": "DOWN 1/2"}], 100), "UP", "DOWN 1/2", "status"),
    (lambda: check_server("gpu-1.chat.0", [{**ROW, "status": "MAINT"}], 0), "UP", "MAINT", "status"),
    (lambda: check_server("gpu-1.chat.0", [], 100), "among HAProxy's servers", "no such", "provision"),
    (lambda: check_clock({"NTPSynchronized": "no"}, ["chrony"]), "synchronised", "chrony runs", "timedatectl"),
])
def test_wrong_says_what_was_expected_what_is_there_and_what_to_type(
        check: Callable[[], None], expected: str, found: str, hint: str) -> None:
    with pytest.raises(Wrong) as caught:
        check()
    assert expected in caught.value.expected
    assert found in caught.value.found
    assert hint in caught.value.hint


def test_a_clock_that_nobody_sets_is_a_warning() -> None:
    with pytest.raises(Doubtful, match="no time service"):
        check_clock({}, [])


def test_haproxys_configuration_is_the_roles_own_with_what_the_inventory_sets() -> None:
    text = haproxy_configuration(FLEET, replace(OPS, variables={"load_balancer_max_connections": 77}))
    assert "maxconn 77" in text
    assert "server gpu-1.chat.1 10.0.0.11:8101 agent-addr 10.9.0.11 agent-port 9777" in text
    assert "bind 10.0.0.2:8000" in text and "bind 10.9.0.2:8404" in text
    assert first_difference("a\nb", "a\nc\nd") == ("line 2: b", "line 2: c")
    assert first_difference("a\nb", "a") == ("line 2: b", "line 2: the end")


def test_what_the_verifier_gives_haproxys_template_is_what_the_playbook_gives_it() -> None:
    """Two places know the template's variables: with a new one in the playbook alone, verify would call it wrong."""
    playbook = (resource("playbooks") / "vars/fleet.yml").read_text()
    given = set(re.findall(r"^(load_balancer_\w+):", playbook, re.MULTILINE))
    assert given == {"load_balancer_services", "load_balancer_addresses", "load_balancer_management_addresses"}


def test_small_readers() -> None:
    assert codename_in('NAME="Debian"\nVERSION_CODENAME=bookworm\n') == "bookworm"
    assert codename_in("NAME=x") == ""
    assert properties("A=1\nB=x=y\nnone") == {"A": "1", "B": "x=y"}
    assert release_file(FLEET, "bookworm", GPU) == ("10.0.0.2", 8480, "/apt/dists/bookworm/InRelease")
    assert release_file(FLEET, "bookworm", OPS)[0] == "127.0.0.1"


def test_many_hosts_are_shared_among_a_few_processes() -> None:
    hosts = [Host(f"gpu-{number}", "", ()) for number in range(200)]
    shares = list(chunks(hosts, 8, 12))
    assert len(shares) == 8
    assert [host for share in shares for host in share] == hosts
    assert len(list(chunks(hosts[:5], 8, 12))) == 1


# --- the runner, against this computer by testinfra's local backend ---

CONFTEST = resource("tests/acceptance") / "conftest.py"
TESTS = """
import pytest
from opsctl.verifying import Doubtful, Wrong


@pytest.mark.of("host", "the root directory is a directory")
def test_good(asked):
    assert asked.machine.file("/").is_directory


@pytest.mark.of("host", "there is a file /no/such/file")
def test_broken(asked):
    if not asked.machine.file("/no/such/file").exists:
        raise Wrong("the file /no/such/file", "none", "touch it")


@pytest.mark.of("host", "a test that breaks")
def test_breaks(asked):
    raise RuntimeError("the ssh connection broke")


@pytest.mark.of("host", "something odd")
def test_odd(asked):
    raise Doubtful("it is odd")


@pytest.mark.of("host", "nothing to see")
def test_skipped(asked):
    pytest.skip("not here")
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """This computer as a fleet of one, never provisioned."""
    groups = "".join(f"[{group}]\nbox\n" for group in ("lb", "gateway", "monitor"))
    (tmp_path / "inventory.ini").write_text(f"[gpu]\nbox ansible_connection=local\n{groups}")
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n")
    box = Host("box", "box", ("gpu", "lb", "monitor", "gateway"), "local")
    return Fleet(tmp_path, tmp_path / "inventory.ini", (box,), (Service("chat", "gpu", 8100, 8000),))


def acceptance(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(text)
    return folder


def test_each_test_comes_back_as_one_sentence(fleet: Fleet, tmp_path: Path) -> None:
    heard: list[Event] = []
    checks = verify(fleet, fleet.hosts, heard.append, tests=acceptance(tmp_path, TESTS))
    assert [(check.host, check.check, check.verdict) for check in checks] == [
        ("box", "the root directory is a directory", "good"), ("box", "there is a file /no/such/file", "wrong"),
        ("box", "a test that breaks", "wrong"), ("box", "something odd", "warning"),
        ("box", "nothing to see", "skipped")]
    broken, breaks = checks[1:3]
    assert (broken.expected, broken.found, broken.hint) == ("the file /no/such/file", "none", "touch it")
    assert "the ssh connection broke" in breaks.found
    told = [event for event in heard if isinstance(event, TaskResult) and event.status == "failed"]
    assert told[0].message == "expected the file /no/such/file; there is none"


def test_tests_that_cannot_be_run_are_no_success(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(OpsctlError, match="before they were done") as caught:
        verify(fleet, fleet.hosts, discard, tests=acceptance(tmp_path, "import no_such_module"))
    assert caught.value.code == "verify.stopped"
    assert any("no_such_module" in line for line in caught.value.log_tail)


def test_a_host_that_is_silent_is_wrong_and_the_others_are_asked(fleet: Fleet, tmp_path: Path) -> None:
    away = Host("away", "127.0.0.1", ("gpu",), port=9)
    known = replace(fleet, hosts=(*fleet.hosts, away))
    checks = verify(known, known.hosts, discard, tests=acceptance(tmp_path, TESTS))
    assert {check.host for check in checks} == {"box", "away"}
    (silent,) = [check for check in checks if check.host == "away"]
    assert (silent.verdict, silent.check) == ("wrong", "answers over SSH, and its login may become root")


def test_a_machine_that_was_never_provisioned_is_exit_9_and_says_so(fleet: Fleet) -> None:
    """The tests that ship, on this computer, as an operator would call them; pytest itself is not heard."""
    if Path("/opt/opsctl/agent/bin/opsctl-host").exists():
        pytest.skip("this computer is a host of a fleet")
    done = subprocess.run([sys.executable, "-m", "opsctl", "verify", str(fleet.inventory), "--json"],
                          capture_output=True, text=True, check=False, env={**os.environ, "PYTEST_ADDOPTS": "--nope"})
    assert done.returncode == 9, done.stderr
    document = json.loads(done.stdout)
    first = document["checks"][0]
    assert first == {"host": "box", "check": "is provisioned", "verdict": "wrong", "hint": "opsctl provision",
                     "expected": "opsctl's own programs in /opt/opsctl/agent",
                     "found": "none: the host was never provisioned to the end"}
    assert document["wrong"] >= 1
    assert {check["found"] for check in document["checks"] if check["check"].startswith("chat.0")} == {
        "the host is not provisioned"}
    assert "passed" not in done.stderr and "conftest" not in done.stderr


def test_a_person_reads_what_is_wrong_and_what_to_type() -> None:
    console = Console(width=120, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(verify_view([Check("gpu-1", "is well", "good"), Check("gpu-1", "x [y]", "wrong", "a", "b", "type c"),
                               Check("gpu-2", "clock", "warning", found="odd"),
                               Check("gpu-2", "z", "skipped", found="n")], 1.0))
    text = console.export_text()
    for words in ("wrong: gpu-1: x [y]", "expected  a", "there is  b", "type      type c", "warning: gpu-2: clock: odd",
                  "not looked at: gpu-2: n", "4 checks in 1 s: 1 good, 1 wrong, 1 warnings, 1 not looked at"):
        assert words in text
