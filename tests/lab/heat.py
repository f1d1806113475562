"""Heat on machines: what the silicon does, what the guard says of it, and a fleet of three GPU hosts under load."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from command import succeeds
from conftest import LabFleet

from opsctl.agent import balancer
from opsctl.lab import state
from opsctl.lab.gpu import trees
from opsctl.lab.gpu.state_file import StateFile

POLL_S = 0.1
GUARD = "/run/opsctl/agent/guard.json"
POLICY = "/etc/opsctl/guard.toml"


def pause(seconds: float = 0.3) -> None:
    subprocess.run(["sleep", str(seconds)], check=True)


def wait_for(what: Callable[[], Any], within_s: float, why: str) -> Any:
    """What it gives when that is true; seconds of patience."""
    until = time.monotonic() + within_s
    while not (found := what()):
        assert time.monotonic() < until, f"not within {within_s:.0f} s: {why}"
        pause()
    return found


def sh(fleet: LabFleet, host: str, line: str, timeout_s: float = 60) -> str:
    done = fleet.run(host, ["sudo", "sh", "-c", line], timeout_s=timeout_s)
    assert done.returncode == 0, f"{host}: {line}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def guard(fleet: LabFleet, host: str) -> dict[str, Any]:
    """What the guard tells of the one instance of a host, and of its first GPU (``gpu``)."""
    document = json.loads(sh(fleet, host, f"cat {GUARD}"))
    return {**document["instances"][0], "gpu": document["gpus"][0], "document": document}


def silicon(fleet: LabFleet, host: str) -> StateFile:
    """The shared state of a machine's simulated GPUs."""
    lab = state.find(fleet.name)
    return StateFile(trees.state_path(lab.place(lab.machine(host))))


def locked_mhz(fleet: LabFleet, host: str) -> int:
    """The clock that is locked on the host's first GPU, 0 when none is."""
    return int(silicon(fleet, host).machine.gpus[0].settings.locked_max_mhz)


def slowdown_s(fleet: LabFleet, host: str) -> float:
    """How long the hardware has slowed its first GPU down."""
    return float(silicon(fleet, host).machine.gpus[0].now.hw_thermal_ns) / 1e9


def cool(fleet: LabFleet, host: str, factor: float, tau_s: float | None = None) -> None:
    """Makes the cooling so many times worse; 1 mends it."""
    words = ["lab", "fault", host, "cooling", "--factor", str(factor), "--name", fleet.name]
    succeeds(*words, *([] if tau_s is None else ["--tau", str(tau_s)]))


@contextmanager
def policy(fleet: LabFleet, host: str, **numbers: float) -> Iterator[None]:
    """Other numbers for a host's guard meanwhile, as Ansible writes them."""
    text = "\\n".join(f"{key} = {value}" for key, value in numbers.items())
    sh(fleet, host, f"[ ! -e {POLICY} ] || cp -p {POLICY} {POLICY}.kept; printf '{text}\\n' >{POLICY}")
    try:
        yield
    finally:
        sh(fleet, host, f"rm -f {POLICY}; [ ! -e {POLICY}.kept ] || mv {POLICY}.kept {POLICY}")


@contextmanager
def unguarded(fleet: LabFleet, host: str) -> Iterator[None]:
    """A guard whose numbers nothing ever reaches: only what the driver itself says of heat sheds some load."""
    numbers = {"less_margin_c": -90, "slowed_margin_c": -91, "least_margin_c": -92, "stop_margin_c": -93,
               "stop_now_margin_c": -94, "memory_less_margin_c": -90, "memory_slowed_margin_c": -91,
               "memory_least_margin_c": -92, "slowed_time_s": 0, "least_time_s": 0, "climb_margin_c": -80,
               "climb_dwell_s": 1}
    with policy(fleet, host, **numbers):
        yield


@dataclass(frozen=True)
class Moment:
    """One look: seconds of the monotonic clock, requests by server, weights by server (-1: not up), the core."""

    at: float
    in_flight: dict[str, int]
    weights: dict[str, int]
    core_c: int
    clock_mhz: int


class Watch:
    """Looks at HAProxy's page and at one host's silicon, ten times a second."""

    def __init__(self, fleet: LabFleet, host: str, page: str) -> None:
        self._silicon, self._page = silicon(fleet, host), page
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heat")
        self.moments: list[Moment] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._enough.set()
        self._thread.join()

    def first(self, what: Callable[[Moment], bool]) -> Moment | None:
        """The first moment that is so."""
        return next((moment for moment in list(self.moments) if what(moment)), None)

    def _watch(self) -> None:
        while not self._enough.wait(POLL_S):
            try:
                with urllib.request.urlopen(self._page, timeout=5) as page:
                    rows = [row for row in balancer.servers(page.read().decode()) if row["service"] == "chat"]
            except OSError:
                continue
            now = self._silicon.machine.gpus[0].now
            self.moments.append(Moment(
                time.monotonic(), {row["server"]: row["sessions"] for row in rows},
                {row["server"]: row["weight"] if row["status"].startswith("UP") else -1 for row in rows},
                int(now.temperature_c), int(now.clock_sm_mhz)))


def share(moment: Moment, server: str) -> float:
    """Of the requests in flight, those on ``server``."""
    return moment.in_flight.get(server, 0) / max(1, sum(moment.in_flight.values()))
