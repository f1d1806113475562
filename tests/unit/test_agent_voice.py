"""What the load balancer hears: only words that cannot do harm, at once, from real sockets."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from release_kit import Keys, make_host, make_keys

from opsctl.agent import supervisor
from opsctl.agent.paths import Paths
from opsctl.agent.supervisor import Voice
from opsctl.agent.voice import Facts, answer

SAFE = re.compile(rb"(up (100|\d{1,2})%|down #[a-z ]+)\n")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def host(tmp_path: Path, keys: Keys) -> Paths:
    paths = make_host(tmp_path / "host", keys)
    (paths.services / "chat").mkdir(parents=True)
    (paths.services / "chat" / "current.0").symlink_to("releases/v1-000000000000")
    return paths


@pytest.mark.parametrize(("facts", "said"), [
    (Facts(False), "down #unknown instance"),
    (Facts(True), "down #no release"),
    (Facts(True, "v1", "active"), "up 100%"),
    (Facts(True, "v1", "reloading"), "up 100%"),
    (Facts(True, "v1", "active", draining=True), "up 0%"),
    (Facts(True, "v1", "", draining=True), "up 0%"),
    (Facts(True, "v1", "deactivating"), "up 0%"),
    (Facts(True, "v1", "active", weight=0), "up 0%"),
    (Facts(True, "v1", "active", weight=30), "up 30%"),
    (Facts(True, "v1", "activating"), "down #starting"),
    (Facts(True, "v1", "failed"), "down #failed"),
    (Facts(True, "v1", "inactive"), "down #stopped"),
    (Facts(True, "v1", "inactive", draining=True), "down #stopped"),
    (Facts(True, "v1", ""), "up 100%"),
    (Facts(True, "v1", "active", unfinished=True), "down #unfinished start"),
    (Facts(True, "v1", "active", tried=True), "up 0%"),
    (Facts(True, "v1", "", tried=True), "up 0%"),
    (Facts(True, "v1", "activating", tried=True), "down #starting"),
    (Facts(True, "v1", "failed", tried=True), "down #failed"),
    (Facts(True, "", "active", unfinished=True), "down #no release"),
])
def test_what_is_said(facts: Facts, said: str) -> None:
    assert answer(facts) == said
    assert SAFE.fullmatch(answer(facts).encode() + b"\n")


def ask(voice: Voice, *questions: bytes) -> list[bytes]:
    """Asks over TCP, each question on a connection of its own, as HAProxy does."""

    async def converse() -> list[bytes]:
        server = await voice.serve("127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        answers = []
        for question in questions:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(question)
            if not question.endswith(b"\n"):
                writer.write_eof()
            answers.append(await asyncio.wait_for(reader.read(), 5))
            writer.close()
        server.close()
        return answers

    return asyncio.run(converse())


def known(host: Paths, active: str) -> Voice:
    voice = Voice(host)
    voice._active["chat.0"] = active
    return voice


def test_the_protocol(host: Paths) -> None:
    voice = known(host, "active")
    assert ask(voice, b"chat.0\n", b"chat.1\n", b"\n", b"../../etc\n", b"chat.0\r\n", b"\xff\xfe\n") == [
        b"up 100%\n", b"down #unknown instance\n", b"down #unknown instance\n", b"down #unknown instance\n",
        b"up 100%\n", b"down #unknown instance\n"]


def test_a_question_without_end_is_not_waited_for(host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "QUESTION_TIMEOUT_S", 0.05)

    async def silent() -> bytes:
        server = await known(host, "active").serve("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        answered = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        server.close()
        return answered

    assert asyncio.run(silent()) == b""


def test_a_draining_engine_gets_no_more(host: Paths) -> None:
    voice = known(host, "active")
    mark = host.draining("chat.0")
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert ask(voice, b"chat.0\n") == [b"up 0%\n"]
    mark.unlink()
    assert ask(voice, b"chat.0\n") == [b"up 100%\n"]


def test_the_least_weight_of_all_owners_counts(host: Paths) -> None:
    voice = known(host, "active")
    folder = host.drains("chat.0")
    folder.mkdir(parents=True)
    (folder / "guard.json").write_text(json.dumps({"owner": "guard", "weight": 50}))
    (folder / "operator:ann.json").write_text(json.dumps({"owner": "operator:ann", "weight": 0}))
    assert ask(voice, b"chat.0\n") == [b"up 0%\n"]
    (folder / "operator:ann.json").unlink()
    assert ask(voice, b"chat.0\n") == [b"up 50%\n"]
    (folder / "torn.json").write_text("{")
    assert ask(voice, b"chat.0\n") == [b"up 0%\n"]


def test_systemd_is_asked_in_the_background_and_its_silence_changes_nothing(
        host: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = Voice(host)
    block = "Id=inference@chat.0.service\nLoadState=loaded\nActiveState={}\nSubState=x\n"

    async def says(state: str) -> None:
        async def output(_argv: list[str]) -> str:
            return block.format(state)
        monkeypatch.setattr(supervisor, "_output", output)
        await voice.poll()

    asyncio.run(says("failed"))
    assert voice.answer("chat.0") == "down #failed"
    asyncio.run(says("active"))
    assert voice.answer("chat.0") == "up 100%"

    async def hangs(_argv: list[str]) -> str:
        raise asyncio.TimeoutError

    monkeypatch.setattr(supervisor, "_output", hangs)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(voice.poll())
    assert voice.answer("chat.0") == "up 100%"


@pytest.mark.parametrize(("record", "said"), [
    ('{"instance": "chat.0", "boot": "boot-1"}', "up 0%"),  # it is under way
    ('{"instance": "chat.0", "boot": "boot-0"}', "down #unfinished start"),
    ('{"remove": "/srv"}', "down #unfinished start"),
    ("", "down #unfinished start"),
])
def test_what_a_power_cut_left_half_done_gets_nothing(host: Paths, record: str, said: str) -> None:
    host.undos.mkdir(parents=True)
    host.undo("chat.0").write_text(record)
    assert known(host, "active").answer("chat.0") == said
