"""What HAProxy itself says of its servers, over its own socket. ``servers`` and ``missing`` are pure."""

from __future__ import annotations

import csv
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsctl.errors import RefusedError

TIMEOUT_S = 5.0
POLL_S = 0.2
OVERALL = ("FRONTEND", "BACKEND")


def servers(statistics: str) -> list[dict[str, Any]]:
    """Rows of ``show stat``: service, server, status (``UP``, ``DOWN 1/2`` ...), weight in per cent, open sessions."""
    rows = csv.DictReader(statistics.removeprefix("# ").splitlines())
    return [{"service": row["pxname"], "server": row["svname"], "status": row["status"],
             "weight": int(row["weight"] or 0), "sessions": int(row["scur"] or 0)}
            for row in rows if row["svname"] not in OVERALL]


def missing(found: Sequence[dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` (server names) that get no requests: not up, without weight, or not there at all."""
    rotating = {row["server"] for row in found if row["status"].startswith("UP") and row["weight"] > 0}
    return [name for name in wanted if name not in rotating]


def look(path: Path, wanted: Sequence[str], wait_s: float) -> dict[str, Any]:
    """Waits for ``wait_s`` seconds at the most until no server of ``wanted`` is missing; says what it saw last.

    Raises:
        RefusedError: ``balancer.silent``: HAProxy does not answer on its socket.
    """
    until = time.monotonic() + wait_s
    while True:
        found = servers(_statistics(path))
        lacking = missing(found, wanted)
        if not lacking or time.monotonic() >= until:
            return {"servers": found, "missing": lacking}
        time.sleep(POLL_S)


def _statistics(path: Path) -> str:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(b"show stat\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    except OSError as error:
        raise RefusedError("balancer.silent", f"HAProxy does not answer on {path}: {error.strerror or error}.",
                           hint="systemctl status haproxy") from None
