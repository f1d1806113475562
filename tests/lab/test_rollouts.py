"""Rollouts that go wrong on real machines: each ends as it should, and clients never notice. Leaves the lab on v1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fingerprint
import pytest
from command import Said, opsctl, refused, succeeds

from opsctl.engines.events import discard
from opsctl.engines.session import Session
from opsctl.fleet.inventory import read_fleet
from opsctl.lab.load import Load, target
from opsctl.lab.model import SHAPES, Shape, write_model
from opsctl.releases.publish import publish
from opsctl.releases.remote import HOST_PROGRAM
from opsctl.releases.store import find

pytestmark = pytest.mark.lab

UNIT = "inference@chat.0.service"
GPU_HOSTS = ("gpu-1", "gpu-2")


def state(lab: Any, host: str) -> dict[str, Any]:
    done = lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"])
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def instance(lab: Any, host: str) -> dict[str, Any]:
    found: dict[str, Any] = state(lab, host)["instances"][0]
    return found


def serving(lab: Any) -> dict[str, tuple[str, str, int]]:
    """Release, health and weight of each instance."""
    found = {host: instance(lab, host) for host in GPU_HOSTS}
    return {host: (one["release"], one["health"], one["weight"]) for host, one in found.items()}


def import_release(lab: Any, file: Path, version: str, *settings: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    succeeds("model", "import", file, "--service", "chat", "--version", version, *words, inventory=lab.inventory)


def update(lab: Any, version: str, *options: str) -> Said:
    if "--min-speed" not in options:  # the small model's speed varies by more than a half on a busy computer
        options = ("--min-speed", "10", *options)
    return opsctl("update-model", "--version", version, "--yes", "--json", *options, inventory=lab.inventory)


def failed(said: Said, exit_code: int, code: str) -> dict[str, Any]:
    assert said.returncode == exit_code, f"exit {said.returncode}, wanted {exit_code}\n{said.stdout}\n{said.stderr}"
    error: dict[str, Any] = said.document["error"]
    assert error["code"] == code, error
    assert error["hint"], error
    return error


@contextmanager
def nobody_notices(lab: Any) -> Iterator[None]:
    """Clients stream meanwhile, and none loses a stream."""
    with Load(target(read_fleet(lab.inventory), "chat"), clients=4, tokens=40) as load:
        yield
    assert load.records
    lost = [record for record in load.records if not record.whole]
    assert not lost, lost[:5]


ALL_ON_V1 = dict.fromkeys(GPU_HOSTS, ("v1", "healthy", 100))


@pytest.fixture(autouse=True)
def given_up(provisioned: Any) -> Iterator[None]:
    """What a test leaves paused keeps others from this service; nobody resumes it here."""
    yield
    for run in succeeds("runs", "--json", inventory=provisioned.inventory).document["runs"]:
        if run["state"] == "unfinished":
            succeeds("lock", "break", run["run"], "--yes", inventory=provisioned.inventory)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_model(tmp_path / "small.gguf", "small")
    return tmp_path / "small.gguf"


def test_a_release_that_does_not_start_goes_back_and_shows_its_log(provisioned: Any, small: Path) -> None:
    content = small.read_bytes()
    small.write_bytes(content.replace(b"llama", b"lhama", 1))  # only the engine knows that there is no such thing
    import_release(provisioned, small, "broken")
    with nobody_notices(provisioned):
        said = update(provisioned, "broken")
    error = failed(said, 6, "instance.did_not_start")
    assert "every instance serves what it served before" in error["message"]
    assert any("small.gguf" in line or "load" in line for line in error["log_tail"]), error["log_tail"]
    assert serving(provisioned) == ALL_ON_V1
    ledger = provisioned.run("ops-1", ["sudo", HOST_PROGRAM, "ledger-show", "--service", "chat"]).stdout
    assert json.loads(ledger)["lines"][-1]["version"] == "v1"


@pytest.mark.slow
def test_a_release_that_answers_other_lengths_than_asked_for_goes_back(
        provisioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "short", Shape(2, 64, 4, 2, 128, context=24))  # it stops where its context ends
    write_model(tmp_path / "short.gguf", "short")
    import_release(provisioned, tmp_path / "short.gguf", "short")
    with nobody_notices(provisioned):
        said = update(provisioned, "short")
    error = failed(said, 6, "gate.unhealthy")
    assert "tokens" in error["message"], error
    assert serving(provisioned) == ALL_ON_V1


@pytest.mark.slow
def test_a_release_that_is_too_slow_goes_back(provisioned: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "mid.gguf", "mid")
    import_release(provisioned, tmp_path / "mid.gguf", "slow", "threads=1")
    with nobody_notices(provisioned):
        said = update(provisioned, "slow", "--min-speed", "80")
    error = failed(said, 6, "gate.unhealthy")
    assert "tokens/s" in error["message"], error
    assert serving(provisioned) == ALL_ON_V1


@pytest.mark.slow
def test_a_file_that_rotted_on_the_gateway_is_refused_before_anything_is_touched(provisioned: Any, small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0" * 64)  # another file than v1's, or it would only be linked
    import_release(provisioned, small, "rotten")
    fleet = read_fleet(provisioned.inventory)
    stored = find(fleet.directory / "bundle", "chat", "rotten")
    assert stored is not None
    with Session(fleet, fleet.group("gateway")[0]) as session:
        publish(session, stored, discard, host="ops-1")
    path = f"/srv/opsctl-gateway/releases/chat/{stored.directory.name}/files/small.gguf"
    flip = f"printf X | dd of={path} bs=1 seek=300000 conv=notrunc"
    assert provisioned.run("ops-1", ["sudo", "sh", "-c", flip]).returncode == 0
    with nobody_notices(provisioned):
        said = update(provisioned, "rotten")
    error = failed(said, 5, "fetch.corrupted")
    assert "small.gguf" in error["message"]
    assert serving(provisioned) == ALL_ON_V1


@pytest.mark.slow
def test_a_release_that_does_not_fit_one_disk_is_refused_before_anything_is_touched(provisioned: Any, tmp_path: Path
                                                                                     ) -> None:
    model, filler = tmp_path / "mid.gguf", "/srv/opsctl/filler"
    write_model(model, "mid", seed=7)
    import_release(provisioned, model, "large")
    free = int(provisioned.run("gpu-2", ["df", "-B1", "--output=avail", "/srv/opsctl"]).stdout.split()[1])
    fill = ["sudo", "fallocate", "-l", str(free - model.stat().st_size // 2), filler]
    before = {host: fingerprint.of_host(provisioned, host) for host in GPU_HOSTS}
    assert provisioned.run("gpu-2", fill).returncode == 0
    try:
        with nobody_notices(provisioned):
            said = update(provisioned, "large")
    finally:
        provisioned.run("gpu-2", ["sudo", "rm", "-f", filler])
    error = failed(said, 5, "host.disk_full")
    assert "does not fit" in error["message"] and "gpu-2" in error["message"] and "gpu-1" not in error["message"]
    assert {host: fingerprint.of_host(provisioned, host) for host in GPU_HOSTS} == before
    assert serving(provisioned) == ALL_ON_V1


@contextmanager
def reloaded_agent(lab: Any, host: str) -> Iterator[None]:
    try:
        yield
    finally:
        assert lab.run(host, ["sudo", "systemctl", "start", "opsctl-agent"]).returncode == 0


@pytest.fixture(scope="module")
def quiet(provisioned: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A release that nothing is wrong with, staged on both hosts."""
    model = tmp_path_factory.mktemp("quiet") / "small.gguf"
    write_model(model, "small")
    import_release(provisioned, model, "quiet", "parallel=3")
    succeeds("stage", "--version", "quiet", inventory=provisioned.inventory)
    return "quiet"


