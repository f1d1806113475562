"""Whether an engine has anything in flight: only its own word counts, and a unit that does not run has nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from release_kit import Keys, Web, lay_down, make_host, make_keys, serving

from opsctl.agent.idle import is_idle, wait_until_idle
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placement
from opsctl.agent.systemd import Unit


@pytest.mark.parametrize(("active", "sub", "running", "waiting", "idle"), [
    ("active", "running", 0, 0, True),
    ("active", "running", 1, 0, False),
    ("active", "running", 0, 2, False),
    ("active", "running", None, None, False),  # it hangs
    ("active", "running", 0, None, False),
    ("deactivating", "stop-sigterm", 0, 0, True),
    ("deactivating", "stop-sigterm", None, None, False),
    ("inactive", "dead", None, None, True),
    ("failed", "failed", None, None, True),
    ("activating", "start", None, None, False),
    ("activating", "auto-restart", None, None, True),
])
def test_what_is_idle(active: str, sub: str, running: int | None, waiting: int | None, idle: bool) -> None:
    assert is_idle(Unit("inference@chat.0.service", active=active, sub=sub), running, waiting) is idle


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def engine() -> Iterator[Web]:
    with serving({}) as running:
        yield running


@pytest.fixture
def host(tmp_path: Path, keys: Keys, engine: Web) -> Paths:
    paths = make_host(tmp_path / "host", keys, int(engine.url.rpartition(":")[2]))
    release = lay_down(paths.releases("chat"), {"model.gguf": b"x"}, keys.private)
    paths.current("chat", 0).symlink_to(f"releases/{release.name}")
    return paths


def metrics(running: int, waiting: int) -> bytes:
    return f"llamacpp:requests_processing {running}\nllamacpp:requests_deferred {waiting}\n".encode()


def systemd_says(active: str) -> object:
    def run(argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 0, f"LoadState=loaded\nActiveState={active}\nSubState=x\n", "")
    return run


def test_it_waits_for_the_last_request(host: Paths, engine: Web) -> None:
    left = [metrics(2, 1), metrics(1, 0), metrics(0, 0)]
    engine.answer = lambda path: left.pop(0) if path == "/metrics" else None
    seen = wait_until_idle(host, read_placement(host, "chat.0"), 30, systemd_says("active"))
    assert seen == {"instance": "chat.0", "unit": "active", "running": 0, "waiting": 0, "idle": True}
    assert not left


def test_what_is_left_at_the_end_of_the_wait_is_told(host: Paths, engine: Web) -> None:
    engine.content["/metrics"] = metrics(2, 1)
    seen = wait_until_idle(host, read_placement(host, "chat.0"), 0, systemd_says("active"))
    assert (seen["running"], seen["waiting"], seen["idle"]) == (2, 1, False)


def test_an_engine_that_says_nothing_is_not_idle(host: Paths) -> None:
    seen = wait_until_idle(host, read_placement(host, "chat.0"), 0, systemd_says("active"))
    assert (seen["running"], seen["waiting"], seen["idle"]) == (None, None, False)


@pytest.mark.parametrize("harm", ["no release", "bad manifest"])
def test_an_engine_that_nobody_knows(host: Paths, engine: Web, harm: str) -> None:
    engine.content["/metrics"] = metrics(0, 0)
    current = host.current("chat", 0)
    (current / "manifest.json").write_bytes(b"{}") if harm == "bad manifest" else current.unlink()
    seen = wait_until_idle(host, read_placement(host, "chat.0"), 0, systemd_says("active"))
    assert (seen["running"], seen["idle"]) == (None, False)
    assert wait_until_idle(host, read_placement(host, "chat.0"), 0, systemd_says("inactive"))["idle"]
