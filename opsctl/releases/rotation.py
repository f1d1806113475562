"""One instance out of the rotation of every load balancer, and back in: the drain of a rollout, and its end.

``drain`` gives a lease that whoever waits renews, so an instance whose controller died comes back by itself; ``hold``
turns it into a drain that stays, also over a reboot, until ``undrain``. Nobody else's drain is ever touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import OpsctlError, PausedError
from opsctl.fleet.model import Fleet
from opsctl.releases.balancers import ROTATION_S, Balancers, balancers
from opsctl.runs.journal import nothing

LEASE_S = 90.0  # of a drain; longer than a connection needs to notice that it is dead and to be made anew
RENEW_S = 20.0
LOOK_S = 2.0  # one question waits this long for the answer it would like
HEARD_S = 10.0  # the agent is asked twice a second; a balancer that still sends after this has not heard it
LOST = ("lock.lost", "run.diverged")  # the run is somebody else's now: not even our own drain is touched any more

Ask = Callable[[Sequence[str]], dict[str, Any]]


class AdriftError(PausedError):
    """A change was ordered and it is not known how it ended, or it ended well and nobody sends requests."""


@dataclass(frozen=True)
class Ways:
    """Whose drain it is and how it is done. ``why``: the drain's reason, as a person reads it."""

    run: str
    drain_timeout_s: float
    why: str
    via_lb: bool = False
    without: frozenset[str] = frozenset()  # load balancers that are off, and were said to be
    check: Callable[[], None] = nothing  # before each order: raises when a lock of the run was lost


@dataclass
class Timing:
    """Seconds of one instance's last way out and back."""

    drain_s: float | None = None
    out_of_rotation_s: float | None = None


