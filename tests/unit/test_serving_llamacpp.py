"""The llama.cpp adapter by equality, the drain by tables, and, where the engine is installed, by real streams."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.serving import adapter, adapters
from opsctl.serving.adapter import MAXIMUM_DRAIN_S, Launch, locked_version, metric, served_names
from opsctl.serving.llamacpp import LLAMACPP, SERVER, model_file
from opsctl.serving.llamacpp_server import (
    EXIT_CUT_OFF,
    EXIT_DRAINED,
    Connection,
    Drain,
    open_connections,
    requests_in_flight,
    wait_until_drained,
)

LAUNCH = Launch(service="chat", release="v1-0123456789ab", files=Path("/r/files"), paths=("model.gguf", "chat.jinja"),
                arguments=LLAMACPP.arguments({"threads": 2, "drain_timeout_s": 60}), address="10.0.0.11", port=8101,
                environment=Path("/e"))


def test_the_argument_vector() -> None:
    assert LLAMACPP.command(LAUNCH).argv == (
        "/e/bin/python", "-I", str(SERVER), "--model", "/r/files/model.gguf", "--address", "10.0.0.11",
        "--port", "8101", "--parallel", "4", "--max-model-len", "4096", "--threads", "2", "--gpu-layers", "-1",
        "--drain-timeout", "60", "--name", "chat", "--name", "chat@v1-0123456789ab")
    assert LLAMACPP.command(LAUNCH).environment == {}


def test_an_instance_sees_its_gpus_only() -> None:
    from dataclasses import replace

    command = LLAMACPP.command(replace(LAUNCH, gpus=("GPU-a", "GPU-b")))
    assert command.environment == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}


@pytest.mark.parametrize(("paths", "named", "chosen"), [
    (["model.gguf", "a.json"], "", "model.gguf"),
    (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "", "m-00001-of-00002.gguf"),
    (["model.gguf", "mmproj-f16.gguf"], "", "model.gguf"),
    (["a.gguf", "sub/b.gguf"], "sub/b.gguf", "sub/b.gguf"),
])
def test_which_file_is_the_model(paths: list[str], named: str, chosen: str) -> None:
    assert model_file(paths, {"model_file": named}) == chosen


@pytest.mark.parametrize(("paths", "named", "code"), [
    (["model.safetensors"], "", "release.no_model_file"), (["a.gguf", "b.gguf"], "", "release.several_model_files"),
    (["a.gguf"], "c.gguf", "release.no_model_file"),
])
def test_no_model_to_serve(paths: list[str], named: str, code: str) -> None:
    with pytest.raises(RefusedError) as refused:
        model_file(paths, {"model_file": named})
    assert refused.value.code == code
    assert refused.value.hint


@pytest.mark.parametrize(("setting", "value"), [("parallel=8", 8), ("model_file=a.gguf", "a.gguf"),
                                                ("gpu_layers=-1", -1)])
def test_settings_are_read(setting: str, value: object) -> None:
    assert list(LLAMACPP.parse_settings([setting]).values()) == [value]


@pytest.mark.parametrize("setting", ["parallel", "parallel=x", "parallel=0", "parallel=1.5", "nonsense=1",
                                     f"drain_timeout_s={MAXIMUM_DRAIN_S + 1}"])
def test_settings_that_cannot_be(setting: str) -> None:
    with pytest.raises(UsageError) as refused:
        LLAMACPP.parse_settings([setting])
    assert refused.value.hint


@pytest.mark.parametrize("arguments", [{"parallel": "4"}, {"parallel": True}, {"model_file": 1}, {"other": 1}])
def test_arguments_of_a_manifest_are_checked_too(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        LLAMACPP.arguments(arguments)


def test_every_adapter_has_the_options_that_hosts_rely_on() -> None:
    for name, one in adapters().items():
        assert one.name == name and one.packages
        assert {"max_model_len", "start_timeout_s", "drain_timeout_s"} <= {option.name for option in one.options}
    with pytest.raises(OpsctlError):
        adapter("nonsense")


def test_the_lock_that_ships() -> None:
    lock = LLAMACPP.lock()
    assert (lock.engine, lock.version) == ("llamacpp", locked_version(lock.text, "xllamacpp"))
    assert "--hash=sha256:" in lock.text
    assert "://" not in lock.text


def test_an_engine_without_a_lock_of_its_own_says_how_to_pin_one() -> None:
    with pytest.raises(UsageError) as refused:
        adapter("vllm").lock()
    assert refused.value.code == "engine.no_lock"
    assert "--engine-lock" in refused.value.hint


@pytest.mark.parametrize(("text", "name", "value"), [
    ("llamacpp:requests_processing 4\n", "llamacpp:requests_processing", 4),
    ("# HELP x y\nvllm:num_requests_running{model_name=\"a b\"} 2.0\nvllm:num_requests_running{m=\"c\"} 1\n",
     "vllm:num_requests_running", 3),
    ("vllm_num_requests_running{m=\"c\"} 1 1700000000\n", "vllm:num_requests_running", 1),
    ("requests_processing_total 4\n", "requests_processing", None),
    ("", "x", None), ("x nonsense\nx 1\n", "x", 1),
])
def test_metrics_are_read(text: str, name: str, value: float | None) -> None:
    assert metric(text, name) == value


def test_names_under_which_a_release_serves() -> None:
    assert served_names("chat", "v1-0123456789ab") == ("chat", "chat@v1-0123456789ab")


# When a draining engine may leave. Rows: seconds, requests in flight, open connections.

OPEN: list[Connection] = [("A:1", 0)]
UNSENT: list[Connection] = [("A:1", 4096)]


@pytest.mark.parametrize(("rows", "verdict"), [
    ([(0, 0, []), (1, 0, [])], "wait"),  # the load balancer has not seen it yet
    ([(0, 0, []), (3.1, 0, [])], "leave"),
    ([(0, 2, OPEN), (3.1, 2, OPEN), (50, 2, OPEN)], "wait"),
    ([(0, 2, OPEN), (50, 0, [])], "wait"),  # idle since just now
    ([(0, 2, OPEN), (50, 0, []), (50.6, 0, [])], "leave"),
    ([(0, 2, OPEN), (50, 0, []), (50.4, 1, OPEN), (50.8, 0, []), (51, 0, [])], "wait"),  # one came late
    ([(0, 2, OPEN), (50, 0, OPEN), (51, 0, OPEN)], "wait"),  # its last bytes may not be written yet
    ([(0, 2, OPEN), (50, 0, OPEN), (51, 0, [])], "leave"),
    ([(0, 2, OPEN), (50, 0, OPEN), (56.1, 0, OPEN)], "leave"),  # only an idle keep-alive is as silent as that
    ([(0, 2, OPEN), (50, 0, UNSENT), (80, 0, UNSENT)], "wait"),  # a slow reader
    ([(0, 2, OPEN), (50, 0, UNSENT), (99, 0, UNSENT), (100, 0, UNSENT)], "leave"),
    ([(0, 2, OPEN), (50, 0, []), (51, 0, [("B:2", 0)])], "leave"),  # a health check that came later
    ([(0, 2, OPEN), (100, 2, OPEN)], "cut"),
])
def test_when_a_draining_engine_may_leave(rows: Sequence[tuple[float, int, list[Connection]]], verdict: str) -> None:
    drain = Drain(started=0.0, timeout_s=100.0)
    assert [drain.decide(*row) for row in rows][-1] == verdict


@pytest.mark.parametrize(("in_flight", "status"), [(0, EXIT_DRAINED), (1, EXIT_CUT_OFF)])
def test_the_exit_status_tells_whether_requests_were_cut(in_flight: int, status: int) -> None:
    clock = iter(range(0, 1000, 2))
    left = wait_until_drained(Drain(0.0, 20.0), lambda: in_flight, list, lambda: float(next(clock)), lambda _: None)
    assert left == status


def test_connections_are_read_as_the_kernel_writes_them() -> None:
    table = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1FA4 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 0100007F:1FA4 0100007F:C350 01 00000010:00000000 00:00000000 00000000     0        0 2 1 0 20 4 30 10 -1
   2: 0100007F:C350 0100007F:1FA4 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 20 4 30 10 -1
"""
    assert open_connections(table, 8100) == [("0100007F:C350", 16)]


