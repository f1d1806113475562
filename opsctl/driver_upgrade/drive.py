"""Drives a change of driver: asks ``upgrade.decide`` for the next hosts, brings each to an end, writes down which.

The hosts of a batch are emptied at once, a thread each; those that are empty get one run of Ansible together; each is
then accepted, or gets its kept packages back, a thread each again. From ``begin`` on a host's drain has no end of its
own: it is over when the host serves, on the one driver or the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsctl.driver_upgrade import upgrade as upgrades
from opsctl.driver_upgrade.host import FailedError, HostAtWork, Settings
from opsctl.driver_upgrade.plan import Step, serving_now
from opsctl.driver_upgrade.upgrade import End, State, Upgrade
from opsctl.engines.ansible import Failure, PlaybookOutcome, run_playbook
from opsctl.engines.events import Emit, Event, Note, PhaseStarted, TaskResult, one_at_a_time
from opsctl.engines.session import on_each
from opsctl.errors import LockedError, OpsctlError, PausedError
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import place
from opsctl.releases.balancers import balancers
from opsctl.releases.plan import Unheard
from opsctl.releases.remote import ask
from opsctl.releases.rotation import LOST, AdriftError
from opsctl.resources import resource

Ended = dict[str, tuple[State, OpsctlError | None]]
PLAYS = {"Keep the driver": "keep", "Change the driver": "change", "Bring the kept driver back": "back"}
FAREWELL_S = 10.0  # for draining instances to come back after Ctrl-C


@dataclass(frozen=True)
class Tools:
    """What is worked with: the fleet, its bundle, and where Ansible's words go."""

    fleet: Fleet
    bundle: Path
    log: Path


@dataclass
class Driven:
    """How it ended. ``timings``: by host and instance, seconds out of rotation."""

    upgrade: Upgrade
    end: End
    timings: dict[str, dict[str, float | None]] = field(default_factory=dict)


def play(tools: Tools, hosts: Sequence[str], steps: Sequence[str], emit: Emit) -> PlaybookOutcome:
    """``playbooks/driver.yml`` for some hosts: ``check``, ``keep``, ``change`` or ``back``.

    The plays of other steps have nothing to do, and are not told of.
    """
    def told(event: Event) -> None:
        if not (isinstance(event, PhaseStarted) and PLAYS.get(event.name, "check") not in steps):
            emit(event)

    return run_playbook(
        resource("playbooks") / "driver.yml", fleet_directory=tools.fleet.directory, inventory=tools.fleet.inventory,
        ssh_config=tools.fleet.ssh_config, log=tools.log, emit=told, limit=hosts,
        variables={"opsctl_bundle": str(tools.bundle), "opsctl_driver_only": list(steps)})


def drive(tools: Tools, upgrade: Upgrade, settings: Settings, emit: Emit) -> Driven:
    """Carries it out to its end, whatever that is; raises only on Ctrl-C and on a broken computer.

    Raises:
        LockedError: a lock of the run was lost.
    """
    return _Conductor(tools, settings, one_at_a_time(emit)).run(upgrade)


def sentence(failure: Failure) -> str:
    """A failed task of Ansible's, as a sentence."""
    reason = failure.message or ("the host stopped answering" if failure.unreachable else "failed")
    if failure.host in reason:  # the role's own sentences say where
        return reason.rstrip(".")
    return f"{failure.host}: {failure.task.rpartition(' : ')[2].rstrip('.')}: {reason}"


