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

from opsctl.engines.events import Emit, Note, PhaseStarted, TaskResult, TaskStarted, one_at_a_time
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
from opsctl.fleet.model import Fleet, Service
from opsctl.fleet.placements import place
from opsctl.releases import rollout as rollouts
from opsctl.releases import rotation as rotation_of
from opsctl.releases.balancers import balancers
from opsctl.releases.plan import Step, Unheard, serves
from opsctl.releases.remote import ask
from opsctl.releases.rollout import Begin, End, Rollout, State
from opsctl.releases.rotation import LOST, AdriftError, Rotation, Ways
from opsctl.releases.watch import OUT_OF_REACH, watch
from opsctl.runs.journal import nothing

ASK_AGAIN, AGAIN_S = 3, 2.0  # how often and how soon load balancers are asked that did not answer
FAREWELL_S = 10.0  # for draining instances to come back after Ctrl-C


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


@dataclass
class Timing(rotation_of.Timing):
    """And what its gate measured."""

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
                decision = rollouts.decide(rollout, *self._serving())
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

    def _serving(self) -> tuple[frozenset[str], Unheard]:
        """Who gets requests now, and what did not answer. A load balancer that does not is asked again before that
        ends a rollout: one lost connection is no reason to leave a fleet mixed.
        """
        for _ in range(ASK_AGAIN):
            serving, unheard = self._look()
            if not unheard.why or self._stop.wait(AGAIN_S):
                break
        return serving, unheard

    def _look(self) -> tuple[frozenset[str], Unheard]:
        """Names of the instances that get requests: well by their own word, and sent to by every load balancer."""
        hosts = [host for host in self._fleet.hosts if self._service.group in host.groups]
        states = on_each(self._fleet, hosts,
                         lambda session: ask(session, ["state", "--json"], host=session.host.name))
        found, silent = set(), set()
        for placement in place(self._fleet):
            state = states.get(placement.host)
            if placement.service != self._service.name:
                continue
            if state is None or isinstance(state, OpsctlError):
                silent.add(f"{placement.host}.{placement.instance}")
                continue
            for instance in state["instances"]:
                if instance["instance"] == placement.instance and serves(instance):
                    found.add(f"{placement.host}.{placement.instance}")
        lb = balancers(self._fleet, self._settings.without)
        try:
            return lb.rotating(found), Unheard(frozenset(silent))
        except PausedError as error:
            self._emit(Note(error.message, "warning"))
            return frozenset(), Unheard(frozenset(silent), error.message)
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
        self._session = Session(fleet, step.host)
        ways = Ways(settings.run, settings.drain_timeout_s, f"change to {_version(step.next)}", settings.via_lb,
                    settings.without, settings.check)
        self._rotation = Rotation(fleet, step.host, step.instance, ways, self._ask, emit, stop, timing, clock)
        self._worker = Worker()

    def __enter__(self) -> _Mover:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
        self._session.close()
        self._rotation.close()

    def move(self, *, back: bool) -> None:
        """To the step's next release, or back.

        Raises:
            RolledBackError: its gate or start failed; the host has undone it.
            MixedError: and could not undo it.
            PausedError: it could not be begun, was not conclusive, or is not known from here.
        """
        step, rotation = self._step, self._rotation
        release, origin = (step.back, step.next) if back else (step.next, step.now)
        self._emit(TaskStarted(f"{step.instance}: {'back ' if back else ''}to {_version(release)}", step.host))
        self._worker.prepare()  # its imports are done by the time that the instance is drained
        instance = rotation.state()
        claimed = rotation.claimed()
        if instance["unit"] == "active":  # an engine that hangs is drained too: requests may be waiting in it
            rotation.heard(instance)
            rotation.drain()
        if self._stop.is_set():
            rotation.undrain()
            raise PausedError("interrupted", f"{step.name} was drained; it is back in service.",
                              hint="the same command again continues")
        try:
            self._cut_over(release, origin, back=back)
        except (RefusedError, LockedError, ConfigurationError) as error:
            if error.code in LOST:
                raise
            rotation.undrain()
            raise PausedError(error.code, error.message, hint=error.hint, log_tail=error.log_tail) from error
        except (RolledBackError, PausedError) as error:
            if not isinstance(error, AdriftError):  # the old release serves again; the budget counts it when it does
                rotation.undrain()
                with contextlib.suppress(OpsctlError):  # the one being raised is the one to hear
                    rotation.in_rotation(claimed, expected=False)
            raise
        rotation.undrain()  # the cutover has done it; one that was begun by another run knows only that one's drain
        try:
            rotation.in_rotation(claimed, expected=True)
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
        return ask(self._session, verb, host=self._step.host)

    def _cut_over(self, release: str, origin: str, *, back: bool) -> None:
        step = self._step
        order = Order(step.host, "cutover", {
            "instance": step.instance, "release": release, "from_release": origin or "none",
            "owner": self._rotation.owner, "min_speed_percent": 0 if back else self._settings.min_speed_percent})
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


def _version(release: str) -> str:
    """``v2-0123456789ab`` -> ``v2``."""
    return release.rpartition("-")[0]
