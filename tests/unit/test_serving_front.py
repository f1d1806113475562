"""The front of an engine: what it leaves with and when, around a real child that plays an engine."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from opsctl.errors import ConfigurationError
from opsctl.serving.front import EXIT_LEFT, EXIT_WRONG, exit_status, in_flight, indices
from opsctl.serving.llamacpp_server import EXIT_CUT_OFF, EXIT_DRAINED

ENGINE = Path(__file__).parent / "played_engine.py"
PATIENCE_S = 30


def test_gpus_become_numbers_by_their_uuid() -> None:
    listing = "0, GPU-aa\n1, GPU-bb\n2, GPU-cc\n"
    assert indices(listing, ["GPU-cc", "GPU-aa"]) == "2,0"
    with pytest.raises(ConfigurationError) as wrong:
        indices(listing, ["GPU-aa", "GPU-dd"])
    assert wrong.value.code == "placement.gpu_missing" and "GPU-dd" in wrong.value.message


@pytest.mark.parametrize(("returncode", "status"), [(0, EXIT_LEFT), (1, 1), (3, 3), (-9, 137), (-15, 143)])
def test_an_engine_that_leaves_unasked_is_a_failure(returncode: int, status: int) -> None:
    assert exit_status(returncode) == status


class Running:
    """A front with its played engine."""

    def __init__(self, folder: Path, engine: Sequence[str], *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.draining = folder / "draining"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-m", "opsctl.serving.front", "--address", "127.0.0.1", "--port", str(self.port),
             "--metric", "vllm:num_requests_running", "--metric", "vllm:num_requests_waiting", *options,
             "--", sys.executable, str(ENGINE), str(self.port), *engine],
            env={"RUNTIME_DIRECTORY": str(folder), "PATH": str(folder)}, stdout=subprocess.PIPE, text=True,
            start_new_session=True)
        self.said: list[str] = []
        self._heard = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.said.append(line.strip())
                self._heard.notify_all()

    def wait_for(self, word: str) -> None:
        with self._heard:
            assert self._heard.wait_for(lambda: any(word in line for line in self.said), PATIENCE_S), self.said

    def request(self, seconds: float) -> Callable[[], bool]:
        """Begins a stream of that many seconds; the answer says whether it came whole."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", f"/stream/{seconds}")
        response = connection.getresponse()  # the first line is here

        def ended() -> bool:
            try:
                return response.read().endswith(b"[DONE]")
            except (OSError, http.client.HTTPException):
                return False

        return ended


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def one(*options: str, engine: Sequence[str] = (), drain: float = 20) -> Running:
        running = Running(tmp_path, engine, "--drain-timeout", str(drain), *options)
        started.append(running)
        return running

    yield one
    for running in started:
        with contextlib.suppress(ProcessLookupError):  # the front and its engine are gone
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()


def test_a_stop_waits_for_what_is_in_flight_and_serves_what_comes_late(start: Callable[..., Running]) -> None:
    running = start()
    running.wait_for("ready")
    early = running.request(4)
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining 1 requests")
    assert running.draining.exists()
    late = running.request(1)
    assert early() and late()
    assert running.process.wait(PATIENCE_S) == EXIT_DRAINED
    running.wait_for("SIGTERM with 0 in flight")


def test_a_stop_cuts_off_what_runs_longer_than_it_may(start: Callable[..., Running]) -> None:
    running = start(drain=4)
    running.wait_for("ready")
    stream = running.request(25)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE_S) == EXIT_CUT_OFF
    assert not stream()
    running.wait_for("SIGTERM with 1 in flight")


def test_a_stop_while_it_loads_waits_for_nothing(start: Callable[..., Running]) -> None:
    running = start(engine=["--never-ready"])
    running.wait_for("loading")
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE_S) == EXIT_DRAINED
    assert time.monotonic() - began < 3
    assert not running.draining.exists()


def test_an_engine_that_says_nothing_of_its_requests_is_given_all_its_time(start: Callable[..., Running]) -> None:
    running = start(engine=["--no-metrics"], drain=5)
    running.wait_for("ready")
    assert in_flight("127.0.0.1", running.port, ["vllm:num_requests_running"]) == 1
    stream = running.request(4)
    running.process.send_signal(signal.SIGTERM)
    assert stream()
    assert running.process.wait(PATIENCE_S) == EXIT_CUT_OFF  # nobody knows that nothing ran any more


@pytest.mark.parametrize(("ending", "status"), [("exit", EXIT_LEFT), ("crash", 137)])
def test_an_engine_that_ends_is_started_again_by_the_unit(start: Callable[..., Running], ending: str,
                                                          status: int) -> None:
    running = start()
    running.wait_for("ready")
    with pytest.raises((OSError, http.client.HTTPException)):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
        connection.request("GET", f"/{ending}")
        connection.getresponse()
    assert running.process.wait(PATIENCE_S) == status
    running.wait_for("left unasked")


def test_an_engine_that_ends_while_it_drains_has_cut_something_off(start: Callable[..., Running]) -> None:
    running = start()
    running.wait_for("ready")
    stream = running.request(20)
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining 1")
    with pytest.raises((OSError, http.client.HTTPException)):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
        connection.request("GET", "/crash")
        connection.getresponse()
    assert running.process.wait(PATIENCE_S) == EXIT_CUT_OFF
    assert not stream()


def test_an_engine_that_does_not_heed_sigterm_is_killed(start: Callable[..., Running]) -> None:
    running = start("--stop-timeout", "1", engine=["--deaf"])
    running.wait_for("ready")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE_S) == EXIT_DRAINED
    running.wait_for("is killed")


def test_an_engine_that_reads_numbers_only_gets_numbers(start: Callable[..., Running], tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, GPU-aa'; echo '1, GPU-bb'\n")
    smi.chmod(0o755)
    running = start("--gpus-by-index", "GPU-bb,GPU-aa")
    running.wait_for("sees 1,0")


def test_a_missing_driver_or_gpu_is_no_reason_to_start_again_and_again(start: Callable[..., Running],
                                                                      tmp_path: Path) -> None:
    assert start("--gpus-by-index", "GPU-aa").process.wait(PATIENCE_S) == EXIT_WRONG
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, GPU-bb'\n")
    smi.chmod(0o755)
    assert start("--gpus-by-index", "GPU-aa").process.wait(PATIENCE_S) == EXIT_WRONG
