"""One instance out of the rotation and back: leases, a drain that is held, deadlines, and whose drains are touched."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opsctl.engines.events import Event, Note
from opsctl.errors import LockedError, OpsctlError, PausedError
from opsctl.fleet.model import Fleet, Host
from opsctl.releases.rotation import Rotation, Timing, Ways

FLEET = Fleet(Path(), Path("inventory.ini"), (Host("gpu-1", "10.0.0.1", ("gpu",)),), (), load_balancer="none")


class Played:
    """A host whose engine has some requests less at each look; ``clock`` goes on by a second with each."""

    def __init__(self, requests: int = 0, weight: int = 100) -> None:
        self.requests, self.weight, self.now = requests, weight, 0.0
        self.asked: list[Sequence[str]] = []
        self.events: list[Event] = []
        self.stop = threading.Event()
        self.fails: dict[str, OpsctlError] = {}

    def ask(self, verb: Sequence[str]) -> dict[str, Any]:
        self.asked.append(verb)
        if verb[0] in self.fails:
            raise self.fails[verb[0]]
        if verb[0] == "idle":
            self.now += 15
            self.requests -= 1
            return {"idle": self.requests <= 0, "running": max(0, self.requests), "waiting": 0}
        if verb[0] == "state":
            return {"instances": [{"instance": "chat.0", "unit": "active", "weight": self.weight}], "drains": []}
        return {"weight": self.weight}

    def rotation(self, **ways: Any) -> Rotation:
        return Rotation(FLEET, "gpu-1", "chat.0", Ways("R1", 60, "driver 595.71.05", **ways), self.ask,
                        self.events.append, self.stop, Timing(), lambda: self.now)

    def orders(self) -> list[str]:
        return [" ".join(verb) for verb in self.asked if verb[0] in ("drain", "undrain")]


LEASE = "drain chat.0 --owner run:R1 --for-s 90 --reason driver 595.71.05"
HELD = "drain chat.0 --owner run:R1 --reason driver 595.71.05"


def test_a_lease_is_renewed_while_requests_run() -> None:
    host = Played(requests=4)
    rotation = host.rotation()
    rotation.drain()
    assert host.orders() == [LEASE] * 3  # when it begins, after half a minute, and when it is empty
    assert rotation.timing.drain_s == 60


def test_a_drain_that_is_held_has_no_lease() -> None:
    host = Played()
    rotation = host.rotation()
    rotation.drain()
    rotation.hold()
    assert host.orders()[-1] == HELD
    host.fails["undrain"] = OpsctlError("host.unreachable", "gone")
    rotation.undrain()
    (note,) = [event for event in host.events if isinstance(event, Note)]
    assert "run:R1's until that is resumed" in note.message


def test_and_no_renewal_gives_it_one() -> None:
    """Of a change that goes on: whoever was held stays held, however its draining ends."""
    host = Played()
    rotation = host.rotation()
    rotation.hold()
    rotation.drain()
    assert host.orders() == [HELD] * 3
    host.requests = 99
    with pytest.raises(PausedError, match="it stays drained"):
        rotation.drain()
    assert set(host.orders()) == {HELD}


def test_an_end_that_is_wanted_is_not_taken_for_done() -> None:
    host = Played()
    rotation = host.rotation()
    rotation.hold()
    host.fails["undrain"] = OpsctlError("host.unreachable", "gone")
    with pytest.raises(OpsctlError, match="gone"):
        rotation.end()
    del host.fails["undrain"]
    rotation.end()
    assert host.orders()[-1] == "undrain chat.0 --owner run:R1"


@pytest.mark.parametrize("why", ["deadline", "stop"])
def test_who_is_not_empty_in_time_serves_again(why: str) -> None:
    host = Played(requests=99)
    if why == "stop":
        host.stop.set()
    with pytest.raises(PausedError, match="back in service"):
        host.rotation().drain()
    assert host.orders()[-1] == "undrain chat.0 --owner run:R1"


def test_without_the_lock_nothing_is_ordered() -> None:
    def check() -> None:
        raise LockedError("lock.lost", "bob has it.")

    host = Played()
    with pytest.raises(LockedError):
        host.rotation(check=check).hold()
    assert host.orders() == []


def test_one_that_an_operator_drained_is_not_waited_for() -> None:
    host = Played(weight=0)
    host.rotation().in_rotation((), expected=True)
    assert "stays drained" in str(host.events)
