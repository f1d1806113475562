"""Waits for what an earlier controller left on hosts: a module of Ansible's, a busy dpkg, a driver's change, a cutover.

A killed controller's connection breaks, and what it had begun there ends when it ends. Nobody kills it: half an
installation is worse than a late one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import OpsctlError, PausedError
from opsctl.releases.remote import ask
from opsctl.runs.journal import NO_AGENT
from opsctl.runs.locking import Locks
from opsctl.runs.place import Place

PATIENCE_S = 600.0
LONGER_S = {
    "cutover": 7200.0,  # it has deadlines of its own, and a large model takes long to load
    "driver": 1800.0,  # it builds a kernel module; so long the role nvidia_driver waits too
}
LOOK_EVERY_S = 2.0
COMMAND = 80  # letters of a command that are shown
TIMEOUT_S = 15.0
DRIVER = "/opsctl/driver-transaction"
# The brackets: pgrep must not find itself, nor the sudo before it.
MODULES = ["pgrep", "-af", "[A]nsiballZ_|/opsctl/[d]river-transaction"]

Clock = Callable[[], float]


def wait_until_idle(locks: Locks, kinds: Collection[str], emit: Emit, check: Callable[[], None],
                    clock: Clock = time.monotonic, pause: Callable[[float], object] = time.sleep) -> None:
    """Until nothing of ``kinds`` (``dpkg``, ``ansible``, ``driver``, ``cutover``) runs on any host that is locked.

    Raises:
        PausedError: ``host.busy``: after ten minutes something still does; a driver has half an hour, a cutover two.
    """
    began = clock()
    told: set[str] = set()
    while found := look(locks, kinds):
        waited = clock() - began
        for name, what in found.items():
            if name not in told:
                told.add(name)
                emit(Note(f"busy, waiting for it to end: {_words(what)}", "warning", name))
            emit(Progress("waiting for what runs there", int(waited), 0, "seconds", host=name))
        late = [(name, what) for name, what in found.items() if waited > LONGER_S.get(what["what"], PATIENCE_S)]
        if late:
            name, what = late[0]
            raise PausedError("host.busy", f"{name} has been busy for {waited / 60:.0f} minutes: {_words(what)}; "
                              "nothing was done there.", hint="look at it there, then the same command again; "
                              f"--limit '!{name}' goes on without")
        pause(LOOK_EVERY_S)
        check()


def look(locks: Locks, kinds: Collection[str]) -> dict[str, dict[str, Any]]:
    """By host, one thing that keeps it busy. A host that does not answer is not waited for."""
    found: dict[str, dict[str, Any]] = {}

    def one(place: Place) -> None:
        try:
            busy = ask(place.session, ["busy"], host=place.host.name, timeout_s=TIMEOUT_S)["busy"]
        except OpsctlError as error:
            if error.code != NO_AGENT:
                return
            busy = _without_agent(place)
        wanted = [what for what in busy if what["what"] in kinds]
        if wanted:  # Ansible's task that began a driver's change waits for it: the change has the longer patience
            found[place.host.name] = next((what for what in wanted if what["what"] == "driver"), wanted[0])

    locks.on_hosts(one)
    return found


def _without_agent(place: Place) -> list[dict[str, Any]]:
    try:
        seen = place.session.run(MODULES, timeout_s=TIMEOUT_S)
    except OpsctlError:
        return []
    lines = [line.partition(" ") for line in seen.stdout.splitlines() if line[:1].isdigit()]
    return [{"what": "driver" if DRIVER in command else "ansible", "pid": int(pid), "unit": "", "command": command}
            for pid, _, command in lines]


def _words(what: dict[str, Any]) -> str:
    kinds = {"dpkg": "packages are being installed", "ansible": "a task of an earlier provision",
             "driver": "a change of the driver that an earlier provision began",
             "cutover": "a cutover that an earlier run began"}
    name = str(what.get("unit") or "").removesuffix(".scope")
    who = " ".join(str(what.get("command") or "").split())[:COMMAND] if what["what"] == "dpkg" else ""
    parts = [f"process {what['pid']}" if what.get("pid") else "", who, name if who else ""]
    said = ", ".join(part for part in parts if part)
    return f"{kinds.get(what['what'], what['what'])}" + (f" ({said})" if said else "")
