"""The load balancer's configuration, in a real HAProxy on loopback: weights, drains, reloads, refusals."""

from __future__ import annotations

import csv
import http.client
import http.server
import io
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rendering import render

from opsctl.resources import resource

HAPROXY = shutil.which("haproxy") or "/usr/sbin/haproxy"
needs_haproxy = pytest.mark.skipif(not Path(HAPROXY).exists(), reason="haproxy is not on this machine")
DEADLINE_S = 15.0

VARIABLES = {
    "load_balancer_addresses": ["127.0.0.1"], "load_balancer_management_addresses": ["127.0.0.1"],
    "load_balancer_statistics_port": 8404, "load_balancer_max_connections": 100, "load_balancer_buffer_bytes": 65536,
    "load_balancer_stream_timeout_s": 3600, "load_balancer_queue_timeout_s": 30, "load_balancer_retry_after_s": 5,
}


def server(name: str, *, address: str = "127.0.0.1", port: int = 8100, agent_port: int = 9777) -> dict[str, object]:
    return {"name": name, "instance": name.split(".", 1)[1], "address": address, "port": port,
            "agent_address": "127.0.0.1", "agent_port": agent_port}


def configuration(services: list[dict[str, object]], **changed: object) -> str:
    return render("templates/haproxy.cfg.j2", load_balancer_services=services, **(VARIABLES | changed))


def as_anybody(text: str, directory: Path) -> str:
    """The same without what only root may do, with its files in ``directory``."""
    text = re.sub(r"^    (chroot|user|group) .*\n", "", text, flags=re.MULTILINE)
    return (text.replace("/dev/log", str(directory / "log.sock"))
            .replace("/run/haproxy/admin.sock", str(directory / "admin.sock"))
            .replace("/var/lib/haproxy/server-state", str(directory / "server-state")))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


CHAT = {"name": "chat", "listen": 8000, "min_serving": 1, "servers": [server("gpu-1.chat.0"), server("gpu-2.chat.0")]}
EMBED = {"name": "embed", "listen": 8001, "min_serving": 1, "servers": [server("gpu-1.embed.0", address="fd00::2")]}


@needs_haproxy
@pytest.mark.parametrize("services", [[], [CHAT], [CHAT, EMBED], [CHAT | {"servers": []}]],
                         ids=["none", "one", "two", "without servers"])
