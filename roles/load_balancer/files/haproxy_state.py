#!/usr/bin/python3
"""Hands the state of HAProxy's servers from one process to the next: ``haproxy-state save|stop|start``.

``save``, before a reload: writes the state that the new process will read. ``stop``, before an orderly stop: the same,
and notes that the state is the last one. ``start``: keeps a state that an orderly stop left, and throws away any other.
After a crash the last state is as old as the last reload: servers that were drained then may serve now, and nobody
would undrain them again.

The file is HAProxy's own ``server-state-file``. When HAProxy does not tell its state, the reload fails, and it goes on
as it was.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

SOCKET = Path("/run/haproxy/admin.sock")
STATE = Path("/var/lib/haproxy/server-state")
TIMEOUT_S = 5.0
NOTHING = "1\n"  # the version of the format, and no server


def ask(path: Path) -> str:
    """The answer to ``show servers state``.

    Raises:
        OSError: HAProxy does not answer.
        ValueError: it answered something else.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"show servers state\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    if not answer.startswith("1\n# be_id "):  # the format's version, then the columns
        raise ValueError(f"{path} answered {answer[:80]!r} to 'show servers state'")
    return answer


def write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Makes names that came and went in ``folder`` last."""
    directory = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def hand_over(act: str, state: Path, admin: Path) -> None:
    orderly = state.with_name(state.name + ".orderly")
    if act == "start":
        if not orderly.exists():
            write(state, NOTHING)
            return
        orderly.unlink()
        sync(orderly.parent)  # or a power cut brings the mark back, and with it a state that is old by then
        return
    write(state, ask(admin))
    if act == "stop":
        write(orderly, "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=["save", "stop", "start"])
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--socket", type=Path, default=SOCKET)
    arguments = parser.parse_args()
    try:
        hand_over(arguments.act, arguments.state, arguments.socket)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"haproxy-state {arguments.act}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
