"""The verbs of locks, holds, journals of runs, and of what keeps a host busy."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from opsctl.agent import busy, holds, locks, runs
from opsctl.agent.paths import Paths
from opsctl.agent.verbs import AddVerb, Arguments
from opsctl.errors import UsageError

LONGEST_HOLD_S = 10 * 366 * 24 * 3600.0


def register(verb: AddVerb) -> None:
    one = _named(verb("lock-take", _take, "take a lock for the holder on stdin (JSON), if nobody alive has it"))
    one.add_argument("--over", type=_run, metavar="RUN", help="also from this run, if it has it")
    one = _named(verb("lock-renew", _renew, "the heartbeat of a lock's holder", audited=False))
    one.add_argument("--token", required=True)
    one = _named(verb("lock-drop", _drop, "give a lock back"))
    one.add_argument("--token", required=True)
    one = _named(verb("lock-break", _break, "take a lock from whoever holds it for a run"))
    one.add_argument("--run", required=True, type=_run)
    verb("locks", _locks, "who has the locks of this host", acts=False)
    one = verb("hold-put", _hold, "leave a host alone, until then or until the hold is removed")
    one.add_argument("--host", required=True, type=_host)
    one.add_argument("--by", required=True)
    one.add_argument("--message", required=True)
    one.add_argument("--for-s", type=_seconds, metavar="SECONDS", help="ends by itself then, by the wall clock")
    verb("hold-remove", _release, "end the hold of a host").add_argument("--host", required=True, type=_host)
    verb("holds", _holds, "hosts that are held, as far as this one knows", acts=False)
    one = verb("run-append", _append, "gateway: add lines on stdin (JSON lines) to the journal of a run", audited=False)
    one.add_argument("--run", required=True, type=_run)
    one.add_argument("--from", required=True, type=_count, dest="first", metavar="N",
                     help="which line the first is, counted from 0; those that are there already are left out")
    verb("run-show", _show, "gateway: the journal of a run", audited=False).add_argument(
        "--run", required=True, type=_run)
    verb("runs", _runs, "gateway: the runs, newest first", audited=False).add_argument("--limit", type=_count)
    verb("busy", _busy, "what works here already: dpkg, modules of Ansible's, opsctl's own jobs", audited=False)


def _named(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--name", required=True, type=_lock, help="host, or service-SERVICE")
    return parser


def _lock(text: str) -> str:
    if not locks.NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither host nor service-SERVICE")
    return text


def _run(text: str) -> str:
    if not locks.RUN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a run")
    return text


def _host(text: str) -> str:
    try:
        return holds.check_host(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= LONGEST_HOLD_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most {LONGEST_HOLD_S:.0f}, ten years")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")
    return int(text)


def _take(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    try:
        holder = json.loads(sys.stdin.buffer.read())
    except ValueError:
        raise UsageError("lock.bad_holder", "lock-take wants a holder on stdin, as JSON.") from None
    return locks.take(paths, arguments.name, holder, arguments.over or "")


def _renew(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return locks.renew(paths, arguments.name, arguments.token)


def _drop(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return locks.drop(paths, arguments.name, arguments.token)


def _break(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return locks.break_(paths, arguments.name, arguments.run)


def _locks(paths: Paths, _: Arguments) -> dict[str, Any]:
    return {"locks": locks.all_locks(paths)}


def _hold(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return {"changed": holds.put(paths, arguments.host, arguments.by, arguments.message, arguments.for_s)}


def _release(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return {"changed": holds.remove(paths, arguments.host)}


def _holds(paths: Paths, _: Arguments) -> dict[str, Any]:
    return {"holds": holds.all_holds(paths)}


def _append(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return {"lines": runs.append(paths, arguments.run, arguments.first, sys.stdin.buffer.read())}


def _show(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return {"run": arguments.run, "lines": runs.show(paths, arguments.run)}


def _runs(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return {"runs": runs.all_runs(paths, arguments.limit)}


def _busy(paths: Paths, _: Arguments) -> dict[str, Any]:
    return {"busy": busy.busy(paths)}
