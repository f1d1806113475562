"""One error tree: a stable code, one sentence for a person, a hint, an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every verb; the table in README.md is checked against this one."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    CONFIGURATION = 3
    LOCKED = 4
    REFUSED = 5
    ROLLED_BACK = 6
    MIXED = 7
    PAUSED = 8
    FOUND_WRONG = 9
    PENDING = 10
    INTERRUPTED = 130


class OpsctlError(Exception):
    """An error that a person is told about.

    ``code`` is stable and greppable (``inventory.float_version``), ``message`` is one sentence that names the
    file, key and value at fault, ``hint`` is what to run or write next, ``log_tail`` the failing thing's last lines.
    """

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, code: str, message: str, *, hint: str = "", log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.log_tail = tuple(log_tail)

    def as_document(self) -> dict[str, object]:
        """The error as it stands in a ``--json`` document."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "log_tail": list(self.log_tail)}


class UsageError(OpsctlError):
    exit_code = ExitCode.USAGE


class ConfigurationError(OpsctlError):
    """The inventory, services.yml or another file of the operator's is wrong."""

    exit_code = ExitCode.CONFIGURATION


class LockedError(OpsctlError):
    exit_code = ExitCode.LOCKED


class RefusedError(OpsctlError):
    """A check said no before anything was changed."""

    exit_code = ExitCode.REFUSED


class RolledBackError(OpsctlError):
    exit_code = ExitCode.ROLLED_BACK


class MixedError(OpsctlError):
    """Something failed half way: the fleet is mixed and a person is needed."""

    exit_code = ExitCode.MIXED


class PausedError(OpsctlError):
    exit_code = ExitCode.PAUSED


class FoundWrongError(OpsctlError):
    """A read-only verb found something wrong."""

    exit_code = ExitCode.FOUND_WRONG
