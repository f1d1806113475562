"""Releases on real machines: what only a real systemd, HAProxy and engine can show. Leaves the shared lab as it was."""

from __future__ import annotations

import http.client
import json
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from command import succeeds

from opsctl.engines.events import discard
from opsctl.engines.session import Session
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.model import Fleet
from opsctl.lab.model import write_model
from opsctl.releases.importing import Imported, Request, import_model
from opsctl.releases.publish import publish
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.store import find
from opsctl.status import endpoints

pytestmark = pytest.mark.lab

UNIT = "inference@chat.0.service"
CLIENTS = 12
TOKENS = 700  # of the small model: 6 clients on the 4 slots of a host leave some always in flight, and some waiting


@pytest.fixture
def fleet(provisioned: Any) -> Fleet:
    return read_fleet(provisioned.inventory)


def verb(lab: Any, host: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Runs opsctl-host as root on a machine."""
    done = lab.run(host, ["sudo", HOST_PROGRAM, *arguments], timeout_s=120)
    return done.returncode, json.loads(done.stdout)


def instance(lab: Any, host: str) -> dict[str, Any]:
    code, state = verb(lab, host, "state", "--json")
    assert code == 0
    found: dict[str, Any] = state["instances"][0]
    return found


def wait_until_healthy(lab: Any, host: str) -> None:
    script = f"until sudo {HOST_PROGRAM} state --json | grep -q '\"health\": \"healthy\"'; do sleep 0.2; done"
    assert lab.run(host, ["timeout", "60", "sh", "-c", script], timeout_s=70).returncode == 0


def imported(fleet: Fleet, source: Path, version: str) -> Imported:
    """A release in the bundle and on the gateway, which the ledger does not name."""
    done = import_model(Request(str(source), "chat", version, (), fleet.directory / "bundle",
                                fleet.directory / "keys" / "release", fleet.directory / "trust" / "allowed_signers"),
                        discard)
    stored = find(fleet.directory / "bundle", "chat", version)
    assert stored is not None
    gateway = fleet.group("gateway")[0]
    with Session(fleet, gateway) as session:
        publish(session, stored, discard, host=gateway.name)
    return done


class Streams:
    """Clients that stream completions through the load balancer, one after the other without a pause; no retries."""

    def __init__(self, url: str, clients: int) -> None:
        self._address = urlsplit(url)
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._stream_on) for _ in range(clients)]
        self.answered: list[str] = []  # by which instance, once its headers came
        self.ended: list[bool] = []
        for thread in self._threads:
            thread.start()

    def _stream_on(self) -> None:
        while not self._enough.is_set():
            self._one()

    def _one(self) -> None:
        connection = http.client.HTTPConnection(str(self._address.hostname), self._address.port or 80, timeout=300)
        body = {"model": "chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": TOKENS, "stream": True,
                "ignore_eos": True}
        try:
            connection.request("POST", f"{self._address.path}/chat/completions", json.dumps(body),
                               {"Content-Type": "application/json"})
            response = connection.getresponse()
            self.answered.append(response.headers.get("x-opsctl-instance", ""))
            self.ended.append(response.status == 200 and response.read().rstrip().endswith(b"[DONE]"))
        except (OSError, http.client.HTTPException):
            self.ended.append(False)

    def finish(self) -> None:
        """Lets every client end the stream that it is in."""
        self._enough.set()
        for thread in self._threads:
            thread.join()


def test_a_plain_stop_under_load_loses_no_stream(provisioned: Any, fleet: Fleet) -> None:
    (url,) = endpoints(fleet)["chat"]
    streams = Streams(url, CLIENTS)
    try:
        seen = 0
        for _ in range(100):
            seen = max(seen, instance(provisioned, "gpu-1")["running"])
            if seen and "gpu-1.chat.0" in streams.answered:
                break
        assert seen, "nothing was in flight on gpu-1"
        done = provisioned.run("gpu-1", ["sudo", "systemctl", "stop", UNIT], timeout_s=300)  # clients go on meanwhile
        assert done.returncode == 0, done.stderr
        assert instance(provisioned, "gpu-1")["unit"] == "inactive"
        streams.finish()
        assert len(streams.ended) > CLIENTS
        assert all(streams.ended), f"{streams.ended.count(False)} of {len(streams.ended)} streams were lost"
        assert {"gpu-1.chat.0", "gpu-2.chat.0"} <= set(streams.answered)
    finally:
        streams.finish()
        provisioned.run("gpu-1", ["sudo", "systemctl", "start", UNIT])
        wait_until_healthy(provisioned, "gpu-1")


def test_a_kill_under_the_same_load_does_lose_streams(provisioned: Any, fleet: Fleet) -> None:
    """So the count above can fail: what saves the streams is the drain, and no retry of the load balancer's."""
    (url,) = endpoints(fleet)["chat"]
    streams = Streams(url, CLIENTS)
    try:
        for _ in range(100):
            if instance(provisioned, "gpu-1")["running"] and "gpu-1.chat.0" in streams.answered:
                break
        killed = provisioned.run("gpu-1", ["sudo", "systemctl", "kill", "--signal=SIGKILL", UNIT])
        assert killed.returncode == 0, killed.stderr
    finally:
        streams.finish()
        wait_until_healthy(provisioned, "gpu-1")  # systemd starts it again
    assert False in streams.ended


def test_staging_outlives_whoever_asked_for_it(provisioned: Any, fleet: Fleet, tmp_path: Path) -> None:
    write_model(tmp_path / "mid.gguf", "mid")
    release = imported(fleet, tmp_path / "mid.gguf", "test-staging").directory.name
    where = ("--service", "chat", "--release", release)
    asked = subprocess.Popen(
        ["ssh", "-F", fleet.ssh_config, "gpu-1", "sudo", HOST_PROGRAM, "stage", *where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert asked.stderr is not None
    asked.stderr.readline()  # the first word of progress: the unit is there
    asked.kill()
    asked.wait()
    code, status = verb(provisioned, "gpu-1", "stage-status", *where, "--wait-s", "90")
    assert (code, status["state"]) == (0, "done"), status
    assert status["result"]["changed"]
    code, again = verb(provisioned, "gpu-1", "stage", *where)
    assert (code, again["result"]["changed"]) == (0, False)


@pytest.fixture
def never_served(provisioned: Any) -> Iterator[str]:
    """gpu-2 as if its instance had never served; afterwards it serves again what it served."""
    release = provisioned.run("gpu-2", ["readlink", "/srv/opsctl/chat/current.0"]).stdout.strip().rpartition("/")[2]
    provisioned.run("gpu-2", ["sudo", "systemctl", "stop", UNIT], timeout_s=300)
    provisioned.run("gpu-2", ["sudo", "rm", "/srv/opsctl/chat/current.0"])
    yield release
    code, done = verb(provisioned, "gpu-2", "first-start", "chat.0", "--release", release)
    assert (code, done["result"]["changed"]) == (0, True), done
    assert instance(provisioned, "gpu-2")["health"] == "healthy"


def test_a_release_that_does_not_start_is_undone_with_its_log(provisioned: Any, fleet: Fleet, never_served: str,
                                                              tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value
    (tmp_path / "odd.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.architecture") + struct.pack("<I", 8)
        + text(b"none-such"))
    release = imported(fleet, tmp_path / "odd.gguf", "test-odd").directory.name
    assert verb(provisioned, "gpu-2", "stage", "--service", "chat", "--release", release)[0] == 0
    code, document = verb(provisioned, "gpu-2", "first-start", "chat.0", "--release", release)
    assert (code, document["error"]["code"]) == (6, "instance.did_not_start")
    assert any("none-such" in line or "odd.gguf" in line for line in document["error"]["log_tail"])
    found = instance(provisioned, "gpu-2")
    assert (found["release"], found["unfinished"], found["unit"]) == ("", False, "inactive")


def test_a_first_start_that_a_power_cut_ended_is_undone_at_boot(provisioned: Any, never_served: str) -> None:
    """The link was there already; what was never found healthy must not serve when the machine comes back."""
    slow = f"/run/systemd/system/{UNIT}.d/slow.conf"  # gone with this boot
    script = f"mkdir -p {slow.rpartition('/')[0]} && printf '[Service]\nExecStartPre=sleep 60\n' >{slow}"
    assert provisioned.run("gpu-2", ["sudo", "sh", "-c", f"{script} && systemctl daemon-reload"]).returncode == 0
    code, begun = verb(provisioned, "gpu-2", "first-start", "chat.0", "--release", never_served, "--wait-s", "0")
    assert (code, begun["state"]) == (0, "running"), begun
    linked = "until test -L /srv/opsctl/chat/current.0; do sleep 0.1; done"
    assert provisioned.run("gpu-2", ["timeout", "30", "sh", "-c", linked]).returncode == 0
    succeeds("lab", "power-cut", "gpu-2", "--name", provisioned.name)
    succeeds("lab", "power-on", "gpu-2", "--name", provisioned.name)
    recovered = "until systemctl is-active --quiet opsctl-recover opsctl-agent; do sleep 0.2; done"
    assert provisioned.run("gpu-2", ["timeout", "60", "sh", "-c", recovered], timeout_s=70).returncode == 0
    found = instance(provisioned, "gpu-2")
    assert (found["release"], found["unfinished"], found["unit"]) == ("", False, "inactive"), found
    assert provisioned.run("gpu-2", ["test", "-L", "/srv/opsctl/chat/current.0"]).returncode == 1


def test_a_tampered_release_does_not_run(provisioned: Any) -> None:
    """Its signature went bad on the disk: the unit fails at once, says why, and does not try again."""
    directory = provisioned.run("gpu-1", ["readlink", "-f", "/srv/opsctl/chat/current.0"]).stdout.strip()
    signature = f"{directory}/manifest.json.sig"
    provisioned.run("gpu-1", ["sudo", "cp", "-p", signature, "/root/kept.sig"])
    try:
        provisioned.run("gpu-1", ["sudo", "sh", "-c", f": > {signature}"])
        provisioned.run("gpu-1", ["sudo", "systemctl", "restart", UNIT], timeout_s=300)
        script = f"until systemctl is-failed --quiet {UNIT}; do sleep 0.1; done"
        assert provisioned.run("gpu-1", ["timeout", "30", "sh", "-c", script]).returncode == 0
        shown = provisioned.run("gpu-1", ["systemctl", "show", UNIT, "-p", "ExecMainStatus,NRestarts"]).stdout.split()
        assert sorted(shown) == ["ExecMainStatus=97", "NRestarts=0"]
        log = provisioned.run("gpu-1", ["sudo", "journalctl", "-u", UNIT, "-o", "cat", "-n", "20", "--no-pager"]).stdout
        assert "is not signed. [release.unsigned]" in log
    finally:
        provisioned.run("gpu-1", ["sudo", "sh", "-c", f"cat /root/kept.sig > {signature}; rm /root/kept.sig"])
        provisioned.run("gpu-1", ["sudo", "systemctl", "reset-failed", UNIT])
        provisioned.run("gpu-1", ["sudo", "systemctl", "start", UNIT])
        wait_until_healthy(provisioned, "gpu-1")


def test_acts_are_in_the_hosts_journal(provisioned: Any) -> None:
    log = provisioned.run("gpu-1", ["sudo", "journalctl", "-t", "opsctl-audit", "-o", "cat", "--no-pager"]).stdout
    acts = [json.loads(line) for line in log.splitlines()]
    assert {act["verb"] for act in acts} >= {"stage", "first-start"}
    assert all(act["user"] for act in acts)
