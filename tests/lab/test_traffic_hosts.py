"""Traffic on real machines: drains as the load balancer sees them, its reloads, staging at a rate, gc.

Leaves the shared lab as it was.
"""

from __future__ import annotations

import http.client
import json
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from opsctl.engines.events import discard
from opsctl.engines.session import Session
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.model import Fleet
from opsctl.lab.model import write_model
from opsctl.releases.importing import Request, import_model
from opsctl.releases.publish import publish
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.store import find
from opsctl.status import endpoints

pytestmark = [pytest.mark.lab, pytest.mark.slow]

CLIENTS = 12
FIRST, SECOND = "gpu-1.chat.0", "gpu-2.chat.0"
ANN, RUN = "operator:ann", "run:20261122-031500-ab12"
MANY_TOKENS = 300  # of the small model: some are always in flight
FEW_TOKENS = 8  # hundreds of requests a second
LIMIT = 3_000_000  # bytes per second


@pytest.fixture
def fleet(provisioned: Any) -> Fleet:
    return read_fleet(provisioned.inventory)


def verb(lab: Any, host: str, *arguments: str) -> dict[str, Any]:
    """Runs opsctl-host as root on a machine, which must be content."""
    done = lab.run(host, ["sudo", HOST_PROGRAM, *arguments], timeout_s=150)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def balancer(lab: Any, *arguments: str) -> dict[str, dict[str, Any]]:
    """What the load balancer says of each server, once it is as it should be."""
    seen = verb(lab, "ops-1", "balancer", "--wait-s", "100", *arguments)
    assert (seen["missing"], seen["busy"]) == ([], []), seen
    return {row["server"]: row for row in seen["servers"]}


class Streams:
    """Clients that stream completions, one after the other without a pause and without a retry."""

    def __init__(self, url: str, tokens: int) -> None:
        self._address = urlsplit(url)
        self._tokens = tokens
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._stream_on) for _ in range(CLIENTS)]
        self.answered: list[str] = []  # by which instance, once its headers came
        self.ended: list[bool] = []
        for thread in self._threads:
            thread.start()

    def _stream_on(self) -> None:
        while not self._enough.is_set():
            connection = http.client.HTTPConnection(str(self._address.hostname), self._address.port or 80, timeout=120)
            try:
                self.ended.append(self._one(connection))
            except (OSError, http.client.HTTPException):
                self.ended.append(False)
            finally:
                connection.close()

    def _one(self, connection: http.client.HTTPConnection) -> bool:
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": self._tokens,
                "stream": True, "ignore_eos": True}
        connection.request("POST", f"{self._address.path}/chat/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        self.answered.append(response.headers.get("x-opsctl-instance", ""))
        return response.status == 200 and response.read().rstrip().endswith(b"[DONE]")

    def since(self, before: int, count: int) -> list[str]:
        """Who answered after the first ``before``; waits until that are ``count`` at least."""
        deadline, pause = time.monotonic() + 60, threading.Event()
        while len(self.answered) < before + count:
            assert time.monotonic() < deadline, "no streams"
            pause.wait(0.05)
        return self.answered[before:]

    def finish(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def streaming(fleet: Fleet, tokens: int) -> Iterator[Streams]:
    (url,) = endpoints(fleet)["chat"]
    streams = Streams(url, tokens)
    try:
        streams.since(0, CLIENTS)
        yield streams
    finally:
        streams.finish()


@pytest.fixture
def drained(provisioned: Any) -> Iterator[Any]:
    """The lab; at its end nobody drains gpu-1 any more, and it gets requests."""
    yield provisioned
    for owner in (ANN, RUN):
        verb(provisioned, "gpu-1", "undrain", "chat.0", "--owner", owner)
    balancer(provisioned, "--wanted", FIRST, "--wanted", SECOND)


def test_a_drain_is_seen_and_loses_nothing(drained: Any, fleet: Fleet) -> None:
    """Streams go on to their end; HAProxy and the engine say when; nothing new comes; then it serves again."""
    with streaming(fleet, MANY_TOKENS) as streams:
        busy = verb(drained, "gpu-1", "idle", "chat.0")
        assert (busy["idle"], busy["running"] > 0) == (False, True)
        verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN, "--reason", "update")
        assert balancer(drained, "--drained", FIRST, "--wanted", SECOND)[FIRST]["weight"] == 0
        idle = verb(drained, "gpu-1", "idle", "chat.0", "--wait-s", "60")
        assert (idle["idle"], idle["running"], idle["waiting"], idle["unit"]) == (True, 0, 0, "active")
        assert set(streams.since(len(streams.answered), 12)) == {SECOND}
        verb(drained, "gpu-1", "undrain", "chat.0", "--owner", RUN)
        balancer(drained, "--wanted", FIRST)
        assert FIRST in streams.since(len(streams.answered), 20)
    assert all(streams.ended), f"{streams.ended.count(False)} of {len(streams.ended)} streams were lost"


def test_an_owner_ends_its_own_drain_alone(drained: Any) -> None:
    verb(drained, "gpu-1", "drain", "chat.0", "--owner", ANN, "--reason", "a fan is loud")
    verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN, "--weight", "30")
    balancer(drained, "--drained", FIRST)
    left = verb(drained, "gpu-1", "undrain", "chat.0", "--owner", RUN)
    assert (left["changed"], [drain["owner"] for drain in left["drains"]]) == (True, [ANN])
    state = verb(drained, "gpu-1", "state")
    assert (state["instances"][0]["voice"], state["instances"][0]["weight"]) == ("up 0%", 0)
    assert balancer(drained, "--drained", FIRST)[FIRST] == {
        "service": "chat", "server": FIRST, "status": "UP", "weight": 0, "sessions": 0, "agent": "L7OK"}
    verb(drained, "gpu-1", "undrain", "chat.0", "--owner", ANN)
    balancer(drained, "--wanted", FIRST)


