"""The engine process: llama.cpp's own server, which serves until SIGTERM and then drains itself.

Run as a script by the python of the engine's environment (``python -I llamacpp_server.py ...``), so it may import
nothing but the standard library and xllamacpp. xllamacpp installs no signal handler and has no stop: a plain SIGTERM
drops every stream. So on SIGTERM it

1. writes ``$RUNTIME_DIRECTORY/draining``, from which the agent tells the load balancer ``up 0%``;
2. goes on serving for ``NOTICE_S``, until the load balancer has seen that;
3. waits until nothing runs, nothing waits, and every client has taken its last bytes, or until the drain timeout;
4. leaves with status 0 (75 when the timeout cut requests off).
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

NOTICE_S = 3.0  # the load balancer asks the agent every second, the agent answers from the file itself
SETTLE_S = 0.5  # idle for this long before it counts: a request may lie between accept and the queue
KEEP_ALIVE_S = 6.0  # the server closes an idle connection after 5 s, so an older silent one is not a client
POLL_S = 0.1
EXIT_DRAINED = 0
EXIT_CUT_OFF = 75  # sysexits.h: temporary failure
ESTABLISHED = "01"

Connection = tuple[str, int]  # remote address and port as the kernel writes them, bytes not yet taken by the client


@dataclass
class Drain:
    """Decides when a draining engine may leave. Times are seconds of one monotonic clock."""

    started: float
    timeout_s: float
    notice_s: float = NOTICE_S
    idle_since: float | None = None
    lingering: frozenset[str] = frozenset()

    def decide(self, now: float, in_flight: int, connections: Sequence[Connection]) -> Literal["wait", "leave", "cut"]:
        """``in_flight`` counts running and waiting requests; ``connections`` are the open ones to our port.

        A finished stream may still lie in the server's or the socket's buffer while its client reads slowly. So a
        connection that was open when the engine fell idle must close, or be seen to have nothing left to send for
        longer than an idle connection is kept.
        """
        remotes = frozenset(remote for remote, _ in connections)
        if in_flight:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since, self.lingering = now, remotes
        else:
            self.lingering &= remotes
        if now - self.started >= self.timeout_s:
            return "cut" if in_flight else "leave"
        if self.idle_since is None or now - self.started < self.notice_s or now - self.idle_since < SETTLE_S:
            return "wait"
        unsent = any(left for remote, left in connections if remote in self.lingering)
        silent = now - self.idle_since >= KEEP_ALIVE_S and not unsent
        return "leave" if not self.lingering or silent else "wait"


def open_connections(table: str, port: int) -> list[Connection]:
    """Established connections to a local port, out of the text of ``/proc/net/tcp`` or ``tcp6``."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 4 and fields[3] == ESTABLISHED and int(fields[1].rpartition(":")[2], 16) == port:
            found.append((fields[2], int(fields[4].partition(":")[0], 16)))
    return found


def requests_in_flight(exposition: str) -> int:
    """Running and waiting requests, out of llama.cpp's metrics."""
    count = 0.0
    for line in exposition.splitlines():
        name, _, value = line.partition(" ")
        if name in ("llamacpp:requests_processing", "llamacpp:requests_deferred"):
            count += float(value)
    return int(count)


def wait_until_drained(
    drain: Drain, in_flight: Callable[[], int], connections: Callable[[], Sequence[Connection]],
    clock: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep,
) -> int:
    """Blocks until the engine may leave; returns its exit status."""
    while True:
        verdict = drain.decide(clock(), in_flight(), connections())
        if verdict != "wait":
            return EXIT_CUT_OFF if verdict == "cut" else EXIT_DRAINED
        pause(POLL_S)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="llama.cpp's server that drains itself on SIGTERM")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--name", required=True, action="append", help="a name under /v1/models; may be repeated")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("--chat-template-file", type=Path)
    parser.add_argument("--drain-timeout", type=float, default=300.0, help="seconds")
    return parser.parse_args()


def _start(arguments: argparse.Namespace) -> Any:
    """Loads the model, which blocks, and returns the listening server."""
    import xllamacpp  # noqa: PLC0415 - the pure parts above are tested without it

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(arguments.model)
    parameters.model_alias = set(arguments.name)
    parameters.hostnames = [arguments.address]
    parameters.port = arguments.port
    parameters.n_parallel = arguments.parallel
    parameters.n_ctx = arguments.max_model_len * arguments.parallel  # it divides the context by the slots
    parameters.n_gpu_layers = arguments.gpu_layers
    parameters.endpoint_metrics = True
    parameters.fit_params = False  # what a release says is what runs; it may not be shrunk to what happens to be free
    parameters.ui = False
    parameters.verbosity = 1  # errors; a line a request would flood the journal
    if arguments.threads:
        parameters.cpuparams.n_threads = arguments.threads
        parameters.cpuparams_batch.n_threads = arguments.threads
    if arguments.chat_template_file:
        parameters.chat_template = arguments.chat_template_file.read_text(encoding="utf-8")
    return xllamacpp.Server(parameters)


def connections_to(port: int) -> list[Connection]:
    """The connections to a port of this network namespace that are open now."""
    found: list[Connection] = []
    for table in (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")):
        if table.exists():  # not in every sandbox; then SETTLE_S alone decides
            found += open_connections(table.read_text(encoding="ascii"), port)
    return found


def mark_draining() -> None:
    """Tells the agent, and through it the load balancer, that this instance takes no more requests."""
    directory = os.environ.get("RUNTIME_DIRECTORY")
    if directory:
        Path(directory, "draining").write_text(f"{time.time():.0f}\n", encoding="ascii")


def main() -> NoReturn:
    """Serves until SIGTERM or SIGINT, then drains and leaves."""
    arguments = _arguments()
    server = _start(arguments)  # SIGTERM still has its default action: nothing is served yet, so nothing is lost
    # The kernel may hand the signal to any of the server's threads; a wakeup descriptor wakes this one all the same.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    _say(f"serving {arguments.model} as {', '.join(arguments.name)} on {arguments.address}:{arguments.port}")
    select.select([reader], [], [])
    mark_draining()
    _say(f"draining {requests_in_flight(server.handle_metrics())} requests, for up to {arguments.drain_timeout:.0f} s")
    status = wait_until_drained(Drain(time.monotonic(), arguments.drain_timeout),
                                lambda: requests_in_flight(server.handle_metrics()),
                                lambda: connections_to(arguments.port))
    _say("drained" if status == EXIT_DRAINED else "the drain timeout is over: requests are cut off")
    # Not by return: the server's destructor waits for its streams' clients, a minute was seen.
    os._exit(status)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
