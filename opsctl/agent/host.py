"""``opsctl-host``: the verbs of one host, for whoever calls over SSH. One JSON document on stdout, also for an error.

Verbs that only look: ``state``, ``balancer``, ``stage-status``, ``first-start-status``, ``releases``, ``ledger-show``.
On hosts: ``stage``, ``first-start``, ``recover``. On the gateway: ``release-begin``, ``receive``, ``release-accept``,
``ledger-append``.
Exit codes are those of ``opsctl`` itself.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from opsctl.agent import audit, balancer, first_start, gateway, job, stage
from opsctl.agent.manifest import FOLDER, SERVICE
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_settings
from opsctl.agent.state import agent_version, state
from opsctl.errors import ExitCode, OpsctlError, RefusedError

FOR_EVER_S = 7 * 24 * 3600.0

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """The ``opsctl-host`` command."""
    arguments = _parser().parse_args(argv)
    os.umask(0o022)
    try:
        if arguments.acts and os.geteuid() != 0:
            raise RefusedError("host.needs_root", f"opsctl-host {arguments.verb} changes this host and needs root.",
                               hint=f"sudo opsctl-host {arguments.verb} ...")
        if arguments.audited:
            what = {key: value for key, value in vars(arguments).items() if key not in NOT_AUDITED}
            audit.record(arguments.verb, what)
        _print(arguments.act(Paths(), arguments))
    except OpsctlError as error:
        return _failed(error)
    except OSError as error:
        return _failed(_of_system(error, arguments.verb))
    except Exception as error:  # noqa: BLE001 - whoever called reads one document, whatever happened here
        traceback.print_exc()  # to stderr: a job's lands in the journal
        return _failed(OpsctlError("unexpected", f"opsctl-host {arguments.verb}: unexpected {type(error).__name__}: "
                                   f"{error}.", hint="the same verb by hand on that host prints where"))
    return int(ExitCode.DONE)


def _failed(error: OpsctlError) -> int:
    _print({"error": error.as_document(), "exit_code": int(error.exit_code)})
    sys.stderr.write(f"{error.message} [{error.code}] {error.hint}\n")
    return int(error.exit_code)


def _of_system(error: OSError, verb: str) -> OpsctlError:
    """A full disk, a missing right, a broken disk: what the kernel said, and of which file."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OpsctlError("host.disk_full", f"opsctl-host {verb}: no space is left{where}.",
                           hint="df -h /srv /opt /var; the same command again goes on where this one stopped")
    return OpsctlError("host.system", f"opsctl-host {verb}: {error.strerror or error}{where}.",
                       hint="dmesg and systemctl status on the host say whether a disk is ill")


NOT_AUDITED = frozenset({"act", "acts", "audited", "verb", "json"})


def _state(paths: Paths, _: Arguments) -> dict[str, Any]:
    return state(paths)


