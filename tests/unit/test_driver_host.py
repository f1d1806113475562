"""One host at its change of driver, with a host that is played: what is held stays held, and done is done."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opsctl.driver_upgrade import host as hosts
from opsctl.driver_upgrade.host import HostAtWork, Settings
from opsctl.driver_upgrade.plan import Instance, Step
from opsctl.engines.events import Emit, Event, Note, discard
from opsctl.errors import LockedError, OpsctlError, PausedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases.rotation import AdriftError

OLD, NEW = "580.126.09", "595.71.05"
FLEET = Fleet(Path(), Path("inventory.ini"), (Host("gpu-1", "10.0.0.1", ("gpu",)),),
              (Service("chat", "gpu", 8100, 8000),), load_balancer="none")
HELD = f"drain chat.0 --owner run:R1 --reason driver {NEW}"


class Played:
    """``drains``: owners; ``fails`` by verb; ``keeps``: an undrain is answered and nothing comes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *drains: str, keeps: bool = False) -> None:
        self.drains, self.keeps = list(drains), keeps
        self.fails: dict[str, OpsctlError] = {}
        self.lost = False
        self.kernels: list[str] = []
        self.done: list[str] = []
        played = self

        class Session:
            def __init__(self, *_: Any) -> None:
                pass

            def close(self) -> None:
                pass

            def run(self, argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
                return subprocess.CompletedProcess(list(argv), 0, json.dumps(played.order(argv[1:3])), "")

        monkeypatch.setattr(hosts, "Session", Session)
        monkeypatch.setattr(hosts, "ask", lambda _, verb, **__: self.order(verb))

    def order(self, verb: Sequence[str]) -> dict[str, Any]:
        if verb[0] in self.fails:
            raise self.fails[verb[0]]
        if verb[0] == "state":
            return {"instances": [{"instance": "chat.0", "unit": "active", "voice": True,
                                   "weight": 0 if self.drains else 100}],
                    "drains": [{"instance": "chat.0", "owner": owner, "weight": 0} for owner in self.drains]}
        self.done.append(" ".join(verb))
        if verb[0] == "undrain" and not self.keeps:
            self.drains = [owner for owner in self.drains if owner != verb[-1]]
        if verb[0] == "verify":
            return {"wrong": [], "told": self.kernels}
        return {"idle": True, "running": 0, "waiting": 0, "weight": 0 if self.drains else 100}

    def check(self) -> None:
        if self.lost:
            raise LockedError("lock.lost", "bob has it")

    def at_work(self, phase: str = "", drained_by: tuple[str, ...] = (), emit: Emit = discard
                ) -> HostAtWork:
        instance = Instance("gpu-1.chat.0", "chat.0", "chat", active=True, serving=not phase, drained_by=drained_by)
        step = Step("gpu-1", (OLD,), OLD, "change", (instance,), 1, phase=phase, before=OLD if phase else "")
        return HostAtWork(FLEET, step, Settings("R1", NEW, check=self.check), emit, threading.Event())


class TestServe:
    def test_back_in_rotation_it_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch, "run:R1", "operator:ann")
        played.at_work().serve("accepted")
        assert played.done == ["mark accepted", "undrain chat.0 --owner run:R1", "done"]

    def test_an_undrain_that_fails_leaves_the_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch, "run:R1")
        played.fails["undrain"] = OpsctlError("host.unreachable", "gone")
        with pytest.raises(OpsctlError, match="gone"):
            played.at_work().serve("accepted")
        assert "done" not in played.done

    def test_and_so_does_a_drain_that_is_still_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch, "run:R1", keeps=True)
        with pytest.raises(OpsctlError, match=r"chat\.0 on gpu-1 is still drained by run:R1"):
            played.at_work().serve("accepted")
        assert "done" not in played.done

    def test_without_the_lock_nothing_is_ordered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch, "run:R1")
        played.lost = True
        with pytest.raises(LockedError):
            played.at_work().serve("accepted")
        assert played.done == []


def test_an_old_kernel_without_a_module_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch)
    played.kernels = ["the module for kernel 6.1.0-9-amd64 is not there"]
    heard: list[Event] = []
    played.at_work(emit=heard.append).accept(NEW)
    assert "6.1.0-9-amd64" in str([event for event in heard if isinstance(event, Note)])


class TestReboot:
    def test_of_this_machine_leaves_a_unit_that_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that an earlier boot began with has given up and is gone."""
        played = Played(monkeypatch)
        played.at_work("broken").reboot()
        assert played.done == ["leave", "--on-active=15s --collect"]

    def test_but_not_without_the_lock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch)
        played.lost = True
        with pytest.raises(LockedError):
            played.at_work("broken").reboot()
        assert played.done == []


class TestEmpty:
    def test_a_change_that_goes_on_stays_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch, "run:R1")
        played.at_work("changing").empty()
        drains = [order for order in played.done if order.startswith("drain")]
        assert played.done[0] == HELD
        assert set(drains) == {HELD}

    def test_one_that_begins_has_a_lease(self, monkeypatch: pytest.MonkeyPatch) -> None:
        played = Played(monkeypatch)
        played.at_work().empty()
        assert "--for-s 90" in played.done[0]

    @pytest.mark.parametrize("verb", ["idle", "begin"])
    def test_nor_does_an_error_put_it_back(self, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
        played = Played(monkeypatch, "run:R1")
        played.fails[verb] = OpsctlError(hosts.SAID_NO, "no")
        with pytest.raises(AdriftError):
            played.at_work("changing").empty()
        assert "run:R1" in played.drains
        played = Played(monkeypatch)
        played.fails[verb] = PausedError(hosts.SAID_NO, "no")
        with pytest.raises(PausedError) as caught:
            played.at_work().empty()
        assert not isinstance(caught.value, AdriftError)
        assert played.done[-1] == "undrain chat.0 --owner run:R1"
