"""``opsctl lab load`` as a process: its lines, its result, its exit code, its manners when it is told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from streaming_engine import Engine

PLAIN = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"],
         "HOME": "/nonexistent"}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running
        running.shutdown()


@pytest.fixture
def inventory(tmp_path: Path, engine: Engine) -> Path:
    """One machine that is everything; the engine there is its load balancer too."""
    (tmp_path / "inventory.ini").write_text(
        "[gpu]\nhere ansible_connection=local\n[lb]\nhere\n[gateway]\nhere\n[monitor]\nhere\n")
    (tmp_path / "services.yml").write_text(
        f"chat:\n  group: gpu\n  port: {engine.port + 1 if engine.port < 65535 else 8100}\n  listen: {engine.port}\n"
        "  instances_per_host: 1\n  gpus_per_instance: 0\n  min_serving: 1\n")
    return tmp_path / "inventory.ini"


def started(inventory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "opsctl", "lab", "load", "-i", inventory, *arguments], env=PLAIN,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def load(inventory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = started(inventory, *arguments)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_nothing_lost_is_exit_0(inventory: Path) -> None:
    said = load(inventory, "--clients", "4", "--tokens", "5", "--streams", "12", "--seconds-per-stream", "0.2")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[0].split() == ["release", "instance", "whole", "lost", "median", "95", "%", "most",
                                                   "in", "flight"]
    assert said.stdout.splitlines()[-1].endswith("s, 5 tokens a stream: 0 of 12 lost")


def test_a_lost_stream_is_exit_9_and_in_the_document(inventory: Path, engine: Engine) -> None:
    engine.fails = ["cut"]
    said = load(inventory, "--clients", "2", "--tokens", "5", "--streams", "6", "--seconds-per-stream", "0.2", "--json")
    assert said.returncode == 9, said.stderr
    document = json.loads(said.stdout)
    assert document["schema"] == "opsctl.lab-load/v1"
    assert (document["whole"], document["lost"], document["clients"]) == (5, 1, 2)
    assert document["reasons"] == [{"why": "ended in the middle", "server": "gpu-1.chat.0", "count": 1}]


@pytest.mark.parametrize(("command", "code"), [(["sh", "-c", "echo $OPSCTL_INVENTORY; exit 6"], 6), (["true"], 0)])
def test_a_command_runs_under_the_load_and_its_exit_code_is_told(inventory: Path, command: list[str], code: int
                                                                 ) -> None:
    said = load(inventory, "--clients", "2", "--tokens", "5", "--seconds-per-stream", "0.2", "--", *command)
    assert said.returncode == code
    assert "0 of" in said.stdout
    if code:
        assert str(inventory) in said.stderr.splitlines()


def test_a_command_that_is_not_there(inventory: Path) -> None:
    said = load(inventory, "--clients", "2", "--tokens", "5", "--seconds-per-stream", "0.2", "--", "no-such-command")
    assert said.returncode == 2
    assert "no-such-command: no such file or directory." in said.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_ends_its_streams_and_prints(inventory: Path, engine: Engine, number: signal.Signals) -> None:
    engine.go.clear()
    process = started(inventory, "--clients", "3", "--tokens", "5", "--seconds-per-stream", "0.1")
    waiting = next(True for _ in iter(lambda: engine.never.wait(0.02), None) if engine.asked == 3)
    assert waiting
    process.send_signal(number)
    assert process.stderr is not None
    assert process.stderr.readline() == "the streams that run end now; Ctrl-C again drops them\n"
    engine.go.set()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].endswith("0 of 3 lost")


def test_on_a_terminal_there_is_a_graph_and_the_commands_lines_stand_above_it(inventory: Path) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "opsctl", "lab", "load", "-i", inventory, "--clients", "3", "--tokens", "20",
         "--seconds-per-stream", "1", "--", "echo", "moved [gpu-1]"], stdin=subprocess.DEVNULL, stdout=its, stderr=its,
        env=PLAIN | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"})
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(30) == 0
    lines = shown.decode().replace("\r", "").splitlines()
    above, graph, table = (next(number for number, line in reversed(list(enumerate(lines))) if words in line)
                           for words in ("moved [gpu-1]", "streams in flight", "tokens a stream: 0 of"))
    assert above < graph < table
    assert "gpu-1.chat.0" in "".join(lines[graph:])


def test_tokens_that_are_none(inventory: Path) -> None:
    said = load(inventory, "--tokens", "many")
    assert said.returncode == 2
    assert "--tokens many" in said.stderr
