"""What the setter may be asked, what it orders of systemd, and how the agent's side of the socket behaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.paths import Paths
from opsctl.agent.setter import protocol, units
from opsctl.agent.setter.client import Setter
from opsctl.agent.setter.protocol import RefusedRequest
from opsctl.errors import OpsctlError

GPU = "GPU-00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize("request_", [
    {"verb": "clocks", "gpu": GPU, "max_mhz": 900}, {"verb": "power", "gpu": GPU, "watts": 350},
    {"verb": "release", "gpu": GPU}, {"verb": "release-all"}, {"verb": "stop", "instance": "chat.0", "how": "drain"},
    {"verb": "stop", "instance": "chat.0", "how": "now"}, {"verb": "start", "instance": "a-b.12"}, {"verb": "state"},
])
def test_a_request_is_taken_as_it_is(request_: dict[str, Any]) -> None:
    assert protocol.read(protocol.line(request_)) == request_


@pytest.mark.parametrize(("line", "word"), [
    (b"no json", "JSON"), (b"[" * 3000, "JSON"), (b'"clocks"', "object"), (b"{}", "verb None"),
    (b'{"verb":["clocks"]}', "verb"), (b'{"verb":"exec","argv":["sh"]}', "verb 'exec'"),
    (b'{"verb":"state","more":1}', "more"), (b'{"verb":"stop","instance":"chat.0"}', "how"),
    *[(json.dumps({"verb": "clocks", "gpu": GPU, "max_mhz": mhz}).encode(), "max_mhz")
      for mhz in (0, -5, 10_001, 900.5, "900", True, None)],
    (json.dumps({"verb": "power", "gpu": GPU, "watts": 0}).encode(), "watts"),
    *[(json.dumps({"verb": "release", "gpu": gpu}).encode(), "gpu")
      for gpu in ("0", "", "GPU-1", f"{GPU}\n", f"{GPU}/..", 0)],
    *[(json.dumps({"verb": "start", "instance": instance}).encode(), "instance")
      for instance in ("chat", "chat.", ".0", "../chat.0", "chat.0.service", "chat.0 sshd", "-chat.0", "chat.0\n", 7)],
    (b'{"verb":"stop","instance":"chat.0","how":"kill"}', "how"),
])
def test_anything_else_is_refused_by_name(line: bytes, word: str) -> None:
    with pytest.raises(RefusedRequest) as refused:
        protocol.read(line)
    assert refused.value.code == "invalid"
    assert word in refused.value.words


class Systemctl:
    """Notes what it was told; fails with what it was given."""

    def __init__(self, complaint: str = "") -> None:
        self.told: list[list[str]] = []
        self.complaint = complaint

    def __call__(self, argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        self.told.append(list(argv))
        if self.complaint == "hangs":
            raise OpsctlError("host.systemd", "systemctl could not be run: timeout.")
        return subprocess.CompletedProcess(argv, int(bool(self.complaint)), "", self.complaint)


@pytest.fixture
def host(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path)
    paths.placements.mkdir(parents=True)
    (paths.placements / "chat.0.toml").touch()
    return paths


UNIT = "inference@chat.0.service"


class TestUnits:
    def test_a_drain_is_an_ordinary_stop_that_nobody_waits_for(self, host: Paths) -> None:
        systemctl = Systemctl()
        assert units.stop(host, "chat.0", "drain", systemctl) == {"how": "drain"}
        assert systemctl.told == [["systemctl", "stop", "--no-block", "--", UNIT]]

    def test_now_kills_only_after_systemd_knows_that_it_is_to_stay_down(self, host: Paths) -> None:
        systemctl = Systemctl()
        units.stop(host, "chat.0", "now", systemctl)
        assert systemctl.told == [["systemctl", "stop", "--no-block", "--", UNIT],
                                  ["systemctl", "kill", "--signal=SIGKILL", "--", UNIT]]

    def test_a_start(self, host: Paths) -> None:
        systemctl = Systemctl()
        units.start(host, "chat.0", systemctl)
        assert systemctl.told == [["systemctl", "start", "--no-block", "--", UNIT]]

    @pytest.mark.parametrize("act", [units.start,
                                     lambda host, name, run: units.stop(host, name, "now", run)])
    def test_nothing_that_is_not_placed_here_and_nothing_that_a_cutover_works_on(self, host: Paths, act: Any) -> None:
        systemctl = Systemctl()
        with pytest.raises(RefusedRequest) as refused:
            act(host, "chat.1", systemctl)
        assert refused.value.code == "unknown_instance"
        host.undos.mkdir(parents=True)
        host.undo("chat.0").touch()
        with pytest.raises(RefusedRequest, match="cutover") as refused:
            act(host, "chat.0", systemctl)
        assert refused.value.code == "busy"
        assert not systemctl.told
        host.undo("chat.0").unlink()
        act(host, "chat.0", systemctl)
        assert systemctl.told

    @pytest.mark.parametrize("complaint", ["hangs", "Unit is masked."])
    def test_what_systemd_says_is_passed_on(self, host: Paths, complaint: str) -> None:
        with pytest.raises(RefusedRequest, match=r"timeout|masked") as refused:
            units.start(host, "chat.0", Systemctl(complaint))
        assert refused.value.code == "failed"


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def played(tmp_path: Path, talk: Talk, test: Callable[[Setter], Awaitable[None]]) -> None:
    """A test of the client, whose setter says what ``talk`` does."""
    async def both() -> None:
        server = await asyncio.start_unix_server(talk, str(tmp_path / "socket"))
        setter = Setter(tmp_path / "socket", timeout_s=0.3)
        await test(setter)
        setter.close()
        server.close()

    asyncio.run(both())


STATE = {"verb": "state"}


class TestClient:
    def test_nobody_there(self, tmp_path: Path) -> None:
        answer = asyncio.run(Setter(tmp_path / "socket").ask(STATE))
        assert (answer["ok"], answer["code"]) == (False, "absent")
        answer = asyncio.run(Setter(tmp_path / "socket").ask({"verb": "start", "instance": "chat.0"}))
        assert answer["code"] == "absent"

    def test_an_answer_that_comes_late_is_not_taken_for_the_next_ones(self, tmp_path: Path) -> None:
        heard: list[int] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.readline():
                heard.append(len(heard))
                number = heard[-1]
                await asyncio.sleep(0.5 if number == 0 else 0)
                writer.write(protocol.line({"ok": True, "number": number}))

        async def test(setter: Setter) -> None:
            before = setter.generation
            assert (await setter.ask(STATE))["code"] == "hangs"
            assert setter.generation != before  # what was set is lost with the connection
            assert (await setter.ask(STATE)) == {"ok": True, "number": 1}
            await asyncio.sleep(0.4)
            assert (await setter.ask(STATE)) == {"ok": True, "number": 2}

        played(tmp_path, talk, test)

    def test_a_lost_connection_is_noticed_before_anybody_asks(self, tmp_path: Path) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(protocol.line({"ok": True}))
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.close()

        async def test(setter: Setter) -> None:
            first = setter.generation
            assert (await setter.ask(STATE))["ok"]
            assert setter.generation == first
            await asyncio.sleep(0.2)
            second = setter.generation
            assert second != first
            assert (await setter.ask(STATE))["ok"]  # on a connection of its own
            assert setter.generation == second

        played(tmp_path, talk, test)

    def test_a_stop_does_not_wait_behind_a_driver_that_hangs(self, tmp_path: Path) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = json.loads(await reader.readline())
            await asyncio.sleep(0 if request["verb"] == "stop" else 10)
            writer.write(protocol.line({"ok": True}))

        async def test(setter: Setter) -> None:
            clocks = asyncio.create_task(setter.ask({"verb": "clocks", "gpu": GPU, "max_mhz": 900}))
            await asyncio.sleep(0.05)
            assert (await setter.ask({"verb": "stop", "instance": "chat.0", "how": "now"}))["ok"]
            assert not clocks.done()
            assert (await clocks)["code"] == "hangs"

        played(tmp_path, talk, test)

    @pytest.mark.parametrize("said", [b"nonsense\n", b"[1]\n", b'{"ok": tr', b""])
    def test_what_is_no_answer(self, tmp_path: Path, said: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(said)
            writer.close()

        async def test(setter: Setter) -> None:
            answer = await setter.ask(STATE)
            assert (answer["ok"], answer["code"]) == (False, "absent")

        played(tmp_path, talk, test)
