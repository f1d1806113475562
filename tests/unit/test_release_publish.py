"""From the bundle to the gateway and onto hosts: what is wanted, what is done where, how failures add up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, Sessions
from release_kit import Keys, lay_down, make_host, make_keys

from opsctl.agent.ledger import Line
from opsctl.agent.paths import Paths
from opsctl.engines.events import Event, Note, TaskResult, discard
from opsctl.engines.session import Completed
from opsctl.errors import LockedError, MixedError, OpsctlError, RefusedError, RolledBackError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases import books, first_start, watch
from opsctl.releases.first_start import bring_up, check_releases, outcome, plan_host
from opsctl.releases.ledger import Wanted, wanted
from opsctl.releases.listing import rows, verify_version
from opsctl.releases.publish import publish
from opsctl.releases.remote import interpret
from opsctl.releases.store import find, verify_all

MODEL = os.urandom(3_000_000)
CHAT = Service("chat", "gpu", 8100, 8000, first_release="v1")
A, B = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


def entry(version: str, digest: str, *, complete: bool = True) -> dict[str, Any]:
    return {"version": version, "digest": digest, "complete": complete, "created": "2026"}


# Which release a service should have.

LINE = Line(1, "v2", B, "2026-11-22T03:15:00Z", "ann@desk")
MARKED = Line(2, "v3", A, "2026-11-22T03:20:00Z", "ann@desk", action="bad")


@pytest.mark.parametrize(("lines", "gateway", "bundle", "result"), [
    ([], [], [entry("v1", A)], Wanted("chat", "v1", A, False, 0)),
    ([], [entry("v1", A)], [], Wanted("chat", "v1", A, True, 0)),
    ([], [entry("v1", A)], [entry("v1", A), entry("v2", B)], Wanted("chat", "v1", A, True, 0)),
    ([LINE], [entry("v2", B)], [entry("v1", A)], Wanted("chat", "v2", B, True, 1)),
    ([LINE, MARKED], [entry("v2", B), entry("v3", A)], [], Wanted("chat", "v2", B, True, 2)),
    ([LINE], [entry("v2", B, complete=False)], [entry("v2", B)], Wanted("chat", "v2", B, False, 1)),
])
def test_the_ledger_decides_and_first_release_only_while_it_is_empty(
        lines: list[Any], gateway: list[Any], bundle: list[Any], result: Wanted) -> None:
    assert wanted(CHAT, lines, gateway, bundle) == result


def test_a_service_without_any_release() -> None:
    assert wanted(Service("chat", "gpu", 8100, 8000), [], [], [entry("v1", A)]) is None


@pytest.mark.parametrize(("lines", "gateway", "bundle", "code"), [
    ([], [], [], "release.missing"),
    ([], [], [entry("v2", B)], "release.missing"),
    ([LINE], [], [entry("v2", A)], "release.missing"),
    ([], [entry("v1", A)], [entry("v1", B)], "release.version_taken"),
])
def test_a_release_that_is_nowhere_or_two(lines: list[Any], gateway: list[Any], bundle: list[Any], code: str) -> None:
    with pytest.raises(RefusedError) as refused:
        wanted(CHAT, lines, gateway, bundle)
    assert refused.value.code == code
    assert "opsctl model import" in refused.value.hint or code != "release.missing"


# What a host lacks.


def instance(index: int, release: str, digest: str, **more: Any) -> dict[str, Any]:
    return {"instance": f"chat.{index}", "service": "chat", "release": release, "digest": digest, "unit": "active",
            "health": "healthy", **more}


@pytest.mark.parametrize(("instances", "start", "behind"), [
    ([instance(0, "", "")], ("chat.0",), ()),
    ([instance(0, "v1", A)], (), ()),
    ([instance(0, "v0", B)], (), ("chat.0",)),
    ([instance(0, "v1", A), instance(1, "", "")], ("chat.1",), ()),
    ([instance(0, "v1", A, unfinished=True)], ("chat.0",), ()),
    ([{**instance(0, "", ""), "service": "embed"}], (), ()),
])
def test_only_instances_that_never_served_are_started(instances: list[Any], start: tuple[str, ...],
                                                      behind: tuple[str, ...]) -> None:
    plan = plan_host({"instances": instances, "releases": []}, Wanted("chat", "v1", A, True, 1))
    assert (plan.start, plan.behind) == (start, behind)


ROLLED, REFUSED = RolledBackError("x", "gpu-1: x"), RefusedError("y", "gpu-2: y")


@pytest.mark.parametrize(("errors", "started", "changed", "kind"), [
    ([], True, True, type(None)), ([ROLLED], False, True, RolledBackError),
    ([ROLLED, ROLLED], False, True, RolledBackError), ([ROLLED], True, True, MixedError),
    ([ROLLED, REFUSED], False, False, MixedError),
    ([REFUSED], False, False, RefusedError), ([REFUSED], False, True, MixedError),
    ([OpsctlError("z", "gpu-3: z")], False, False, MixedError),
])
def test_how_failures_add_up(errors: list[OpsctlError], started: bool, changed: bool, kind: type) -> None:
    failure = outcome(errors, started=started, changed=changed)
    assert type(failure) is kind
    assert failure is None or failure.message.startswith(errors[0].message)


# What a host answers.


def test_a_hosts_error_is_an_error_here() -> None:
    document = {"error": {"code": "gateway.busy", "message": "wait.", "hint": "then again", "log_tail": ["a"]},
                "exit_code": 4}
    with pytest.raises(LockedError) as error:
        interpret(Completed(4, json.dumps(document), ""), "receive", "ops-1")
    assert (error.value.code, error.value.message, error.value.log_tail) == ("gateway.busy", "ops-1: wait.", ("a",))


@pytest.mark.parametrize("completed", [Completed(1, "", "sudo: command not found"), Completed(0, "hello", ""),
                                       Completed(1, "{}", "")])
def test_no_answer_is_an_error_too(completed: Completed) -> None:
    with pytest.raises(OpsctlError) as error:
        interpret(completed, "state", "gpu-1")
    assert error.value.code == "host.no_answer"


def test_releases_are_listed_side_by_side() -> None:
    lines = (Line(1, "v1", A, "2026", "ann"), Line(2, "v2", B, "2026", "ann", action="bad"))
    listed = rows([entry("v1", A), entry("v2", B)], [entry("v1", A)], lines)
    assert [(row["version"], row["where"], row["now"], row["bad"]) for row in listed] == [
        ("v1", ["bundle", "gateway"], True, False), ("v2", ["bundle"], False, True)]


# With real opsctl-host verbs, in this process.


@pytest.fixture
def gateway(tmp_path: Path, keys: Keys) -> Machine:
    return Machine(make_host(tmp_path / "ops-1", keys), "ops-1")


@pytest.fixture
def fleet(tmp_path: Path, keys: Keys) -> Fleet:
    """A fleet's directory with v1 in the bundle."""
    directory = tmp_path / "fleet"
    (directory / "trust").mkdir(parents=True)
    shutil.copy(keys.allowed_signers, directory / "trust" / "allowed_signers")
    lay_down(directory / "bundle" / "releases" / "chat", {"model.gguf": MODEL}, keys.private)
    hosts = (Host("ops-1", "10.0.0.1", ("gateway", "lb")), Host("gpu-1", "10.0.0.11", ("gpu",)),
             Host("gpu-2", "10.0.0.12", ("gpu",)))
    return Fleet(directory, directory / "inventory.ini", hosts, (CHAT,))


