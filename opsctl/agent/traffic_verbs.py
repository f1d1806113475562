"""The verbs of traffic: who gets requests, who has some in flight."""

from __future__ import annotations

from typing import Any

from opsctl.agent import balancer
from opsctl.agent.paths import Paths
from opsctl.agent.verbs import AddVerb, Arguments, waiting


def register(verb: AddVerb) -> None:
    one = verb("balancer", _balancer, "load balancer: its servers, as it sees them", acts=False)
    one.add_argument("--wanted", action="append", default=[], metavar="SERVER", help="wait until it gets requests")
    waiting(one, 0)


def _balancer(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return balancer.look(paths.balancer_socket, arguments.wanted, arguments.wait_s)
