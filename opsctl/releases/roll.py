"""Drives a rollout: asks ``rollout.decide`` for the next thing, does it on the hosts, writes down what came of it.

One instance is moved by ``_Mover.move``: is its agent heard, drain, wait until every load balancer and the engine show
nothing, order the cutover on the host, watch it, wait until the load balancers send requests again. Each move has a
thread and connections of its own. The drain is a lease that this process renews: when the controller dies, the
instance comes back by itself; once begun, the cutover needs nobody.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsctl.engines.events import Emit, Note, PhaseStarted, Progress, TaskResult, TaskStarted, one_at_a_time
from opsctl.engines.pyinfra import Order, Worker, carry_out
from opsctl.engines.session import Session, on_each
from opsctl.errors import (
    ConfigurationError,
    LockedError,
    MixedError,
    OpsctlError,
    PausedError,
    RefusedError,
    RolledBackError,
)
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import place
from opsctl.releases import rollout as rollouts
from opsctl.releases.balancers import ROTATION_S, Balancers, balancers
from opsctl.releases.plan import Step, serves
from opsctl.releases.remote import ask
from opsctl.releases.rollout import Begin, End, Rollout, State
from opsctl.releases.watch import OUT_OF_REACH, watch
from opsctl.runs.journal import nothing

LEASE_S = 90.0  # of a drain; longer than a connection needs to notice that it is dead and to be made anew
RENEW_S = 20.0
LOOK_S = 2.0  # one question waits this long for the answer it would like
HEARD_S = 10.0  # the agent is asked twice a second; a balancer that still sends after this has not heard it
FAREWELL_S = 10.0  # for draining instances to come back after Ctrl-C
LOST = ("lock.lost", "run.diverged")  # the run is somebody else's now: not even our own drain is touched any more


@dataclass(frozen=True)
class Settings:
    """What the operator decided. ``drain_timeout_s`` and ``min_speed_percent``: of the service, unless said."""

    run: str
    drain_timeout_s: float
    min_speed_percent: int
    via_lb: bool = False
    without: frozenset[str] = frozenset()  # load balancers that are off, and were said to be
    check: Callable[[], None] = nothing  # before each order: raises when a lock of the run was lost
    about_to: Callable[[], None] = nothing  # before moves begin: so too, and the journal is safe when it returns


class AdriftError(PausedError):
    """A cutover was ordered and it is not known how it ended, or it ended well and nobody sends requests."""


@dataclass
class Timing:
    """Seconds of one instance's last move, and what its gate measured."""

    drain_s: float | None = None
    out_of_rotation_s: float | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    def as_document(self) -> dict[str, Any]:
        keys = ("stop_s", "start_s", "gate_s", "tokens_per_second", "baseline_tokens_per_second")
        return {"drain_s": self.drain_s, "out_of_rotation_s": self.out_of_rotation_s,
                **{key: self.result.get(key) for key in keys}}


@dataclass
class Rolled:
    """How a rollout ended."""

    rollout: Rollout
    end: End
    timings: dict[str, Timing]


def roll(fleet: Fleet, service: Service, rollout: Rollout, settings: Settings, emit: Emit) -> Rolled:
    """Carries ``rollout`` out to its end, whatever that is; raises only on Ctrl-C and on a broken computer.

    Raises:
        LockedError: a lock of the run was lost; what was begun on hosts ends there by itself.
    """
    return _Conductor(fleet, service, settings, one_at_a_time(emit)).run(rollout)


