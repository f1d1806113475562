"""Runs the acceptance tests on a live fleet: pytest with testinfra in child processes, whose results are events here.

pytest's own words go to ``.opsctl/verify/pytest.log``; what each test found comes as one JSON line on a descriptor of
its own. Nothing on a host is changed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opsctl.engines.child import die_with_parent, stop_group
from opsctl.engines.events import Emit, PhaseStarted, TaskResult, one_at_a_time
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.ssh_config import private_directory, write_ssh_config
from opsctl.resources import resource
from opsctl.verifying import Check, chunks

REACH_TIMEOUT_S = 20.0
PROCESSES = 8
HOSTS_A_PROCESS = 12
ENDED_WELL = (0, 1, 5)  # pytest: all passed; some failed; none was collected
STATUS = {"good": "ok", "wrong": "failed", "warning": "ok", "skipped": "skipped"}
LOG_TAIL_LINES = 20


def verify(fleet: Fleet, hosts: Sequence[Host], emit: Emit, *, tests: Path | None = None) -> list[Check]:
    """Every test on every host that answers. A host that does not is one thing that is wrong.

    Raises:
        OpsctlError: ``verify.stopped``: pytest itself did not come to an end.
    """
    emit = one_at_a_time(emit)
    write_ssh_config(fleet)
    directory = fleet.directory / ".opsctl" / "verify"
    private_directory(directory)
    log = directory / "pytest.log"
    log.unlink(missing_ok=True)
    emit(PhaseStarted(f"Ask {len(hosts)} host{'s' if len(hosts) != 1 else ''}"))
    answers = on_each(fleet, hosts, _knock)
    checks = [_silent(name, answer) for name, answer in answers.items() if isinstance(answer, OpsctlError)]
    for check in checks:
        emit(event_of(check))
    reached = [host for host in hosts if not isinstance(answers[host.name], OpsctlError)]
    shares = list(chunks(reached, PROCESSES, HOSTS_A_PROCESS))
    if shares:
        folder = tests or resource("tests/acceptance")
        with ThreadPoolExecutor(len(shares)) as pool:
            for found in pool.map(lambda share: list(_run(fleet, share, reached, folder, log, emit)), shares):
                checks += found
    order = {host.name: number for number, host in enumerate(hosts)}
    return sorted(checks, key=lambda check: order.get(check.host, len(order)))


def event_of(check: Check) -> TaskResult:
    """What views hear of a check."""
    message = "" if check.verdict != "wrong" else f"expected {check.expected}; there is {check.found}"
    return TaskResult(check.host, check.check, STATUS[check.verdict], message)  # type: ignore[arg-type]


def command(folder: Path) -> list[str]:
    """pytest on these tests alone: no settings, plugins or caches of whoever calls."""
    return [sys.executable, "-m", "pytest", "--quiet", "--capture=fd", "--tb=short", "-p", "no:cacheprovider",
            "-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}", "--import-mode=importlib", str(folder)]


def _run(fleet: Fleet, hosts: Sequence[Host], reached: Sequence[Host], folder: Path, log: Path, emit: Emit
         ) -> Iterator[Check]:
    """One process of pytest; ``reached``: all hosts that answer, for tests that ask one host of another."""
    read_fd, write_fd = os.pipe()
    task = {"inventory": str(fleet.inventory), "hosts": [host.name for host in hosts],
            "reached": [host.name for host in reached], "events_fd": write_fd}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    with os.fdopen(read_fd, encoding="utf-8") as events, log.open("ab") as said:
        process = subprocess.Popen(
            command(folder), stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=(write_fd,),
            cwd=fleet.directory, start_new_session=True, preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call
            env={**kept, "OPSCTL_VERIFY": json.dumps(task), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                 "PYTHONDONTWRITEBYTECODE": "1"})
        os.close(write_fd)
        try:
            for line in events:
                check = Check(**json.loads(line))
                emit(event_of(check))
                yield check
            code = process.wait()
        finally:
            stop_group(process, signal.SIGTERM)
    if code not in ENDED_WELL:
        raise OpsctlError("verify.stopped", f"the acceptance tests ended with exit code {code} before they were done.",
                          hint=f"all they said is in {log}",
                          log_tail=tuple(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]))


def _knock(session: Session) -> None:
    session.run(["true"], timeout_s=REACH_TIMEOUT_S)


def _silent(host: str, error: OpsctlError) -> Check:
    return Check(host, "answers over SSH, and its login may become root", "wrong", "an answer",
                 error.message.removeprefix(f"{host}: "), error.hint)
