"""What a real HAProxy answers to the commands of ``opsctl.agent.balancer``."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_templates_haproxy import HAPROXY, Balancer, _Answer, needs_haproxy, until

from opsctl.agent.balancer import look, set_state
from opsctl.errors import OpsctlError, RefusedError

pytestmark = needs_haproxy
NOBODY = Path("/dev/null")  # no socket


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[Balancer]:
    """Two instances behind it, and the socket of its master."""
    made = Balancer(tmp_path)
    try:
        restart(made)
        yield made
    finally:
        made.close()


def restart(haproxy: Balancer) -> None:
    haproxy.process.terminate()
    haproxy.process.wait(timeout=10)
    haproxy.process = subprocess.Popen([HAPROXY, "-W", "-S", master(haproxy), "-f", haproxy.directory / "haproxy.cfg"],
                                       stderr=subprocess.DEVNULL)
    until(lambda: both(haproxy)[0] == (0, 100), "not up")


def admin(haproxy: Balancer) -> Path:
    return haproxy.directory / "admin.sock"


def master(haproxy: Balancer) -> Path:
    return haproxy.directory / "master.sock"


def both(haproxy: Balancer, whose: Path = NOBODY) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sessions and weight of each server; ``whose``: the master's socket, to count those of old processes too."""
    try:
        found = look(admin(haproxy), whose, [], [], 0)["servers"]
    except RefusedError as error:
        raise ConnectionError(error.message) from error  # it is just starting
    first, second = ((row["sessions"], row["weight"]) for row in found)
    return first, second


class Slow(_Answer):
    """Answers when the test says so."""

    go = threading.Event()

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        if self.path == "/slow":
            self.go.wait(30)
        super().do_GET()


def test_its_own_drain_and_its_end(haproxy: Balancer) -> None:
    assert set_state(admin(haproxy), "gpu-1.chat.0", "drain") == {"changed": True}
    seen = look(admin(haproxy), NOBODY, ["gpu-2.chat.1"], ["gpu-1.chat.0"], 10)
    assert (seen["missing"], seen["busy"]) == ([], [])
    assert look(admin(haproxy), NOBODY, ["gpu-1.chat.0"], [], 0)["missing"] == ["gpu-1.chat.0"]
    set_state(admin(haproxy), "gpu-1.chat.0", "ready")
    assert look(admin(haproxy), NOBODY, ["gpu-1.chat.0"], [], 10)["missing"] == []


def test_the_agents_word_is_told(haproxy: Balancer) -> None:
    def heard() -> str:
        (row,) = [row for row in look(admin(haproxy), NOBODY, [], [], 0)["servers"] if row["server"] == "gpu-1.chat.0"]
        return str(row["agent"])

    until(lambda: heard() == "L7OK", "no agent")
    haproxy.voice.words["chat.0"] = "down #stopped"
    until(lambda: heard() == "L7STS", "the agent's word did not arrive")
    assert look(admin(haproxy), NOBODY, [], ["gpu-1.chat.0"], 0)["busy"] == []
    haproxy.voice.shutdown()
    haproxy.voice.server_close()
    until(lambda: heard() == "L4CON", "nobody noticed that the agent is gone")


def test_a_word_that_it_does_not_know(haproxy: Balancer) -> None:
    with pytest.raises(OpsctlError, match="expects 'ready', 'drain' and 'maint'"):
        set_state(admin(haproxy), "gpu-1.chat.0", "asleep")


def test_a_stream_that_a_reload_left_behind_is_busy(haproxy: Balancer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy.engines[0], "RequestHandlerClass", Slow)
    haproxy.voice.words["chat.1"] = "up 0%"
    until(lambda: both(haproxy)[1] == (0, 0), "the other one is chosen still")
    stream = threading.Thread(target=haproxy.get, args=["/slow"])
    stream.start()
    try:
        until(lambda: both(haproxy)[0] == (1, 100), "nothing is in flight")
        haproxy.voice.words = {"chat.0": "up 0%", "chat.1": "up 100%"}
        until(lambda: both(haproxy) == ((1, 0), (0, 100)), "not drained")
        haproxy.state("save")
        os.kill(haproxy.process.pid, signal.SIGUSR2)
        until(lambda: both(haproxy)[0] == (0, 0), "no new process")
        assert both(haproxy, master(haproxy))[0] == (1, 0)
        assert look(admin(haproxy), master(haproxy), [], ["gpu-1.chat.0"], 0)["busy"] == ["gpu-1.chat.0"]
    finally:
        Slow.go.set()
        stream.join()
    assert look(admin(haproxy), master(haproxy), [], ["gpu-1.chat.0"], 10)["busy"] == []
