"""Locks of a host: who may take one, that one of two gets it, and what fencing keeps out."""

from __future__ import annotations

import json
import multiprocessing
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from machines import Machine
from release_kit import Keys, make_host, make_keys
from systemd_kit import Systemd

from opsctl.agent import cutover, drains, job, locks
from opsctl.agent.locks import Lock, Now, judge, refusal
from opsctl.agent.paths import Paths
from opsctl.agent.state import state
from opsctl.errors import UsageError


def holder(whose: str = "t1", run: str = "run-1", **more: Any) -> dict[str, Any]:
    return {"token": whose, "run": run, "verb": "update-model", "user": "ann", "machine": "laptop", "machine_id": "m1",
            "boot": "controller-boot", "pid": 7, "pid_start": 99, "message": "", **more}


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    boots(paths, "boot-1")
    return paths


def boots(paths: Paths, name: str) -> None:
    paths.boot_id.parent.mkdir(parents=True, exist_ok=True)
    paths.boot_id.write_text(f"{name}\n")


def at(seconds: float, began_s: float = 0.0) -> Any:
    """A clock that says so of the boot whose name lies there."""
    return lambda paths: Now(paths.boot_id.read_text().strip(), seconds, began_s)


# The decision.


@pytest.mark.parametrize(("beat", "now", "over", "how"), [
    (("boot-1", 1000.0), Now("boot-1", 1000.0), "", ""),
    (("boot-1", 1000.0), Now("boot-1", 1060.0), "", ""),
    (("boot-1", 1000.0), Now("boot-1", 1060.1), "", "stale"),
    (("boot-1", 1000.0), Now("boot-1", 1000.0), "run-1", "over"),
    (("boot-1", 1000.0), Now("boot-1", 1000.0), "run-9", ""),  # it saw another holder than the one that is there
    (("boot-1", 1000.0), Now("boot-1", 1061.0), "run-9", "stale"),
    (("boot-1", 1000.0), Now("boot-2", 5.0), "", ""),  # its holder may still be there and beat again
    (("boot-1", 1000.0), Now("boot-2", 60.0), "", ""),
    (("boot-1", 1000.0), Now("boot-2", 60.1), "", "reboot"),
    (("boot-1", 1000.0), Now("boot-2", 5.0), "run-1", "over"),
    (("boot-1", 1000.0), Now("boot-2", 5030.0, 5000.0), "", ""),  # a container: its kernel is older than its boot
    (("boot-1", 1000.0), Now("boot-2", 5061.0, 5000.0), "", "reboot"),
])
def test_who_may_take_a_lock_that_another_has(beat: tuple[str, float], now: Now, over: str, how: str) -> None:
    before = Lock(holder(), "2026-11-22T03:00:00Z", *beat)
    assert judge(before, "t2", over, now) == how
    assert judge(before, "t1", over, now) == "renewed"
    assert judge(None, "t2", over, now) == "free"


def test_the_clock_of_this_machine(host: Paths) -> None:
    now = locks.this_moment(host)
    assert now.boot == "boot-1"
    assert 0 <= now.began_s < now.at_s <= drains.boot_clock()


# On disk.


def test_a_lock_from_taken_to_dropped(host: Paths) -> None:
    assert locks.take(host, "host", holder(), clock=at(1000)) == {"taken": True, "how": "free", "before": None}
    refused = locks.take(host, "host", holder("t2", "run-2", user="bob"), clock=at(1010))
    assert not refused["taken"]
    assert (refused["holder"]["user"], refused["holder"]["run"], refused["holder"]["beat_s"]) == ("ann", "run-1", 10.0)
    assert refused["holder"]["since"].endswith("Z")
    assert locks.renew(host, "host", "t1", at(1050))["held"]
    assert not locks.take(host, "host", holder("t2"), clock=at(1105))["taken"]
    assert locks.renew(host, "host", "t2", at(1105)) == {"held": False, "holder": locks.told(host, clock=at(1105))}
    assert locks.drop(host, "host", "t2") == {"dropped": False}
    assert locks.drop(host, "host", "t1") == {"dropped": True}
    assert locks.drop(host, "host", "t1") == {"dropped": False}
    assert locks.renew(host, "host", "t1", at(1106)) == {"held": False, "holder": None}
    assert locks.take(host, "host", holder("t2"), clock=at(1106))["how"] == "free"


def test_a_holder_whose_lock_was_taken_finds_that_at_its_next_beat(host: Paths) -> None:
    locks.take(host, "host", holder(), clock=at(1000))
    taken = locks.take(host, "host", holder("t2", "run-2"), clock=at(1061))
    assert (taken["how"], taken["before"]["run"], taken["before"]["beat_s"]) == ("stale", "run-1", 61.0)
    found = locks.renew(host, "host", "t1", at(1062))
    assert (found["held"], found["holder"]["run"]) == (False, "run-2")
    assert locks.told(host, clock=at(1062))["beat_s"] == 1.0  # its beat was not taken for the new holder's


