"""Who keeps packages locked is named while Ansible waits: a real process, a real lock, the program that hosts run."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs_kit import make_fleet

from opsctl import watching
from opsctl.engines.events import Event, Note, PhaseStarted, Progress, TaskResult, TaskStarted
from opsctl.fleet.model import Host

HOLD = ("import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()")
HERE = Host("gpu-1", "127.0.0.1", ("gpu",), connection="local")


def holding(lock: Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("")
    process.wait()


class Ears:
    """Hears events, and waits for a note without ever sleeping."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.noted = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Note | Progress):
            self.noted.set()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[watching.Watch, Ears, Path]]:
    """A watch over this computer whose dpkg has its lock in a folder, and which asks ten times a second."""
    monkeypatch.setattr(watching, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(watching, "LONG_S", 0.2)
    lock, ears = tmp_path / "lock", Ears()
    lock.touch()
    watch = watching.Watch(make_fleet(tmp_path), (HERE,), ears)
    watch._program = watch._program.replace(b"/var/lib/dpkg/lock-frontend", str(lock).encode())
    with watch:
        yield watch, ears, lock


def test_who_holds_the_lock_is_named_while_a_task_waits(watched: tuple[watching.Watch, Ears, Path]) -> None:
    watch, ears, lock = watched
    process = holding(lock)
    try:
        watch(TaskStarted("base : Install the base packages.", "gpu-1"))
        assert ears.noted.wait(20), "nobody was named"
    finally:
        end(process)
    (note,) = [event for event in ears.events if isinstance(event, Note)]
    assert note.host == "gpu-1"
    assert note.level == "warning"
    assert f"pid {process.pid}" in note.message
    assert Path(sys.executable).name in note.message, "its command is named, not only its number"


def test_what_opsctl_runs_itself_is_nobody_to_wait_for(watched: tuple[watching.Watch, Ears, Path]) -> None:
    watch, ears, lock = watched
    process = holding(lock, OPSCTL_PROVISION="1")
    try:
        watch(TaskStarted("base : Install the base packages.", "gpu-1"))
        assert not ears.noted.wait(2)
    finally:
        end(process)


def test_only_a_task_that_takes_long_makes_anybody_ask() -> None:
    slow = watching.Slow()
    slow.hear(TaskStarted("a"), 0.0)
    slow.hear(TaskStarted("a", "gpu-1"), 0.0)
    slow.hear(TaskStarted("a", "gpu-2"), 1.0)
    assert slow.hosts(2.9) == {}
    assert slow.hosts(3.5) == {"gpu-1": 3.5}
    slow.hear(TaskResult("gpu-1", "a", "changed", item="one of several"), 3.6)
    assert set(slow.hosts(9.0)) == {"gpu-1", "gpu-2"}
    slow.hear(TaskResult("gpu-1", "a", "ok"), 9.0)
    assert set(slow.hosts(10.0)) == {"gpu-2"}
    slow.hear(PhaseStarted("Base"), 10.0)
    assert slow.hosts(99.0) == {}
