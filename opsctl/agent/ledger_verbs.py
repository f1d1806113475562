"""The verbs of the ledger."""

from __future__ import annotations

import os
from typing import Any

from opsctl.agent import audit, gateway
from opsctl.agent.paths import Paths
from opsctl.agent.verbs import AddVerb, Arguments, service


def register(verb: AddVerb) -> None:
    verb("ledger-show", _show, "gateway: the ledger of a service", acts=False).add_argument(
        "--service", required=True, type=service)
    one = verb("ledger-append", _append, "gateway: say which release the fleet should serve")
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--version", required=True)
    one.add_argument("--digest", required=True, metavar="SHA256")
    one.add_argument("--after", required=True, type=int, metavar="N", help="lines that the writer has seen")
    for name in ("by", "run", "note"):
        one.add_argument(f"--{name}", default="")


def _show(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.show_ledger(paths, arguments.service)


def _append(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.append_ledger(paths, arguments.service, arguments.version, arguments.digest, after=arguments.after,
                                 by=arguments.by or audit.operator(os.environ), run=arguments.run, note=arguments.note)