@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["*"], ["fd00::1", "127.0.0.1"]], ids=str)
def test_haproxy_accepts_it_without_a_warning(services: list[dict[str, object]], addresses: list[str],
                                              tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(as_anybody(configuration(services, load_balancer_addresses=addresses), tmp_path))
    (tmp_path / "server-state").write_text("1\n")
    done = subprocess.run([HAPROXY, "-c", "-f", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr, done.stderr


def test_what_the_drain_rests_on() -> None:
    text = configuration([CHAT])
    assert "balance random(2)" in text
    assert "http-reuse never" in text
    assert "retry-on conn-failure empty-response 503" in text
    assert "    load-server-state-from-file global" in text
    assert not re.search(r"^[^#]*on-marked-down", text, re.MULTILINE)
    assert not re.search(r"^[^#]*stats admin", text, re.MULTILINE)


class Engine(http.server.ThreadingHTTPServer):
    """Answers every request with its name."""

    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.name = name
        self.healthy = True

    def handle_error(self, *_: object) -> None:
        """HAProxy's checks hang up as soon as they know enough."""


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        body = self.server.name.encode()
        self.send_response(200 if self.server.healthy or self.path != "/health" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


class Voice(socketserver.ThreadingTCPServer):
    """An agent that says of each instance what the test told it to."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Say)
        self.words: dict[str, str] = {}


class _Say(socketserver.StreamRequestHandler):
    server: Voice

    def handle(self) -> None:
        instance = self.rfile.readline().decode().strip()
        self.wfile.write(self.server.words[instance].encode() + b"\n")


class Balancer:
    """A running HAProxy with two instances behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.engines = [Engine("gpu-1.chat.0"), Engine("gpu-2.chat.1")]
        self.voice = Voice()
        self.voice.words = {"chat.0": "up 100%", "chat.1": "up 100%"}
        self.listen, self.statistics = free_ports(2)
        agent_port = self.voice.server_address[1]
        servers = [server(engine.name, port=engine.server_address[1], agent_port=agent_port) for engine in self.engines]
        text = configuration([{"name": "chat", "listen": self.listen, "servers": servers}],
                             load_balancer_statistics_port=self.statistics)
        (directory / "haproxy.cfg").write_text(as_anybody(text, directory))
        for listener in (*self.engines, self.voice):
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.state("start")
        self.process = subprocess.Popen([HAPROXY, "-W", "-f", directory / "haproxy.cfg"],
                                        stderr=(directory / "log").open("w"), stdout=subprocess.DEVNULL)

    def state(self, act: str) -> None:
        program = resource("roles") / "load_balancer" / "files" / "haproxy_state.py"
        subprocess.run([sys.executable, program, act, "--state", self.directory / "server-state",
                        "--socket", self.directory / "admin.sock"], check=True)

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.directory / "admin.sock"))
            connection.sendall(command.encode() + b"\n")
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def servers(self) -> dict[str, tuple[str, str]]:
        """``{"gpu-1.chat.0": ("UP", "100")}``: status and weight."""
        rows = csv.DictReader(io.StringIO(self.ask("show stat").removeprefix("# ")))
        return {row["svname"]: (row["status"], row["weight"]) for row in rows if row["svname"].startswith("gpu-")}

    def get(self, path: str = "/v1/models", port: int = 0) -> tuple[int, http.client.HTTPMessage, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.listen, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def who_answers(self, requests: int) -> Counter[str]:
        return Counter(self.get()[2] for _ in range(requests))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)
        for listener in (*self.engines, self.voice):
            listener.shutdown()
            listener.server_close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition of another process's; the deadline fails the test, it is no measure."""
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not _holds(condition):
        assert time.monotonic() < deadline, what
        pause.wait(0.02)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (ConnectionError, FileNotFoundError):
        return False


@pytest.fixture
def balancer(tmp_path: Path) -> Iterator[Balancer]:
    made = Balancer(tmp_path)
    try:
        until(lambda: made.servers() == {"gpu-1.chat.0": ("UP", "100"), "gpu-2.chat.1": ("UP", "100")}, "not up")
        yield made
    finally:
        made.close()


@needs_haproxy
class TestRunning:
    def test_both_answer_and_say_who_they_are(self, balancer: Balancer) -> None:
        for _ in range(20):
            status, headers, body = balancer.get()
            assert (status, headers["x-opsctl-instance"]) == (200, body)
        assert balancer.who_answers(40).keys() == {"gpu-1.chat.0", "gpu-2.chat.1"}

    def test_a_drained_instance_gets_nothing_and_each_hears_its_own_word(self, balancer: Balancer) -> None:
        balancer.voice.words["chat.0"] = "up 0%"
        until(lambda: balancer.servers()["gpu-1.chat.0"][1] == "0", "the agent's word did not arrive")
        assert balancer.servers()["gpu-2.chat.1"] == ("UP", "100")
        assert balancer.who_answers(40) == {"gpu-2.chat.1": 40}
        balancer.voice.words["chat.0"] = "up 100%"
        until(lambda: balancer.servers()["gpu-1.chat.0"][1] == "100", "it did not come back")

    def test_a_weight_is_obeyed_by_one_client(self, balancer: Balancer) -> None:
        balancer.voice.words["chat.0"] = "up 1%"
        until(lambda: balancer.servers()["gpu-1.chat.0"][1] == "1", "the agent's word did not arrive")
        assert balancer.who_answers(100)["gpu-1.chat.0"] <= 10

    def test_a_drain_outlives_a_reload(self, balancer: Balancer) -> None:
        balancer.voice.words["chat.0"] = "up 0%"
        until(lambda: balancer.servers()["gpu-1.chat.0"][1] == "0", "the agent's word did not arrive")
        before = balancer.ask("show info")
        balancer.state("save")
        os.kill(balancer.process.pid, signal.SIGUSR2)
        answers: Counter[str] = Counter()

        def reloaded() -> bool:
            answers.update(balancer.who_answers(5))
            return _pid(balancer.ask("show info")) != _pid(before)

        until(reloaded, "no reload")
        assert balancer.servers()["gpu-1.chat.0"] == ("UP", "0")
        answers.update(balancer.who_answers(40))
        assert answers.keys() == {"gpu-2.chat.1"}, answers

    def test_an_operators_drain_outlives_a_stop(self, balancer: Balancer) -> None:
        balancer.ask("set server chat/gpu-1.chat.0 state drain")
        until(lambda: balancer.servers()["gpu-1.chat.0"][0].startswith("DRAIN"), "no drain")
        balancer.state("stop")
        balancer.process.terminate()
        balancer.process.wait(timeout=10)
        balancer.state("start")
        balancer.process = subprocess.Popen([HAPROXY, "-W", "-f", balancer.directory / "haproxy.cfg"],
                                            stderr=subprocess.DEVNULL)
        until(lambda: balancer.servers()["gpu-1.chat.0"][0].startswith("DRAIN"), "the drain is forgotten")
        assert balancer.who_answers(20) == {"gpu-2.chat.1": 20}

    def test_nobody_serves(self, balancer: Balancer) -> None:
        balancer.voice.words = {"chat.0": "up 0%", "chat.1": "down #no release"}
        until(lambda: balancer.get()[0] == 503, "still answers")
        status, headers, body = balancer.get()
        assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "5", "application/json")
        assert "No instance of chat serves" in body

    def test_an_engine_that_is_not_healthy_gets_nothing(self, balancer: Balancer) -> None:
        balancer.engines[0].healthy = False
        until(lambda: balancer.servers()["gpu-1.chat.0"][0] == "DOWN", "still up")
        assert balancer.who_answers(20) == {"gpu-2.chat.1": 20}

    def test_the_statistics_can_be_read_and_nothing_else(self, balancer: Balancer) -> None:
        assert "haproxy_server_status" in balancer.get("/metrics", balancer.statistics)[2]
        assert "gpu-1.chat.0" in balancer.get("/", balancer.statistics)[2]


def _pid(info: str) -> str:
    return info.partition("\nPid: ")[2].partition("\n")[0]