def test_a_holder_beats_again_after_the_host_booted(host: Paths) -> None:
    locks.take(host, "host", holder(), clock=at(1000))
    boots(host, "boot-2")
    assert not locks.take(host, "host", holder("t2"), clock=at(30))["taken"]
    assert locks.renew(host, "host", "t1", at(40))["held"]
    assert not locks.take(host, "host", holder("t2"), clock=at(99))["taken"]
    assert locks.take(host, "host", holder("t2"), clock=at(101))["how"] == "stale"


def test_the_same_process_takes_its_lock_again_and_keeps_since(host: Paths) -> None:
    locks.take(host, "host", holder(), clock=at(1000))
    path = host.locks / "host.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["since"], "2020-01-01T00:00:00Z"))
    assert locks.take(host, "host", holder(message="more"), clock=at(2000))["how"] == "renewed"
    found = locks.told(host, clock=at(2000))
    assert (found["since"], found["message"], found["beat_s"]) == ("2020-01-01T00:00:00Z", "more", 0.0)


def test_a_lock_is_broken_for_the_run_that_was_named_alone(host: Paths) -> None:
    locks.take(host, "service-chat", holder(), clock=at(1000))
    assert locks.break_(host, "service-chat", "run-2") == {"broken": False}
    assert locks.break_(host, "service-chat", "run-1") == {"broken": True}
    assert locks.all_locks(host) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"holder": {}}', b"\xff", b"null"])
def test_a_file_that_cannot_be_read_is_no_lock(host: Paths, content: bytes) -> None:
    locks.take(host, "host", holder(), clock=at(1000))
    (host.locks / "host.json").write_bytes(content)
    assert locks.all_locks(host) == []
    assert not locks.renew(host, "host", "t1", at(1001))["held"]
    assert locks.take(host, "host", holder("t2"), clock=at(1001))["how"] == "free"


@pytest.mark.parametrize("name", ["", "hosts", "service-", "service-../x", "../host", "service-Chat", "host\n"])
def test_names_that_are_no_locks(host: Paths, name: str) -> None:
    with pytest.raises(UsageError):
        locks.take(host, name, holder())


@pytest.mark.parametrize("bad", [{"token": ""}, {"token": 5}, {"pid": "7"}, {"user": None}, {"run": "../x"}])
def test_a_holder_that_says_too_little_is_refused(host: Paths, bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refused:
        locks.take(host, "host", holder(**bad))
    assert refused.value.code == "lock.bad_holder"
    assert locks.all_locks(host) == []


def grab(root: Path, token: str, start: Any, answers: Any) -> None:
    start.wait()
    answers.put([locks.take(Paths(root), name, holder(token, f"run-{token}"))["taken"] for name in NAMES])


NAMES = [f"service-s{number}" for number in range(25)]


def test_one_of_two_processes_gets_a_lock(host: Paths) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=grab, args=(host.root, token, start, answers)) for token in ("a", "b")]
    for process in both:
        process.start()
    first, second = answers.get(timeout=60), answers.get(timeout=60)
    for process in both:
        process.join()
    assert [one + other for one, other in zip(first, second, strict=True)] == [1] * len(NAMES)


# The verbs.


def says(host: Paths, *words: str, stdin: object = None) -> tuple[int, dict[str, Any]]:
    done = Machine(host, "gw").run(["opsctl-host", *words], stdin=json.dumps(stdin).encode() if stdin else b"")
    return done.returncode, json.loads(done.stdout)


def test_a_held_lock_is_an_answer_and_no_error(host: Paths) -> None:
    take = ["lock-take", "--name", "service-chat"]
    assert says(host, *take, stdin=holder()) == (0, {"taken": True, "how": "free", "before": None})
    code, answer = says(host, *take, stdin=holder("t2", "run-2"))
    assert (code, answer["taken"], answer["holder"]["run"]) == (0, False, "run-1")
    code, answer = says(host, *take, "--over", "run-1", stdin=holder("t2", "run-2"))
    assert (code, answer["how"], answer["before"]["token"]) == (0, "over", "t1")
    assert [lock["name"] for lock in says(host, "locks")[1]["locks"]] == ["service-chat"]
    assert says(host, "lock-renew", "--name", "service-chat", "--token", "t1")[1]["held"] is False
    assert says(host, "lock-renew", "--name", "service-chat", "--token", "t2")[1]["held"] is True
    assert says(host, "lock-drop", "--name", "service-chat", "--token", "t1") == (0, {"dropped": False})
    assert says(host, "lock-break", "--name", "service-chat", "--run", "run-2") == (0, {"broken": True})
    assert says(host, "locks") == (0, {"locks": []})


