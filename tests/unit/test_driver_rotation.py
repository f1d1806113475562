"""A change of driver whose controller dies, before a real HAProxy: its drains there are ended, a person's stay."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_driver_programs import program
from test_templates_haproxy import Balancer, needs_haproxy, until

from opsctl.agent import balancer as haproxy
from opsctl.driver_upgrade import host as hosts
from opsctl.driver_upgrade.host import HostAtWork, Settings
from opsctl.driver_upgrade.plan import Step, make_plan
from opsctl.engines.events import discard
from opsctl.errors import PausedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import place
from opsctl.releases import balancers, rotation

pytestmark = needs_haproxy
keeper = program("driver_keep")
OLD, NEW = "580.126.09", "595.71.05"
SERVER = "gpu-1.chat.0"
GPU_1 = Host("gpu-1", "10.0.0.1", ("gpu",))
FLEET = Fleet(Path(), Path("inventory.ini"), (GPU_1, Host("ops-1", "10.0.0.9", ("lb",))),
              (Service("chat", "gpu", 8100, 8000),), load_balancer="haproxy")
WAYS = pytest.mark.parametrize("via_lb", [True, False], ids=["via the load balancer", "by the agent"])


class KilledError(BaseException):
    """Nothing that a killed controller would have done afterwards is done."""


class Machine:
    """gpu-1 with the real keeper's records, behind a real HAProxy; ``dies_at``: the order at which controllers die."""

    def __init__(self, balancer: Balancer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.balancer = balancer
        self.drains: list[str] = []
        self.runs, self.dead, self.dies_at = True, False, ""
        monkeypatch.setattr(keeper, "HOME", home)
        monkeypatch.setattr(keeper, "CHANGE", home / "change.json")
        monkeypatch.setattr(keeper, "ROTATION", home / "rotation.json", raising=False)
        monkeypatch.setattr(keeper, "UNIT_FILE", home / "unit")
        monkeypatch.setattr(keeper, "installed", lambda: [{"name": "libcuda1", "version": OLD, "pin": False,
                                                           "status": "installed"}])
        monkeypatch.setattr(keeper, "check_files", lambda _: None)
        machine = self

        class Session:
            def __init__(self, _: Fleet, host: Any) -> None:
                self.host = host

            def close(self) -> None:
                pass

            def run(self, argv: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
                machine.obey(argv[1:])
                answer = keeper.VERBS[argv[1]](*argv[2:]) if argv[0] == hosts.KEEP else machine.systemctl(argv[1])
                return subprocess.CompletedProcess(list(argv), 0, json.dumps(answer), "")

        monkeypatch.setattr(hosts, "Session", Session)
        monkeypatch.setattr(hosts, "ask", lambda _, verb, **__: machine.host_program(verb))
        monkeypatch.setattr(balancers, "Session", Session)
        monkeypatch.setattr(balancers, "ask", lambda _, verb, **__: machine.load_balancer(verb))
        monkeypatch.setattr(rotation, "ROTATION_S", 5.0)

    def obey(self, words: Sequence[str]) -> None:
        self.dead = self.dead or words[0] == self.dies_at
        if self.dead:
            raise KilledError

    def systemctl(self, word: str) -> dict[str, Any]:
        self.runs = word != "stop"
        self._say()
        return {}

    def host_program(self, verb: Sequence[str]) -> dict[str, Any]:
        self.obey(verb)
        if verb[0] == "state":
            return self.state()
        if verb[0] == "drain":
            self.drains = sorted({*self.drains, verb[3]})
        if verb[0] == "undrain":
            self.drains = [owner for owner in self.drains if owner != verb[-1]]
        self._say()
        return {"idle": True, "running": 0, "waiting": 0, "weight": 0 if self.drains else 100}

    def state(self) -> dict[str, Any]:
        return {"instances": [{"instance": "chat.0", "unit": "active" if self.runs else "inactive", "voice": "up",
                               "weight": 0 if self.drains else 100, "health": "healthy", "unfinished": False}],
                "drains": [{"instance": "chat.0", "owner": owner, "weight": 0} for owner in self.drains]}

    def load_balancer(self, verb: Sequence[str]) -> dict[str, Any]:
        self.obey(verb)
        if verb[0] != "balancer":
            return haproxy.set_state(self._admin, verb[1], verb[0].removeprefix("balancer-"))
        words = dict(zip(verb[1::2], verb[2::2], strict=True))
        wanted, drained = ([words[word]] if word in words else [] for word in ("--wanted", "--drained"))
        return haproxy.look(self._admin, Path("/dev/null"), wanted, drained, float(words.get("--wait-s", 0)))

    def start(self) -> None:
        """As ``opsctl-host accept`` does, and whoever boots the machine."""
        self.runs = True
        self._say()

    def lease_ends(self) -> None:
        if keeper.read_change() is None:
            self.drains = []
            self._say()

    def step(self) -> Step:
        """As a run plans it that looks at the machine now."""
        plan = make_plan(NEW, [GPU_1], FLEET.services, place(FLEET), {"gpu-1": self.state()},
                         {"gpu-1": keeper.look()}, waves="1", rotating=())
        return plan.steps[0]

    def controller(self, *, via_lb: bool, run: str = "R1") -> HostAtWork:
        self.dead, self.dies_at = False, ""
        return HostAtWork(FLEET, self.step(), Settings(run, NEW, via_lb=via_lb), discard, threading.Event())

    def is_seen(self, status: str, weight: str = "100") -> None:
        until(lambda: self.balancer.servers()[SERVER] == (status, weight),
              f"{SERVER} is not {status} with {weight}")

    def by_hand(self, state: str) -> None:
        self.balancer.ask(f"set server chat/{SERVER} state {state}")
        self.is_seen("DRAIN (agent)" if state == "drain" else "UP")

    @property
    def _admin(self) -> Path:
        return self.balancer.directory / "admin.sock"

    def _say(self) -> None:
        self.balancer.engines[0].healthy = self.runs
        self.balancer.voice.words["chat.0"] = f"up {0 if self.drains else 100}%" if self.runs else "down #stopped"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Balancer(tmp_path)
    try:
        found = Machine(made, tmp_path / "home", monkeypatch)
        until(lambda: made.servers()[SERVER] == ("UP", "100"), "not up")
        yield found
    finally:
        made.close()


def die(machine: Machine, at: str, *, via_lb: bool) -> None:
    controller = machine.controller(via_lb=via_lb)
    machine.dies_at = at
    with pytest.raises(KilledError):
        controller.empty()
    machine.lease_ends()


def go_on(machine: Machine, *, via_lb: bool, run: str = "R1") -> None:
    """As a run that continues does, or the next one: the host is emptied unless its own boot has ended the change."""
    controller = machine.controller(via_lb=via_lb, run=run)
    phase = controller.step.phase
    if phase != "accepted":
        controller.empty()
        assert not machine.runs
    machine.start()
    until(lambda: machine.balancer.servers()[SERVER][0] != "DOWN (agent)", "not up")
    controller.serve("accepted")


def is_over(machine: Machine) -> None:
    seen = keeper.look()
    assert (seen["change"], seen.get("rotation", {}), machine.drains) == (None, {}, [])


@pytest.mark.parametrize("at", ["idle", "begin", "stop"])
@pytest.mark.parametrize("run", ["R1", "R2"], ids=["resumed", "by a later run"])
def test_what_a_dead_controller_drained_in_the_load_balancer_serves_again(machine: Machine, at: str, run: str) -> None:
    die(machine, at, via_lb=True)
    machine.is_seen("DRAIN (agent)", "0" if keeper.read_change() else "100")
    go_on(machine, via_lb=run == "R1", run=run)
    machine.is_seen("UP")
    is_over(machine)


@WAYS
def test_so_it_does_after_a_boot_of_its_own_that_accepted_the_driver(machine: Machine, via_lb: bool) -> None:
    machine.controller(via_lb=via_lb).empty()
    machine.start()
    keeper.mark("accepted")
    machine.drains = []
    go_on(machine, via_lb=via_lb)
    machine.is_seen("UP")
    is_over(machine)


@WAYS
@pytest.mark.parametrize("at", ["idle", "stop", "stopped", "boot"])
def test_what_a_person_drained_there_stays_so(machine: Machine, via_lb: bool, at: str) -> None:
    machine.by_hand("drain")
    if at == "stopped":
        machine.controller(via_lb=via_lb).empty()
        until(lambda: machine.balancer.servers()[SERVER][0].startswith("DOWN"), "HAProxy says it is drained still")
    elif at == "boot":
        machine.controller(via_lb=via_lb).empty()
        machine.start()
        keeper.mark("accepted")
        machine.drains = []
    else:
        die(machine, at, via_lb=via_lb)
    until(lambda: machine.balancer.servers()[SERVER][0] != "UP", "it was put back")
    go_on(machine, via_lb=via_lb)
    machine.is_seen("DRAIN (agent)")
    is_over(machine)


@WAYS
def test_unless_that_person_has_put_it_back_meanwhile(machine: Machine, via_lb: bool) -> None:
    machine.by_hand("drain")
    die(machine, "idle", via_lb=via_lb)
    machine.by_hand("ready")
    go_on(machine, via_lb=via_lb)
    machine.is_seen("UP")
    is_over(machine)


def test_a_drain_that_is_given_up_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    die(machine, "idle", via_lb=True)
    controller = machine.controller(via_lb=True)
    monkeypatch.setattr(machine, "host_program", lambda verb, real=machine.host_program: {
        **real(verb), **({"idle": False} if verb[0] == "idle" else {})})
    controller._settings = replace(controller._settings, drain_timeout_s=0.1)
    for out in controller._rotations:
        out.rotation._ways = replace(out.rotation._ways, drain_timeout_s=0.1)
    with pytest.raises(PausedError, match="back in service"):
        controller.empty()
    machine.is_seen("UP")
    is_over(machine)
