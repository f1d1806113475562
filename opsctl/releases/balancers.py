"""The load balancers of a fleet, as a rollout needs them: who still sends requests to an instance, who does again.

``haproxy``: every host of the group ``lb``, each asked on its own socket. ``hook``: an executable of the operator's.
``none``: nobody is asked; an engine's own drain is then all that protects requests.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from opsctl.agent.balancer import may_get_more
from opsctl.engines.session import Session
from opsctl.errors import ConfigurationError, OpsctlError, PausedError
from opsctl.fleet.model import Fleet
from opsctl.releases.remote import ask

HOOK = "load_balancer_hook"  # the inventory's variable
HOOK_TIMEOUT_S = 60.0
# until what came back gets requests: two good checks a second apart, after the agent said up
ROTATION_S = 30.0
# What HAProxy says of a server that was taken out, and of one that is down: then it does not say whether it is out too.
OUT, DOWN = ("DRAIN", "MAINT"), ("DOWN",)


class Balancers(Protocol):
    """What is asked for one server (``gpu-1.chat.0``) of all load balancers together."""

    def open_sessions(self, server: str, wait_s: float) -> tuple[int, tuple[str, ...]]:
        """Requests that they still have there, and which of them would send more; waits a little for (0, ())."""

    def lacking(self, server: str, wait_s: float) -> tuple[str, ...]:
        """Those that send it no requests; waits a little for none."""

    def rotating(self, servers: Collection[str]) -> frozenset[str]:
        """Those that every load balancer sends requests to now."""

    def claimed(self, server: str, before: Collection[str] = ()) -> tuple[str, ...]:
        """Load balancers in which a person took it out by hand; nobody else puts it back.

        ``before``: where it was so when somebody looked last, which counts where no more than that it is down is seen.
        """

    def drain(self, server: str, leave: Collection[str] = ()) -> None:
        """Takes it out by the load balancers themselves, past the agent. What is out already is left as it is.

        ``leave``: load balancers in which it is a person's.
        """

    def undrain(self, server: str) -> None:
        """Ends what ``drain`` did here, or before ``adopt``, and nothing else."""

    def adopt(self, server: str, names: Collection[str]) -> None:
        """Load balancers in which ``drain`` was called by a process that is dead."""

    def ours(self, server: str) -> tuple[str, ...]:
        """Load balancers in which it is out by ``drain``."""

    def names(self) -> tuple[str, ...]:
        """Load balancers that ``drain`` talks to and that remember it."""

    def close(self) -> None: ...


def balancers(fleet: Fleet, without: Collection[str] = ()) -> Balancers:
    """By the inventory's ``load_balancer``; for one thread at a time. ``without``: hosts that are off, and left out.

    Raises:
        ConfigurationError: a hook is wanted and not there.
    """
    if fleet.load_balancer == "haproxy":
        return Haproxy([Session(fleet, host) for host in fleet.group("lb") if host.name not in without])
    return Hook(_hook(fleet)) if fleet.load_balancer == "hook" else Nobody()


class Haproxy:
    """HAProxy on each host of the group ``lb``."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._mine: set[tuple[str, str]] = set()

    def open_sessions(self, server: str, wait_s: float) -> tuple[int, tuple[str, ...]]:
        count, sending = 0, []
        for session in self._sessions:
            seen = self._ask(session, ["balancer", "--drained", server, "--wait-s", f"{wait_s:g}"])
            rows = [row for row in seen["servers"] if row["server"] == server]
            count += sum(row["sessions"] for row in rows)
            if any(may_get_more(row) for row in rows):
                sending.append(session.host.name)
        return count, tuple(sending)

    def lacking(self, server: str, wait_s: float) -> tuple[str, ...]:
        return tuple(session.host.name for session in self._sessions
                     if self._ask(session, ["balancer", "--wanted", server, "--wait-s", f"{wait_s:g}"])["missing"])

    def rotating(self, servers: Collection[str]) -> frozenset[str]:
        found = frozenset(servers)
        words = [word for server in servers for word in ("--wanted", server)]
        for session in self._sessions:
            found -= frozenset(self._ask(session, ["balancer", *words])["missing"])
        return found

    def claimed(self, server: str, before: Collection[str] = ()) -> tuple[str, ...]:
        return tuple(session.host.name for session in self._sessions if (session.host.name, server) not in self._mine
                     and self._is(session, server, *OUT, *(DOWN if session.host.name in before else ())))

    def drain(self, server: str, leave: Collection[str] = ()) -> None:
        for session in self._sessions:
            if session.host.name not in leave and not self._is(session, server, *OUT):
                self._mine.add((session.host.name, server))
                self._ask(session, ["balancer-drain", server])

    def undrain(self, server: str) -> None:
        for session in self._sessions:
            if (session.host.name, server) in self._mine:
                self._ask(session, ["balancer-ready", server])
                self._mine.discard((session.host.name, server))

    def adopt(self, server: str, names: Collection[str]) -> None:
        self._mine |= {(name, server) for name in names}

    def ours(self, server: str) -> tuple[str, ...]:
        return tuple(sorted(name for name, one in self._mine if one == server))

    def names(self) -> tuple[str, ...]:
        return tuple(session.host.name for session in self._sessions)

    def _is(self, session: Session, server: str, *states: str) -> bool:
        return any(row["server"] == server and row["status"].startswith(states)
                   for row in self._ask(session, ["balancer"])["servers"])

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    @staticmethod
    def _ask(session: Session, verb: list[str]) -> dict[str, Any]:
        try:
            return ask(session, verb, host=session.host.name)
        except OpsctlError as error:
            raise PausedError("balancer.unseen", f"the load balancer on {error.message}",
                              hint="a drain is seen there or not at all; mend it, then the same command again",
                              log_tail=error.log_tail) from error


