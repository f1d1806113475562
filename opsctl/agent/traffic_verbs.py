"""The verbs of traffic: who gets requests, who has some in flight."""

from __future__ import annotations

import argparse
import os
from typing import Any

from opsctl.agent import balancer, drains, locks
from opsctl.agent.audit import operator
from opsctl.agent.idle import wait_until_idle
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placement
from opsctl.agent.verbs import AddVerb, Arguments, waiting
from opsctl.errors import UsageError


def register(verb: AddVerb) -> None:
    one = verb("drain", _drain, "send an instance less, for one owner; the least weight of all owners counts")
    _owned(one)
    one.add_argument("--weight", type=_weight, default=0, metavar="PERCENT", help="0, the default: nothing new")
    one.add_argument("--reason", default="")
    one.add_argument("--for-s", type=_seconds, metavar="SECONDS", help="ends by itself then, or with this boot")
    _owned(verb("undrain", _undrain, "take one owner's drain of an instance away, and no other"))
    one = verb("idle", _idle, "wait until an instance's engine has nothing running or waiting", acts=False)
    one.add_argument("instance")
    waiting(one, 0)
    one = verb("balancer", _balancer, "load balancer: its servers, as it sees them", acts=False)
    one.add_argument("--wanted", action="append", default=[], metavar="SERVER", help="wait until it gets requests")
    one.add_argument("--drained", action="append", default=[], metavar="SERVER",
                     help="wait until it has none and gets no more")
    waiting(one, 0)
    for word, about in (("drain", "take a server out by the load balancer itself, past its agent"),
                        ("ready", "end what balancer-drain did")):
        one = verb(f"balancer-{word}", _set_state, f"load balancer: {about}")
        one.add_argument("server")
        one.set_defaults(word=word)


def _owned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("instance")
    parser.add_argument("--owner", required=True, type=_owner, help="operator:NAME, run:RUN or guard")


def _owner(text: str) -> str:
    try:
        return drains.check_owner(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{error.message} {error.hint}") from None


def _weight(text: str) -> int:
    if not text.isdigit() or not 0 <= int(text) < drains.FULL:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and {drains.FULL - 1}")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def _drain(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    instance = read_placement(paths, arguments.instance).instance
    with locks.fenced(paths, arguments.owner):
        changed = drains.put(paths, instance, arguments.owner, arguments.weight, arguments.reason,
                             operator(os.environ), arguments.for_s)
    return _drained(paths, instance, changed)


def _undrain(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    instance = read_placement(paths, arguments.instance).instance
    return _drained(paths, instance, drains.remove(paths, instance, arguments.owner))


def _drained(paths: Paths, instance: str, changed: bool) -> dict[str, Any]:
    found = drains.read_drains(paths, instance)
    return {"changed": changed, "instance": instance, "weight": drains.least_weight(found), "drains": found}


def _idle(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return wait_until_idle(paths, read_placement(paths, arguments.instance), arguments.wait_s)


def _balancer(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return balancer.look(paths.balancer_socket, paths.balancer_master, arguments.wanted, arguments.drained,
                         arguments.wait_s)


def _set_state(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return balancer.set_state(paths.balancer_socket, arguments.server, arguments.word)