class _Conductor:
    def __init__(self, tools: Tools, settings: Settings, emit: Emit) -> None:
        self._tools = tools
        self._fleet = tools.fleet
        self._settings = settings
        self._emit = emit
        self._stop = threading.Event()
        self._timings: dict[str, dict[str, float | None]] = {}
        self._wave = 0

    def run(self, upgrade: Upgrade) -> Driven:
        while True:
            decision = upgrades.decide(upgrade, *self._serving())
            if isinstance(decision, End):
                return Driven(upgrade, decision, self._timings)
            self._settings.about_to()
            self._announce(decision.steps, upgrade)
            for host, (state, error) in self._batch(decision.steps).items():
                if error is not None:
                    self._emit(TaskResult(host, f"driver {self._settings.to}", "failed", error.message, error.log_tail))
                upgrade = upgrades.after(upgrade, host, state, error)

    def _announce(self, steps: Sequence[Step], upgrade: Upgrade) -> None:
        wave = steps[0].wave
        if wave == self._wave:
            return
        self._wave = wave
        last = max(move.step.wave for move in upgrade.moves)
        first = min((move.step.wave for move in upgrade.moves if move.step.serving), default=0)
        size = sum(move.step.wave == wave for move in upgrade.moves)
        who = f"{size} hosts" if size > 1 else steps[0].host
        canary = " (canary)" if wave == first and last > wave else ""
        self._emit(PhaseStarted(f"Wave {wave} of {last}: {who}{canary}", tuple(step.host for step in steps)))

    def _serving(self) -> tuple[dict[str, frozenset[str]], Unheard]:
        """Who gets requests now, by service, and what did not answer."""
        placements = place(self._fleet)
        names = {placement.host for placement in placements}
        states = on_each(self._fleet, [host for host in self._fleet.hosts if host.name in names],
                         lambda session: ask(session, ["state", "--json"], host=session.host.name))
        lb = balancers(self._fleet, self._settings.without)
        try:
            rotating = lb.rotating([f"{one.host}.{one.instance}" for one in placements])
        except PausedError as error:
            self._emit(Note(error.message, "warning"))
            return {}, Unheard(why=error.message)
        finally:
            lb.close()
        silent = frozenset(f"{one.host}.{one.instance}" for one in placements
                           if isinstance(states.get(one.host), OpsctlError))
        return serving_now(placements, states, rotating), Unheard(silent)

    def _batch(self, steps: Sequence[Step]) -> Ended:
        """Every host to an end."""
        hosts = {step.host: HostAtWork(self._fleet, step, self._settings, self._emit, self._stop) for step in steps}
        ended: Ended = {}
        try:
            emptied = self._empty({name: host for name, host in hosts.items() if host.step.action == "change"}, ended)
            why = self._change(emptied, ended)
            new = {name: host for name, host in emptied.items() if name not in ended and name not in why}
            why |= self._accept(new, ended)
            # Who is well serves before anybody goes back, which may take a reboot.
            self._serve({name: host for name, host in new.items() if name not in ended and name not in why},
                        State.CHANGED, {}, ended)
            why |= {name: None for name, host in hosts.items() if host.step.action == "back"}
            self._back({name: host for name, host in hosts.items() if name in why}, why, ended)
            # Those that a boot of their own brought to an end were accepted, or went back, there.
            for phase, state in (("accepted", State.CHANGED), ("back", State.BACK)):
                self._serve({name: host for name, host in hosts.items() if host.step.action == "finish"
                             and host.step.phase == phase}, state, {}, ended)
            return ended
        finally:
            for name, host in hosts.items():
                self._timings[name] = {one: timing.out_of_rotation_s for one, timing in host.timings.items()}
                host.close()

    def _empty(self, hosts: Mapping[str, HostAtWork], ended: Ended) -> dict[str, HostAtWork]:
        """Those that are drained and stopped."""
        for name, error in self._each(hosts, HostAtWork.empty).items():
            if error is not None:
                ended[name] = (State.ADRIFT if isinstance(error, AdriftError) else State.PAUSED, error)
        return {name: host for name, host in hosts.items() if name not in ended}

    def _accept(self, hosts: Mapping[str, HostAtWork], ended: Ended) -> dict[str, OpsctlError | None]:
        """Who is to go back, and why; who is not heard is adrift."""
        failed: dict[str, OpsctlError | None] = {}
        for name, error in self._each(hosts, lambda host: host.accept(self._settings.to)).items():
            if isinstance(error, FailedError):
                failed[name] = error
            elif error is not None:
                ended[name] = (State.ADRIFT, error)
        return failed

    def _change(self, hosts: Mapping[str, HostAtWork], ended: Ended) -> dict[str, OpsctlError | None]:
        """One run of Ansible; who is to go back, and why. Who is not heard any more is adrift; this machine reboots."""
        if not hosts:
            return {}
        self._settings.about_to()
        outcome = self._play(hosts, "change", {}, ended)
        if outcome is None:
            return {}
        failed: dict[str, OpsctlError | None] = {}
        for name, host in hosts.items():
            mine = [failure for failure in outcome.failures if failure.host == name]
            if not mine and not outcome.exit_code:
                continue
            if not mine and name in outcome.stats and not outcome.stats[name].get("failures"):
                continue
            last = mine[-1] if mine else Failure(name, outcome.phase, "Ansible", f"exit code {outcome.exit_code}")
            if last.unreachable:
                ended[name] = (State.ADRIFT, PausedError(
                    "host.unreachable", f"{sentence(last)}: it is not known which driver it has",
                    hint="is it up? its console, or the BMC, says why not", log_tail=last.detail))
            elif self._reboots(host):
                ended[name] = (State.REBOOTING, PausedError(
                    "driver.reboots", f"{name}, where this runs, reboots into driver {self._settings.to}; a unit there "
                    "accepts it after that, or brings the old one back"))
            else:
                failed[name] = OpsctlError("driver.failed", sentence(last), log_tail=last.detail)
        return failed

    def _play(self, hosts: Mapping[str, HostAtWork], what: str, why: Mapping[str, OpsctlError | None], ended: Ended
              ) -> PlaybookOutcome | None:
        """None where Ansible did not begin or did not end: the hosts are held and stopped, and adrift."""
        try:
            return play(self._tools, list(hosts), [what], self._emit)
        except OpsctlError as error:
            if error.code in LOST:
                raise
            for name in hosts:
                first = why.get(name)
                before = f"{first.message.rstrip('.')}; and then: " if first else ""
                ended[name] = (State.ADRIFT, AdriftError(
                    error.code, f"{name} is drained and stopped, and {before or 'then: '}{error.message}",
                    hint=error.hint, log_tail=error.log_tail))
            return None

    def _reboots(self, host: HostAtWork, *, back: bool = False) -> bool:
        """Whether all that this machine lacks is a boot, which is ordered then: nobody else could go on after it."""
        if not host.step.local:
            return False
        try:
            look = host.look()
            version = look["change"]["from"] if back else self._settings.to
            if look["versions"] != [version] or look["states"] or look["loaded"] == version:
                return False
            self._settings.about_to()  # the play before took its time
            host.reboot()
        except OpsctlError as error:
            if error.code in LOST:
                raise
            return False
        return True

    def _back(self, hosts: Mapping[str, HostAtWork], why: Mapping[str, OpsctlError | None], ended: Ended) -> None:
        """The kept packages again, and what serves on them."""
        if not hosts:
            return
        for name in hosts:
            error = why[name]
            self._emit(Note(f"goes back to its old driver{f': {error.message}' if error else ''}", "warning", name))
        self._settings.about_to()
        outcome = self._play(hosts, "back", why, ended)
        if outcome is None:
            return
        for failure in outcome.failures:
            state = State.ADRIFT if failure.unreachable else State.BROKEN
            ended[failure.host] = (state, _broken(why.get(failure.host), sentence(failure), failure.detail))
        for name, host in hosts.items():
            if name not in ended and self._reboots(host, back=True):
                error = why[name]
                first = f"{error.message.rstrip('.')}; and then: " if error else ""
                ended[name] = (State.REBOOTING, PausedError(
                    "driver.reboots", f"{first}{name}, where this runs, reboots into its old driver; a unit there "
                    "accepts it after that"))
        left = {name: host for name, host in hosts.items() if name not in ended}
        for name, error in self._each(left, lambda host: host.accept(_old(host))).items():
            if error is not None:
                ended[name] = (State.BROKEN, _broken(why[name], error.message, error.log_tail))
        left = {name: host for name, host in left.items() if name not in ended}
        self._serve(left, State.BACK, why, ended)

    def _serve(self, hosts: Mapping[str, HostAtWork], state: State, why: Mapping[str, OpsctlError | None],
               ended: Ended) -> None:
        """Back into rotation. Where a load balancer does not see it, the host is well all the same: it is unseen."""
        reasons = {name: why.get(name) or _went_back(host) for name, host in hosts.items()} \
            if state is State.BACK else {}
        phase = "back" if state is State.BACK else "accepted"
        for name, error in self._each(hosts, lambda host: host.serve(phase)).items():
            if error is None:
                ended[name] = (state, reasons.get(name))
            else:
                ended[name] = (State.UNSEEN if error.code == "rotation.missing" else State.ADRIFT, error)

    def _each(self, hosts: Mapping[str, HostAtWork], act: Callable[[HostAtWork], Any]
              ) -> dict[str, OpsctlError | None]:
        """Calls ``act`` for all of them at once; what each raised. Can be interrupted; a lost lock ends it all."""
        answers: dict[str, OpsctlError | None] = {}

        def call(name: str, host: HostAtWork) -> None:
            try:
                act(host)
                answers[name] = None
            except OpsctlError as error:
                answers[name] = error
            except BaseException as error:  # noqa: BLE001 - a thread that ends without a word would be taken for done
                answers[name] = PausedError("unexpected", f"{name}: unexpected {type(error).__name__}: {error}",
                                            hint="the same command again continues; --debug shows more")

        threads = [threading.Thread(target=call, args=pair, name=f"driver-{pair[0]}", daemon=True)
                   for pair in hosts.items()]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        except KeyboardInterrupt:
            self._stop.set()
            until = time.monotonic() + FAREWELL_S
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()))
            raise
        for error in answers.values():
            if error is not None and error.code in LOST:
                raise error if isinstance(error, LockedError) else LockedError(error.code, error.message)
        return answers


def _old(host: HostAtWork) -> str:
    """The driver before the change, by the host's own record: the plan may have seen half of another."""
    change = host.look()["change"]
    return str(change["from"]) if change else host.step.old


def _went_back(host: HostAtWork) -> OpsctlError:
    """Why, as the host has written it down."""
    try:
        change = host.look()["change"] or {}
    except OpsctlError:
        change = {}
    return OpsctlError("driver.failed", f"{host.step.host} did not serve on the new driver: "
                       f"{change.get('why') or 'it was on its way back'}")


def _broken(why: OpsctlError | None, then: str, log_tail: Sequence[str]) -> OpsctlError:
    first = f"{why.message.rstrip('.')}; and the old driver does not serve either: " if why else ""
    return OpsctlError("driver.not_undone", f"{first}{then}",
                       hint="/usr/local/lib/opsctl/driver-keep look on the host; its kept packages are in "
                            "/var/lib/opsctl/driver/kept", log_tail=log_tail)