def test_publishing_and_again(fleet: Fleet, gateway: Machine) -> None:
    stored = find(fleet.directory / "bundle", "chat", "v1")
    assert stored is not None
    assert publish(gateway, stored, discard, host="ops-1")
    assert (gateway.paths.gateway_releases / "chat" / stored.name / "files" / "model.gguf").read_bytes() == MODEL
    assert not publish(gateway, stored, discard, host="ops-1")


def test_a_broken_transfer_goes_on(fleet: Fleet, gateway: Machine) -> None:
    stored = find(fleet.directory / "bundle", "chat", "v1")
    assert stored is not None
    gateway.cut = 1_000_000
    with pytest.raises(RefusedError):  # not all of it was there to accept
        publish(gateway, stored, discard, host="ops-1")
    sent: list[int] = []
    assert publish(gateway, stored, lambda event: sent.append(event.done), host="ops-1")  # type: ignore[union-attr]
    assert sent[0] == 1_000_000


@dataclass
class Gpu(Machine):
    """A GPU host that is played: it stages and starts what it is told, or fails as told."""

    release: str = ""
    staged: bool = False
    fails: str = ""
    breaks: int = 0
    breaks_with: str = ""

    def send(self, argv: Sequence[str], chunks: Iterable[bytes], *, sudo: bool = True, timeout_s: float = 30.0
             ) -> Completed:
        verb = argv[1]
        if verb.startswith("ledger-"):
            return super().send(argv, chunks)
        self.verbs.append(verb)
        if verb == "stage-status" and self.breaks:
            self.breaks -= 1
            raise OpsctlError(self.breaks_with, "gpu-1: the connection broke.")
        if verb == self.fails:
            error = {"code": "instance.did_not_start", "message": "boom.", "hint": "look", "log_tail": ["last line"]}
            return Completed(6, json.dumps({"error": error, "exit_code": 6}), "")
        if verb == "state":
            digest = "x" if self.release != "v1" else A
            return Completed(0, json.dumps({"instances": [instance(0, self.release, digest)], "releases": []}), "")
        if verb in ("stage", "first-start"):  # is running now; whoever watches finds it done
            return Completed(0, json.dumps({"state": "running", "total": 0, "phase": "fetch"}), "")
        changed = verb == "first-start-status" or not self.staged
        self.staged = True
        if verb == "first-start-status":
            self.release = argv[2] and "v1"
        return Completed(0, json.dumps({"state": "done", "total": 0, "phase": "", "result": {"changed": changed}}), "")