def test_a_dead_agent_pauses_before_its_host_is_touched(provisioned: Any, quiet: str) -> None:
    with reloaded_agent(provisioned, "gpu-1"):
        assert provisioned.run("gpu-1", ["sudo", "systemctl", "stop", "opsctl-agent"]).returncode == 0
        before = fingerprint.of_host(provisioned, "gpu-1")
        with nobody_notices(provisioned):
            said = update(provisioned, quiet)
        error = failed(said, 8, "agent.silent")
        assert "gpu-1" in error["message"]
        assert "--via-lb" in error["hint"]
        assert fingerprint.of_host(provisioned, "gpu-1") == before
        assert not state(provisioned, "gpu-1")["drains"]
    assert serving(provisioned) == ALL_ON_V1


@pytest.mark.slow
def test_a_hung_engine_pauses_at_the_deadline_and_is_back_in_service(provisioned: Any, quiet: str) -> None:
    """Its requests never end, so it is never empty; what the operator sees next is the engine as it was."""
    fleet = read_fleet(provisioned.inventory)
    with Load(target(fleet, "chat"), clients=6, tokens=3000) as load:
        for _ in range(200):
            if load.in_flight("gpu-1.chat.0"):
                break
            load.wait_for_look()
        assert load.in_flight("gpu-1.chat.0")
        assert provisioned.run("gpu-1", ["sudo", "systemctl", "kill", "--signal=SIGSTOP", UNIT]).returncode == 0
        try:
            said = update(provisioned, quiet, "--drain-timeout", "6")
            error = failed(said, 8, "drain.deadline")
            assert "gpu-1.chat.0" in error["message"]
            assert "back in service" in error["message"]
            after = state(provisioned, "gpu-1")
            assert not after["drains"]
            assert (after["instances"][0]["release"], after["instances"][0]["weight"]) == ("v1", 100)
        finally:
            assert provisioned.run("gpu-1", ["sudo", "systemctl", "kill", "--signal=SIGCONT", UNIT]).returncode == 0
    healthy = f"until sudo {HOST_PROGRAM} state --json | grep -q '\"health\": \"healthy\"'; do sleep 0.2; done"
    assert provisioned.run("gpu-1", ["timeout", "60", "sh", "-c", healthy], timeout_s=70).returncode == 0


