"""One host while its driver is changed: its instances out of the rotation, stopped, accepted, and back in.

What changes packages is Ansible (``playbooks/driver.yml``) and ``driver-keep`` on the host; this orders what comes
before and after. For one thread at a time.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from opsctl.agent.locks import OWNED_BY_RUN
from opsctl.driver_upgrade.plan import Instance, Step
from opsctl.engines.events import Emit, Note, TaskResult, TaskStarted
from opsctl.engines.session import Session
from opsctl.errors import OpsctlError, PausedError
from opsctl.fleet.model import Fleet
from opsctl.releases.remote import ask
from opsctl.releases.rotation import RENEW_S, AdriftError, Rotation, Timing, Ways
from opsctl.resources import resource
from opsctl.runs.journal import nothing

KEEP = "/usr/local/lib/opsctl/driver-keep"
STOP_TIMEOUT_S = 720.0  # TimeoutStopSec of an instance, and a little
ACCEPT_TIMEOUT_S = 3600.0  # an engine has a start's time of its own, and a large model takes long to load
SAID_NO = "driver.host_said_no"
REBOOT_IN_S = 15  # for this process to say how it ended


@dataclass(frozen=True)
class Settings:
    """What the operator decided. ``drain_timeout_s``: None means each service's own."""

    run: str
    to: str
    drain_timeout_s: float | None = None
    via_lb: bool = False
    without: frozenset[str] = frozenset()  # load balancers that are off, and were said to be
    check: Callable[[], None] = nothing  # before each order: raises when a lock of the run was lost
    about_to: Callable[[], None] = nothing  # before hosts are begun: so too, and the journal is safe when it returns


class FailedError(OpsctlError):
    """The new driver is not accepted: the host is to get its old one back."""