def test_a_drain_whose_owner_died_ends_by_itself(drained: Any) -> None:
    verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN, "--for-s", "4")
    balancer(drained, "--drained", FIRST)
    assert not verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN, "--for-s", "4")["changed"]
    balancer(drained, "--wanted", FIRST)
    state = verb(drained, "gpu-1", "state")
    assert (state["drains"], state["instances"][0]["voice"]) == ([], "up 100%")


def test_the_load_balancers_own_drain(drained: Any, fleet: Fleet) -> None:
    """For when the agent does not answer: it knows nothing of this, and does not undo it."""
    try:
        assert verb(drained, "ops-1", "balancer-drain", FIRST) == {"changed": True}
        assert balancer(drained, "--drained", FIRST)[FIRST]["status"].startswith("DRAIN")
        assert verb(drained, "gpu-1", "state")["instances"][0]["voice"] == "up 100%"
        with streaming(fleet, FEW_TOKENS) as streams:
            assert set(streams.since(0, 50)) == {SECOND}
    finally:
        verb(drained, "ops-1", "balancer-ready", FIRST)
    balancer(drained, "--wanted", FIRST)


@contextmanager
def silent_agent(lab: Any) -> Iterator[None]:
    """gpu-1's agent hangs: a new process of the load balancer's hears nothing of drains for as long."""
    def signal(name: str) -> None:
        done = lab.run("gpu-1", ["sudo", "systemctl", "kill", f"--signal={name}", "opsctl-agent"])
        assert done.returncode == 0, done.stderr

    signal("STOP")
    try:
        yield
    finally:
        signal("CONT")


ASK_PID = ("import socket; c = socket.socket(socket.AF_UNIX); c.connect('/run/haproxy/admin.sock'); "
           "c.sendall(b'show info\\n'); print(*(line for line in c.makefile() if line.startswith('Pid:')))")


def new_process(lab: Any, reload: str) -> None:
    """Reloads HAProxy by a line of shell and waits until the new process answers."""
    pid = shlex.join(["python3", "-c", ASK_PID])
    script = f'before=$({pid}); {reload}; until now=$({pid}) && test "$now" != "$before"; do sleep 0.1; done'
    done = lab.run("ops-1", ["sudo", "timeout", "30", "bash", "-c", script])
    assert done.returncode == 0, done.stderr


def test_a_drain_outlives_reloads_of_the_load_balancer(drained: Any, fleet: Fleet) -> None:
    assert drained.run("ops-1", ["sudo", "test", "-S", "/run/haproxy-master.sock"]).returncode == 0
    with streaming(fleet, FEW_TOKENS) as streams:
        verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN)
        balancer(drained, "--drained", FIRST)
        before = len(streams.answered)
        new_process(drained, "systemctl reload haproxy")
        streams.since(len(streams.answered), 100)
        with silent_agent(drained):
            new_process(drained, "systemctl reload haproxy")
            streams.since(len(streams.answered), 100)
            assert balancer(drained, "--drained", FIRST)[FIRST]["weight"] == 0
        answered = streams.since(before, 200)
    assert set(answered) == {SECOND}, f"{answered.count(FIRST)} of {len(answered)} went to the drained instance"
    assert all(streams.ended), f"{streams.ended.count(False)} of {len(streams.ended)} streams were lost"