@pytest.fixture
def machines(fleet: Fleet, gateway: Machine, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
             ) -> dict[str, Any]:
    played: dict[str, Any] = {"ops-1": gateway, "gpu-1": Gpu(Paths(tmp_path / "gpu-1"), "gpu-1"),
                              "gpu-2": Gpu(Paths(tmp_path / "gpu-2"), "gpu-2")}
    sessions = Sessions(played)
    for module in (first_start, books):
        monkeypatch.setattr(module, "Session", sessions)
        monkeypatch.setattr(module, "on_each", sessions.on_each)
    stored = find(fleet.directory / "bundle", "chat", "v1")
    assert stored is not None
    monkeypatch.setattr(f"{__name__}.A", stored.digest)
    return played


def test_a_new_fleet_is_brought_up_and_then_there_is_nothing_to_do(fleet: Fleet, machines: dict[str, Any]) -> None:
    done = bring_up(fleet, discard)
    assert done["changed"] == 2 + 2 * 2  # published, ledger; on each host staged, started
    assert [(row["host"], row["release"], row["state"]) for row in done["instances"]] == [
        ("gpu-1", "v1", "started"), ("gpu-2", "v1", "started")]
    again = bring_up(fleet, discard)
    assert again["changed"] == 0
    assert {row["state"] for row in again["instances"]} == {"serving"}


def test_an_instance_on_another_release_is_reported_and_never_moved(fleet: Fleet, machines: dict[str, Any]) -> None:
    machines["gpu-1"].release = "v0"
    seen: list[Event] = []
    done = bring_up(fleet, seen.append)
    assert done["instances"][0] == {"host": "gpu-1", "instance": "chat.0", "release": "v0", "state": "behind"}
    assert "first-start" not in machines["gpu-1"].verbs
    assert any(isinstance(event, Note) and event.host == "gpu-1" and "not moved" in event.message for event in seen)


def test_one_host_that_fails_keeps_no_other_from_starting(fleet: Fleet, machines: dict[str, Any]) -> None:
    machines["gpu-1"].fails = "first-start"
    seen: list[Event] = []
    with pytest.raises(MixedError) as error:
        bring_up(fleet, seen.append)
    assert machines["gpu-2"].release == "v1"
    assert error.value.log_tail == ("last line",)
    assert any(isinstance(event, TaskResult) and (event.host, event.status) == ("gpu-1", "failed") for event in seen)