class HostAtWork:
    """Its sessions; nothing is asked before the first order."""

    def __init__(self, fleet: Fleet, step: Step, settings: Settings, emit: Emit, stop: threading.Event) -> None:
        self.step = step
        self.timings = {instance.instance: Timing() for instance in step.takes}
        self._settings = settings
        self._emit = emit
        self._stop = stop
        self._session = Session(fleet, step.host)
        self._rotations = [_Out(fleet, step.host, instance, settings, emit, stop, self.timings[instance.instance])
                           for instance in step.takes]
        self._recorded = {instance.instance: {"ours": instance.ours, "by_hand": instance.by_hand}
                          for instance in step.takes if instance.ours or instance.by_hand}

    def close(self) -> None:
        for out in self._rotations:
            out.close()
        self._session.close()

    def empty(self) -> None:
        """All its instances drained, held so, and stopped; from here on the host has a change under way.

        Raises:
            PausedError: it was given up, and its instances are back in service.
            AdriftError: the change was under way already, or is now; they stay drained.
        """
        self._emit(TaskStarted(f"to driver {self._settings.to}", self.step.host))
        begun = bool(self.step.phase)  # its drains have no lease any more, and it may have half of a driver
        try:
            if begun:
                for out in self._rotations:
                    out.rotation.hold()
            self._write_down()
            self._drain()
            if self._stop.is_set():
                then = "stays drained" if begun else "is back in service"
                raise PausedError("interrupted", f"{self.step.host} was drained; it {then}.",
                                  hint="the same command again continues")
            for out in self._rotations:
                out.rotation.hold()
            self._settings.check()
            try:
                self.keeper("begin", json.dumps({
                    "run": self._settings.run, "to": self._settings.to, "host": self.step.host,
                    "instances": [instance.instance for instance in self.step.takes]}))
            except OpsctlError as error:
                begun = begun or error.code != SAID_NO  # a host that is not heard may have begun
                raise
            begun = True
            if self.step.local:
                self.keeper("leave")
            self._stop_units()
        except OpsctlError as error:
            if not begun:
                self._undrain()
                raise
            raise AdriftError(error.code, f"{self.step.host} was drained, and then: {error.message}", hint=error.hint,
                              log_tail=error.log_tail) from error
        except BaseException:
            if not begun:
                self._undrain()
            raise

    def accept(self, version: str) -> None:
        """Every layer has this driver, and every instance that was stopped starts and answers.

        Raises:
            FailedError: one does not.
            OpsctlError: the host is not heard.
        """
        seen = self.keeper("verify", version)
        if seen["wrong"]:
            raise FailedError("driver.layers", f"{self.step.host}: {'; '.join(seen['wrong'])}.")
        for old in seen.get("told", ()):
            self._emit(Note(f"{old}; it neither runs nor boots next", "warning", self.step.host))
        for instance in self.step.takes:
            self._emit(TaskStarted(f"{instance.instance}: start on driver {version}", self.step.host))
            self._settings.check()
            try:
                ask(self._session, ["accept", instance.instance], host=self.step.host, timeout_s=ACCEPT_TIMEOUT_S)
            except OpsctlError as error:
                if error.code.startswith(("instance.", "gate.", "release.")):
                    raise FailedError(error.code, f"on driver {version}: {error.message}", hint=error.hint,
                                      log_tail=error.log_tail or self._last_words(instance)) from error
                raise

    def serve(self, phase: str) -> None:
        """Back in the rotation of every load balancer; the change is over. ``phase``: ``accepted`` or ``back``.

        Raises:
            AdriftError: a load balancer sends nothing.
            OpsctlError: it is not known to be in rotation; the change is not over.
        """
        for out in self._rotations:
            out.look_once()
        self._settings.check()
        self.keeper("mark", phase)
        for out in self._rotations:
            out.rotation.end()
        for out in self._rotations:
            out.take_back_dead_runs()
        for out in self._rotations:
            out.rotation.in_rotation(out.claimed, expected=True)
        self._settings.check()
        self._check_undrained()
        self.keeper("done")
        out_s = max((timing.out_of_rotation_s or 0.0 for timing in self.timings.values()), default=0.0)
        self._emit(TaskResult(self.step.host, f"driver: {phase}", "changed",
                              f"out of rotation for {out_s:.1f} s" if out_s else ""))

    def look(self) -> dict[str, Any]:
        return self.keeper("look")

    def reboot(self) -> None:
        """This machine, in a moment; a unit goes on. That of an earlier boot may have given up, and be gone."""
        self._settings.check()
        self.keeper("leave")
        self._run(["systemd-run", f"--on-active={REBOOT_IN_S}s", "--collect", "--quiet", "systemctl", "reboot"])

    def keeper(self, *words: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """What ``driver-keep`` answers.

        Raises:
            OpsctlError: it says no, or the host is not heard.
        """
        document: dict[str, Any] = json.loads(self._run([KEEP, *words], timeout_s))
        return document

    def _run(self, argv: Sequence[str], timeout_s: float = 60.0) -> str:
        done = self._session.run(argv, timeout_s=timeout_s)
        if done.returncode:
            lines = done.stderr.splitlines()
            raise OpsctlError(SAID_NO, f"{self.step.host}: {argv[0].rpartition('/')[2]} {argv[1]}: "
                              f"{lines[-1] if lines else f'exit status {done.returncode}'}", log_tail=lines[-10:])
        return done.stdout

    def _write_down(self) -> None:
        """What is out in load balancers, and by whom, before any is told: nobody else knows it when this is gone."""
        if not self._rotations:
            return
        with ThreadPoolExecutor(len(self._rotations), thread_name_prefix="look") as pool:
            list(pool.map(_Out.look, self._rotations))
        self._record({out.rotation.instance: out.coming() for out in self._rotations})

    def _record(self, instances: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        new = {name: {key: tuple(names) for key, names in out.items()} for name, out in instances.items()
               if any(out.values())}
        if new != self._recorded:
            self._settings.check()
            self.keeper("rotation", json.dumps(new))
            self._recorded = new

    def _drain(self) -> None:
        """All at once; who is empty keeps its lease until the last one is."""
        if not self._rotations:
            return
        with ThreadPoolExecutor(len(self._rotations), thread_name_prefix="drain") as pool:
            draining: dict[Future[None], _Out] = {pool.submit(out.drain): out for out in self._rotations}
            waiting = set(draining)
            while waiting:
                done, waiting = wait(waiting, timeout=RENEW_S)
                errors = [error for future in done if (error := future.exception())]
                if errors:
                    self._stop_others(waiting)
                    raise errors[0]
                for future in set(draining) - waiting:
                    draining[future].rotation.renew()

    def _stop_others(self, waiting: set[Future[None]]) -> None:
        """Theirs end by themselves at the deadline of the service; each undrains itself when it gives up."""
        for future in waiting:
            with contextlib.suppress(OpsctlError):
                future.result()

    def _stop_units(self) -> None:
        units = [f"inference@{instance.instance}.service" for instance in self.step.takes]
        if units:
            self._run(["systemctl", "stop", "--", *units], STOP_TIMEOUT_S)

    def _check_undrained(self) -> None:
        """Raises PausedError while a drain of this run is left: without the record nobody would know to end it."""
        if not self._rotations:
            return
        mine = {out.rotation.instance: out.rotation.owner for out in self._rotations}
        for drain in ask(self._session, ["state", "--json"], host=self.step.host).get("drains", ()):
            if mine.get(drain["instance"]) == drain["owner"]:
                raise PausedError("driver.still_drained", f"{drain['instance']} on {self.step.host} is still drained "
                                  f"by {drain['owner']}.")

    def _undrain(self) -> None:
        for out in self._rotations:
            out.rotation.undrain()
        if not any(out.rotation.ours() for out in self._rotations):
            with contextlib.suppress(OpsctlError):  # the one being raised is the one to hear
                self._record({})

    def _last_words(self, instance: Instance) -> tuple[str, ...]:
        done = self._session.run(["journalctl", "--unit", f"inference@{instance.instance}.service", "--lines", "20",
                                  "--no-pager", "--output", "cat"])
        return tuple(done.stdout.splitlines())


class _Out:
    """One instance's way out, with connections of its own."""

    def __init__(self, fleet: Fleet, host: str, instance: Instance, settings: Settings, emit: Emit,
                 stop: threading.Event, timing: Timing) -> None:
        timeout_s = settings.drain_timeout_s or fleet.service(instance.service).drain_timeout_s
        ways = Ways(settings.run, timeout_s, f"driver {settings.to}", settings.via_lb, settings.without,
                    settings.check)
        self._instance = instance
        self._settings = settings
        self._session = Session(fleet, host)
        self.rotation = Rotation(fleet, host, instance.instance, ways,
                                 lambda verb: ask(self._session, verb, host=host), emit, stop, timing)
        self.rotation.adopt(instance.ours)
        self.claimed: tuple[str, ...] = ()
        self._state: Mapping[str, Any] = {}
        self._looked = False

    def look(self) -> None:
        self._state = self.rotation.state()
        self.look_once()

    def look_once(self) -> None:
        """By whose hand it is out in load balancers; not again, when our own orders have changed what is seen there."""
        if not self._looked:
            self.claimed = self.rotation.claimed(self._instance.by_hand)
            self._looked = True

    def coming(self) -> dict[str, tuple[str, ...]]:
        """By whose order it is out in which load balancers, as soon as it is drained."""
        ours = self.rotation.coming(self.claimed) if self._drains else self.rotation.ours()
        return {"ours": ours, "by_hand": self.claimed}

    @property
    def _drains(self) -> bool:
        return bool(self._state["unit"] == "active")  # an engine that hangs too: requests may be waiting in it

    def drain(self) -> None:
        if self._drains:
            self.rotation.heard(self._state)
            self.rotation.drain(self.claimed)

    def take_back_dead_runs(self) -> None:
        """Drains of runs that were given up in the middle: this one has their locks, and did what they did not."""
        for owner in self._instance.drained_by:
            if owner.startswith(OWNED_BY_RUN) and owner != self.rotation.owner:
                self._settings.check()
                ask(self._session, ["undrain", self._instance.instance, "--owner", owner], host=self.rotation.host)

    def close(self) -> None:
        self.rotation.close()
        self._session.close()


def look_with(session: Session) -> dict[str, Any]:
    """``driver-keep look`` of a host that may not have it yet.

    Raises:
        OpsctlError: the host is not heard.
    """
    program = (resource("roles") / "nvidia_driver/files/driver_keep.py").read_bytes()
    done = session.run(["/usr/bin/python3", "-", "look"], stdin=program)
    if done.returncode:
        raise OpsctlError("driver.no_look", f"{session.host.name}: its driver could not be looked at.",
                          log_tail=done.stderr.splitlines()[-10:])
    document: dict[str, Any] = json.loads(done.stdout)
    return document
