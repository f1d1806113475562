"""What ``opsctl verify`` runs on a live fleet: read-only tests, each a sentence of one host. ``make test`` leaves them.

``opsctl.accepting`` starts pytest here and says in the environment which fleet is meant. A test is marked with whom it
asks and with its sentence; each target of that kind (``opsctl.verifying.targets``) makes one test of it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host as Machine

from opsctl.agent import ledger
from opsctl.agent.ledger import Line
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import gateway
from opsctl.verifying import Doubtful, Target, Wrong, codename_in, sentence, targets, versions_in

HOST_PROGRAM = "/opt/opsctl/agent/bin/opsctl-host"
INDEX = "/srv/opsctl-gateway/bundle/apt/dists/{codename}/main/binary-amd64/Packages"
# Sends bytes to an address and gives back all that comes until the other side is done; on the host: its network counts.
EXCHANGE = """
import base64, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[4])) as connection:
    connection.sendall(base64.b64decode(sys.argv[3]))
    sys.stdout.write(base64.b64encode(b"".join(iter(lambda: connection.recv(65536), b""))).decode())
"""

TASK: dict[str, Any] = json.loads(os.environ.get("OPSCTL_VERIFY", "{}"))
collect_ignore_glob = [] if TASK else ["test_*.py"]


class Asked:
    """One host, its testinfra backend, and what was asked of it once for all tests."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.host = fleet.host(name)
        self._mute: set[str] = set()  # verbs that gave no answer: one test says so, and the others have nothing to ask

    @cached_property
    def machine(self) -> Machine:
        local = self.host.connection == "local"
        where = {"hostspec": "local://"} if local else {
            "hostspec": f"ssh://{self.host.name}", "ssh_config": str(self.fleet.ssh_config)}
        plain = testinfra.get_host(**where)
        return plain if plain.check_output("id -u") == "0" else testinfra.get_host(**where, sudo=True)

    def run(self, argv: Sequence[str]) -> Any:
        """testinfra's result of an argument vector: ``rc``, ``stdout``, ``stderr``."""
        return self.machine.run(" ".join(["%s"] * len(argv)), *argv)

    @cached_property
    def provisioned(self) -> bool:
        return self.machine.file(HOST_PROGRAM).exists

    def verb(self, *words: str) -> dict[str, Any]:
        """The document of a verb of ``opsctl-host`` that only looks."""
        if not self.provisioned:
            pytest.skip("the host is not provisioned")
        if words[0] in self._mute:
            pytest.skip(f"opsctl-host {words[0]} gives no answer")
        done = self.run([HOST_PROGRAM, *words])
        try:
            document: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            document = {"error": {"message": done.stderr.strip() or f"exit code {done.rc}", "hint": "opsctl provision"}}
        if "error" in document:
            self._mute.add(words[0])
            raise Wrong(f"an answer to opsctl-host {words[0]}", document["error"]["message"], document["error"]["hint"])
        return document

    @cached_property
    def state(self) -> dict[str, Any]:
        return self.verb("state", "--json")

    @cached_property
    def servers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.verb("balancer")["servers"]
        return found

    @cached_property
    def codename(self) -> str:
        return codename_in(self.machine.file("/etc/os-release").content_string)

    def exchange(self, address: str, port: int, data: bytes, timeout_s: float = 60.0) -> bytes:
        done = self.run(["/usr/bin/python3", "-c", EXCHANGE, address, str(port), base64.b64encode(data).decode(),
                         str(timeout_s)])
        if done.rc:
            raise Wrong(f"an answer from {address} port {port}", (done.stderr.strip().splitlines() or ["none"])[-1])
        return base64.b64decode(done.stdout)

    def instance(self, name: str) -> Mapping[str, Any]:
        found = next((one for one in self.state["instances"] if one["instance"] == name), None)
        if found is None:
            pytest.skip(f"the host does not know {name}, as its placements say")
        if found.get("unfinished"):
            pytest.skip("its release is being changed")
        return dict(found)