@pytest.mark.slow
def test_what_an_operator_drained_is_moved_and_stays_drained(provisioned: Any, quiet: str) -> None:
    succeeds("drain", "gpu-1", "-m", "fan is replaced", "--yes", inventory=provisioned.inventory)
    try:
        # with gpu-1 away, gpu-2 is all that serves: this is an outage, and wants leave
        assert "chat" in failed(update(provisioned, quiet), 5, "update.outage")["message"]
        said = update(provisioned, quiet, "--allow-outage")
        assert said.returncode == 0, said.stderr
        assert instance(provisioned, "gpu-1")["release"] == quiet
        drains = state(provisioned, "gpu-1")["drains"]
        assert [(drain["owner"].partition(":")[0], drain["weight"]) for drain in drains] == [("operator", 0)]
        assert serving(provisioned)["gpu-2"] == (quiet, "healthy", 100)
    finally:
        succeeds("undrain", "gpu-1", inventory=provisioned.inventory)
    back = opsctl("rollback", "--yes", "--json", inventory=provisioned.inventory)
    assert back.returncode == 0, back.stderr
    assert (back.document["to"], back.document["bad"]) == ("v1", [quiet])
    assert serving(provisioned) == ALL_ON_V1


@pytest.mark.slow
def test_a_release_marked_bad_wants_leave(provisioned: Any) -> None:
    said = opsctl("update-model", "--version", "quiet", "--yes", "--json", inventory=provisioned.inventory)
    assert "quiet" in refused(said, 5, "release.bad")
    planned = opsctl("update-model", "--version", "quiet", "--plan", "--allow-bad", "--json",
                     inventory=provisioned.inventory)
    assert planned.returncode == 10, planned.stderr
    assert [one["action"] for one in planned.document["plan"]["instances"]] == ["move", "move"]


def test_the_same_update_again_is_nothing_to_do(provisioned: Any) -> None:
    said = succeeds("update-model", "--version", "v1", "--yes", "--json", inventory=provisioned.inventory)
    assert said.document["changed"] == 0
