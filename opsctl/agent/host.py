"""``opsctl-host``: the verbs of one host, for whoever calls over SSH. One JSON document on stdout, also for an error.

Here: ``state`` and how a gateway takes releases in. The others stand in files of their own: ``stage_verbs.py``,
``cutover_verbs.py``, ``traffic_verbs.py``, ``ledger_verbs.py``, ``lock_verbs.py``, ``guard_verbs.py``;
``opsctl-host --help`` lists all. Exit codes are those of ``opsctl`` itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from opsctl.agent import (
    audit,
    cutover_verbs,
    gateway,
    guard_verbs,
    leaving,
    ledger_verbs,
    lock_verbs,
    stage_verbs,
    traffic_verbs,
)
from opsctl.agent.paths import Paths
from opsctl.agent.state import agent_version, state
from opsctl.agent.verbs import Act, Arguments, release_of, service, system_error
from opsctl.errors import ExitCode, OpsctlError, RefusedError


def main(argv: Sequence[str] | None = None) -> int:
    """The ``opsctl-host`` command."""
    arguments = _parser().parse_args(argv)
    os.umask(0o022)
    try:
        if arguments.acts and os.geteuid() != 0:
            raise RefusedError("host.needs_root", f"opsctl-host {arguments.verb} needs root.",
                               hint=f"sudo opsctl-host {arguments.verb} ...")
        if arguments.audited:
            what = {key: value for key, value in vars(arguments).items() if key not in NOT_AUDITED}
            audit.record(arguments.verb, what)
        _print(arguments.act(Paths(), arguments))
    except OpsctlError as error:
        return _failed(error)
    except OSError as error:
        return _failed(system_error(error, arguments.verb))
    except Exception as error:  # noqa: BLE001 - whoever called reads one document, whatever happened here
        traceback.print_exc()  # to stderr: a job's lands in the journal
        return _failed(OpsctlError("unexpected", f"opsctl-host {arguments.verb}: unexpected {type(error).__name__}: "
                                   f"{error}.", hint="the same verb by hand on that host prints where"))
    return int(ExitCode.DONE)


def _failed(error: OpsctlError) -> int:
    _print({"error": error.as_document(), "exit_code": int(error.exit_code)})
    sys.stderr.write(f"{error.message} [{error.code}] {error.hint}\n")
    return int(error.exit_code)


NOT_AUDITED = frozenset({"act", "acts", "audited", "verb", "json", "token"})


def _state(paths: Paths, _: Arguments) -> dict[str, Any]:
    return state(paths)


def _begin(paths: Paths, _: Arguments) -> dict[str, Any]:
    return gateway.begin(paths, sys.stdin.buffer.read())


def _receive(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.receive(paths, arguments.service, arguments.release, arguments.path, arguments.offset,
                           sys.stdin.buffer)


def _accept(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.accept(paths, arguments.service, arguments.release)


def _releases(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.releases(paths, arguments.service)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opsctl-host", description="The verbs of one host of an opsctl fleet.")
    parser.add_argument("--version", action="version", version=f"opsctl-agent {agent_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, act: Act, about: str, *, acts: bool = True,
             audited: bool = True) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=about, description=about)
        one.set_defaults(act=act, acts=acts, audited=acts and audited)
        return one

    looked = verb("state", _state, "everything about this host", acts=False)
    looked.add_argument("--json", action="store_true", help="the answer always is JSON")
    verb("release-begin", _begin, "gateway: take a manifest and signature on stdin; say which files are missing")
    one = verb("receive", _receive, "gateway: append stdin to a file of a release on its way", audited=False)
    release_of(one)
    one.add_argument("--path", required=True)
    one.add_argument("--offset", required=True, type=int, metavar="BYTES")
    release_of(verb("release-accept", _accept, "gateway: check everything and give the release its name"))
    verb("releases", _releases, "gateway: the releases of a service", acts=False).add_argument(
        "--service", required=True, type=service)
    stage_verbs.register(verb)
    cutover_verbs.register(verb)
    ledger_verbs.register(verb)
    traffic_verbs.register(verb)
    lock_verbs.register(verb)
    guard_verbs.register(verb)
    leaving.register(verb)
    return parser


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