class _Conductor:
    """Asks, begins, waits. The one place that holds the rollout's state; the movers report to it through a queue."""

    def __init__(self, fleet: Fleet, service: Service, settings: Settings, emit: Emit) -> None:
        self._fleet = fleet
        self._service = service
        self._settings = settings
        self._emit = emit
        self._ended: queue.Queue[tuple[Step, bool, OpsctlError | None]] = queue.Queue()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._timings: dict[str, Timing] = {}
        self._wave = 0
        self._going_back = False

    def run(self, rollout: Rollout) -> Rolled:
        try:
            while True:
                decision = rollouts.decide(rollout, self._serving())
                if isinstance(decision, End):
                    return Rolled(rollout, decision, self._timings)
                if isinstance(decision, Begin):
                    self._settings.about_to()
                    self._announce(decision, rollout)
                    for step in decision.steps:
                        rollout = rollouts.after(rollout, step.name, State.REVERTING if decision.back else State.MOVING)
                        self._begin(step, back=decision.back)
                else:
                    rollout = self._wait(rollout)
        except (KeyboardInterrupt, LockedError):
            self._farewell()
            raise

    def _serving(self) -> frozenset[str]:
        """Names of the instances that get requests now: well by their own word, and sent to by every load balancer.

        What does not answer serves nobody, as far as we know.
        """
        hosts = [host for host in self._fleet.hosts if self._service.group in host.groups]
        states = on_each(self._fleet, hosts,
                         lambda session: ask(session, ["state", "--json"], host=session.host.name))
        found = set()
        for placement in place(self._fleet):
            state = states.get(placement.host)
            if placement.service != self._service.name or state is None or isinstance(state, OpsctlError):
                continue
            for instance in state["instances"]:
                if instance["instance"] == placement.instance and serves(instance):
                    found.add(f"{placement.host}.{placement.instance}")
        lb = balancers(self._fleet, self._settings.without)
        try:
            return lb.rotating(found)
        except PausedError as error:
            self._emit(Note(error.message, "warning"))
            return frozenset()
        finally:
            lb.close()

    def _announce(self, decision: Begin, rollout: Rollout) -> None:
        if decision.back:
            if not self._going_back:
                self._going_back = True
                self._emit(PhaseStarted("Bring back what was moved", tuple(step.host for step in decision.steps)))
            return
        wave = decision.steps[0].wave
        if wave != self._wave:
            self._wave = wave
            steps = [move.step for move in rollout.moves if move.step.wave == wave]
            last = max(move.step.wave for move in rollout.moves)
            who = f"{len(steps)} instances" if len(steps) > 1 else steps[0].name
            first = min((move.step.wave for move in rollout.moves if move.step.serving and move.step.wave), default=0)
            what = "" if steps[0].serving else ", serving nobody now"
            canary = " (canary)" if wave == first and last > wave else ""
            self._emit(PhaseStarted(f"Wave {wave} of {last}: {who}{canary}{what}",
                                    tuple(dict.fromkeys(step.host for step in steps))))

    def _begin(self, step: Step, *, back: bool) -> None:
        timing = self._timings[step.name] = Timing()

        def run() -> None:
            error: OpsctlError | None = None
            try:
                with _Mover(self._fleet, step, self._settings, self._emit, self._stop, timing) as mover:
                    mover.move(back=back)
            except OpsctlError as found:
                error = found
            except BaseException as found:  # noqa: BLE001 - a thread that ends without a word would be waited for for ever
                error = PausedError("unexpected", f"{step.name}: unexpected {type(found).__name__}: {found}",
                                    hint="the same command again continues; --debug shows more")
            self._ended.put((step, back, error))

        thread = threading.Thread(target=run, name=f"move-{step.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _wait(self, rollout: Rollout) -> Rollout:
        """Until one move ends; ``get`` with a timeout, because one without cannot be interrupted."""
        while True:
            try:
                step, back, error = self._ended.get(timeout=0.5)
            except queue.Empty:
                continue
            if error is not None and error.code in LOST:
                raise error
            state = ended(error, back=back, served=step.serving)
            if error is not None:
                where = f"back to {_version(step.back)}" if back else f"to {_version(step.next)}"
                self._emit(TaskResult(step.host, f"{step.instance}: {where}", "failed", error.message, error.log_tail))
            return rollouts.after(rollout, step.name, state, error)

    def _farewell(self) -> None:
        """After Ctrl-C: who is only draining comes back now; a cutover under way finishes or undoes by itself."""
        self._stop.set()
        until = time.monotonic() + FAREWELL_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def ended(error: OpsctlError | None, *, back: bool, served: bool = True) -> State:
    """The state of an instance whose move ended; ``served``: it got requests before. Pure.

    A cutover that undid itself is ``failed``, or ``left`` where nobody was served before; one that could not is
    ``broken``. Anything else was noticed before the host was touched, which pauses, or cannot be known from here.
    """
    if error is None:
        return State.REVERTED if back else State.MOVED
    if back:
        return State.STUCK
    if isinstance(error, MixedError):
        return State.BROKEN
    if isinstance(error, AdriftError):
        return State.ADRIFT
    if isinstance(error, RolledBackError):
        return State.FAILED if served else State.LEFT
    return State.PAUSED


class _Mover:
    """Moves one instance; for one thread."""

    def __init__(self, fleet: Fleet, step: Step, settings: Settings, emit: Emit, stop: threading.Event, timing: Timing,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._step = step
        self._settings = settings
        self._emit = emit
        self._stop = stop
        self._timing = timing
        self._clock = clock
        self._owner = f"run:{settings.run}"
        self._host: Host = fleet.host(step.host)
        self._session = Session(fleet, self._host)
        self._balancers: Balancers = balancers(fleet, settings.without)
        self._in_balancers = settings.via_lb or fleet.load_balancer == "hook"
        self._worker = Worker()
        self._out_since: float | None = None

    def __enter__(self) -> _Mover:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
        self._session.close()
        self._balancers.close()

    def move(self, *, back: bool) -> None:
        """To the step's next release, or back.

        Raises:
            RolledBackError: its gate or start failed; the host has undone it.
            MixedError: and could not undo it.
            PausedError: it could not be begun, was not conclusive, or is not known from here.
        """
        step = self._step
        release, origin = (step.back, step.next) if back else (step.next, step.now)
        self._emit(TaskStarted(f"{step.instance}: {'back ' if back else ''}to {_version(release)}", step.host))
        self._worker.prepare()  # its imports are done by the time that the instance is drained
        instance = self._state()
        claimed = self._balancers.claimed(step.name)
        if instance["unit"] == "active":  # an engine that hangs is drained too: requests may be waiting in it
            self._heard(instance)
            self._drain()
        if self._stop.is_set():
            self._undrain()
            raise PausedError("interrupted", f"{step.name} was drained; it is back in service.",
                              hint="the same command again continues")
        try:
            self._cut_over(release, origin, back=back)
        except (RefusedError, LockedError, ConfigurationError) as error:
            if error.code in LOST:
                raise
            self._undrain()
            raise PausedError(error.code, error.message, hint=error.hint, log_tail=error.log_tail) from error
        except (RolledBackError, PausedError) as error:
            if not isinstance(error, AdriftError):  # the old release serves again; the budget counts it when it does
                self._undrain()
                with contextlib.suppress(OpsctlError):  # the one being raised is the one to hear
                    self._in_rotation(claimed, expected=False)
            raise
        self._undrain()  # the cutover has done it; one that was begun by another run knows only that one's drain
        try:
            self._in_rotation(claimed, expected=True)
        except AdriftError:
            raise
        except OpsctlError as error:
            raise AdriftError(error.code, f"{step.name} is on {_version(release)}, and then: {error.message}",
                              hint=error.hint, log_tail=error.log_tail) from error
        out = self._timing.out_of_rotation_s
        took = f"out of rotation for {out:.1f} s" if out is not None else ""
        self._emit(TaskResult(step.host, f"{step.instance}: {_version(origin) or 'nothing'} -> {_version(release)}",
                              "changed", took))

    def _ask(self, verb: Sequence[str]) -> dict[str, Any]:
        return ask(self._session, verb, host=self._host.name)

    def _state(self) -> dict[str, Any]:
        state = self._ask(["state", "--json"])
        for instance in state["instances"]:
            if instance["instance"] == self._step.instance:
                found: dict[str, Any] = instance
                return found
        raise PausedError("instance.unknown", f"{self._host.name} does not know {self._step.instance}.",
                          hint="opsctl provision places it")

    def _heard(self, instance: Mapping[str, Any]) -> None:
        """A drain is heard through the agent: one that does not answer is noticed before anything is done."""
        if not self._settings.via_lb and not instance.get("voice"):
            raise PausedError(
                "agent.silent", f"{self._host.name}: opsctl-agent does not answer, so no load balancer would hear of a "
                f"drain of {self._step.instance}; it was not touched.",
                hint=f"systemctl status opsctl-agent on {self._host.name}; or --via-lb drains in HAProxy itself")

    def _drain(self) -> None:
        """Until every load balancer sends nothing more and has nothing open, and the engine says the same."""
        step, began = self._step, self._clock()
        self._renew()
        self._out_since = began
        renewed = began
        try:
            if self._in_balancers:
                self._balancers.drain(step.name)
            while True:
                sessions, sending = self._balancers.open_sessions(step.name, LOOK_S)
                engine = self._ask(["idle", step.instance, "--wait-s", f"{LOOK_S if not sessions else 0:g}"])
                now = self._clock()
                if not sessions and not sending and engine["idle"]:
                    self._timing.drain_s = round(now - began, 1)
                    self._renew()  # the cutover's own record holds it from its first act on
                    return
                self._emit(Progress(f"{step.instance}: draining, requests in flight",
                                    max(sessions, (engine["running"] or 0) + (engine["waiting"] or 0)), 0, "items",
                                    host=step.host))
                self._patience(now - began, sessions, sending, engine)
                if now - renewed > RENEW_S:
                    self._renew()
                    renewed = now
        except BaseException:
            self._undrain()
            self._out_since = None
            raise

    def _patience(self, waited_s: float, sessions: int, sending: Sequence[str], engine: Mapping[str, Any]) -> None:
        """Raises PausedError when it is time to give up: told to stop, not heard, or past the deadline."""
        step = self._step
        if self._stop.is_set():
            raise PausedError("interrupted", f"{step.name} was draining; it is back in service.",
                              hint="the same command again continues")
        if sending and waited_s > HEARD_S:
            raise PausedError("drain.not_heard", f"{', '.join(sending)} went on sending requests to {step.name} "
                              f"{waited_s:.0f} s after it was drained; it is back in service.",
                              hint=f"can the load balancer reach the agent of {step.host} (TCP 9777)? "
                                   "--via-lb drains in HAProxy itself")
        if waited_s > self._settings.drain_timeout_s:
            running, waiting = engine["running"], engine["waiting"]
            said = f"{running} requests running and {waiting} waiting" if running is not None else "no answer"
            raise PausedError(
                "drain.deadline", f"{step.name} was not empty after {self._settings.drain_timeout_s:.0f} s: the engine "
                f"says {said}, the load balancers have {sessions} open; it is back in service.",
                hint=f"opsctl status shows it; journalctl -u inference@{step.instance} on {step.host}; drain_timeout_s "
                     "in services.yml or --drain-timeout waits longer")

    def _renew(self) -> None:
        self._settings.check()
        self._ask(["drain", self._step.instance, "--owner", self._owner, "--for-s", f"{LEASE_S:g}", "--reason",
                   f"change to {_version(self._step.next)}"])

    def _undrain(self) -> None:
        """Ends this run's drain and no other. Best effort: the lease ends by itself, and the first error counts."""
        weight = 0
        try:
            self._settings.check()
            weight = int(self._ask(["undrain", self._step.instance, "--owner", self._owner])["weight"])
        except OpsctlError as error:
            self._emit(Note(f"{self._step.instance} could not be undrained ({error.message}); its drain ends by itself "
                            f"within {LEASE_S:.0f} s", "warning", self._step.host))
            if error.code in LOST:
                return
        if not self._in_balancers or (self._fleet.load_balancer == "hook" and weight == 0):
            return  # a hook cannot tell our drain from another one's: as long as one counts it stays out
        try:
            self._balancers.undrain(self._step.name)
        except OpsctlError as error:
            self._emit(Note(f"{self._step.name} is still drained in the load balancer: {error.message}", "warning",
                            self._step.host))

    def _cut_over(self, release: str, origin: str, *, back: bool) -> None:
        step = self._step
        order = Order(step.host, "cutover", {
            "instance": step.instance, "release": release, "from_release": origin or "none", "owner": self._owner,
            "min_speed_percent": 0 if back else self._settings.min_speed_percent})
        self._settings.check()
        first = next(iter(carry_out(self._fleet, [order], self._emit, worker=self._worker).values()))
        try:
            if isinstance(first, OpsctlError):
                raise first
            self._timing.result = watch(self._session, ["cutover-status", step.instance, "--release", release],
                                        f"{step.instance}: {_version(release)}", self._emit, first=first)
        except OpsctlError as error:
            if isinstance(error, RolledBackError | MixedError | PausedError | ConfigurationError | LockedError) or (
                    isinstance(error, RefusedError) and error.code not in OUT_OF_REACH):
                raise
            raise AdriftError(error.code, f"{error.message.rstrip('.')}; the cutover of {step.name} finishes or undoes "
                              "itself there.", hint="opsctl status when the host is heard again",
                              log_tail=error.log_tail) from error

    def _in_rotation(self, claimed: Sequence[str], *, expected: bool) -> None:
        """Waits until every load balancer sends requests; one that somebody else keeps drained is not waited for."""
        instance = self._state()
        if int(instance.get("weight", 100)) == 0:
            self._emit(Note(f"{self._step.instance} stays drained: {self._drained_by()}", "info", self._step.host))
            return
        if claimed:
            self._emit(Note(f"{self._step.instance} stays out: somebody took it out by hand in the load balancer on "
                            f"{', '.join(claimed)}", "info", self._step.host))
            return
        lacking = self._balancers.lacking(self._step.name, ROTATION_S)
        if not lacking and self._out_since is not None:
            self._timing.out_of_rotation_s = round(self._clock() - self._out_since, 1)
        if lacking and expected:
            raise AdriftError("rotation.missing", f"{self._step.name} serves, but {', '.join(lacking)} sends it no "
                              f"requests after {ROTATION_S:.0f} s.",
                              hint="the statistics page of the load balancer (port 8404) says why")

    def _drained_by(self) -> str:
        drains = [drain for drain in self._ask(["state", "--json"])["drains"]
                  if drain["instance"] == self._step.instance and drain["weight"] == 0]
        return ", ".join(f"{drain['owner']}{': ' + drain['reason'] if drain.get('reason') else ''}" for drain in drains)


def _version(release: str) -> str:
    """``v2-0123456789ab`` -> ``v2``."""
    return release.rpartition("-")[0]
