"""``opsctl stage`` on real machines: v2 comes while v1 serves, whatever goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import opsctl, refused, succeeds

from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SLOW = "10M"  # bytes per second: the mid model, 100 MB, takes ten seconds
SLOWER = "2M"  # nearly a minute; the same command without a limit lifts it


@pytest.fixture(scope="module")
def serving(provisioned: Any) -> Any:
    """The shared lab with a second, larger model, which no other test has, as one release after the other."""
    succeeds("lab", "model", "--size", "mid", "--seed", "3", provisioned.directory / "mid.gguf")
    return provisioned


def release_of(lab: Any, version: str, *settings: str) -> str:
    """Imports a release that nobody has yet; its folder's name. Different settings share the files."""
    said = succeeds("model", "import", lab.directory / "mid.gguf", "--service", "chat", "--version", version,
                    *(word for one in settings for word in ("--set", one)), "--json", inventory=lab.inventory)
    document: dict[str, Any] = said.document
    return f"{version}-{document['digest'][:12]}"


def state(lab: Any, host: str) -> dict[str, Any]:
    done = lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"])
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def staged(lab: Any, host: str) -> set[str]:
    return {f"{one['version']}-{one['digest'][:12]}" for one in state(lab, host)["releases"] if one["complete"]}


@pytest.fixture
def untouched(serving: Any) -> Iterator[None]:
    """Asserts that every instance serves all the while: same unit start, same release, healthy."""

    def seen() -> list[Any]:
        return [(host, one["instance"], one["release"], one["since"], one["unit"], one["health"])
                for host in serving.gpu_hosts for one in state(serving, host)["instances"]]

    before = seen()
    assert {one[-1] for one in before} == {"healthy"}
    yield
    assert seen() == before


def stage(lab: Any, version: str, *more: str) -> Any:
    return opsctl("stage", "--version", version, "--json", *more, inventory=lab.inventory)


def remove(lab: Any, host: str, release: str) -> None:
    """Takes a release away from a host, so that a test may bring it."""
    lab.run(host, ["sudo", "rm", "-rf", f"/srv/opsctl/chat/releases/{release}"])
    assert release not in staged(lab, host)


@pytest.mark.usefixtures("untouched")
def test_a_release_is_staged_while_another_serves_and_then_there_is_nothing_to_do(serving: Any) -> None:
    release = release_of(serving, "s1")
    said = stage(serving, "s1")
    assert said.returncode == 0, said.stdout + said.stderr
    document = said.document
    assert (document["schema"], document["release"], document["changed"]) == ("opsctl.stage/v1", release, 2)
    assert {row["host"]: row["fetched_bytes"] for row in document["hosts"]} == dict.fromkeys(
        serving.gpu_hosts, document["bytes"])
    assert "Publish chat s1" in said.stderr
    for host in serving.gpu_hosts:
        assert release in staged(serving, host)
    again = stage(serving, "s1")
    assert (again.returncode, again.document["changed"]) == (0, 0)
    assert "nothing to do" in succeeds("stage", "--version", "s1", inventory=serving.inventory).stdout


@pytest.mark.usefixtures("untouched")
def test_files_that_a_host_has_are_linked_and_not_fetched(serving: Any) -> None:
    release_of(serving, "s1")
    stage(serving, "s1")
    release_of(serving, "s2", "max_model_len=512")
    said = stage(serving, "s2")
    assert said.returncode == 0, said.stdout + said.stderr
    assert {(row["fetched_bytes"], row["linked_files"]) for row in said.document["hosts"]} == {(0, 1)}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whoever_is_interrupted_leaves_the_hosts_at_work_and_the_same_command_finds_them(
        serving: Any, number: signal.Signals) -> None:
    release = bring_anew(serving, "s3")
    process = subprocess.Popen([sys.executable, "-m", "opsctl", "stage", "--version", "s3", "--rate-limit", SLOWER],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OPSCTL_INVENTORY": str(serving.inventory)})
    assert process.stderr is not None
    heard = []
    for line in process.stderr:
        heard.append(line)
        if "MB/s" in line and "left" in line:
            break
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number is signal.SIGINT else -number), heard
    unit = f"opsctl-stage-chat_{release}.service"
    assert serving.run("gpu-1", ["systemctl", "is-active", unit]).stdout.strip() == "active"
    assert release not in staged(serving, "gpu-1")
    began = serving.run("gpu-1", ["systemctl", "show", "-P", "InvocationID", unit]).stdout
    seen: list[str] = []
    look = threading.Thread(target=lambda: seen.append(serving.run(
        "gpu-1", ["systemctl", "show", "-P", "InvocationID", unit]).stdout))
    look.start()
    said = stage(serving, "s3")
    look.join()
    assert said.returncode == 0, said.stdout + said.stderr
    assert seen == [began], "the unit was another one"
    assert said.document["changed"] == 2
    assert release in staged(serving, "gpu-1") & staged(serving, "gpu-2")


def bring_anew(lab: Any, version: str) -> str:
    """A release that no host has, nor any file of it: all of it must be fetched."""
    release = release_of(lab, version)
    stage(lab, version)  # publishes it
    for host in lab.gpu_hosts:
        for one in staged(lab, host):
            if one[0] == "s" and one[1].isdigit():
                remove(lab, host, one)
    return release