class Asking:
    """All hosts, each asked over one connection, and the gateway's books."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._known: dict[str, Asked] = {}
        self._versions: dict[str, dict[str, set[str]]] = {}
        self._lines: dict[str, tuple[Line, ...]] = {}

    def host(self, name: str) -> Asked:
        return self._known.setdefault(name, Asked(self.fleet, name))

    def reaches(self, name: str) -> bool:
        return name in TASK["reached"]

    @property
    def gateway(self) -> Asked:
        """Skips when the gateway does not answer: that is told once, of itself."""
        name = gateway(self.fleet).name
        if name in TASK["hosts"] and name not in TASK["reached"]:
            pytest.skip("the gateway does not answer")
        return self.host(name)

    def ledger(self, service: str) -> tuple[Line, ...]:
        """Skips where there is none yet."""
        if service not in self._lines:
            shown = self.gateway.verb("ledger-show", "--service", service)["lines"]
            self._lines[service] = tuple(map(ledger.line_of, shown))
        if ledger.tip(self._lines[service]) is None:
            pytest.skip(f"{service} has no release yet")
        return self._lines[service]

    def bundle_versions(self, codename: str) -> dict[str, set[str]] | None:
        """By package; None when packages do not come from the bundle."""
        if self.fleet.package_source != "gateway":
            return None
        if codename not in self._versions:
            index = self.gateway.machine.file(INDEX.format(codename=codename))
            if not index.exists:
                raise Wrong(f"packages for {codename} in the gateway's bundle", f"no {INDEX.format(codename=codename)}")
            self._versions[codename] = versions_in(index.content_string)
        return self._versions[codename]


@pytest.fixture(scope="session")
def asking(fleet: Fleet) -> Asking:
    return Asking(fleet)


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    return _fleet()


@pytest.fixture
def asked(asking: Asking, target: Target) -> Asked:
    """The host of the test's target."""
    return asking.host(target.host)


@pytest.fixture
def provisioned(asked: Asked) -> Asked:
    """The same; skips the hosts that were never provisioned."""
    if not asked.provisioned:
        pytest.skip("the host is not provisioned")
    return asked


_FLEETS: list[Fleet] = []


def _fleet() -> Fleet:
    if not _FLEETS:
        _FLEETS.append(read_fleet(Path(TASK["inventory"])))
    return _FLEETS[0]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "of(kind, sentence): whom the test asks, and what it says of each")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.iter_markers("of"):
        kind, template = mark.args
        fleet = _fleet()
        found = targets(fleet, [fleet.host(name) for name in TASK["hosts"]], kind)
        metafunc.parametrize("target", found, ids=[f"{target.host}: {sentence(template, target)}" for target in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Host by host, so that a person sees one after the other; first of each whether it is provisioned at all."""
    if not TASK:
        return
    order = {name: number for number, name in enumerate(TASK.get("hosts", ()))}
    asked = [item for item in items if isinstance(_target(item), Target)]  # pytest's own word: there is nobody to ask
    items[:] = sorted(asked, key=lambda item: (order.get(_target(item).host, 0), item.path.name != "test_hosts.py"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if TASK and (call.when == "call" or (call.when == "setup" and error is not None)):
        template = next(item.iter_markers("of")).args[1]
        document = {"host": _target(item).host, "check": sentence(template, _target(item)), **outcome(error)}
        os.write(TASK["events_fd"], json.dumps(document).encode() + b"\n")
    return report


def _target(item: pytest.Item) -> Target:
    found: Target = item.callspec.params["target"]  # type: ignore[attr-defined]
    return found


def outcome(error: BaseException | None) -> dict[str, str]:
    """The verdict on a test, from what it raised."""
    if error is None:
        return {"verdict": "good"}
    if isinstance(error, Wrong):
        return {"verdict": "wrong", "expected": error.expected, "found": error.found, "hint": error.hint}
    if isinstance(error, Doubtful):
        return {"verdict": "warning", "found": str(error)}
    if isinstance(error, pytest.skip.Exception):
        return {"verdict": "skipped", "found": str(error.msg)}
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return {"verdict": "wrong", "expected": "an answer", "found": f"the question could not be asked: {words}",
            "hint": "opsctl status; .opsctl/verify/pytest.log has all of it"}
