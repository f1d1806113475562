"""The audit line: written by the journal's protocol, and never in anybody's way."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from opsctl.agent import audit


@pytest.fixture
def journal(tmp_path: Path) -> socket.socket:
    hearing = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    hearing.bind(str(tmp_path / "journal"))
    return hearing


def test_a_line_reaches_the_journal(journal: socket.socket, tmp_path: Path) -> None:
    audit.record("guard", {"instance": "chat.0"}, tmp_path / "journal")
    lines = journal.recv(9999).decode().splitlines()
    assert "SYSLOG_IDENTIFIER=opsctl-audit" in lines
    said = json.loads(lines[0].removeprefix("MESSAGE="))
    assert (said["verb"], said["instance"]) == ("guard", "chat.0")


def test_a_journal_that_hears_nothing_holds_up_nobody(journal: socket.socket, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as full, \
            pytest.raises(BlockingIOError):
        while True:
            full.sendto(b"x", str(tmp_path / "journal"))
    acting = threading.Thread(target=audit.record, args=("guard", {}, tmp_path / "journal"), daemon=True)
    acting.start()
    acting.join(5)
    assert not acting.is_alive()


@pytest.mark.parametrize("name", ["nothing", "a-file", "closed", "deep/" * 60])
def test_without_a_journal_nothing_is_raised(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(str(tmp_path / "closed"))
    audit.record("guard", {}, tmp_path / name)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a-file", "closed"]
