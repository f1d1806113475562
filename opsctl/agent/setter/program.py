"""``opsctl-setter``: serves. ``opsctl-setter restore``: restores what the state file says; the unit's ExecStopPost.
``opsctl-setter state``: what the one that serves has set, for a person.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from opsctl.agent import unfinished
from opsctl.agent.paths import Paths
from opsctl.agent.setter import protocol
from opsctl.agent.setter.board import Board
from opsctl.agent.setter.book import Book
from opsctl.agent.setter.lane import Lane
from opsctl.agent.setter.server import GRACE_S, Server

RESTORE_S = 8.0  # within the unit's TimeoutStopSec
ANSWER_S = 5.0


def serve(paths: Paths, grace_s: float) -> int:
    """Until SIGTERM. What is set then is the restore's business."""
    stopping, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os.write(told, b"\n"))
    book = Book(paths, unfinished.boot(paths), _say)
    board = Board(book)
    server = Server(paths, book, board, _say, grace_s)
    try:
        listener = server.listen()
    except OSError as error:
        _say(f"cannot listen on {paths.setter_socket}: {error}")
        return 1
    _ready()
    server.serve(listener, stopping)
    server.end(listener)
    return 0


def restore(paths: Paths, within_s: float) -> int:
    """1 when something is left: it stays in the file, and the next start tries again."""
    book = Book(paths, unfinished.boot(paths), _say)
    board = Board(book)
    until = time.monotonic() + within_s
    jobs = {gpu: Lane(gpu).post(partial(board.release, gpu)) for gpu in book.entries()}
    for gpu, job in jobs.items():
        if not job.over.wait(max(0.0, until - time.monotonic())):
            _say(f"{gpu} is not restored: a call into the driver has not returned")
        elif isinstance(job.answer, dict):
            _say(f"{gpu} is restored" + "".join(f"; {words}" for words in job.answer.values()))
        else:
            _say(f"{gpu} is not restored: {job.answer.words if job.answer else 'nobody knows why'}")
    left = book.entries()
    return 1 if left else 0


def show(paths: Paths) -> int:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(ANSWER_S)
        try:
            channel.connect(str(paths.setter_socket))
            channel.sendall(protocol.line({"verb": "state"}))
            sys.stdout.write(channel.makefile().readline())
            sys.stdout.flush()
        except OSError as error:
            _say(f"the setter does not answer on {paths.setter_socket}: {error}")
            return 1
    return 0


def _ready() -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """The ``opsctl-setter`` command. Ends the process: a thread may still wait inside the driver."""
    parser = argparse.ArgumentParser(prog="opsctl-setter", description="Sets clocks and power limits of GPUs, stops "
                                     "and starts instances, for the agent and root alone.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the host's folders lie (/)")
    parser.add_argument("--grace-s", type=float, default=GRACE_S, help="restore when nobody holds what is set for so "
                        "long (%(default)s)")
    commands = parser.add_subparsers(dest="command")
    restoring = commands.add_parser("restore", help="restore what the state file says, and end")
    restoring.add_argument("--within-s", type=float, default=RESTORE_S, help="(%(default)s)")
    commands.add_parser("state", help="what is set, as the one that serves says")
    given = parser.parse_args(argv)
    paths = Paths(given.root)
    if given.command == "restore":
        status = restore(paths, given.within_s)
    elif given.command == "state":
        status = show(paths)
    else:
        status = serve(paths, given.grace_s)
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