@pytest.mark.parametrize(("times", "code", "heard"), [
    (3, "host.connection_lost", True), (1, "host.timed_out", True), (4, "host.unreachable", True),
    (99, "host.connection_lost", False), (1, "host.foreign_key", False)])
def test_a_connection_that_breaks_while_a_job_is_watched(
        fleet: Fleet, machines: dict[str, Any], monkeypatch: pytest.MonkeyPatch, times: int, code: str, heard: bool
        ) -> None:
    pauses: list[float] = []
    machines["gpu-1"].breaks, machines["gpu-1"].breaks_with = times, code
    monkeypatch.setattr(watch, "pause", pauses.append)
    if heard:
        assert len(bring_up(fleet, discard)["instances"]) == 2
        assert len(pauses) == times
    else:
        with pytest.raises(OpsctlError) as error:
            bring_up(fleet, discard)
        assert error.value.code == code
        assert len(pauses) <= 4


def test_all_that_fail_leave_the_fleet_as_it_was(fleet: Fleet, machines: dict[str, Any]) -> None:
    machines["gpu-1"].fails = machines["gpu-2"].fails = "first-start"
    with pytest.raises(RolledBackError):
        bring_up(fleet, discard)


def test_only_the_chosen_hosts(fleet: Fleet, machines: dict[str, Any]) -> None:
    bring_up(fleet, discard, hosts=[fleet.host("gpu-2")])
    assert {verb for verb in machines["gpu-1"].verbs if not verb.startswith("ledger-")} == set()


def test_a_gateway_that_was_installed_anew_gets_its_ledger_from_the_hosts(fleet: Fleet, machines: dict[str, Any]
                                                                          ) -> None:
    """Else a second first line would say something else than every copy."""
    bring_up(fleet, discard)
    ledger = machines["ops-1"].paths.ledgers / "chat.jsonl"
    before = ledger.read_bytes()
    ledger.unlink()
    assert bring_up(fleet, discard)["changed"] == 0
    assert ledger.read_bytes() == before


def test_a_service_without_release_is_noted(fleet: Fleet, machines: dict[str, Any]) -> None:
    from dataclasses import replace

    seen: list[Event] = []
    none = replace(fleet, services=(replace(CHAT, first_release=""),))
    assert bring_up(none, seen.append) == {"changed": 0, "instances": []}
    assert any(isinstance(event, Note) and "opsctl model import" in event.message for event in seen)


@pytest.mark.parametrize(("harm", "code"), [
    (shutil.rmtree, "release.missing"),
    (lambda release: (release / "manifest.json.sig").unlink(), "release.unsigned"),
    (lambda release: (release / "files" / "model.gguf").write_bytes(b"!" + MODEL[1:]), "release.tampered"),
    (lambda release: (release / "files" / "model.gguf").unlink(), "release.missing_file"),
    (lambda release: (release / "manifest.json").write_bytes(b"{}"), "release.tampered"),
])
def test_a_release_that_cannot_be_trusted_is_refused_before_anything_is_touched(
        fleet: Fleet, machines: dict[str, Any], harm: Any, code: str) -> None:
    stored = find(fleet.directory / "bundle", "chat", "v1")
    assert stored is not None
    harm(stored.directory)
    with pytest.raises(RefusedError) as refused:
        check_releases(fleet, discard)
    assert refused.value.code == code
    assert machines["ops-1"].verbs == ["ledger-show", "releases"]
    assert not machines["gpu-1"].verbs


def test_verify_all_stops_at_what_is_wrong(fleet: Fleet, keys: Keys) -> None:
    bundle = fleet.directory / "bundle"
    assert len(verify_all(bundle, keys.allowed_signers)) == 1
    assert verify_version(bundle, "chat", "v1", keys.allowed_signers, lambda _: lambda *_: None)
    (bundle / "releases" / "chat" / "v9-000000000000").mkdir()
    with pytest.raises(RefusedError) as refused:
        verify_all(bundle, keys.allowed_signers)
    assert refused.value.code == "release.no_manifest"
