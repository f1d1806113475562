"""Staging over hosts that are played, with the real worker and real sessions: who is asked what, what is refused
before anything is begun, how it ends.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from played_host import Played, failure, fleet_of, host_of, play, when_asked
from release_kit import Keys, lay_down, make_keys
from session_server import make_key, serving

from opsctl.cli.stage import document_of, serving_hosts, summary
from opsctl.engines.events import Event, Note, PhaseStarted, Progress, TaskResult, discard
from opsctl.engines.pyinfra_job import Job, write_job
from opsctl.engines.session import Session
from opsctl.errors import ExitCode, OpsctlError, PausedError, RefusedError, UsageError
from opsctl.fleet.model import Fleet, Service
from opsctl.releases.staging import Found, bytes_per_second, check_space, choose, find_release, stage_release

CHAT = Service("chat", "gpu", 8100, 8000)
A, B = "a" * 64, "b" * 64
V2 = "v2-" + "b" * 12
NAMES = ("ops-1", "gpu-1", "gpu-2", "gpu-3")
MISSING = {"staged": False, "engine_built": False, "fetch_bytes": 70, "link_files": 1, "free_bytes": 900, "fits": True}
STAGED = {**MISSING, "staged": True, "engine_built": True, "fetch_bytes": 0}
RESULT = {"changed": True, "release": V2, "fetched_bytes": 70, "linked_files": 1, "environment_built": True}


def entry(version: str, digest: str, *, complete: bool = True) -> dict[str, Any]:
    return {"version": version, "digest": digest, "complete": complete, "bytes": 99}


@pytest.mark.parametrize(("text", "rate"), [
    ("", 0), ("200M", 200_000_000), ("1.5G", 1_500_000_000), ("800K", 800_000), ("800k", 800_000), ("1T", 10 ** 12),
    ("200MB/s", 200_000_000), (" 2M ", 2_000_000), ("0.001M", 1000)])
def test_rates(text: str, rate: int) -> None:
    assert bytes_per_second(text) == rate


@pytest.mark.parametrize("text", ["200", "M", "-1M", "1,5G", "0M", "1K2", "0.5K", "fast", "1MiB", "nan"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        bytes_per_second(text)
    assert caught.value.code == "stage.bad_rate"
    assert "200M" in caught.value.hint


@pytest.mark.parametrize(("version", "there", "here", "found"), [
    ("v2", [entry("v1", A), entry("v2", B)], [], (B, True)),
    ("v2", [entry("v1", A)], [entry("v2", B)], (B, False)),
    ("v2", [entry("v2", B)], [entry("v2", B)], (B, True)),
    (V2, [entry("v2", B)], [entry("v2", A)], (B, True)),
    (f"v2-{'a' * 12}", [entry("v2", B)], [entry("v2", A)], (A, False)),
])
def test_a_release_is_found_on_gateway_or_in_bundle(version: str, there: Any, here: Any, found: tuple[str, bool]
                                                    ) -> None:
    assert choose("chat", version, there, here) == Found("chat", "v2", found[0], found[1], 99)


def test_an_unknown_version_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        choose("chat", "v3", [entry("v1", A), entry("v2", B)], [entry("v2", B), entry("v2.1", A)])
    assert (caught.value.code, caught.value.hint) == ("release.no_such_version", "versions: v1, v2, v2.1")
    with pytest.raises(UsageError) as caught:
        choose("chat", "v3", [], [])
    assert "opsctl model import" in caught.value.hint


def test_two_releases_of_one_name_are_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        choose("chat", "v2", [entry("v2", A)], [entry("v2", B)])
    assert caught.value.code == "release.version_taken"
    assert V2 in caught.value.hint


def test_what_does_not_fit_is_refused_for_all_hosts_together() -> None:
    short = {**MISSING, "fits": False, "fetch_bytes": 140_000_000_000, "free_bytes": 12_000_000_000}
    check_space({"gpu-1": MISSING, "gpu-2": STAGED}, "chat", "v2")
    with pytest.raises(RefusedError) as caught:
        check_space({"gpu-1": MISSING, "gpu-2": short, "gpu-3": short}, "chat", "v2")
    assert caught.value.code == "host.disk_full"
    assert "gpu-2 would fetch 140,000 MB and has 12,000 MB free; gpu-3 would" in caught.value.message
    assert "gpu-1" not in caught.value.message
    assert "--limit '!gpu-2'" in caught.value.hint


@dataclasses.dataclass
class Row:
    """The gateway ops-1 and three GPU hosts, which stage what they are told."""

    fleet: Fleet
    played: dict[str, Played]

    @property
    def hosts(self) -> tuple[Any, ...]:
        return self.fleet.group("gpu")

    def verbs(self, name: str) -> list[str]:
        return [asked[0] for asked in self.played[name].asked()]

    def stage(self, events: list[Event] | None = None, release: str = V2, **more: Any) -> list[dict[str, Any]]:
        return stage_release(self.fleet, self.hosts, CHAT, release, discard if events is None else events.append,
                             **more)


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


@pytest.fixture
def row(tmp_path: Path, client_key: Path) -> Iterator[Row]:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(tmp_path / name, client_key)) for name in NAMES}
        played = {name: play(servers[name], tmp_path / name / "played") for name in NAMES}
        for one in played.values():
            one.tell("stage-plan", MISSING)
            one.tell("stage", {"state": "running", "phase": "fetch", "done": 10, "total": 80})
            one.tell_in_turn("stage-status",
                             {"document": {"state": "running", "phase": "fetch", "done": 40, "total": 80}},
                             {"document": {"state": "done", "result": RESULT}})
        hosts = [host_of(servers[name], client_key, name) for name in NAMES]
        hosts[0] = dataclasses.replace(hosts[0], groups=("gateway",))
        yield Row(dataclasses.replace(fleet_of(tmp_path, hosts, *servers.values()), services=(CHAT,)), played)


def test_hosts_that_lack_it_are_staged_and_watched(row: Row) -> None:
    row.played["gpu-2"].tell("stage-plan", STAGED)
    seen: list[Event] = []
    rows = row.stage(seen, rate_limit=5000)
    assert rows[0] == {"host": "gpu-1", "release": V2, "changed": True, "fetched_bytes": 70, "linked_files": 1,
                       "engine_built": True, "skipped": ""}
    assert rows[1] == {"host": "gpu-2", "release": V2, "changed": False, "fetched_bytes": 0, "linked_files": 0,
                       "engine_built": False, "skipped": ""}
    assert row.verbs("gpu-2") == ["state", "stage-plan"]
    where = ["--service", "chat", "--release", V2]
    assert row.played["gpu-3"].asked()[-3:] == [
        ["stage", *where, "--rate-limit", "5000", "--wait-s", "0"],
        ["stage-status", *where, "--wait-s", "2.0"], ["stage-status", *where, "--wait-s", "2.0"]]
    assert [event.host for event in seen if isinstance(event, TaskResult) and event.status == "changed"] == [
        "gpu-1", "gpu-3"]
    told = [event for event in seen if isinstance(event, Progress) and event.host == "gpu-1"]
    assert [(event.done, event.total) for event in told] == [(10, 80), (40, 80), (80, 80)]
    assert told[1].per_second > 0
    assert not any(row.verbs("ops-1"))


def test_nothing_to_do_orders_nothing(row: Row) -> None:
    for name in NAMES:
        row.played[name].tell("stage-plan", STAGED)
    rows = row.stage()
    assert not any(one["changed"] for one in rows)
    assert "stage" not in {verb for name in NAMES for verb in row.verbs(name)}


def test_an_engine_that_is_not_built_is_something_to_do(row: Row) -> None:
    for name in NAMES:
        row.played[name].tell("stage-plan", {**STAGED, "engine_built": name != "gpu-2"})
    assert [one["changed"] for one in row.stage()] == [False, True, False]


def test_a_host_without_room_refuses_all_of_it_before_the_first_byte(row: Row) -> None:
    row.played["gpu-2"].tell("stage-plan", {**MISSING, "fits": False})
    with pytest.raises(RefusedError) as caught:
        row.stage()
    assert caught.value.code == "host.disk_full"
    assert "gpu-2" in caught.value.message
    assert "stage" not in {verb for name in NAMES for verb in row.verbs(name)}


def test_a_silent_host_refuses_unless_it_may_be_left_out(row: Row) -> None:
    row.played["gpu-2"].server.close()
    with pytest.raises(RefusedError) as caught:
        row.stage()
    assert caught.value.code == "host.unreachable"
    assert "--skip-unreachable 1" in caught.value.hint
    assert "stage" not in row.verbs("gpu-1")
    rows = row.stage(skip_unreachable=1)
    assert [bool(one["skipped"]) for one in rows] == [False, True, False]
    assert [one["changed"] for one in rows] == [True, False, True]


def test_another_trouble_of_a_host_refuses_whatever_may_be_left_out(row: Row) -> None:
    row.fleet.known_hosts.write_text(row.fleet.known_hosts.read_text().replace(
        row.played["gpu-2"].server.pin, ""))
    with pytest.raises(RefusedError) as caught:
        row.stage(skip_unreachable=3)
    assert caught.value.code == "host.not_trusted"


def lost_times(row: Row, times: int) -> list[Event]:
    """Stages while gpu-2 boots so often; what it knew of the job is gone with each."""
    gone = {"document": {"state": "none", "phase": "", "done": 0, "total": 0}}
    row.played["gpu-2"].tell_in_turn("stage-status", *[gone] * times, {"document": {"state": "done", "result": RESULT}})
    seen: list[Event] = []
    row.stage(seen)
    return seen


def test_a_host_that_boots_meanwhile_goes_on(row: Row) -> None:
    seen = lost_times(row, 2)
    assert row.verbs("gpu-2").count("stage") == 3
    assert {event.host for event in seen if isinstance(event, TaskResult) and event.status == "changed"} == {
        "gpu-1", "gpu-2", "gpu-3"}
    assert len([event for event in seen if isinstance(event, Note) and "cut off" in event.message]) == 2


def test_a_host_that_boots_again_and_again_pauses(row: Row) -> None:
    with pytest.raises(PausedError) as caught:
        lost_times(row, 3)
    assert caught.value.code == "job.lost"
    assert "staged on gpu-1, gpu-3; what serves is untouched" in caught.value.message
    assert "same command again" in caught.value.hint


def test_one_host_that_refuses_keeps_no_other_from_being_staged(row: Row) -> None:
    error = {"code": "fetch.corrupted", "message": "model.gguf is not what was signed.", "hint": "look",
             "log_tail": ["x"], "exit_code": 5}
    row.played["gpu-2"].tell("stage-status", {"state": "failed", "error": error})
    seen: list[Event] = []
    with pytest.raises(RefusedError) as caught:
        row.stage(seen)
    assert caught.value.message == ("gpu-2: model.gguf is not what was signed; staged on gpu-1, gpu-3; what serves is "
                                    "untouched.")
    assert (caught.value.code, caught.value.exit_code, caught.value.log_tail) == (
        "fetch.corrupted", ExitCode.REFUSED, ("x",))
    assert {(event.host, event.status) for event in seen if isinstance(event, TaskResult)} == {
        ("gpu-1", "changed"), ("gpu-2", "failed"), ("gpu-3", "changed")}


def test_hosts_that_fail_for_different_reasons_are_no_refusal(row: Row) -> None:
    row.played["gpu-1"].fail("stage", "release.tampered", 5)
    row.played["gpu-2"].fail("stage", "job.other", 4)
    row.played["gpu-3"].fail("stage", "release.tampered", 5)
    with pytest.raises(OpsctlError) as caught:
        row.stage()
    assert type(caught.value) is OpsctlError
    assert "(3 hosts failed); what serves" in caught.value.message


STAGE = """
import dataclasses, sys
from opsctl.engines.events import discard
from opsctl.engines.pyinfra_job import read_job
from opsctl.fleet.model import Service
from opsctl.releases.staging import stage_release
job = read_job(sys.stdin.readline())
chat = Service("chat", "gpu", 8100, 8000)
fleet = dataclasses.replace(job.fleet, services=(chat,))
stage_release(fleet, fleet.group("gpu"), chat, "v2-bbbbbbbbbbbb", discard)
"""


def test_ctrl_c_does_not_wait_for_the_hosts(row: Row) -> None:
    for name in NAMES:
        row.played[name].tell("stage-status", {"state": "running", "phase": "fetch", "done": 1, "total": 9},
                              seconds=1)
    process = subprocess.Popen([sys.executable, "-c", STAGE], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin
    process.stdin.write(write_job(Job(row.fleet, ())))
    process.stdin.flush()
    try:
        for name in ("gpu-1", "gpu-2", "gpu-3"):
            when_asked(row.played[name], "stage-status")
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


def bundled(row: Row, keys: Keys) -> Path:
    """A release of version v2 in the bundle, and its keys in the fleet's folder."""
    trust = row.fleet.directory / "trust"
    trust.mkdir()
    (trust / "allowed_signers").write_bytes(keys.allowed_signers.read_bytes())
    return lay_down(row.fleet.directory / "bundle" / "releases" / "chat", {"model.gguf": b"GGUF" * 9}, keys.private,
                    "v2")


