"""What the verbs of ``opsctl-host`` share: pieces of the parser, jobs that are watched, errors of the system."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from opsctl.agent import job
from opsctl.agent.manifest import FOLDER, SERVICE
from opsctl.agent.paths import Paths
from opsctl.errors import ExitCode, OpsctlError

FOR_EVER_S = 7 * 24 * 3600.0

Arguments = argparse.Namespace
Act = Callable[[Paths, Arguments], dict[str, Any]]


class AddVerb(Protocol):
    """Adds one verb. ``acts``: it changes the host and needs root; ``audited``: an operator's act, to the journal."""

    def __call__(self, name: str, act: Act, about: str, *, acts: bool = True, audited: bool = True
                 ) -> argparse.ArgumentParser: ...


def service(text: str) -> str:
    if not SERVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a service")
    return text


def folder(text: str) -> str:
    if not FOLDER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not VERSION-DIGEST12")
    return text


def release_of(parser: argparse.ArgumentParser) -> None:
    """``--service`` and ``--release``."""
    parser.add_argument("--service", required=True, type=service)
    parser.add_argument("--release", required=True, type=folder, metavar="VERSION-DIGEST12")


def waiting(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument("--wait-s", type=float, default=default, metavar="SECONDS",
                        help="how long to watch; the work goes on when nobody watches")


def watch(paths: Paths, name: str, verb: Sequence[str] | None, wait_s: float, *, raising: bool = True
           ) -> dict[str, Any]:
    """Waits for a job; progress as NDJSON on stderr, so that stdout stays one document."""
    status = job.wait(paths, name, verb, wait_s, lambda now: _progress(now) if raising and wait_s > 0 else None)
    if raising and status["state"] == "failed":
        raise error_from(status["error"])
    return status


def _progress(status: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps({key: status.get(key) for key in ("job", "state", "phase", "done", "total")}) + "\n")
    sys.stderr.flush()


def error_from(document: dict[str, Any]) -> OpsctlError:
    """The error that a worker wrote down, with its exit code."""
    error = OpsctlError(document["code"], document["message"], hint=document["hint"], log_tail=document["log_tail"])
    error.exit_code = ExitCode(document["exit_code"])
    return error


def work(name: str, verb: Sequence[str], paths: Paths, work: Callable[[job.Reporter], dict[str, Any]]
          ) -> dict[str, Any]:
    """Runs inside the job's unit: every end is written down."""
    reporter = job.Reporter(paths, name, verb)
    try:
        result = work(reporter)
    except OpsctlError as error:
        reporter.failed(error)
        raise
    except OSError as error:
        reporter.failed(system_error(error, name))
        raise
    except Exception as error:
        reporter.failed(OpsctlError("unexpected", f"unexpected {type(error).__name__}: {error}",
                                    hint=f"journalctl -u {name}"))
        raise
    reporter.finished(result)
    return result


def system_error(error: OSError, verb: str) -> OpsctlError:
    """A full disk, a missing right, a broken disk: what the kernel said, and of which file."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OpsctlError("host.disk_full", f"opsctl-host {verb}: no space is left{where}.",
                           hint="df -h /srv /opt /var; the same command again goes on where this one stopped")
    return OpsctlError("host.system", f"opsctl-host {verb}: {error.strerror or error}{where}.",
                       hint="dmesg and systemctl status on the host say whether a disk is ill")
