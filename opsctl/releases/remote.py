"""Calls ``opsctl-host`` on a host and gives its one JSON document, or its error as an error here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from opsctl.engines.session import Completed
from opsctl.errors import (
    ConfigurationError,
    ExitCode,
    FoundWrongError,
    LockedError,
    MixedError,
    OpsctlError,
    PausedError,
    RefusedError,
    RolledBackError,
    UsageError,
)

HOST_PROGRAM = "/opt/opsctl/agent/bin/opsctl-host"
TIMEOUT_S = 60.0
KINDS: dict[int, type[OpsctlError]] = {int(kind.exit_code): kind for kind in (
    UsageError, ConfigurationError, LockedError, RefusedError, RolledBackError, MixedError, PausedError,
    FoundWrongError)}


class Channel(Protocol):
    """What is used of a ``Session``."""

    def run(self, argv: Sequence[str], *, sudo: bool = True, timeout_s: float = 30.0, stdin: bytes = b"") -> Completed:
        ...

    def send(self, argv: Sequence[str], chunks: Iterable[bytes], *, sudo: bool = True, timeout_s: float = 30.0
             ) -> Completed: ...


def has_agent(channel: Channel) -> bool:
    """Whether the host was provisioned before. Asked without sudo: the first provision may be what brings it."""
    return channel.run(["test", "-x", HOST_PROGRAM], sudo=False).returncode == 0


def ask(channel: Channel, verb: Sequence[str], *, host: str, stdin: bytes = b"", timeout_s: float = TIMEOUT_S
        ) -> dict[str, Any]:
    """Runs one verb of ``opsctl-host``.

    Raises:
        OpsctlError: of the kind and with the code, hint and log lines that the host gave; names the host.
    """
    return interpret(channel.run([HOST_PROGRAM, *verb], timeout_s=timeout_s, stdin=stdin), verb[0], host)


def send(channel: Channel, verb: Sequence[str], chunks: Iterable[bytes], *, host: str, timeout_s: float
         ) -> dict[str, Any]:
    """As ``ask``, with ``chunks`` on standard input."""
    return interpret(channel.send([HOST_PROGRAM, *verb], chunks, timeout_s=timeout_s), verb[0], host)


def interpret(completed: Completed, verb: str, host: str) -> dict[str, Any]:
    """The document on stdout. Pure."""
    try:
        document = json.loads(completed.stdout)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise OpsctlError("host.no_answer", f"{host}: opsctl-host {verb} ended with {completed.returncode}, no answer.",
                          hint="opsctl provision brings the agent this opsctl knows",
                          log_tail=completed.stderr.splitlines()[-10:])
    if "error" in document and completed.returncode:
        raise error_of(document["error"], int(document.get("exit_code", completed.returncode)), host)
    if completed.returncode:
        raise OpsctlError("host.no_answer", f"{host}: opsctl-host {verb} ended with {completed.returncode}.",
                          hint="opsctl provision brings the agent this opsctl knows",
                          log_tail=completed.stderr.splitlines()[-10:])
    return document


def error_of(error: Mapping[str, Any], exit_code: int, host: str = "") -> OpsctlError:
    """An error document as an exception of the same kind; ``host`` is put before its sentence, if it is given."""
    kind = KINDS.get(exit_code, OpsctlError)
    sentence = str(error.get("message", ""))
    found = kind(str(error.get("code", "host.error")), f"{host}: {sentence}" if host else sentence,
                 hint=str(error.get("hint", "")), log_tail=tuple(map(str, error.get("log_tail", ()))))
    if kind is OpsctlError:
        found.exit_code = ExitCode.UNEXPECTED
    return found


def unreachable(silent: Mapping[str, OpsctlError]) -> RefusedError:
    """One refusal for hosts that do not answer, naming the ways on."""
    names = sorted(silent)
    return RefusedError(
        "host.unreachable", f"{', '.join(names)} {'does' if len(names) == 1 else 'do'} not answer over SSH; "
        "nothing was changed.",
        hint=f"leave out: opsctl hold {names[0]}, --limit '!{names[0]}' or --skip-unreachable {len(names)}; "
        f"look: ssh -F .opsctl/ssh_config {names[0]}",
        log_tail=tuple(error.message for error in silent.values()),
    )