class Nobody:
    """``load_balancer=none``."""

    def open_sessions(self, server: str, wait_s: float) -> tuple[int, tuple[str, ...]]:
        return 0, ()

    def rotating(self, servers: Collection[str]) -> frozenset[str]:
        return frozenset(servers)

    def claimed(self, server: str, before: Collection[str] = ()) -> tuple[str, ...]:
        return ()

    def adopt(self, server: str, names: Collection[str]) -> None:
        pass

    def ours(self, server: str) -> tuple[str, ...]:
        return ()

    def names(self) -> tuple[str, ...]:
        return ()

    def lacking(self, server: str, wait_s: float) -> tuple[str, ...]:
        return ()

    def drain(self, server: str, leave: Collection[str] = ()) -> None:
        pass

    def undrain(self, server: str) -> None:
        pass

    def close(self) -> None:
        pass


class Hook(Nobody):
    """An executable that is called with ``drain|undrain|sessions SERVER``; ``sessions`` prints a number."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def open_sessions(self, server: str, wait_s: float) -> tuple[int, tuple[str, ...]]:
        said = self._call("sessions", server)
        if not said.strip().isdigit():
            raise PausedError("balancer.hook", f"{self._program} sessions {server} printed {said.strip()[:80]!r}, not "
                              "a number.", hint="it prints how many requests the load balancer has there now")
        if int(said):
            time.sleep(wait_s)
        return int(said), ()

    def drain(self, server: str, leave: Collection[str] = ()) -> None:
        self._call("drain", server)

    def undrain(self, server: str) -> None:
        self._call("undrain", server)

    def _call(self, word: str, server: str) -> str:
        try:
            done = subprocess.run([self._program, word, server], capture_output=True, text=True, check=False,
                                  timeout=HOOK_TIMEOUT_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PausedError("balancer.hook", f"{self._program} {word} {server} could not be run: {error}.",
                              hint="mend the hook, then the same command again") from None
        if done.returncode:
            raise PausedError("balancer.hook", f"{self._program} {word} {server} ended with {done.returncode}.",
                              hint="mend the hook, then the same command again",
                              log_tail=done.stderr.splitlines()[-10:])
        return done.stdout


def _hook(fleet: Fleet) -> Path:
    named = {str(host.variables[HOOK]) for host in fleet.hosts if host.variables.get(HOOK)}
    if len(named) != 1:
        raise ConfigurationError("inventory.no_hook", f"{fleet.inventory}: load_balancer is hook, and {HOOK} names "
                                 f"{len(named) or 'no'} executable{'s' if len(named) > 1 else ''}.",
                                 hint=f"{HOOK}=hooks/balancer in [all:vars]; it is called with drain, undrain or "
                                      "sessions, and a server such as gpu-1.chat.0")
    path = fleet.directory / named.pop()
    if not path.is_file():
        raise ConfigurationError("inventory.no_hook", f"{fleet.inventory}: {HOOK}: there is no {path}.",
                                 hint="an executable file, beside the inventory or with its whole path")
    return path