@pytest.mark.parametrize("stdin", [None, 5, {"token": "t"}])
def test_a_holder_that_is_none_is_usage(host: Paths, stdin: object) -> None:
    code, answer = says(host, "lock-take", "--name", "host", stdin=stdin)
    assert (code, answer["error"]["code"]) == (2, "lock.bad_holder")


# Fencing.

FREE = None
OF_RUN_1 = Lock(holder(), "2026-11-22T03:00:00Z", "boot-1", 1000.0)


@pytest.mark.parametrize(("lock", "owner", "now", "refused"), [
    (FREE, "run:run-1", Now("boot-1", 1000.0), False),  # a person by hand, or a controller of before there were locks
    (OF_RUN_1, "run:run-1", Now("boot-1", 1000.0), False),
    (OF_RUN_1, "run:run-2", Now("boot-1", 1060.0), True),
    (OF_RUN_1, "run:run-2", Now("boot-1", 1060.1), False),
    (OF_RUN_1, "run:run-2", Now("boot-2", 30.0), True),
    (OF_RUN_1, "run:run-2", Now("boot-2", 61.0), False),
    (OF_RUN_1, "operator:bob", Now("boot-1", 1000.0), False),
    (OF_RUN_1, "guard", Now("boot-1", 1000.0), False),
    (OF_RUN_1, "", Now("boot-1", 1000.0), False),
])
def test_whose_orders_reach_a_host(lock: Lock | None, owner: str, now: Now, refused: bool) -> None:
    error = refusal(lock, owner, now)
    assert (error is not None) == refused
    if error:
        assert (error.code, int(error.exit_code)) == ("host.locked", 4)
        assert all(word in error.message for word in ("ann@laptop", "update-model", "run run-1", "run-2"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def gpu(tmp_path: Path, keys: Keys) -> Paths:
    return make_host(tmp_path / "gpu", keys)


def test_a_run_that_lost_the_host_neither_drains_nor_cuts_over(gpu: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    units = Systemd()
    for name in ("start", "wait"):
        monkeypatch.setattr(job, name, partial(getattr(job, name), run=units))
    monkeypatch.setattr(cutover, "undo_timeout_s", lambda *_: 60.0)
    order = ["cutover", "chat.0", "--release", f"v2-{'b' * 12}", "--from", f"v1-{'a' * 12}", "--wait-s", "0"]
    assert says(gpu, "lock-take", "--name", "host", stdin=holder())[1]["taken"]
    for words in (["drain", "chat.0"], order):
        code, answer = says(gpu, *words, "--owner", "run:run-2")
        assert (code, answer["error"]["code"]) == (4, "host.locked")
        assert "run-1" in answer["error"]["hint"]
    assert drains.read_drains(gpu, "chat.0") == []
    assert not units.orders
    assert says(gpu, "drain", "chat.0", "--owner", "run:run-1")[1]["changed"]
    assert says(gpu, "drain", "chat.0", "--owner", "operator:bob")[1]["changed"]
    assert says(gpu, *order, "--owner", "run:run-1")[0] == 0
    assert says(gpu, "undrain", "chat.0", "--owner", "run:run-2")[0] == 0, "what brings traffic back is never fenced"
    says(gpu, "lock-drop", "--name", "host", "--token", "t1")
    assert says(gpu, "drain", "chat.0", "--owner", "run:run-2")[1]["changed"]


def test_a_lock_is_not_taken_in_the_middle_of_an_act(gpu: Paths) -> None:
    taken = threading.Event()

    def rival() -> None:
        locks.take(gpu, "host", holder("t2", "run-2"))
        taken.set()

    thread = threading.Thread(target=rival)
    with locks.fenced(gpu, "run:run-1"):
        thread.start()
        assert not taken.wait(0.2)
    thread.join()
    assert taken.is_set()


def test_an_act_that_fails_inside_the_fence_leaves_it_open(gpu: Paths) -> None:
    with pytest.raises(ZeroDivisionError), locks.fenced(gpu, "run:run-1"):
        raise ZeroDivisionError
    assert locks.take(gpu, "host", holder())["taken"]


def test_a_host_says_who_is_at_work_on_it(gpu: Paths) -> None:
    assert state(gpu, Systemd())["lock"] is None
    says(gpu, "lock-take", "--name", "host", stdin=holder())
    found = state(gpu, Systemd())["lock"]
    assert (found["run"], found["verb"], found["beat_s"]) == ("run-1", "update-model", pytest.approx(0, abs=5))
