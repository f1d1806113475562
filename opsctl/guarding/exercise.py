"""``opsctl drill thermal`` in a lab: cooling is made worse for a while, and mended whatever happens to this process.

A machine of a lab has the mark /etc/opsctl-lab, and its lab is on this computer: then, and only then, is there cooling
that somebody here can break. Whoever imports this loads ``opsctl.lab``: only the drill does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from opsctl.engines.session import Session
from opsctl.errors import LockedError, OpsctlError, RefusedError
from opsctl.executing import audit_arguments, audit_line
from opsctl.fleet.model import Fleet, Host
from opsctl.guarding import looking
from opsctl.guarding.story import Step, Story
from opsctl.lab import laboratory, state
from opsctl.lab.gpu import faults, trees
from opsctl.releases.remote import ask

MARK = "/etc/opsctl-lab"
LOOK_S = 0.5
PATIENCE_S = 420.0  # after the mending: cooling down, and 30 s of calm for each rung, and an engine that starts
Hear = Callable[[float, Mapping[str, Any], Sequence[Step]], None]


def lab_of(session: Session, fleet: Fleet) -> str:
    """The lab of this computer that the host is a machine of; empty: it is none, and nothing of it may be broken."""
    if session.run(["test", "-e", MARK], sudo=False).returncode:
        return ""
    return own_lab(fleet, session.host)


def own_lab(fleet: Fleet, host: Host) -> str:
    """The lab whose fleet this is and that has such a machine, with GPUs, at the host's address."""
    with suppress(OSError, ValueError):
        for lab in state.load_all():
            if lab.fleet == fleet.directory and any(
                    (machine.name, machine.address) == (host.name, host.address) and machine.gpus
                    for machine in lab.machines):
                return lab.name
    return ""


def check(session: Session, answer: Mapping[str, Any]) -> None:
    """Raises:
        RefusedError: ``drill.not_ready``: the guard is silent, observes nothing, or is at work already.
        LockedError: ``drill.locked``: a run is at work on the host.
    """
    name = session.host.name
    if answer["words"]:
        raise RefusedError("drill.not_ready", f"{name}: {answer['words']}.")
    busy = [one["instance"] for one in answer["instances"] if one["rung"] or one["latched"] or one["stopped"]]
    if busy or not answer["instances"]:
        what = f"the guard is at work on {', '.join(busy)}" if busy else "the guard has no instance there"
        raise RefusedError("drill.not_ready", f"{name}: {what}.", hint=f"opsctl guard explain {name}")
    for lock in ask(session, ["locks"], host=name)["locks"]:
        if lock["name"] == "host":
            raise LockedError("drill.locked", f"{name}: run {lock['holder'].get('run', '?')} is at work on it.",
                              hint="opsctl lock status; a drill would be mixed up with what that run sees")


def announce(session: Session, by: str, words: str) -> None:
    """Into the host's journal, where whoever wonders about an alert finds it; one that takes no line stops nothing."""
    line = audit_line(["drill", "thermal", words], session.host.user or by.partition("@")[0], by, sudo=False)
    with suppress(OpsctlError):
        session.run(audit_arguments(line), sudo=False)


@contextmanager
def worse_cooling(lab: str, host: str, gpu: int | None, factor: float) -> Iterator[None]:
    """Inside, cooling is worse; leaving mends it.

    Its undo is registered before: a process of its own that mends when this one is gone, also by SIGKILL.

    Raises:
        RefusedError: ``drill.not_ready``: it was broken before; a drill would mend what somebody else broke.
        OpsctlError: what the lab says.
    """
    known = state.find(lab)
    machine = known.machine(host)
    faults.chosen(gpu, machine.gpus.count if machine.gpus else 0, host)  # what makes no sense is refused before all
    before = faults.load(trees.faults_path(known.place(machine)))
    if before.cooling:
        raise RefusedError("drill.not_ready", f"{host}: its cooling is broken already.",
                           hint=f"opsctl lab fault {host} clear --name {lab}")
    faults.cool(before, (), factor)

    undo = [sys.executable, "-m", "opsctl", "lab", "fault", host, "cooling", "--factor", "1", "--name", lab]
    with when_gone([*undo, *(["--gpu", str(gpu)] if gpu is not None else [])]):
        try:
            laboratory.fault(lab, host, gpu, lambda there, gpus: faults.cool(there, gpus, factor))
            yield
        finally:
            laboratory.fault(lab, host, gpu, lambda there, gpus: faults.cool(there, gpus, 1.0))


@contextmanager
def when_gone(argv: Sequence[str]) -> Iterator[None]:
    """Has ``argv`` run when this process ends inside, however it does; leaving calls it off."""
    process = subprocess.Popen(["sh", "-c", 'cat > /dev/null; exec "$@"', "sh", *argv], stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def watch(session: Session, story: Story, began: float, until: Callable[[float], bool], hear: Hear,
          clock: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep) -> None:
    """Looks each ``LOOK_S`` and tells ``hear``, until ``until(seconds since began)``. A host that is silent for a
    moment is asked again; its agent may be busy."""
    while not until(clock() - began):
        started = clock()
        try:
            answer = looking.ask(session)
        except OpsctlError as error:
            if error.code not in ("host.timed_out", "host.no_answer"):
                raise
        else:
            at_s = clock() - began
            hear(at_s, answer, story.see(at_s, answer))
        pause(max(0.0, LOOK_S - (clock() - started)))
