"""Ansible as an engine: ``ansible-playbook`` as a process, its doings as typed events.

``command`` and ``translate`` are pure; ``run_playbook`` is the I/O. Ansible is never imported, and the
outcome is decided from the events, not from the exit code (4 means unreachable *or* a parser error).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import IO, Any

from opsctl.engines.ansible_programs import ansible_program, inherited
from opsctl.engines.child import die_with_parent, stop_group
from opsctl.engines.events import Emit, Event, PhaseStarted, TaskResult, TaskStarted
from opsctl.errors import ConfigurationError
from opsctl.resources import PACKAGE, resource

LOG_TAIL_LINES = 20
WOULD_RUN = "Command would have run if not in check mode"  # ansible.builtin.command's word, beside "skipped"


@dataclass(frozen=True)
class Failure:
    host: str
    phase: str
    task: str
    message: str
    detail: tuple[str, ...] = ()
    unreachable: bool = False


@dataclass
class PlaybookOutcome:
    """What a playbook did. ``stats`` maps host -> ok/changed/failures/unreachable/skipped counts."""

    changed: list[tuple[str, str]] = field(default_factory=list)  # (host, task)
    failures: list[Failure] = field(default_factory=list)
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    phase: str = ""
    exit_code: int = 0
    check: bool = False  # in check mode "changed" says what would be
    modules: dict[str, str] = field(default_factory=dict)  # task -> ansible.builtin.copy


def command(inventory: Path, playbook: Path, *, limit: Sequence[str] = (), become: bool = False,
            check: bool = False, variables: Mapping[str, Any] | None = None) -> list[str]:
    """The argument vector of one playbook run. ``become``: the sudo password comes on standard input."""
    arguments = [ansible_program("ansible-playbook"), "--inventory", str(inventory), str(playbook)]
    if limit:
        arguments += ["--limit", ",".join(limit)]
    if become:
        arguments += ["--become-password-file", "-"]
    if check:
        arguments += ["--check", "--diff"]
    if variables:
        arguments += ["--extra-vars", json.dumps(dict(variables), sort_keys=True)]
    return arguments


def environment(base: Mapping[str, str], *, fleet_directory: Path, ssh_config: Path, events_fd: int) -> dict[str, str]:
    """The environment of ``ansible-playbook``: what every program of Ansible's gets, and what opsctl insists on."""
    return inherited(base, fleet_directory) | {
        "ANSIBLE_CALLBACK_PLUGINS": str(PACKAGE / "engines" / "callback"),
        "ANSIBLE_STDOUT_CALLBACK": "opsctl_events",
        "ANSIBLE_ROLES_PATH": str(resource("roles")),
        # ControlPersist stands in ssh_config too; here Ansible sees it, and renews a shared connection after a reboot
        "ANSIBLE_SSH_ARGS": shlex.join(["-F", str(ssh_config), "-o", "ControlPersist=60s"]),
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_FORKS": "32",
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_RETRY_FILES_ENABLED": "False",
        "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
        "ANSIBLE_LOCALHOST_WARNING": "False",
        "OPSCTL_EVENTS_FD": str(events_fd),
    }


def translate(raw: Mapping[str, Any], outcome: PlaybookOutcome) -> Iterator[Event]:
    """One line of the callback's to typed events; ``outcome`` is brought up to date on the way."""
    kind = raw["event"]
    host, task = str(raw.get("host", "")), str(raw.get("task", ""))
    if kind == "play":
        outcome.phase = str(raw["name"])
        yield PhaseStarted(outcome.phase)
    elif kind == "task":
        outcome.modules[task] = str(raw.get("action", ""))
        yield TaskStarted(task)
    elif kind == "host_start":
        yield TaskStarted(task, host)
    elif kind == "item_ok" and raw["changed"]:
        yield TaskResult(host, task, "changed", detail=_diff(raw) if outcome.check else (), item=str(raw["item"]))
    elif kind == "item_failed":
        yield TaskResult(host, task, "failed", _message(raw), _detail(raw), item=str(raw["item"]))
    elif kind == "ok":
        if raw["changed"]:
            outcome.changed.append((host, task))
        # a loop's items have spoken for themselves
        alone = raw["changed"] and not raw["is_loop"]
        yield TaskResult(host, task, "changed" if alone else "ok", detail=_diff(raw) if alone and outcome.check else ())
    elif kind == "skipped" and outcome.check and raw.get("msg") == WOULD_RUN:
        outcome.changed.append((host, task))
        yield TaskResult(host, task, "changed")
    elif kind == "skipped":
        yield TaskResult(host, task, "skipped")
    elif kind in ("failed", "unreachable") and not raw.get("ignored", False):
        failure = Failure(host, outcome.phase, task, _message(raw), _detail(raw), kind == "unreachable")
        outcome.failures.append(failure)
        yield TaskResult(host, task, "unreachable" if failure.unreachable else "failed", failure.message,
                         failure.detail)
    elif kind == "stats":
        outcome.stats = {str(name): dict(counts) for name, counts in raw["hosts"].items()}


