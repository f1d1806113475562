"""A lab as plain data, its lock, and which lab a verb means."""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from opsctl.errors import UsageError
from opsctl.lab import state
from opsctl.lab.processes import Process, identify
from opsctl.lab.state import Lab, Machine, decode, encode, find, locked, meant, save

GPU = Machine("gpu-1", "10.91.0.11", ("gpu",), prepared=True, keeper=Process(4, 5, "boot"), init=Process(6, 7, "boot"))
LAB = Lab(name="lab", number=3, suite="bookworm", subnet=IPv4Network("10.91.0.0/24"), fleet=Path("/home/ann/lab"),
          base=Path("/var/cache/base"), machines=(Machine("ops-1", "10.91.0.10", ("lb", "gateway")), GPU),
          snapshots={"early": ("gpu-1",)})


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(state, "STATE_ROOT", tmp_path / "labs")
    return tmp_path / "labs"


def make(name: str) -> None:
    (state.STATE_ROOT / name).mkdir(parents=True)
    save(replace(LAB, name=name))


def test_state_survives() -> None:
    assert decode(encode(LAB)) == LAB
    make("lab")
    assert find("lab") == LAB


@pytest.mark.parametrize(("there", "named", "wanted"), [
    ([], None, "lab"),
    (["demo"], None, "demo"),
    (["demo", "lab"], None, "lab"),
    (["demo", "lab"], "demo", "demo"),
    ([], "demo", "demo"),
])
def test_which_lab_is_meant(there: list[str], named: str | None, wanted: str) -> None:
    for name in there:
        make(name)
    assert meant(named) == wanted


def test_the_lab_whose_fleet_is_worked_on_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("demo", "lab"):
        save(replace(LAB, name=name, fleet=tmp_path / name))
    monkeypatch.setenv("OPSCTL_INVENTORY", str(tmp_path / "demo" / "inventory.ini"))
    assert meant(None) == "demo"
    monkeypatch.delenv("OPSCTL_INVENTORY")
    assert meant(None) == "lab"


def test_several_and_none_named() -> None:
    make("demo")
    make("drill")
    with pytest.raises(UsageError) as caught:
        meant(None)
    assert caught.value.code == "lab.which"
    assert "demo, drill" in caught.value.hint


@pytest.mark.parametrize("name", ["", "Lab", "1lab", "../lab", "a" * 32, "lab name"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(name)
    assert caught.value.code == "lab.bad_name"


def test_a_reused_pid_is_not_our_process() -> None:
    mine = identify(os.getpid())
    assert mine is not None
    assert mine.alive
    assert not replace(mine, started=mine.started + 1).alive
    assert not replace(mine, boot="another").alive


def test_an_empty_lock_leaves_nothing(root: Path) -> None:
    with locked(root / "lab", lambda: None):
        assert (root / "lab").is_dir()
    assert not (root / "lab").exists()


def test_who_waited_for_a_directory_that_was_removed_starts_over(root: Path) -> None:
    (root / "lab").mkdir(parents=True)
    holder = os.open(root / "lab", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    waits, entered = threading.Event(), []

    def wait_for_it() -> None:
        with locked(root / "lab", waits.set):
            entered.append((root / "lab").stat().st_ino)
            (root / "lab" / "state.json").write_text("{}")

    waiter = threading.Thread(target=wait_for_it)
    waiter.start()
    assert waits.wait(10)
    assert not entered
    (root / "lab").rename(root / "removed")  # as good as removed, and its inode cannot be reused
    os.close(holder)
    waiter.join(10)
    assert entered == [(root / "lab").stat().st_ino]