def test_without_the_servers_states_a_reload_sends_requests_to_what_is_drained(drained: Any, fleet: Fleet) -> None:
    """So the test above can fail: what keeps the drain is the file. Until the agent is heard again, here a moment."""
    with streaming(fleet, FEW_TOKENS) as streams:
        verb(drained, "gpu-1", "drain", "chat.0", "--owner", RUN)
        balancer(drained, "--drained", FIRST)
        before = len(streams.answered)
        with silent_agent(drained):
            # All that a reload does but for what saves the states.
            new_process(drained, "echo 1 >/var/lib/haproxy/server-state; "
                                 "systemctl kill --kill-whom=main --signal=USR2 haproxy")
            streams.since(len(streams.answered), 100)
        assert FIRST in streams.answered[before:]
        balancer(drained, "--drained", FIRST)


@pytest.fixture
def big(fleet: Fleet, tmp_path: Path) -> tuple[str, int]:
    """A release of 100 MB on the gateway, which the ledger does not name: its folder and the bytes of its files."""
    write_model(tmp_path / "mid.gguf", "mid")
    import_model(Request(str(tmp_path / "mid.gguf"), "chat", "test-rate", (), fleet.directory / "bundle",
                         fleet.directory / "keys" / "release", fleet.directory / "trust" / "allowed_signers"), discard)
    stored = find(fleet.directory / "bundle", "chat", "test-rate")
    assert stored is not None
    gateway = fleet.group("gateway")[0]
    with Session(fleet, gateway) as session:
        publish(session, stored, discard, host=gateway.name)
    return stored.directory.name, stored.release.size


def test_staging_keeps_its_rate_which_may_change_and_gc_takes_it_away(provisioned: Any, big: tuple[str, int]) -> None:
    release, size = big
    where = ("--service", "chat", "--release", release)
    plan = verb(provisioned, "gpu-1", "stage-plan", *where)
    assert (plan["staged"], plan["fetch_bytes"], plan["engine_built"], plan["fits"]) == (False, size, True, True)
    assert plan["free_after_bytes"] == plan["free_bytes"] - size

    began = time.monotonic()
    begun = verb(provisioned, "gpu-1", "stage", *where, "--rate-limit", str(LIMIT), "--wait-s", "0")
    assert begun["state"] == "running"
    seen: list[tuple[float, int]] = []
    while len(seen) < 2 or seen[-1][0] - seen[0][0] < 4:
        status = verb(provisioned, "gpu-1", "stage-status", *where)
        assert (status["state"], status["total"] in (0, size)) == ("running", True), status
        if status["done"]:
            seen.append((time.monotonic(), status["done"]))
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    rate = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
    assert LIMIT / 3 < rate < LIMIT * 1.5, f"{rate:.0f} bytes per second"

    done = verb(provisioned, "gpu-1", "stage", *where, "--wait-s", "120")  # as fast as it goes, from now on
    assert (done["state"], done["done"], done["result"]["fetched_bytes"]) == ("done", size, size)
    assert time.monotonic() - began < size / LIMIT * 0.8
    assert verb(provisioned, "gpu-1", "stage-plan", *where)["staged"]

    serves = provisioned.run("gpu-1", ["readlink", "/srv/opsctl/chat/current.0"]).stdout.strip().rpartition("/")[2]
    engines = {one["engine"] for one in verb(provisioned, "gpu-1", "state")["releases"]}
    kept = verb(provisioned, "gpu-1", "gc", "--service", "chat", "--keep", release, "--dry-run")
    assert release not in [one["release"] for one in kept["removed"]]
    removed = verb(provisioned, "gpu-1", "gc", "--service", "chat")
    assert (removed["changed"], removed["engines"]) == (True, [])
    assert next(one["bytes"] for one in removed["removed"] if one["release"] == release) >= size
    state = verb(provisioned, "gpu-1", "state")
    assert [f"{one['version']}-{one['digest'][:12]}" for one in state["releases"]] == [serves]
    assert {one["engine"] for one in state["releases"]} == engines
    assert state["instances"][0]["health"] == "healthy"
