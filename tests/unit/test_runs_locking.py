"""Locks of a run, with hosts whose opsctl-host is the real one: taken, kept, lost, taken over, given back."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from runs_kit import RunsHost, holder, make_fleet, make_hosts

from opsctl.agent import locks as host_locks
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import ExitCode, LockedError, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet
from opsctl.runs import bare, identity, locking
from opsctl.runs.identity import Holder
from opsctl.runs.locking import Locks
from opsctl.runs.place import Place

HOSTS = ("gpu-1", "gpu-2", "gpu-3")


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return make_fleet(tmp_path)


@pytest.fixture
def hosts(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunsHost]:
    return make_hosts(fleet, tmp_path, monkeypatch)


class Clock:
    now_s = 500.0

    def __call__(self) -> float:
        return self.now_s


def locks(fleet: Fleet, who: Holder, names: tuple[str, ...] = HOSTS, **more: object) -> Locks:
    emit = more.pop("emit", discard)
    return Locks(fleet, [fleet.host(name) for name in names], ["chat"], who, emit, **more)  # type: ignore[arg-type]


def held(host: RunsHost) -> dict[str, str]:
    """Lock -> run."""
    return {one["name"]: one["holder"]["run"] for one in host_locks.all_locks(host.paths)}


def said(seen: list[Event]) -> str:
    return "\n".join(event.message for event in seen if isinstance(event, Note))


def test_all_are_taken_and_given_back(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    mine = locks(fleet, holder())
    mine.take()
    assert held(hosts["ops-1"]) == {"service-chat": "R1"}
    assert [held(hosts[name]) for name in HOSTS] == [{"host": "R1"}] * 3
    mine.check()
    mine.drop()
    assert [held(host) for host in hosts.values()] == [{}] * 4


def test_one_that_is_held_gives_back_the_others(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    bobs = locks(fleet, holder("bob", "R0"), ("gpu-2",))
    bobs._services.clear()
    bobs.take()
    hosts["gpu-2"].clock_s += 12
    with pytest.raises(LockedError) as refused:
        locks(fleet, holder()).take()
    error = refused.value
    assert (error.code, error.exit_code) == ("lock.held", ExitCode.LOCKED)
    assert error.message.startswith("gpu-2: locked by bob@bobs-laptop for update-model (run R0, since 2")
    assert "last heartbeat 12 s ago" in error.message
    assert "opsctl lock break R0" in error.hint
    assert "wait" in error.hint
    assert [held(hosts[name]) for name in ("ops-1", *HOSTS)] == [{}, {}, {"host": "R0"}, {}]
    bobs.drop()


def test_the_services_lock_is_asked_first(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    bobs = locks(fleet, holder("bob", "R0"))
    bobs.take()
    for host in hosts.values():
        host.verbs.clear()
    with pytest.raises(LockedError, match="service chat: locked by bob"):
        locks(fleet, holder()).take()
    assert [hosts[name].verbs for name in HOSTS] == [[], [], []]
    bobs.drop()


def test_who_is_silent_for_a_minute_is_taken_over_and_that_is_said(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    bobs = locks(fleet, holder("bob", "R0"))
    bobs.take()
    seen: list[Event] = []
    for host in hosts.values():
        host.clock_s += 61
    mine = locks(fleet, holder(), emit=seen.append)
    mine.take()
    assert said(seen) == ("took over the lock of service chat, gpu-1, gpu-2, gpu-3 from bob@bobs-laptop (update-model, "
                          "run R0): no heartbeat for a minute")
    assert held(hosts["gpu-3"]) == {"host": "R1"}
    bobs.drop()
    assert held(hosts["gpu-3"]) == {"host": "R1"}, "what is no longer his he does not take away"
    mine.drop()


def test_our_own_process_that_is_gone_is_taken_over_at_once(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    me = identity.me("R1", "update-model")
    killed = replace(me, token="other", run="R0", pid_start=me.pid_start - 1)
    locks(fleet, killed).take()
    seen: list[Event] = []
    mine = locks(fleet, me, emit=seen.append)
    mine.take()
    assert "(update-model, run R0): that process is gone" in said(seen)
    mine.drop()


def test_our_own_process_that_lives_is_not(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    me = identity.me("R1", "update-model")
    other = locks(fleet, replace(me, token="other", run="R0"))
    other.take()
    with pytest.raises(LockedError) as refused:
        locks(fleet, me).take()
    assert refused.value.code == "lock.held"
    other.drop()


def test_a_laptop_that_slept_finds_its_lock_gone_before_it_acts(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    clock = Clock()
    anns = locks(fleet, holder(), clock=clock)
    anns.take()
    for host in hosts.values():
        host.clock_s += 90
    bobs = locks(fleet, holder("bob", "R2"), ("gpu-2",))
    bobs._services.clear()
    bobs.take()
    anns.check()  # as if no time had passed: nothing was asked
    clock.now_s += 90
    with pytest.raises(LockedError) as lost:
        anns.check()
    assert (lost.value.code, lost.value.exit_code) == ("lock.lost", ExitCode.LOCKED)
    assert "gpu-2" in lost.value.message
    assert "taken by bob@bobs-laptop for update-model (run R2" in lost.value.message
    assert "nothing more is done" in lost.value.message
    with pytest.raises(LockedError):
        anns.check()
    anns.drop()
    assert [held(hosts[name]) for name in HOSTS] == [{}, {"host": "R2"}, {}]
    bobs.drop()


def test_a_lock_that_was_broken_stops_its_holder(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    clock = Clock()
    mine = locks(fleet, holder(), clock=clock)
    mine.take()
    host_locks.break_(hosts["gpu-1"].paths, "host", "R1")
    clock.now_s += 21
    with pytest.raises(LockedError, match="broken by somebody"):
        mine.check()
    mine.drop()


def test_an_old_heartbeat_is_renewed_before_an_act_and_a_fresh_one_is_not(fleet: Fleet, hosts: dict[str, RunsHost]
                                                                          ) -> None:
    clock = Clock()
    mine = locks(fleet, holder(), clock=clock)
    mine.take()
    clock.now_s += 19
    mine.check()
    assert "lock-renew" not in hosts["gpu-1"].verbs
    clock.now_s += 2
    mine.check()
    mine.check()
    assert hosts["gpu-1"].verbs.count("lock-renew") == 1
    mine.drop()


def test_a_host_that_does_not_answer_is_told_once_and_stops_nobody(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    clock, seen = Clock(), list[Event]()
    mine = locks(fleet, holder(), clock=clock, emit=seen.append)
    mine.take()
    hosts["gpu-2"].silent = "host.unreachable"
    for _ in range(3):
        clock.now_s += 30
        mine.check()
    assert said(seen) == "does not answer the heartbeat of its lock: gpu-2 does not answer."
    hosts["gpu-2"].silent = ""
    clock.now_s += 30
    mine.check()
    mine.drop()
    assert held(hosts["gpu-2"]) == {}


def test_a_host_that_is_silent_at_the_start_is_locked_when_it_answers(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    clock = Clock()
    hosts["gpu-2"].silent = "host.unreachable"
    mine = locks(fleet, holder(), clock=clock)
    mine.take()
    hosts["gpu-2"].silent = ""
    clock.now_s += 30
    mine.check()
    assert held(hosts["gpu-2"]) == {"host": "R1"}
    mine.drop()


def test_without_the_gateway_only_a_rollback_goes_on(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    hosts["ops-1"].silent = "host.unreachable"
    with pytest.raises(RefusedError) as refused:
        locks(fleet, holder()).take()
    assert refused.value.code == "host.unreachable"
    assert held(hosts["gpu-1"]) == {}
    seen: list[Event] = []
    mine = locks(fleet, holder(), gateway_optional=True, emit=seen.append)
    mine.take()
    assert "the gateway does not answer: service chat is not locked there, its hosts are" in said(seen)
    assert held(hosts["gpu-1"]) == {"host": "R1"}
    mine.drop()


def test_a_run_that_is_continued_gives_its_name_to_the_locks(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    mine = locks(fleet, holder())
    mine.take()
    mine.rename("R0")
    assert (held(hosts["ops-1"]), held(hosts["gpu-1"])) == ({"service-chat": "R0"}, {"host": "R0"})
    mine.check()
    mine.drop()
    assert held(hosts["gpu-1"]) == {}


@pytest.fixture
def bare_hosts(hosts: dict[str, RunsHost]) -> dict[str, RunsHost]:
    for host in hosts.values():
        host.bare = True
    return hosts


def bare_lock(host: RunsHost) -> Path:
    return host.paths.root / "lib/opsctl-provision.lock"


def test_bare_machines_are_locked_by_a_folder(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    mine = locks(fleet, holder(), ("ops-1", *HOSTS), allow_bare=True)
    mine.take()
    assert all((bare_lock(host) / "owner").is_file() for host in bare_hosts.values())
    with pytest.raises(LockedError) as refused:
        locks(fleet, holder("bob", "R2"), allow_bare=True).take()
    assert refused.value.code == "lock.held"
    assert "ann@anns-laptop" in refused.value.message
    mine.drop()
    assert not any(path.name.startswith("opsctl") for host in bare_hosts.values()
                   for path in (host.paths.root / "lib").iterdir())


def test_a_bare_machine_is_taken_over_by_the_same_rules(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    me = identity.me("R1", "provision")
    dead = locks(fleet, replace(me, token="dead", run="R0", pid_start=1), allow_bare=True)
    dead.take()
    seen: list[Event] = []
    mine = locks(fleet, me, allow_bare=True, emit=seen.append)
    mine.take()
    assert "that process is gone" in said(seen)
    for host in bare_hosts.values():
        host.clock_s += 61
    bobs = locks(fleet, holder("bob", "R2"), allow_bare=True)
    bobs.take()
    dead.drop()
    mine.drop()
    assert (bare_lock(bare_hosts["gpu-1"]) / "owner").is_file(), "it is bob's now"
    bobs.drop()


def test_of_two_who_take_over_a_bare_machine_one_does(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    host = bare_hosts["gpu-1"]
    assert bare.take(host, holder("ann", "R0"))
    host.clock_s += 61
    owner = bare.owner(host)
    assert owner is not None
    assert owner.beat_s == pytest.approx(61)
    assert bare.take(host, holder("bob"), over=owner)
    assert not bare.take(host, holder("eve"), over=owner)
    host.clock_s = 5.0  # it was booted
    again = bare.owner(host)
    assert again is not None
    assert (again.holder["user"], again.beat_s) == ("bob", 5.0)


def test_when_the_agent_comes_its_lock_replaces_the_folder(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    clock = Clock()
    mine = locks(fleet, holder(), allow_bare=True, clock=clock)
    mine.take()
    for host in bare_hosts.values():
        host.bare = False
    clock.now_s += 21
    mine.check()
    assert held(bare_hosts["gpu-1"]) == {"host": "R1"}
    assert held(bare_hosts["ops-1"]) == {"service-chat": "R1"}
    assert not bare_lock(bare_hosts["gpu-1"]).exists()
    mine.drop()


def test_what_else_the_gateway_says_is_told_as_it_is(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    hosts["ops-1"].silent = "host.foreign_key"
    with pytest.raises(OpsctlError) as refused:
        locks(fleet, holder(), gateway_optional=True).take()
    assert refused.value.code == "host.foreign_key"


def test_a_heart_that_stumbles_beats_on(fleet: Fleet, hosts: dict[str, RunsHost], monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    monkeypatch.setattr(locking, "BEAT_EVERY_S", 0.01)
    thrice, times = threading.Event(), list[int]()

    def full() -> None:
        times.append(1)
        if len(times) > 2:
            thrice.set()
        raise OSError(28, "No space left on device")

    mine = locks(fleet, holder())
    mine.meanwhile = full
    mine.take()
    assert thrice.wait(5)
    mine.drop()


def test_a_word_that_cannot_be_said_stops_no_heartbeat(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    def dead(_: Event) -> None:
        raise OSError(5, "Input/output error")

    clock = Clock()
    mine = locks(fleet, holder(), clock=clock, emit=dead)
    mine.take()
    hosts["gpu-1"].silent = "host.unreachable"
    clock.now_s += 30
    mine.check()
    assert hosts["gpu-2"].verbs.count("lock-renew") == 1
    mine.drop()


def test_one_that_hangs_holds_up_nobodys_heartbeat(fleet: Fleet, hosts: dict[str, RunsHost],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "BEAT_EVERY_S", 0.01)
    monkeypatch.setattr(locking, "PATIENCE_S", 0.01, raising=False)
    go_on, thrice, hangs, beats = threading.Event(), threading.Event(), list[str](), list[str]()
    beat = Locks._beat

    def slow(self: Locks, place: Place) -> None:
        if place.host.name == "gpu-2":
            with place.only_one:
                hangs.append("gpu-2")
                go_on.wait(10)
            return
        beat(self, place)
        beats.append(place.host.name)
        if beats.count("gpu-3") > 2:
            thrice.set()

    monkeypatch.setattr(Locks, "_beat", slow)
    mine = locks(fleet, holder())
    mine.take()
    assert thrice.wait(5)
    assert hangs == ["gpu-2"], "nobody queues up behind it"
    go_on.set()
    mine.drop()


def older(path: Path, seconds: float = 61) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("left", ["", "{\n", "null\n", None])
def test_an_owner_that_a_power_cut_left_empty_goes_stale(fleet: Fleet, bare_hosts: dict[str, RunsHost],
                                                         left: str | None) -> None:
    folder = bare_lock(bare_hosts["gpu-1"])
    folder.mkdir(parents=True)
    if left is None:
        (folder / "over.T").mkdir()
    else:
        (folder / "owner").write_text(left)
    with pytest.raises(LockedError) as refused:
        locks(fleet, holder(), allow_bare=True).take()
    assert "gpu-1: locked by somebody" in refused.value.message
    assert "/var/lib/opsctl-provision.lock" in refused.value.hint
    older(folder)
    mine = locks(fleet, holder(), allow_bare=True)
    mine.take()
    owner = bare.owner(bare_hosts["gpu-1"])
    assert owner is not None
    assert owner.holder["user"] == "ann"
    mine.drop()
    assert not folder.exists()


def test_a_folder_that_is_just_given_back_stands_in_nobodys_way(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    bare_lock(bare_hosts["gpu-1"]).mkdir(parents=True)
    mine = locks(fleet, holder(), allow_bare=True)
    mine.take()
    mine.drop()


def test_an_agent_that_has_come_does_away_with_an_empty_owner(fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    folder = bare_lock(hosts["gpu-1"])
    folder.mkdir(parents=True)
    (folder / "owner").touch()
    older(folder)
    mine = locks(fleet, holder(), allow_bare=True)
    mine.take()
    assert not folder.exists()
    mine.drop()


def test_the_owner_lies_on_the_disk_before_the_lock_is_there(fleet: Fleet, bare_hosts: dict[str, RunsHost],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    program = RunsHost._program
    monkeypatch.setattr(RunsHost, "_program", lambda self, argv, chunks: asked.append(list(argv)) or program(
        self, argv, chunks))
    assert bare.take(bare_hosts["gpu-1"], holder())
    done = [argv[0] for argv in asked]
    assert done == ["mkdir", "cat", "tee", "sync", "mv", "sync", "mv"]


def test_a_takeover_that_was_cut_off_goes_stale_too(fleet: Fleet, bare_hosts: dict[str, RunsHost]) -> None:
    host = bare_hosts["gpu-1"]
    assert bare.take(host, holder("ann", "R0"))
    host.clock_s += 61
    owner = bare.owner(host)
    assert owner is not None
    cut = bare_lock(host) / f"over.{owner.holder['token']}"
    cut.mkdir()
    assert not bare.take(host, holder("bob"), over=owner)
    older(cut)
    assert bare.take(host, holder("bob"), over=owner)
    assert not bare.take(host, holder("eve"), over=owner)
    older(cut.with_name(f"{cut.name}.1"))
    assert not bare.take(host, holder("eve"), over=owner), "bob has it, whatever eve saw a while ago"
    now = bare.owner(host)
    assert now is not None
    assert now.holder["user"] == "bob"


def test_a_host_without_a_lock_is_named_and_one_that_somebody_else_has_by_then_stops_us(
        fleet: Fleet, hosts: dict[str, RunsHost]) -> None:
    clock, seen = Clock(), list[Event]()
    hosts["gpu-2"].silent = "host.unreachable"
    mine = locks(fleet, holder(), clock=clock, emit=seen.append)
    mine.take()
    mine.rename("R0")
    assert said(seen) == "is not locked, and tried again with each heartbeat: gpu-2 does not answer."
    hosts["gpu-2"].silent = ""
    bobs = locks(fleet, holder("bob", "R2"), ("gpu-2",))
    bobs._services.clear()
    bobs.take()
    clock.now_s += 30
    with pytest.raises(LockedError, match="gpu-2 is not ours any more: taken by bob"):
        mine.check()
    mine.drop()
    assert held(hosts["gpu-2"]) == {"host": "R2"}
    bobs.drop()
