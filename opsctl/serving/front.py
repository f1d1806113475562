"""The front of an engine that does not drain itself: starts it as a child, and stops it when nothing is in flight.

``opsctl-launch`` becomes ``python -I -m opsctl.serving.front [options] -- ENGINE...``. systemd signals this process
alone (``KillMode=mixed``); the engine goes on serving until it is told. On SIGTERM the front

1. writes ``$RUNTIME_DIRECTORY/draining``, from which the agent tells the load balancer ``up 0%``;
2. waits until the engine shows nothing running or waiting and every client has its last bytes, or until the drain
   timeout;
3. sends SIGTERM to the engine, waits for it, and leaves with status 0 (75 when the timeout cut requests off).

An engine that leaves unasked is a failure, whatever status it leaves with: vLLM's server ends with 0 when its engine
core has died, and the unit would not be started again.
"""

from __future__ import annotations

import argparse
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence

from opsctl.errors import ConfigurationError
from opsctl.serving.adapter import metric
from opsctl.serving.llamacpp_server import (
    EXIT_CUT_OFF,
    EXIT_DRAINED,
    Drain,
    connections_to,
    mark_draining,
    wait_until_drained,
)

EXIT_LEFT = 70  # sysexits.h: internal software error
EXIT_WRONG = 96  # opsctl-launch's: the unit is not started again
ASK_S = 2.0
POLL_S = 0.3
STOP_S = 40.0  # more than an engine itself allows a request that is left
SMI = ("nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader")
SMI_S = 60.0


class EngineLeftError(Exception):
    """The engine ended while it drained."""


def indices(listing: str, uuids: Sequence[str]) -> str:
    """What stands in CUDA_VISIBLE_DEVICES for an engine that reads numbers only. ``listing`` is nvidia-smi's.

    Raises:
        ConfigurationError: a GPU is missing; none is ever taken for another.
    """
    found = {uuid.strip(): index.strip() for index, _, uuid in (line.partition(",") for line in listing.splitlines())}
    missing = [uuid for uuid in uuids if uuid not in found]
    if missing:
        raise ConfigurationError("placement.gpu_missing", f"this host does not show the GPU {missing[0]}.",
                                 hint="nvidia-smi -L lists what is there; opsctl provision deals the GPUs out again")
    return ",".join(found[uuid] for uuid in uuids)


def exit_status(returncode: int) -> int:
    """What the unit sees of an engine that left unasked; never success."""
    if returncode < 0:
        return 128 - returncode
    return returncode or EXIT_LEFT


def in_flight(address: str, port: int, metrics: Sequence[str]) -> int:
    """Requests that run or wait; an engine that does not answer, or does not say, counts as one with a request."""
    text = _metrics(address, port)
    counts = [metric(text, name) for name in metrics]
    return 1 if None in counts else int(sum(count or 0 for count in counts))


def _metrics(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{port}/metrics", timeout=ASK_S) as response:
            return str(response.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return ""


def _listens(address: str, port: int) -> bool:
    """Whether anybody can have sent a request; an engine that is too busy to answer listens."""
    try:
        socket.create_connection((address, port), timeout=ASK_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="front", description="starts an engine and drains it on SIGTERM")
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--metric", required=True, action="append", help="of requests in flight; may be repeated")
    parser.add_argument("--drain-timeout", required=True, type=float, help="seconds")
    parser.add_argument("--stop-timeout", type=float, default=STOP_S, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--gpus-by-index", metavar="UUIDS", default="", help="GPUs for CUDA_VISIBLE_DEVICES")
    parser.add_argument("engine", nargs="+", help="after --: the engine's argument vector")
    return parser.parse_args(argv)


def _visible(uuids: str) -> dict[str, str]:
    if not uuids:
        return {}
    try:
        listing = subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError("placement.gpu_missing", f"nvidia-smi does not list the GPUs: {error}.",
                                 hint="the driver is missing or broken: nvidia-smi -L") from None
    return {"CUDA_VISIBLE_DEVICES": indices(listing, uuids.split(","))}


def _drain(arguments: argparse.Namespace, engine: subprocess.Popen[bytes]) -> int:
    """Waits until the engine may be stopped; returns what the front will leave with."""

    def count() -> int:
        if engine.poll() is not None:
            raise EngineLeftError
        return in_flight(arguments.address, arguments.port, arguments.metric)

    mark_draining()
    _say(f"draining {count()} requests, for up to {arguments.drain_timeout:.0f} s")
    return wait_until_drained(Drain(time.monotonic(), arguments.drain_timeout), count,
                              lambda: connections_to(arguments.port), pause=lambda _: time.sleep(POLL_S))


def _stop(arguments: argparse.Namespace, engine: subprocess.Popen[bytes]) -> int:
    status = EXIT_DRAINED
    try:
        if _listens(arguments.address, arguments.port):  # else it is still loading, and serves nobody
            status = _drain(arguments, engine)
    except EngineLeftError:
        _say(f"the engine left while it drained, with {engine.returncode}")
        return EXIT_CUT_OFF
    _say("drained" if status == EXIT_DRAINED else "the drain timeout is over: requests are cut off")
    engine.terminate()
    try:
        engine.wait(arguments.stop_timeout)
    except subprocess.TimeoutExpired:
        _say(f"the engine did not stop within {arguments.stop_timeout:.0f} s and is killed")
        engine.kill()
        engine.wait()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the engine until SIGTERM, SIGINT, or its own end."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda _number, _frame: None)
    try:
        environment = {**os.environ, **_visible(arguments.gpus_by_index)}
    except ConfigurationError as error:
        sys.stderr.write(f"{error.message} [{error.code}] {error.hint}\n")
        return EXIT_WRONG
    with subprocess.Popen(arguments.engine, env=environment, stdin=subprocess.DEVNULL) as engine:
        while True:
            select.select([reader], [], [])
            signals = set(os.read(reader, 64))
            if engine.poll() is not None:
                _say(f"the engine left unasked, with {engine.returncode}")
                return exit_status(engine.returncode)
            if signals & {signal.SIGTERM, signal.SIGINT}:
                return _stop(arguments, engine)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
