"""The verbs of the ledger, and of what it names on the gateway."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from opsctl.agent import audit, gateway, ledger
from opsctl.agent.paths import Paths
from opsctl.agent.verbs import AddVerb, Arguments, release_of, service
from opsctl.errors import UsageError

COPY = "this host's copy of it, not the gateway's"


def register(verb: AddVerb) -> None:
    one = verb("ledger-show", _show, "the ledger of a service", acts=False)
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--copy", action="store_true", help=COPY)
    one = verb("ledger-append", _append, "gateway: say which release the fleet should serve, or that one is bad")
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--version", required=True)
    one.add_argument("--digest", required=True, metavar="SHA256")
    one.add_argument("--after", required=True, type=int, metavar="N", help="lines that the writer has seen")
    one.add_argument("--action", choices=ledger.ACTIONS, default=ledger.SERVE)
    for name in ("by", "run", "note"):
        one.add_argument(f"--{name}", default="")
    one = verb("ledger-extend", _extend, "gateway: append the lines on stdin (JSON lines), all of them or none")
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--after", required=True, type=int, metavar="N", help="lines that the writer has seen")
    one = verb("ledger-put", _put, "take a whole ledger on stdin that begins with what is here")
    one.add_argument("--service", required=True, type=service)
    one.add_argument("--copy", action="store_true", help=COPY)
    release_of(verb("release-manifest", _manifest, "gateway: manifest and signature of a release", acts=False))


def _show(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.show_ledger(paths, arguments.service, copy=arguments.copy)


def _append(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.append_ledger(paths, arguments.service, arguments.version, arguments.digest, after=arguments.after,
                                 by=arguments.by or audit.operator(os.environ), run=arguments.run, note=arguments.note,
                                 action=arguments.action)


def _extend(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    """Numbers and dates on stdin are not taken; a line without ``by`` is of whoever calls."""
    try:
        given = [json.loads(text) for text in sys.stdin.buffer.read().splitlines()]
        lines = [ledger.line_of({**one, "number": 0, "at": "", "by": one.get("by") or audit.operator(os.environ)})
                 for one in given]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError("ledger.bad_input", "ledger-extend wants a JSON object with version and digest in each line."
                         ) from None
    return gateway.extend_ledger(paths, arguments.service, lines, after=arguments.after)


def _put(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.put_ledger(paths, arguments.service, sys.stdin.buffer.read(), copy=arguments.copy)


def _manifest(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.manifest(paths, arguments.service, arguments.release)
