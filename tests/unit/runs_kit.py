"""A fleet whose hosts run the real verbs of opsctl-host in this process, also from threads: locks, journals, holds."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, Sessions

from opsctl.agent import locks
from opsctl.agent.paths import Paths
from opsctl.engines.session import Completed
from opsctl.errors import RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.runs import holding, journal, locking, running
from opsctl.runs.identity import Holder

ONE_AT_A_TIME = threading.Lock()  # the verbs run with this process' stdout and root
CHAT = Service("chat", "gpu", 8100, 8000)


@dataclass
class RunsHost(Machine):
    """``clock_s``: the host's boot clock. ``bare``: no agent. ``busy``: its answers to that, one a time."""

    clock_s: float = 1000.0
    bare: bool = False
    busy: list[list[dict[str, Any]]] = field(default_factory=list)

    def send(self, argv: Sequence[str], chunks: Iterable[bytes], *, sudo: bool = True, timeout_s: float = 30.0
             ) -> Completed:
        if self.silent:
            raise RefusedError(self.silent, f"{self.name} does not answer.")
        if "opsctl-host" not in argv[0]:
            return self._program(argv, chunks)
        if self.bare:
            return Completed(127, "", f"{argv[0]}: command not found\n")
        if argv[1] == "busy":
            self.verbs.append("busy")
            return Completed(0, f'{{"busy": {json.dumps(self.busy.pop(0) if self.busy else [])}}}', "")
        with ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "boot_clock", lambda: self.clock_s)
            return super().send(argv, chunks)

    def _program(self, argv: Sequence[str], chunks: Iterable[bytes]) -> Completed:
        """A program of coreutils, with /var/lib and the uptime of this host."""
        uptime = self.paths.root / "uptime"
        uptime.parent.mkdir(parents=True, exist_ok=True)
        uptime.write_text(f"{self.clock_s} 1.0\n")
        (self.paths.root / "lib").mkdir(exist_ok=True)
        here = [word.replace("/var/lib", str(self.paths.root / "lib")).replace("/proc/uptime", str(uptime))
                for word in argv]
        done = subprocess.run(here, input=b"".join(chunks), capture_output=True, check=False)
        return Completed(done.returncode, done.stdout.decode(), done.stderr.decode())


def make_fleet(directory: Path, gpus: int = 3) -> Fleet:
    """ops-1 is the gateway."""
    hosts = (Host("ops-1", "10.0.0.1", ("gateway", "lb")),
             *(Host(f"gpu-{number}", f"10.0.0.{10 + number}", ("gpu",)) for number in range(1, gpus + 1)))
    return Fleet(directory, directory / "inventory.ini", hosts, (CHAT,))


def make_hosts(fleet: Fleet, directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, RunsHost]:
    found = {host.name: RunsHost(Paths(directory / "roots" / host.name), host.name) for host in fleet.hosts}
    sessions = RunsSessions(found)  # type: ignore[arg-type]
    for module in (locking, journal, running, holding):
        monkeypatch.setattr(module, "Session", sessions)
    monkeypatch.setattr(holding, "on_each", sessions.on_each)
    return found


class RunsSessions(Sessions):
    def __call__(self, fleet: Fleet, host: Host | str) -> Any:
        session = super().__call__(fleet, host)
        type(session).close = lambda _: None
        return session


def holder(name: str = "ann", run: str = "R1", **more: Any) -> Holder:
    """A person at a machine of their own."""
    return Holder(**{"token": f"token-of-{name}-{run}", "run": run, "verb": "update-model", "user": name,
                     "machine": f"{name}s-laptop", "machine_id": f"id-of-{name}s", "boot": "boot-1", "pid": 4711,
                     "pid_start": 99, "namespace": "pid:[1]"} | more)

