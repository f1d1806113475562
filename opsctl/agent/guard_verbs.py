"""The verbs of the guard: how it stands, whether it may act, a latch that is lifted.

Orders are one file, ``/var/lib/opsctl/guard-orders.json``, which the guard reads; they outlive boots.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from opsctl.agent import guard_view
from opsctl.agent.audit import operator
from opsctl.agent.drains import boot_clock
from opsctl.agent.durable import locked, write_atomically
from opsctl.agent.guard.model import Policy
from opsctl.agent.guard.policy import read_policy
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placement
from opsctl.agent.verbs import AddVerb, Arguments
from opsctl.errors import ConfigurationError

Clock = Callable[[], float]


def register(verb: AddVerb) -> None:
    one = verb("guard", _guard, "how the guard stands: GPUs, instances, rungs and why", acts=False)
    one.add_argument("--policy", action="store_true", help="and the numbers that it goes by")
    one = verb("guard-mode", _mode, "whether the guard may change clocks and stop instances; weights always act")
    one.add_argument("mode", choices=guard_view.MODES, help="auto: observe on the first day, then enforce")
    one.add_argument("--by", default="", help="who wants it; default: whoever calls")
    one = verb("guard-unlatch", _unlatch, "let an instance climb again that the guard keeps down because it flapped")
    one.add_argument("instance")
    one.add_argument("--by", default="", help="who wants it; default: whoever calls")


def set_mode(paths: Paths, mode: str, by: str, clock: Clock = time.time) -> dict[str, Any]:
    """Orders a mode; ``changed`` is False when it was ordered already."""
    with locked(paths.guard_orders.with_name(".guard-orders.lock")):
        before = guard_view.orders(paths)
        if before["mode"] != mode:
            _write(paths, {**before, "mode": mode, "by": by, "at": clock()})
    return {"changed": before["mode"] != mode, "mode": mode, "before": before["mode"]}


def unlatch(paths: Paths, instance: str, by: str, clock: Clock = time.time) -> dict[str, Any]:
    """Orders that ``instance`` may climb again from now on. One order an instance: the last counts.

    Raises:
        ConfigurationError: it is not placed here.
    """
    name = read_placement(paths, instance).instance
    with locked(paths.guard_orders.with_name(".guard-orders.lock")):
        before = guard_view.orders(paths)
        _write(paths, {**before, "unlatch": {**before["unlatch"], name: clock()}, "by": by, "at": clock()})
    return {"changed": True, "instance": name}


def _write(paths: Paths, orders: dict[str, Any]) -> None:
    write_atomically(paths.guard_orders, json.dumps(orders) + "\n")


def _guard(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    found = guard_view.answer(paths, boot_clock())
    return {**found, **_policy(paths)} if arguments.policy else found


def _policy(paths: Paths) -> dict[str, Any]:
    """A file that is wrong counts for nothing, and is told."""
    try:
        return {"policy": asdict(read_policy(paths.guard_policy)), "policy_words": ""}
    except ConfigurationError as error:
        return {"policy": asdict(Policy()), "policy_words": error.message}


def _mode(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return set_mode(paths, arguments.mode, arguments.by or operator(os.environ))


def _unlatch(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return unlatch(paths, arguments.instance, arguments.by or operator(os.environ))
