"""What a host tells of itself for a rollout: the voice that really answers, weights, gates, engines, space."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from release_kit import ENGINE, Keys, build_environment, lay_down, make_host, make_keys

from opsctl.agent import drains, passed
from opsctl.agent.paths import Paths
from opsctl.agent.state import ask_voice, state
from opsctl.agent.supervisor import Voice


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    paths = make_host(tmp_path / "host", keys)
    release = lay_down(paths.releases("chat"), {"model.gguf": b"x" * 10}, keys.private)
    paths.current("chat", 0).symlink_to(f"releases/{release.name}")
    answer_at(paths, 1)
    return paths


def answer_at(paths: Paths, port: int) -> None:
    paths.settings.write_text(f'host = "gpu-1"\nlisten = "127.0.0.1"\nagent_check_port = {port}\n'
                              'gateway_url = "http://127.0.0.1:8480"\n')


def inactive(argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(argv, 0, "LoadState=loaded\nActiveState=inactive\nSubState=dead\n", "")


def told(host: Paths) -> dict[str, Any]:
    (found,) = state(host, inactive)["instances"]
    return dict(found)


@contextmanager
def agent(paths: Paths) -> Iterator[None]:
    """The real voice on a port of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(Voice(paths).serve("127.0.0.1", 0))
    answer_at(paths, server.sockets[0].getsockname()[1])
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_the_voice_that_answers_and_the_least_weight(host: Paths) -> None:
    drains.put(host, "chat.0", "operator:ann", 40, "", "ann")
    drains.put(host, "chat.0", "guard", 70, "", "agent")
    with agent(host):
        found = told(host)
    assert (found["voice"], found["weight"]) == ("up 40%", 40)
    assert [drain["owner"] for drain in state(host, inactive)["drains"]] == ["guard", "operator:ann"]


def test_an_agent_that_is_gone_says_nothing(host: Paths) -> None:
    assert told(host)["voice"] == ""


def test_an_agent_that_hangs_is_not_waited_for(host: Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        assert ask_voice("127.0.0.1", hangs.getsockname()[1], "chat.0", timeout_s=0.05) == ""


def test_the_last_gate_is_that_of_the_release_it_serves(host: Paths) -> None:
    assert told(host)["gate"] is None
    serves = host.current("chat", 0).readlink().name
    passed.write(host, "chat.0", "v0-000000000000", {"tokens_per_second": 1.0})
    assert told(host)["gate"] is None
    passed.write(host, "chat.0", serves, {"tokens_per_second": 25.5, "start_s": 3.0})
    gate = told(host)["gate"]
    assert (gate["release"], gate["tokens_per_second"]) == (serves, 25.5)
    host.current("chat", 0).unlink()
    assert told(host)["gate"] is None


def test_engines_and_space(host: Paths) -> None:
    document = state(host, inactive)
    (release,) = document["releases"]
    assert (release["engine"], release["engine_built"]) == (ENGINE.directory, False)
    build_environment(host)
    (release,) = state(host, inactive)["releases"]
    assert release["engine_built"]
    assert document["free_bytes"] > 0


def test_a_host_that_never_had_a_release_has_space_too(host: Paths) -> None:
    host.services.rename(host.services.with_name("gone"))
    assert state(host, inactive)["free_bytes"] > 0
