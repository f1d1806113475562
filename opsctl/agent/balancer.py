"""What HAProxy itself says of its servers, over its own sockets, and the one thing it is told there.

After a reload the old process lives on for as long as it has streams; the new one knows nothing of them. So sessions
are added up over all processes, which the master's socket lists. Never ``show servers conn``: with ``http-reuse never``
it says 0 while requests are in flight (measured: 10 of them lost).
"""

from __future__ import annotations

import csv
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsctl.errors import OpsctlError, RefusedError

TIMEOUT_S = 5.0
POLL_S = 0.2
OVERALL = ("FRONTEND", "BACKEND")
OLD = "# old workers"
RELOAD_S = 3.0  # for so long at the most nobody answers while one process takes over from another
# Every answer ends with an empty line: one without it was cut off, and lacks servers.
STATISTICS = re.compile(r"# pxname,.*\n\n", re.DOTALL)
PROCESSES = re.compile(r"#<PID>.*\n\n", re.DOTALL)
ANYTHING = re.compile(r".*\n", re.DOTALL)


def servers(statistics: str) -> list[dict[str, Any]]:
    """Rows of ``show stat``: service, server, status (``UP``, ``DOWN 1/2`` ...), weight in per cent, open sessions.

    ``agent``: how the last agent check ended: ``L7OK`` (up), ``L7STS`` (down), ``L4CON`` (refused), ``L7TOUT`` ...;
    empty when there was none yet.
    """
    rows = csv.DictReader(statistics.removeprefix("# ").splitlines())
    return [{"service": row["pxname"], "server": row["svname"], "status": row["status"],
             "weight": int(row["weight"] or 0), "sessions": int(row["scur"] or 0),
             "agent": (row.get("agent_status") or "").removeprefix("* ")}
            for row in rows if row["svname"] not in OVERALL]


def missing(found: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` (server names) that get no requests: not up, without weight, or not there at all."""
    rotating = {row["server"] for row in found if row["status"].startswith("UP") and row["weight"] > 0}
    return [name for name in wanted if name not in rotating]


def busy(found: Sequence[Mapping[str, Any]], drained: Sequence[str]) -> list[str]:
    """Those of ``drained`` (server names) that have requests or may get some."""
    working = {row["server"] for row in found if row["sessions"] or may_get_more(row)}
    return [name for name in drained if name in working]


def may_get_more(row: Mapping[str, Any]) -> bool:
    """Whether HAProxy could choose this server. One that is down by its own check alone may be up in a moment."""
    out = row["status"].startswith(("DRAIN", "MAINT")) or (row["status"].startswith("DOWN") and row["agent"] == "L7STS")
    return row["weight"] > 0 and not out


def old_workers(processes: str) -> list[str]:
    """PIDs of the processes that a reload left behind, from the master's ``show proc``."""
    lines = iter(processes.splitlines())
    for line in lines:
        if line.startswith(OLD):
            break
    found = []
    for line in lines:
        if line.startswith("#"):
            break
        words = line.split()
        if words and words[0].isdigit():
            found.append(words[0])
    return found


def with_sessions_of(found: Sequence[dict[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``found`` with the sessions that other processes have on the same servers; what only those know is left out."""
    return [{**row, "sessions": row["sessions"] + sum(
        other["sessions"] for other in others
        if (other["service"], other["server"]) == (row["service"], row["server"]))} for row in found]


def look(admin: Path, master: Path, wanted: Sequence[str], drained: Sequence[str], wait_s: float) -> dict[str, Any]:
    """Waits ``wait_s`` seconds at the most until nothing is missing of ``wanted`` and nothing busy of ``drained``.

    Returns ``{"servers", "missing", "busy"}``, what it saw last. ``master``: the socket of HAProxy's master process,
    where it has one.

    Raises:
        RefusedError: ``balancer.silent``: HAProxy does not answer on its socket.
    """
    until = time.monotonic() + wait_s
    while True:
        found = _seen(admin, master)
        lacking, working = missing(found, wanted), busy(found, drained)
        if not (lacking or working) or time.monotonic() >= until:
            return {"servers": found, "missing": lacking, "busy": working}
        time.sleep(POLL_S)


def set_state(admin: Path, server: str, state: str) -> dict[str, Any]:
    """``drain`` or ``ready``: takes ``server`` out by HAProxy's own means, or ends that; ``{"changed": True}``.

    Raises:
        RefusedError: HAProxy does not answer, or has no such server.
        OpsctlError: it would not.
    """
    backends = [row["service"] for row in servers(_ask(admin, "show stat", STATISTICS))
                if row["server"] == server]
    if not backends:
        raise RefusedError("balancer.no_server", f"HAProxy has no server {server}.",
                           hint="opsctl-host balancer lists its servers; opsctl provision writes them")
    for backend in backends:
        said = _ask(admin, f"set server {backend}/{server} state {state}", ANYTHING).strip()
        if said:  # it answers nothing when it did it
            raise OpsctlError("balancer.not_set", f"HAProxy did not set {backend}/{server} to {state}: {said}",
                              hint="systemctl status haproxy")
    return {"changed": True}


def _seen(admin: Path, master: Path) -> list[dict[str, Any]]:
    found = servers(_ask(admin, "show stat", STATISTICS))
    for pid in old_workers(_ask(master, "show proc", PROCESSES)) if master.is_socket() else ():
        statistics = _ask(master, f"@!{pid} show stat", ANYTHING)
        if STATISTICS.fullmatch(statistics):  # one that has just ended is answered for by the master, in a sentence
            found = with_sessions_of(found, servers(statistics))
    return found


def _ask(path: Path, command: str, whole: re.Pattern[str]) -> str:
    """What HAProxy answers. ``whole``: what the answer looks like; in a reload it may be cut off, or nobody listens.

    Raises:
        RefusedError: ``balancer.silent``: that did not pass.
    """
    until = time.monotonic() + RELOAD_S
    while True:
        try:
            answer = _say(path, command)
            if whole.fullmatch(answer):
                return answer
            problem = f"it said {answer[:80]!r} to {command!r}"
        except ConnectionError as error:
            problem = error.strerror or str(error)
        except OSError as error:
            raise _silent(path, error.strerror or str(error)) from None
        if time.monotonic() >= until:
            raise _silent(path, problem)
        time.sleep(POLL_S)


def _say(path: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(command.encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)  # the master's socket waits for more, for ever
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace")


def _silent(path: Path, problem: str) -> RefusedError:
    return RefusedError("balancer.silent", f"HAProxy does not answer on {path}: {problem}.",
                        hint="systemctl status haproxy")