def _message(raw: Mapping[str, Any]) -> str:
    if "censored" in raw:
        return "the output is hidden because it may hold a secret"
    message = raw.get("msg", "")
    return str(message if isinstance(message, str) else json.dumps(message)).strip().splitlines()[0] if message else ""


def _diff(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What would be different, line by line as ``diff -u`` has it; empty where the module does not say."""
    found = raw.get("diff", ())
    lines: list[str] = []
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict):
            continue
        if "prepared" in one:
            lines += str(one["prepared"]).strip().splitlines()
            continue
        before, after = (_text(one.get(side, "")) for side in ("before", "after"))
        name = str(one.get("after_header") or one.get("before_header") or "")
        lines += unified_diff(before, after, name, name, n=1, lineterm="")
    return tuple(lines)


def _text(side: object) -> list[str]:
    """A file's text, or the few attributes that a module names: both as lines."""
    return (side if isinstance(side, str) else json.dumps(side, indent=1, sort_keys=True)).splitlines()


def _detail(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The last lines a failed task left, longest-lived source first; never a censored one's."""
    if "censored" in raw:
        return ()
    lines: list[str] = []
    message = raw.get("msg", "")
    if isinstance(message, str):
        lines += message.strip().splitlines()[1:]
    for key in ("stdout", "stderr", "module_stderr"):
        value = raw.get(key)
        if isinstance(value, str):
            lines += value.strip().splitlines()
    return tuple(lines[-LOG_TAIL_LINES:])


def run_playbook(playbook: Path, *, fleet_directory: Path, inventory: Path, ssh_config: Path, log: Path, emit: Emit,
                 limit: Sequence[str] = (), become_password: str | None = None,
                 variables: Mapping[str, Any] | None = None, check: bool = False) -> PlaybookOutcome:
    """Runs a playbook to its end; everything Ansible says outside its events goes to ``log``.

    ``check``: in check mode, with diffs: nothing is changed, and ``changed`` is what would be.

    Raises:
        ConfigurationError: Ansible stopped before its first play (the last lines of ``log`` are in the error).
        KeyboardInterrupt: passed on after Ansible was stopped, within seconds.
    """
    arguments = command(inventory, playbook, limit=limit, become=become_password is not None,
                        variables=variables, check=check)
    outcome = PlaybookOutcome(check=check)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said, _event_pipe() as (reading, writing):
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=said, stderr=said, pass_fds=(writing.fileno(),),
            start_new_session=True, cwd=fleet_directory, preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call, no allocation
            env=environment(os.environ, fleet_directory=fleet_directory, ssh_config=ssh_config,
                            events_fd=writing.fileno()),
        )
        writing.close()
        try:
            _tell(process, become_password)
            for event in _events(reading, outcome):
                emit(event)
            outcome.exit_code = process.wait()
        except BaseException:
            stop_group(process, signal.SIGINT)
            raise
    if outcome.exit_code and not outcome.phase and not outcome.failures:
        tail = tuple(log.read_text(errors="replace").strip().splitlines()[-LOG_TAIL_LINES:])
        raise ConfigurationError("ansible.stopped", f"ansible-playbook stopped with exit code {outcome.exit_code} "
                                 f"before the first task of {playbook.name}.", hint=f"all it said is in {log}",
                                 log_tail=tail)
    return outcome


def _tell(process: subprocess.Popen[bytes], become_password: str | None) -> None:
    """The password goes through a pipe: never into an argument, the environment or a file."""
    if process.stdin is None:
        raise AssertionError("the process was started with a pipe")
    with suppress(BrokenPipeError), process.stdin as pipe:
        if become_password is not None:
            pipe.write(become_password.encode() + b"\n")


def _events(reading: IO[str], outcome: PlaybookOutcome) -> Iterable[Event]:
    for line in reading:
        if line.endswith("\n"):  # else the writer was killed in the middle of it
            yield from translate(json.loads(line), outcome)


@contextmanager
def _event_pipe() -> Iterator[tuple[IO[str], IO[bytes]]]:
    """Both ends as files, which close once: a number that was closed is the next connection's of another thread."""
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, encoding="utf-8") as reading, os.fdopen(write_fd, "wb") as writing:
        yield reading, writing