def _stage(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    read_settings(paths)
    name, verb = _stage_job(arguments)
    if stage.is_staged(paths, arguments.service, arguments.release):
        return {"state": "done", "result": {"changed": False, "release": arguments.release}}
    job.start(paths, name, verb)
    return _watch(paths, name, verb, arguments.wait_s)


def _stage_status(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return _watch(paths, *_stage_job(arguments), arguments.wait_s, raising=False)


def _stage_job(arguments: Arguments) -> tuple[str, list[str]]:
    """The job's name and what its unit runs."""
    return stage.job_name(arguments.service, arguments.release), [
        "work-stage", "--service", arguments.service, "--release", arguments.release]


def _first_start(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    name, verb = _first_start_job(arguments)
    job.start(paths, name, verb)
    return _watch(paths, name, verb, arguments.wait_s)


def _first_start_status(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    name, verb = _first_start_job(arguments)
    return _watch(paths, name, verb if arguments.release else None, arguments.wait_s, raising=False)


def _first_start_job(arguments: Arguments) -> tuple[str, list[str]]:
    """As ``_stage_job``; one job an instance, whatever the release."""
    return first_start.job_name(arguments.instance), [
        "work-first-start", arguments.instance, "--release", arguments.release]


def _recover(paths: Paths, _: Arguments) -> dict[str, Any]:
    done = first_start.recover(paths)
    if done["changed"]:
        audit.record("recover", done)
    return done


def _watch(paths: Paths, name: str, verb: Sequence[str] | None, wait_s: float, *, raising: bool = True
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


def _work(name: str, verb: Sequence[str], paths: Paths, work: Callable[[job.Reporter], dict[str, Any]]
          ) -> dict[str, Any]:
    """Runs inside the job's unit: every end is written down."""
    reporter = job.Reporter(paths, name, verb)
    try:
        result = work(reporter)
    except OpsctlError as error:
        reporter.failed(error)
        raise
    except OSError as error:
        reporter.failed(_of_system(error, name))
        raise
    except Exception as error:
        reporter.failed(OpsctlError("unexpected", f"unexpected {type(error).__name__}: {error}",
                                    hint=f"journalctl -u {name}"))
        raise
    reporter.finished(result)
    return result


def _work_stage(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return _work(*_stage_job(arguments), paths, lambda reporter: stage.stage(
        paths, read_settings(paths).gateway_url, arguments.service, arguments.release, report=reporter.progress,
        doing=reporter.doing))


def _work_first_start(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return _work(*_first_start_job(arguments), paths, lambda reporter: first_start.first_start(
        paths, arguments.instance, arguments.release, doing=reporter.doing))


def _begin(paths: Paths, _: Arguments) -> dict[str, Any]:
    return gateway.begin(paths, sys.stdin.buffer.read())


def _receive(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.receive(paths, arguments.service, arguments.release, arguments.path, arguments.offset,
                           sys.stdin.buffer)


def _accept(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.accept(paths, arguments.service, arguments.release)


def _releases(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.releases(paths, arguments.service)


def _balancer(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return balancer.look(paths.balancer_socket, arguments.wanted, arguments.wait_s)


def _ledger_show(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.show_ledger(paths, arguments.service)


def _ledger_append(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return gateway.append_ledger(paths, arguments.service, arguments.version, arguments.digest, after=arguments.after,
                                 by=arguments.by or audit.operator(os.environ), run=arguments.run, note=arguments.note)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="opsctl-host", description="The verbs of one host of an opsctl fleet.")
    parser.add_argument("--version", action="version", version=f"opsctl-agent {agent_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, act: Callable[[Paths, Arguments], dict[str, Any]], about: str, *, acts: bool = True,
             audited: bool = True) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=about, description=about)
        one.set_defaults(act=act, acts=acts, audited=acts and audited)
        return one

    def release_of(one: argparse.ArgumentParser) -> None:
        one.add_argument("--service", required=True, type=_service)
        one.add_argument("--release", required=True, type=_folder, metavar="VERSION-DIGEST12")

    def waiting(one: argparse.ArgumentParser, default: float) -> None:
        one.add_argument("--wait-s", type=float, default=default, metavar="SECONDS",
                         help="how long to watch; the work goes on when nobody watches")

    looked = verb("state", _state, "everything about this host", acts=False)
    looked.add_argument("--json", action="store_true", help="the answer always is JSON")
    one = verb("balancer", _balancer, "load balancer: its servers, as it sees them", acts=False)
    one.add_argument("--wanted", action="append", default=[], metavar="SERVER", help="wait until it gets requests")
    waiting(one, 0)
    one = verb("stage", _stage, "bring a release and its engine here, as a unit of its own; watch it")
    release_of(one)
    waiting(one, FOR_EVER_S)
    one = verb("stage-status", _stage_status, "how far staging is", acts=False)
    release_of(one)
    waiting(one, 0)
    one = verb("first-start", _first_start, "start an instance that has never served, as a unit of its own; watch it")
    one.add_argument("instance")
    one.add_argument("--release", required=True, type=_folder, metavar="VERSION-DIGEST12")
    waiting(one, FOR_EVER_S)
    one = verb("first-start-status", _first_start_status, "how far a first start is", acts=False)
    one.add_argument("instance")
    one.add_argument("--release", type=_folder, metavar="VERSION-DIGEST12",
                     help="exit 4 when the first start is on another release")
    waiting(one, 0)
    verb("recover", _recover, "undo first starts that a power cut left half done; runs at boot", audited=False)
    release_of(verb("work-stage", _work_stage, "what the unit of stage runs", audited=False))
    one = verb("work-first-start", _work_first_start, "what the unit of first-start runs", audited=False)
    one.add_argument("instance")
    one.add_argument("--release", required=True, type=_folder, metavar="VERSION-DIGEST12")
    verb("release-begin", _begin, "gateway: take a manifest and signature on stdin; say which files are missing")
    one = verb("receive", _receive, "gateway: append stdin to a file of a release on its way", audited=False)
    release_of(one)
    one.add_argument("--path", required=True)
    one.add_argument("--offset", required=True, type=int, metavar="BYTES")
    release_of(verb("release-accept", _accept, "gateway: check everything and give the release its name"))
    verb("releases", _releases, "gateway: the releases of a service", acts=False).add_argument(
        "--service", required=True, type=_service)
    verb("ledger-show", _ledger_show, "gateway: the ledger of a service", acts=False).add_argument(
        "--service", required=True, type=_service)
    one = verb("ledger-append", _ledger_append, "gateway: say which release the fleet should serve")
    one.add_argument("--service", required=True, type=_service)
    one.add_argument("--version", required=True)
    one.add_argument("--digest", required=True, metavar="SHA256")
    one.add_argument("--after", required=True, type=int, metavar="N", help="lines that the writer has seen")
    for name in ("by", "run", "note"):
        one.add_argument(f"--{name}", default="")
    return parser


def _service(text: str) -> str:
    if not SERVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a service")
    return text


def _folder(text: str) -> str:
    if not FOLDER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not VERSION-DIGEST12")
    return text


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