def test_what_only_the_bundle_has_is_published_first(row: Row, keys: Keys) -> None:
    release = bundled(row, keys).name
    for name in ("gpu-1", "gpu-3"):
        row.played[name].tell_in_turn("stage-plan", failure("stage-plan", "release.not_on_gateway", 5),
                                      {"document": MISSING})
    row.played["ops-1"].tell("release-begin", {"accepted": False, "service": "chat", "release": release, "needed": []})
    row.played["ops-1"].tell("release-accept", {"changed": True})
    seen: list[Event] = []
    assert [one["changed"] for one in row.stage(seen, release=release)] == [True] * 3
    assert row.verbs("ops-1") == ["release-begin", "release-accept"]
    assert "Publish chat v2" in [event.name for event in seen if isinstance(event, PhaseStarted)]


def test_a_release_of_the_bundle_that_was_changed_is_not_published(row: Row, keys: Keys) -> None:
    directory = bundled(row, keys)
    (directory / "files" / "model.gguf").write_bytes(b"GGUF" * 8 + b"!!!!")
    row.played["gpu-1"].fail("stage-plan", "release.not_on_gateway", 5)
    with pytest.raises(RefusedError) as caught:
        row.stage(release=directory.name)
    assert caught.value.code == "release.tampered"
    assert row.verbs("ops-1") == []