class Rotation:
    """Of one instance; for one thread at a time. ``ask`` calls a verb of the host's ``opsctl-host``."""

    def __init__(self, fleet: Fleet, host: str, instance: str, ways: Ways, ask: Ask, emit: Emit, stop: threading.Event,
                 timing: Timing, clock: Callable[[], float] = time.monotonic) -> None:
        self.host = host
        self.instance = instance
        self.name = f"{host}.{instance}"
        self.owner = f"run:{ways.run}"
        self.timing = timing
        self._ways = ways
        self._ask = ask
        self._emit = emit
        self._stop = stop
        self._clock = clock
        self._hook = fleet.load_balancer == "hook"
        self._balancers: Balancers = balancers(fleet, ways.without)
        self._in_balancers = ways.via_lb or self._hook
        self._out_since: float | None = None
        self._held = False

    def close(self) -> None:
        self._balancers.close()

    def state(self) -> dict[str, Any]:
        """The instance in ``opsctl-host state``.

        Raises:
            PausedError: the host does not know it.
        """
        state = self._ask(["state", "--json"])
        for instance in state["instances"]:
            if instance["instance"] == self.instance:
                found: dict[str, Any] = instance
                return found
        raise PausedError("instance.unknown", f"{self.host} does not know {self.instance}.",
                          hint="opsctl provision places it")

    def claimed(self, before: Sequence[str] = ()) -> tuple[str, ...]:
        """Load balancers in which a person took it out by hand. ``before``: as was seen by whoever began this."""
        return self._balancers.claimed(self.name, before)

    def adopt(self, names: Sequence[str]) -> None:
        """Load balancers in which a dead process of ours took it out: the end of its drain ends that too."""
        self._balancers.adopt(self.name, names)
        self._in_balancers = self._in_balancers or bool(names)

    def ours(self) -> tuple[str, ...]:
        """Load balancers in which it is out by our order."""
        return self._balancers.ours(self.name)

    def coming(self, claimed: Sequence[str]) -> tuple[str, ...]:
        """Those in which it is out by our order after ``drain``, at the most."""
        told = self._balancers.names() if self._ways.via_lb else self.ours()
        return tuple(name for name in told if name not in claimed)

    def heard(self, instance: Mapping[str, Any]) -> None:
        """A drain is heard through the agent: one that does not answer is noticed before anything is done.

        Raises:
            PausedError: ``agent.silent``.
        """
        if not self._ways.via_lb and not instance.get("voice"):
            raise PausedError(
                "agent.silent", f"{self.host}: opsctl-agent does not answer, so no load balancer would hear of a "
                f"drain of {self.instance}; it was not touched.",
                hint=f"systemctl status opsctl-agent on {self.host}; or --via-lb drains in HAProxy itself")

    def drain(self, claimed: Sequence[str] = ()) -> None:
        """Until every load balancer sends nothing more and has nothing open, and the engine says the same.

        ``claimed``: load balancers in which a person has it out, which are not told.

        Raises:
            PausedError: it was given up, and the instance is back in service; one that was held before stays drained.
        """
        began = self._clock()
        self.renew()
        self._out_since = began
        renewed = began
        try:
            if self._in_balancers:
                self._balancers.drain(self.name, claimed)
            while True:
                sessions, sending = self._balancers.open_sessions(self.name, LOOK_S)
                engine = self._ask(["idle", self.instance, "--wait-s", f"{LOOK_S if not sessions else 0:g}"])
                now = self._clock()
                if not sessions and not sending and engine["idle"]:
                    self.timing.drain_s = round(now - began, 1)
                    self.renew()  # whoever drained acts now
                    return
                self._emit(Progress(f"{self.instance}: draining, requests in flight",
                                    max(sessions, (engine["running"] or 0) + (engine["waiting"] or 0)), 0, "items",
                                    host=self.host))
                self._patience(now - began, sessions, sending, engine)
                if now - renewed > RENEW_S:
                    self.renew()
                    renewed = now
        except BaseException:
            if not self._held:
                self.undrain()
                self._out_since = None
            raise

    def renew(self) -> None:
        """The drain, with a lease of ``LEASE_S`` from now on; one that is held has none."""
        self._order(*(() if self._held else ("--for-s", f"{LEASE_S:g}")))

    def hold(self) -> None:
        """The drain without an end of its own: over reboots, and when nobody is there to renew it."""
        self._order()
        self._held = True

    def end(self) -> None:
        """Ends this run's drain and no other.

        Raises:
            OpsctlError: it may still be there.
        """
        self._ways.check()
        weight = int(self._ask(["undrain", self.instance, "--owner", self.owner])["weight"])
        self._held = False
        if self._in_balancers and not (self._hook and weight == 0):
            self._balancers.undrain(self.name)

    def undrain(self) -> None:
        """Ends this run's drain and no other. Best effort: a lease ends by itself, and the first error counts."""
        weight = 0
        try:
            self._ways.check()
            weight = int(self._ask(["undrain", self.instance, "--owner", self.owner])["weight"])
        except OpsctlError as error:
            until = f"is {self.owner}'s until that is resumed" if self._held else \
                f"ends by itself within {LEASE_S:.0f} s"
            self._emit(Note(f"{self.instance} could not be undrained ({error.message}); its drain {until}", "warning",
                            self.host))
            if error.code in LOST:
                return
        if not self._in_balancers or (self._hook and weight == 0):
            return  # a hook cannot tell our drain from another one's: as long as one counts it stays out
        try:
            self._balancers.undrain(self.name)
        except OpsctlError as error:
            self._emit(Note(f"{self.name} is still drained in the load balancer: {error.message}", "warning",
                            self.host))

    def in_rotation(self, claimed: Sequence[str], *, expected: bool) -> None:
        """Waits until every load balancer sends requests; one that somebody else keeps drained is not waited for.

        Raises:
            AdriftError: it is ``expected``, and does not happen.
        """
        instance = self.state()
        if int(instance.get("weight", 100)) == 0:
            self._emit(Note(f"{self.instance} stays drained: {self._drained_by()}", "info", self.host))
            return
        if claimed:
            self._emit(Note(f"{self.instance} stays out: somebody took it out by hand in the load balancer on "
                            f"{', '.join(claimed)}", "info", self.host))
            return
        lacking = self._balancers.lacking(self.name, ROTATION_S)
        if not lacking and self._out_since is not None:
            self.timing.out_of_rotation_s = round(self._clock() - self._out_since, 1)
        if lacking and expected:
            raise AdriftError("rotation.missing", f"{self.name} serves, but {', '.join(lacking)} sends it no "
                              f"requests after {ROTATION_S:.0f} s.",
                              hint="the statistics page of the load balancer (port 8404) says why")

    def _order(self, *lease: str) -> None:
        self._ways.check()
        self._ask(["drain", self.instance, "--owner", self.owner, *lease, "--reason", self._ways.why])

    def _patience(self, waited_s: float, sessions: int, sending: Sequence[str], engine: Mapping[str, Any]) -> None:
        """Raises PausedError when it is time to give up: told to stop, not heard, or past the deadline."""
        if self._stop.is_set():
            raise PausedError("interrupted", f"{self.name} was draining; {self._then()}.",
                              hint="the same command again continues")
        if sending and waited_s > HEARD_S:
            raise PausedError("drain.not_heard", f"{', '.join(sending)} went on sending requests to {self.name} "
                              f"{waited_s:.0f} s after it was drained; {self._then()}.",
                              hint=f"can the load balancer reach the agent of {self.host} (TCP 9777)? "
                                   "--via-lb drains in HAProxy itself")
        if waited_s > self._ways.drain_timeout_s:
            running, waiting = engine["running"], engine["waiting"]
            said = f"{running} requests running and {waiting} waiting" if running is not None else "no answer"
            raise PausedError(
                "drain.deadline", f"{self.name} was not empty after {self._ways.drain_timeout_s:.0f} s: the engine "
                f"says {said}, the load balancers have {sessions} open; {self._then()}.",
                hint=f"opsctl status shows it; journalctl -u inference@{self.instance} on {self.host}; drain_timeout_s "
                     "in services.yml or --drain-timeout waits longer")

    def _then(self) -> str:
        return "it stays drained" if self._held else "it is back in service"

    def _drained_by(self) -> str:
        drains = [drain for drain in self._ask(["state", "--json"])["drains"]
                  if drain["instance"] == self.instance and drain["weight"] == 0]
        return ", ".join(f"{drain['owner']}{': ' + drain['reason'] if drain.get('reason') else ''}" for drain in drains)