@pytest.mark.usefixtures("untouched")
def test_a_file_that_was_corrupted_on_the_gateway_is_refused(serving: Any) -> None:
    release = bring_anew(serving, "s4")
    path = f"/srv/opsctl-gateway/releases/chat/{release}/files/mid.gguf"
    spoil = ("import os, stat, sys; path = sys.argv[1]; os.chmod(path, 0o644); file = open(path, 'r+b'); "
             "file.seek(1000); byte = file.read(1); file.seek(1000); file.write(bytes([byte[0] ^ 1])); file.close()")
    done = serving.run("ops-1", ["sudo", "python3", "-c", spoil, path])
    assert done.returncode == 0, done.stderr
    try:
        sentence = refused(stage(serving, "s4"), 5, "fetch.corrupted")
        assert "mid.gguf" in sentence
        assert any(f"{host}: " in sentence for host in serving.gpu_hosts)
        assert not any(release in staged(serving, host) for host in serving.gpu_hosts)
    finally:
        serving.run("ops-1", ["sudo", "python3", "-c", spoil, path])
    assert stage(serving, "s4").returncode == 0


@pytest.mark.usefixtures("untouched")
def test_a_release_that_does_not_fit_one_host_is_refused_before_any_byte(serving: Any) -> None:
    release = bring_anew(serving, "s5")
    filler = "/srv/opsctl/filler"
    free = int(serving.run("gpu-2", ["sudo", "sh", "-c", "df -B1 --output=avail /srv/opsctl | tail -1"]).stdout)
    size = (serving.directory / "mid.gguf").stat().st_size
    done = serving.run("gpu-2", ["sudo", "fallocate", "-l", str(free - size), filler])
    assert done.returncode == 0, done.stderr
    try:
        sentence = refused(stage(serving, "s5"), 5, "host.disk_full")
        assert "gpu-2 would fetch" in sentence
        assert "gpu-1" not in sentence
        for host in serving.gpu_hosts:
            found = serving.run(host, ["sudo", "find", "/srv/opsctl/chat/releases", "-path", f"*/{release}*"]).stdout
            assert found == "", "a byte was brought"
        only = stage(serving, "s5", "--limit", "gpu-1")
        assert (only.returncode, only.document["changed"]) == (0, 1)
    finally:
        serving.run("gpu-2", ["sudo", "rm", "-f", filler])
    assert stage(serving, "s5").document["changed"] == 1


@pytest.fixture
def small_disk(serving: Any) -> Iterator[str]:
    """/srv/opsctl of gpu-2 is a file system of its own, with room for what is there, one more, and what stays free."""
    grow = ("set -e; used=$(du -sm /srv/opsctl | cut -f1); mkdir /run/roomy; cp -a /srv/opsctl/. /run/roomy/; "
            "mount -t tmpfs -o size=$((used + 450))m,mode=755 small /srv/opsctl; cp -a /run/roomy/. /srv/opsctl/; "
            "rm -rf /run/roomy")
    done = serving.run("gpu-2", ["sudo", "sh", "-c", grow], timeout_s=120)
    assert done.returncode == 0, done.stderr
    yield "/srv/opsctl/filler"
    assert serving.run("gpu-2", ["sudo", "umount", "--lazy", "/srv/opsctl"]).returncode == 0


@pytest.mark.usefixtures("untouched")
def test_a_disk_that_fills_while_it_is_staged_ends_that_and_nothing_else(serving: Any, small_disk: str) -> None:
    """There was room when it began; then somebody else took it."""
    release = bring_anew(serving, "s8")
    fill = (f"until find /srv/opsctl/chat/releases -path '*{release}*' -size +1M | grep -q .; do sleep 0.1; done; "
            f"dd if=/dev/zero of={small_disk} bs=1M; true")
    with subprocess.Popen(["ssh", "-F", serving.directory / ".opsctl/ssh_config", "gpu-2", f'sudo sh -c "{fill}"'],
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as filler:
        try:
            said = stage(serving, "s8", "--rate-limit", SLOW)
            filler.wait(timeout=60)
        finally:
            filler.kill()
    assert said.returncode not in (0, 10), said.stdout
    error = said.document["error"]
    assert error["code"] == "host.disk_full", error
    assert "gpu-2" in error["message"]
    assert "gpu-1" in error["message"]  # which has it staged
    assert release in staged(serving, "gpu-1")
    assert release not in staged(serving, "gpu-2")
    assert serving.run("gpu-2", ["sudo", "rm", small_disk]).returncode == 0
    assert stage(serving, "s8").document["changed"] == 1


@pytest.mark.usefixtures("untouched")
def test_a_rate_is_kept(serving: Any) -> None:
    bring_anew(serving, "s6")
    began = time.monotonic()
    said = stage(serving, "s6", "--rate-limit", SLOW)
    assert said.returncode == 0, said.stdout + said.stderr
    size = (serving.directory / "mid.gguf").stat().st_size
    assert time.monotonic() - began > 0.7 * size / 10_000_000


def test_an_unknown_version_is_told_with_the_known_ones(serving: Any) -> None:
    sentence = refused(stage(serving, "none-such"), 2, "release.no_such_version")
    assert "v1" in sentence


def test_staging_is_in_the_hosts_journal(serving: Any) -> None:
    log = serving.run("gpu-2", ["sudo", "journalctl", "-t", "opsctl-audit", "-o", "cat", "--no-pager"]).stdout
    assert any(json.loads(line)["verb"] == "stage" for line in log.splitlines())


def test_no_worker_of_pyinfra_is_left() -> None:
    """Of this run: a worker has opsctl as its parent, or was inherited by init."""
    left = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"opsctl.engines.pyinfra_worker" in cmdline(path) and parent(path.parent) == 1]
    assert left == []


def cmdline(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])