def test_waiting_requests_are_in_flight_too() -> None:
    assert requests_in_flight("llamacpp:requests_processing 2\nllamacpp:requests_deferred 3\nother 9\n") == 5


# The real engine. Four slots serve the streams in turn, so most of them wait while the first are served.

STREAMS = 40


@pytest.fixture
def server(tmp_path: Path) -> subprocess.Popen[str]:
    tried = subprocess.run([sys.executable, "-c", "import xllamacpp"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"the engine does not load here: {tried.stderr.strip().splitlines()[-1]}")
    from opsctl.lab.model import write_model

    write_model(tmp_path / "model.gguf", "small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-I", SERVER, "--model", tmp_path / "model.gguf", "--address", "127.0.0.1",
         "--port", str(port), "--name", "chat", "--name", "chat@v1-0123456789ab", "--parallel", "4",
         "--max-model-len", "4000", "--threads", "1",
         "--drain-timeout", "60"], env={**os.environ, "RUNTIME_DIRECTORY": str(tmp_path)},
        stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving")
    process.args = port  # type: ignore[assignment]
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def test_a_stop_under_load_loses_no_stream(server: subprocess.Popen[str], tmp_path: Path) -> None:
    port = int(server.args)  # type: ignore[arg-type]
    ended: list[bool] = []
    begun = threading.Barrier(STREAMS + 1)
    answering = threading.Event()

    def stream() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True, "ignore_eos": True}
        begun.wait()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        try:
            response = connection.getresponse()
            answering.set()
            ended.append(response.read().rstrip().endswith(b"[DONE]"))
        except (OSError, http.client.HTTPException):
            ended.append(False)

    threads = [threading.Thread(target=stream) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait()
    assert answering.wait(60)
    server.send_signal(signal.SIGTERM)
    in_flight = STREAMS - len(ended)
    assert server.wait(60) == 0
    for thread in threads:
        thread.join()
    assert in_flight >= 5
    assert ended == [True] * STREAMS
    assert (tmp_path / "draining").exists()


def test_a_stop_while_idle_takes_the_load_balancers_time_and_no_more(server: subprocess.Popen[str]) -> None:
    names = json.loads(_get(int(server.args), "/v1/models"))["data"][0]["aliases"]  # type: ignore[arg-type]
    assert names == ["chat", "chat@v1-0123456789ab"]
    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert time.monotonic() - began >= 2


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())
