"""The verbs of cutovers. A first start is a cutover from nothing; both are the job of one unit for each instance."""

from __future__ import annotations

import argparse
from typing import Any

from opsctl.agent import audit, cutover, drains, job, locks
from opsctl.agent.cutover import MIN_SPEED_PERCENT, Order, Tools
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placement
from opsctl.agent.verbs import FOR_EVER_S, AddVerb, Arguments, folder, waiting, watch, work
from opsctl.errors import LockedError, MixedError, OpsctlError, RefusedError, UsageError

NONE = "none"


def register(verb: AddVerb) -> None:
    one = verb("cutover", _cutover, "move an instance to another release, as a unit of its own; watch it")
    _ordered(one)
    waiting(one, FOR_EVER_S)
    one = verb("first-start", _cutover, "start an instance that has never served, as a unit of its own; watch it")
    one.add_argument("instance")
    _release(one, required=True)
    one.set_defaults(from_release=NONE, owner="", min_speed_percent=MIN_SPEED_PERCENT)
    waiting(one, FOR_EVER_S)
    for name in ("cutover", "first-start"):
        one = verb(f"{name}-status", _status, f"how far a {name.replace('-', ' ')} is", acts=False)
        one.add_argument("instance")
        _release(one, help="exit 4 when it is to another release")
        waiting(one, 0)
    _ordered(verb("work-cutover", _work, "what the unit of cutover runs", audited=False))
    one = verb("work-undo", _undo, "undo the cutover of a worker that is gone; its unit runs this at its end",
               audited=False)
    one.add_argument("instance")
    _owner(one)
    one = verb("accept", _accept, "start what an instance served, unless it is well, and ask it the gate's questions")
    one.add_argument("instance")
    verb("recover", _recover, "undo cutovers that a power cut left half done; runs at boot", audited=False)


def _ordered(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instance")
    _release(parser, required=True)
    parser.add_argument("--from", required=True, type=_from, dest="from_release", metavar="VERSION-DIGEST12|none",
                        help="what it serves now; none: it has never served")
    _owner(parser)
    parser.add_argument("--min-speed-percent", type=_percent, default=MIN_SPEED_PERCENT, metavar="PERCENT",
                        help="tokens per second, of the release before; 0: any speed will do")


def _release(parser: argparse.ArgumentParser, *, required: bool = False, help: str | None = None) -> None:
    parser.add_argument("--release", required=required, type=folder, metavar="VERSION-DIGEST12", help=help)


def _owner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner", type=_drain_owner, default="", help="whose drain of the instance ends with this")


def _from(text: str) -> str:
    return text if text == NONE else folder(text)


def _drain_owner(text: str) -> str:
    try:
        return drains.check_owner(text) if text else ""
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.message} {error.hint}") from None


def _percent(text: str) -> int:
    if not text.isdigit() or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1000")
    return int(text)


def _cutover(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    """``joined``: it ran already, for another owner maybe. Its record keeps traffic away, so our drain ends now.

    A run that lost this host to another one begins nothing; what it had begun goes on by itself.
    """
    order = _order(arguments)
    read_placement(paths, order.instance)
    name, verb = _job(order)
    undo = ["work-undo", order.instance, *_owned(order.owner)]
    with locks.fenced(paths, order.owner):
        joined = not job.start(paths, name, verb, besides=_besides(order), properties=job.undone_by(
            undo, cutover.undo_timeout_s(paths, order.instance, order.from_release)))
    if joined and order.owner and order.owner not in job.last_word(paths, name)["verb"]:
        drains.remove(paths, order.instance, order.owner)
    return {**watch(paths, name, verb, arguments.wait_s), "joined": joined}


def _status(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    verb = ["work-cutover", arguments.instance, "--release", arguments.release] if arguments.release else None
    return watch(paths, cutover.job_name(arguments.instance), verb, arguments.wait_s, raising=False)


def _work(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    order = _order(arguments)
    name, verb = _job(order)
    return work(name, [*verb, *_besides(order)], paths,
                lambda reporter: cutover.cutover(paths, order, Tools(doing=reporter.doing)))


def _undo(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    """Nothing to do after a worker that came to its end; what it undoes, it says instead of the worker."""
    name = cutover.job_name(arguments.instance)
    word = job.last_word(paths, name)
    try:
        record, trouble = cutover.undo_left(paths, arguments.instance, arguments.owner, Tools())
    except LockedError:
        raise
    except OpsctlError as error:
        job.close(paths, name, MixedError("cutover.not_undone", f"{arguments.instance}: the worker of its cutover is "
                                          f"gone, and it cannot be brought back: {error.message}", hint=error.hint))
        raise
    if record is not None and record.touched:
        job.close(paths, name, cutover.failure(record, cutover.killed(word), trouble, cutover.last_words(record)))
    elif word["state"] == "running":
        job.close(paths, name, RefusedError("cutover.killed", f"{arguments.instance}: the worker of its cutover was "
                                            "killed before it changed anything.", hint="the same command again"))
    return {"changed": record is not None, "instance": arguments.instance}


def _accept(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return cutover.accept(paths, read_placement(paths, arguments.instance).instance, Tools())


def _recover(paths: Paths, _: Arguments) -> dict[str, Any]:
    done = cutover.recover(paths)
    if done["changed"]:
        audit.record("recover", done)
    return done


def _order(arguments: Arguments) -> Order:
    before = "" if arguments.from_release == NONE else arguments.from_release
    return Order(arguments.instance, arguments.release, before, arguments.owner, arguments.min_speed_percent)


def _job(order: Order) -> tuple[str, list[str]]:
    """The job's name, one for each instance, and what it is: whoever orders the same move joins it."""
    return cutover.job_name(order.instance), [
        "work-cutover", order.instance, "--release", order.release, "--from", order.from_release or NONE]


def _besides(order: Order) -> list[str]:
    """What the worker is told of whoever was first."""
    return [*_owned(order.owner), "--min-speed-percent", str(order.min_speed_percent)]


def _owned(owner: str) -> list[str]:
    return ["--owner", owner] if owner else []
