"""What checks are made of: what a host said, what the inventory wants of it, and what is to be said of both. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from opsctl.stack.fit import Source

Verdict = Literal["pass", "warn", "fix", "skip"]
# host: every host; gpu: hosts that have GPUs or are to have; driver: as gpu, and only where a driver is loaded
Scope = Literal["host", "gpu", "driver"]
VERDICTS: tuple[Verdict, ...] = ("fix", "warn", "skip", "pass")  # the worst first


@dataclass(frozen=True)
class Judged:
    """The end of one check. ``fix``: what to type, for ``warn`` and ``fix`` alone; ``stops``: see ``Finding``."""

    verdict: Verdict
    what: str
    fix: str = ""
    stops: bool = False


@dataclass(frozen=True)
class Finding:
    """One check of one host. ``stops_provision``: a provision of this host would certainly break or be refused."""

    id: str
    title: str
    verdict: Verdict
    what: str
    fix: str = ""
    stops_provision: bool = False


@dataclass(frozen=True)
class Wanted:
    """What the fleet wants of a host. Empty: the inventory says nothing of it.

    ``release_bytes``: the largest release, summed over the services of the host; ``least_release_bytes``: the smallest,
    which a first provision brings at the least; 0: not known. ``gateway``: the URL of
    the bundle, empty with ``package_source=upstream`` and on the gateway itself.
    """

    host: str
    groups: tuple[str, ...] = ()
    package_source: Literal["gateway", "upstream"] = "gateway"
    gateway: str = ""
    driver: str = ""
    flavour: str = ""
    gpu_model: str = ""
    fabric_manager: str = "auto"
    gpu_uuids: tuple[str, ...] = ()
    release_bytes: int = 0
    least_release_bytes: int = 0
    driver_source: Source = "vendor"


@dataclass(frozen=True)
class Captured:
    """The probe's document, and how long commands over SSH took.

    ``command_s``: seconds each; empty where there is no SSH, None where nobody timed any.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    command_s: tuple[float, ...] | None = ()

    def out(self, name: str) -> str:
        """What a program printed; empty when it was not run."""
        return str(self._command(name).get("out", ""))

    def exit(self, name: str) -> int | None:
        """Its exit status; 127: there is no such program; None: it ran past its deadline."""
        status = self._command(name).get("exit", 127)
        return None if status is None else int(status)

    def asked(self, name: str) -> bool:
        """Whether the program was asked for at all."""
        return name in self.document.get("commands", {})

    def file(self, path: str) -> str | None:
        """The text of a file; None when it could not be read."""
        text = self.document.get("files", {}).get(path)
        return None if text is None else str(text)

    def rows(self, name: str) -> list[Mapping[str, Any]]:
        """A list of the document: ``pci``, ``disks``, ``locks``, ``listeners``, ``gpu_users``."""
        return list(self.document.get(name, ()))

    @property
    def as_root(self) -> bool:
        """Whether root asked, who alone sees all processes and locks."""
        return bool(self.document.get("root"))

    def _command(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.document.get("commands", {}).get(name, {})
        return found


@dataclass(frozen=True)
class Check:
    """``id`` is stable; ``title`` says what is looked at."""

    id: str
    title: str
    scope: Scope
    judge: Callable[[Captured, Wanted], Judged]


def good(what: str) -> Judged:
    return Judged("pass", what)


def warn(what: str, command: str) -> Judged:
    """It works, and will hurt."""
    return Judged("warn", what, command)


def fix(what: str, command: str, *, stops: bool = False) -> Judged:
    """Something cannot work."""
    return Judged("fix", what, command, stops)


def skip(why: str) -> Judged:
    """Nothing can be said, and why: never a guess."""
    return Judged("skip", why)


def on(wanted: Wanted, *argv: str) -> str:
    """The command line that runs ``argv`` on the host, for people to type."""
    return shlex.join(["opsctl", "exec", "--limit", wanted.host, "--", *argv])


def shell(wanted: Wanted, text: str) -> str:
    """As ``on``, for what needs a shell there."""
    return on(wanted, "sh", "-c", text)


def provision(wanted: Wanted) -> str:
    return f"opsctl provision --limit {wanted.host}"


def some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(text: str) -> str:
    return next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
