"""The life of a service on real machines: releases of releases, drains with owners, a ledger without its gateway, what
is collected, and what leaves services.yml while streams run. Leaves the shared lab as it was.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command import opsctl, refused, succeeds

from opsctl.agent.ledger import Line
from opsctl.engines.events import discard
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.model import Fleet
from opsctl.lab import state as lab_state
from opsctl.lab.load import Load, target
from opsctl.releases.books import read_books, write_lines
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.traffic import operator_owner

pytestmark = [pytest.mark.lab, pytest.mark.slow]

CHAT = """\
chat:
  group: gpu
  port: 8100
  listen: 8000
  instances_per_host: {instances}
  gpus_per_instance: 0
  min_serving: 1
  first_release: v1
"""
TALK = """\
talk:
  group: gpu
  port: 8200
  listen: 8001
  min_serving: 1
  first_release: v1
"""
NOISE_BYTES = 10_000_000  # what ssh and Ansible say to a host meanwhile; the model of talk is ten times that


@pytest.fixture(scope="module")
def life(provisioned: Any) -> Iterator[Any]:
    """The shared lab with two instances of chat on each host, and a second service talk, on a larger model."""
    services = provisioned.directory / "services.yml"
    before = services.read_text()
    succeeds("lab", "model", "--size", "mid", provisioned.directory / "mid.gguf")
    services.write_text(CHAT.format(instances=2) + TALK)
    succeeds("model", "import", provisioned.directory / "mid.gguf", "--service", "talk", "--version", "v1",
             inventory=provisioned.inventory)
    try:
        succeeds("provision", inventory=provisioned.inventory)
        yield provisioned
    finally:
        services.write_text(before)
        succeeds("provision", inventory=provisioned.inventory)


@pytest.fixture
def fleet(life: Any) -> Fleet:
    return read_fleet(life.inventory)


def verb(lab: Any, host: str, *arguments: str) -> dict[str, Any]:
    done = lab.run(host, ["sudo", HOST_PROGRAM, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def said_by_shell(lab: Any, host: str, script: str) -> str:
    done = lab.run(host, ["sudo", "sh", "-c", script])
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout.strip())


def received(lab: Any, host: str) -> int:
    """Bytes that a machine has got over its network since it booted."""
    return int(said_by_shell(lab, host, "cat /sys/class/net/host0/statistics/rx_bytes"))


def inode(lab: Any, host: str, path: str) -> str:
    return said_by_shell(lab, host, f"stat -c %i {path}")


# A release with the files of another.


def test_a_release_of_a_release_moves_no_byte(life: Any) -> None:
    hosts = ("ops-1", *life.gpu_hosts)
    before = {host: received(life, host) for host in hosts}
    said = succeeds("model", "import", "release:v1", "--service", "talk", "--version", "v1.1", "--set",
                    "max_model_len=2048", "--json", inventory=life.inventory)
    assert (said.document["changed"], said.document["arguments"]["max_model_len"]) == (True, 2048)
    succeeds("stage", "--service", "talk", "--version", "v1.1", inventory=life.inventory)
    model = Path("files") / "mid.gguf"
    here = [folder / model for folder in (life.directory / "bundle/releases/talk").glob("v1*")]
    assert len(here) == 2
    assert len({path.stat().st_ino for path in here}) == 1
    assert inode(life, "ops-1", f"/srv/opsctl-gateway/releases/talk/v1-*/{model}") == inode(
        life, "ops-1", f"/srv/opsctl-gateway/releases/talk/v1.1-*/{model}")
    for host in life.gpu_hosts:
        assert inode(life, host, f"/srv/opsctl/talk/releases/v1-*/{model}") == inode(
            life, host, f"/srv/opsctl/talk/releases/v1.1-*/{model}")
    for host in hosts:
        assert received(life, host) - before[host] < NOISE_BYTES, host
    again = succeeds("model", "import", "release:v1", "--service", "talk", "--version", "v1.1", "--set",
                     "max_model_len=2048", "--json", inventory=life.inventory)
    assert not again.document["changed"]
    other = opsctl("model", "import", "release:v1", "--service", "talk", "--version", "v1.1", "--json",
                   inventory=life.inventory)
    assert "max_model_len is 2048" in refused(other, 5, "release.version_taken")


def test_a_bundle_without_it_makes_one_by_manifest_alone(life: Any) -> None:
    bundle = life.directory / "bundle/releases/talk"
    kept = life.directory / "kept-talk"
    bundle.rename(kept)
    try:
        before = received(life, "ops-1")
        said = succeeds("model", "import", "release:v1", "--service", "talk", "--version", "v1.2", "--set",
                        "max_model_len=1024", "--json", inventory=life.inventory)
        assert (said.document["changed"], said.document["directory"]) == (True, "")
        assert received(life, "ops-1") - before < NOISE_BYTES
        succeeds("stage", "--service", "talk", "--version", "v1.2", inventory=life.inventory)
        taken = opsctl("model", "import", life.directory / "mid.gguf", "--service", "talk", "--version", "v1.2",
                       "--json", inventory=life.inventory)
        refused(taken, 5, "release.version_taken")  # the bundle knows nothing of it, the gateway does
        listed = succeeds("model", "list", "--service", "talk", "--json", inventory=life.inventory).document["releases"]
        assert {row["version"]: row["where"] for row in listed}["v1.2"] == ["gateway"]
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        kept.rename(bundle)


# Drains.


def weights(lab: Any, server: str) -> int:
    """Percent, as HAProxy has it."""
    (row,) = [row for row in verb(lab, "ops-1", "balancer")["servers"] if row["server"] == server]
    return int(row["weight"])


def drained(lab: Any, instance: str) -> dict[str, Any]:
    rows = succeeds("status", "--json", inventory=lab.inventory).document["rows"]
    (row,) = [row for row in rows if f"{row['host']}:{row['instance']}" == instance]
    found: dict[str, Any] = row
    return found


def test_two_owners_of_one_drain(life: Any, fleet: Fleet) -> None:
    mine, server = operator_owner(), "gpu-1.chat.0"
    with Load(target(fleet, "chat"), clients=12, tokens=400) as load:
        load.wait_until_steady()
        said = succeeds("drain", "gpu-1:chat.0", "-m", "new kernel", "--wait", "--yes", "--json",
                        inventory=life.inventory)
        assert said.document["changed"] == 1
        assert [one["server"] for one in said.document["emptied"]] == [server]
        assert weights(life, server) == 0
        assert load.in_flight(server) == 0
        verb(life, "gpu-1", "drain", "chat.0", "--owner", "operator:bob", "--reason", "fans")
        row = drained(life, "gpu-1:chat.0")
        assert (row["state"], row["weight"]) == ("drained", 0)
        assert f"0 % by {mine} (new kernel)" in row["note"] and "0 % by operator:bob (fans)" in row["note"]
        back = succeeds("undrain", "gpu-1:chat.0", inventory=life.inventory)
        assert "stays at 0 %: 0 % by operator:bob (fans)" in back.stdout
        assert weights(life, server) == 0
        refused(opsctl("undrain", "gpu-1:chat.0", "--owner", "operator:bob", "--json", inventory=life.inventory), 2,
                "confirm.needs_yes")
        succeeds("undrain", "gpu-1:chat.0", "--owner", "operator:bob", "--yes", inventory=life.inventory)
        verb(life, "ops-1", "balancer", "--wanted", server, "--wait-s", "10")
        assert weights(life, server) == 100
        load.wait_for_look()
    assert not [record.lacking for record in load.records if not record.whole]
    assert drained(life, "gpu-1:chat.0")["state"] == "serving"


def test_a_trickle(life: Any) -> None:
    succeeds("drain", "gpu-1:chat.0", "--weight", "20", "--yes", inventory=life.inventory)
    try:
        row = drained(life, "gpu-1:chat.0")
        assert (row["state"], row["weight"]) == ("serving", 20)
    finally:
        succeeds("undrain", "gpu-1:chat.0", inventory=life.inventory)


def test_the_last_instances_are_not_drained_by_accident(life: Any) -> None:
    said = opsctl("drain", "chat", "--yes", "--json", inventory=life.inventory)
    assert "chat has 4 serving; 0 would go on, and min_serving is 1" in refused(said, 5, "drain.outage")
    assert all(drained(life, f"{host}:chat.0")["state"] == "serving" for host in life.gpu_hosts)
    refused(opsctl("drain", "gpu-1:chat.0", "--json", inventory=life.inventory), 2, "confirm.needs_yes")


# The ledger.


@pytest.fixture
def gateway_away(life: Any) -> Iterator[None]:
    """ops-1 lets nobody in over SSH; it is the load balancer too, so it goes on running."""
    lab = lab_state.load(life.name)
    assert lab is not None
    init = lab.machine("ops-1").init
    assert init is not None

    def systemctl(word: str) -> None:
        subprocess.run(["nsenter", "--target", str(init.pid), "--all", "systemctl", word, "ssh"], check=True,
                       capture_output=True)

    systemctl("stop")
    yield
    systemctl("start")


def copies(lab: Any, service: str) -> list[list[str]]:
    return [[f"{line['action']} {line['version']}" for line in
             verb(lab, host, "ledger-show", "--service", service, "--copy")["lines"]] for host in lab.gpu_hosts]


def marked(books_line: Line, version: str, digest: str) -> Line:
    return replace(books_line, version=version, digest=digest, action="bad", note="tried without its gateway")


def test_lines_that_were_written_without_the_gateway(life: Any, fleet: Fleet, request: pytest.FixtureRequest) -> None:
    assert copies(life, "talk") == [["serve v1"], ["serve v1"]]
    listed = succeeds("model", "list", "--service", "talk", "--json", inventory=life.inventory).document["releases"]
    digest = {row["version"]: row["digest"] for row in listed}["v1.1"]
    request.getfixturevalue("gateway_away")
    books = read_books(fleet, "talk", discard)
    assert not books.gateway_up
    write_lines(fleet, "talk", books, [marked(books.lines[0], "v1.1", digest)], discard)
    assert copies(life, "talk") == [["serve v1", "bad v1.1"]] * 2
    history = succeeds("history", "--service", "talk", "--json", inventory=life.inventory).document
    assert history["source"] in life.gpu_hosts
    assert [(line["action"], line["version"], line["now"]) for line in history["lines"]] == [
        ("serve", "v1", True), ("bad", "v1.1", False)]


def test_the_gateway_gets_them_when_it_is_back(life: Any, fleet: Fleet) -> None:
    """From whoever finds it up again: here from ``opsctl provision``, which changes nothing else."""
    lines = verb(life, "ops-1", "ledger-show", "--service", "talk")["lines"]
    assert [line["version"] for line in lines] == ["v1"]
    said = succeeds("provision", inventory=life.inventory)
    assert "got 1 line of the ledger of talk" in said.stderr
    lines = verb(life, "ops-1", "ledger-show", "--service", "talk")["lines"]
    assert [(line["action"], line["version"]) for line in lines] == [("serve", "v1"), ("bad", "v1.1")]
    table = succeeds("history", "--service", "talk", inventory=life.inventory).stdout
    assert "serving now" in table
    listed = succeeds("model", "list", "--service", "talk", "--json", inventory=life.inventory).document["releases"]
    marks = {row["version"]: (row["now"], row["bad"]) for row in listed}
    assert (marks["v1"], marks["v1.1"], marks["v1.2"]) == ((True, False), (False, True), (False, False))


# What is collected.


def test_gc_keeps_what_is_served_and_the_newest_that_is_not_bad(life: Any) -> None:
    off_terminal = opsctl("gc", "--service", "talk", "--json", inventory=life.inventory)
    refused(off_terminal, 2, "confirm.needs_yes")
    assert "goes" in off_terminal.stderr
    said = succeeds("gc", "--service", "talk", "--yes", "--json", inventory=life.inventory).document
    assert {row["host"] for row in said["hosts"]} == set(life.gpu_hosts)
    for row in said["hosts"]:
        assert sorted(name.rpartition("-")[0] for name in row["kept"]) == ["v1", "v1.2"]
        assert [name.rpartition("-")[0] for name in row["removed"]] == ["v1.1"]
        assert row["engines"] == []
    for host in life.gpu_hosts:
        left = [one["version"] for one in verb(life, host, "state", "--json")["releases"] if one["service"] == "talk"]
        assert sorted(left) == ["v1", "v1.2"]
    assert succeeds("gc", "--service", "talk", "--yes", "--json", inventory=life.inventory).document["changed"] == 0


# What leaves.


LEAVE = "inference : Drain, stop and forget the instances that left, after their last streams."


def reloaded_at(lab: Any) -> float:
    """When HAProxy was reloaded last, POSIX time."""
    shown = said_by_shell(lab, "ops-1", "systemctl show haproxy --property=StateChangeTimestamp --timestamp=us+utc")
    return datetime.strptime(shown.partition("=")[2], "%a %Y-%m-%d %H:%M:%S.%f %Z").replace(tzinfo=UTC).timestamp()


def test_an_instance_and_a_service_leave_under_streams(life: Any, fleet: Fleet) -> None:
    """None is lost: of chat, whose clients go on, and of talk, whose clients find nobody from some moment on."""
    verb(life, "gpu-1", "drain", "chat.1", "--owner", "operator:bob", "--weight", "50")
    for host in life.gpu_hosts:  # engines take what nobody else wants, or all of this computer would wait for them
        said_by_shell(life, host, "renice -n 15 -u inference")
    talk = Load(target(fleet, "talk"), clients=8, seconds_per_stream=20)
    chat = Load(target(fleet, "chat"), clients=8, tokens=400)
    with talk, chat:
        talk.wait_until_steady(180)
        chat.wait_until_steady(180)
        (life.directory / "services.yml").write_text(CHAT.format(instances=1))
        document = succeeds("provision", "--json", inventory=life.inventory, timeout_s=1500).document
    changes = {(change["host"], change["task"]) for change in document["changes"]}
    assert {(host, LEAVE) for host in life.gpu_hosts} <= changes
    posix = time.time() - time.monotonic()
    at = reloaded_at(life) - posix
    for load, instance in ((talk, "talk.0"), (chat, "chat.1")):
        lost = [record for record in load.records if not record.whole]
        if load is talk:  # who came when it had left was not let in
            lost = [record for record in lost if record.first_byte is not None or record.start < at - load.began]
        assert not lost, f"{len(lost)} of {len(load.records)} of {load.target.service}: {lost[:3]}"
        for host in life.gpu_hosts:
            mine = [record for record in load.records if record.server == f"{host}.{instance}"]
            assert any(record.in_flight_at(at - load.began) for record in mine), f"{host}.{instance} of {len(mine)}"


def test_nothing_of_them_is_left_but_their_releases(life: Any) -> None:
    servers = {row["server"] for row in verb(life, "ops-1", "balancer")["servers"]}
    assert servers == {"gpu-1.chat.0", "gpu-2.chat.0"}
    for host in life.gpu_hosts:
        ports = said_by_shell(life, host, "ss -Hltn | awk '{print $4}' | sed 's/.*://' | sort -u").split()
        assert "8100" in ports and not {"8101", "8200"} & set(ports)
        units = said_by_shell(life, host, "ls /etc/systemd/system/multi-user.target.wants /etc/systemd/system")
        assert "inference@chat.0" in units and "chat.1" not in units and "talk" not in units
        known = said_by_shell(life, host, "ls /etc/opsctl/instances /var/lib/opsctl/drains /var/lib/opsctl/gates "
                              "/var/cache/opsctl /srv/opsctl/chat /srv/opsctl/talk")
        assert "chat.1" not in known and "talk.0" not in known and "current.1" not in known
        releases = {one["service"] for one in verb(life, host, "state", "--json")["releases"]}
        assert releases == {"chat", "talk"}
    again = succeeds("provision", "--json", inventory=life.inventory).document
    assert again["changed"] == 0


def test_gc_takes_a_service_that_left_when_it_is_named(life: Any) -> None:
    said = succeeds("gc", "--yes", "--json", inventory=life.inventory)
    assert said.document["left_behind"] == {"talk": list(life.gpu_hosts)}
    assert "opsctl gc --service talk" in said.stderr
    gone = succeeds("gc", "--service", "talk", "--yes", "--json", inventory=life.inventory).document
    assert [sorted(name.rpartition("-")[0] for name in row["removed"]) for row in gone["hosts"]] == [["v1", "v1.2"]] * 2
    assert all(row["bytes"] > 100_000_000 for row in gone["hosts"])
    for host in life.gpu_hosts:
        assert {one["service"] for one in verb(life, host, "state", "--json")["releases"]} == {"chat"}
    told = succeeds("history", "--service", "talk", "--json", inventory=life.inventory).document
    assert len(told["lines"]) == 2
    refused(opsctl("gc", "--service", "walk", "--yes", "--json", inventory=life.inventory), 2, "fleet.no_such_service")