def test_what_is_nowhere_is_refused(row: Row) -> None:
    row.played["gpu-1"].fail("stage-plan", "release.not_on_gateway", 5)
    with pytest.raises(RefusedError) as caught:
        row.stage()
    assert caught.value.code == "release.missing"


def test_the_gateway_is_asked_for_its_releases(row: Row, keys: Keys) -> None:
    directory = bundled(row, keys)
    row.played["ops-1"].tell("releases", {"releases": [entry("v1", A), entry("v3", B, complete=False)]})
    with Session(row.fleet, "ops-1") as session:
        assert find_release(row.fleet, session, CHAT, "v1") == Found("chat", "v1", A, True, 99)
        found = find_release(row.fleet, session, CHAT, "v2")
        assert (found.release, found.on_gateway, found.size) == (directory.name, False, 36)
        with pytest.raises(UsageError) as caught:
            find_release(row.fleet, session, CHAT, "v3")
        assert caught.value.hint == "versions: v1, v2"
    assert find_release(row.fleet, None, CHAT, "v2").release == directory.name


def test_the_verb_says_what_was_done() -> None:
    rows = [{"host": "gpu-1", "release": V2, "changed": True, "fetched_bytes": 7_000_000, "linked_files": 2,
             "engine_built": True, "skipped": ""},
            {"host": "gpu-2", "release": V2, "changed": False, "fetched_bytes": 0, "linked_files": 0,
             "engine_built": False, "skipped": "gpu-2: silence"}]
    document = document_of(Found("chat", "v2", B, True, 99), rows, "R")
    assert (document["changed"], document["skipped"], document["release"]) == (1, ["gpu-2"], V2)
    assert summary(document) == ("chat v2: staged on 1 of 2 hosts\n"
                                 "  gpu-1      7.0 MB fetched, 2 files linked, engine built\n"
                                 "left out, not answering: gpu-2\n"
                                 "next: opsctl update-model --version v2")
    again = document_of(Found("chat", "v2", B, True, 99), [{**rows[0], "changed": False}], "R")
    assert summary(again).startswith("nothing to do: chat v2 is staged\n")


def test_only_hosts_of_the_service_are_meant(row: Row) -> None:
    assert serving_hosts(row.fleet, CHAT, row.fleet.hosts) == row.hosts
    with pytest.raises(UsageError) as caught:
        serving_hosts(row.fleet, CHAT, (row.fleet.host("ops-1"),))
    assert caught.value.hint == "hosts of gpu: gpu-1, gpu-2, gpu-3"
