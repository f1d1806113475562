"""Whether others would go on serving, by HAProxy's own page; and what is kept over a restart."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opsctl.agent.guard import book
from opsctl.agent.guard.book import Kept, Orders
from opsctl.agent.guard.model import Memory, Pool, Rung
from opsctl.agent.guard.pool import look, others

HEAD = "# pxname,svname,scur,status,weight,agent_status,\n"


def page(**servers: tuple[str, int]) -> str:
    rows = [f"chat,{name.replace('_', '-')}.chat.0,0,{status},{weight},L7OK,"
            for name, (status, weight) in servers.items()]
    return HEAD + "\n".join(["chat,FRONTEND,3,OPEN,,,", *rows, "chat,BACKEND,3,UP,200,,",
                             "other,gpu-9.chat.0,0,UP,100,L7OK,"]) + "\n\n"


@pytest.mark.parametrize(("servers", "count"), [
    ({"gpu_1": ("UP", 1), "gpu_2": ("UP", 100), "gpu_3": ("UP", 70)}, 2),
    ({"gpu_1": ("UP", 100), "gpu_2": ("UP", 1)}, 0),  # as hot as this one: it may be about to stop
    ({"gpu_1": ("UP", 1), "gpu_2": ("DOWN", 100), "gpu_3": ("DRAIN", 0), "gpu_4": ("MAINT", 100)}, 0),
    ({"gpu_1": ("UP", 1), "gpu_2": ("UP 1/3", 100)}, 1),
    ({"gpu_1": ("UP", 1)}, 0),
])
def test_who_counts(servers: dict[str, tuple[str, int]], count: int) -> None:
    assert others(page(**servers), "chat", "gpu-1.chat.0") == count


@pytest.mark.parametrize(("text", "words"), [
    ("<html>", "no page of HAProxy"), ("", "no page"), (page(gpu_2=("UP", 100)), "does not know gpu-1.chat.0")])
def test_a_page_that_says_nothing_of_this_instance_is_none(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        others(text, "chat", "gpu-1.chat.0")


@contextmanager
def served(text: str, status: int = 200) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/;csv"
    finally:
        server.shutdown()
        server.server_close()


def ask(*pages: str) -> Pool:
    return asyncio.run(look(pages, "chat", "gpu-1.chat.0", 1))


def test_the_load_balancer_that_sees_least_counts() -> None:
    two = page(gpu_1=("UP", 1), gpu_2=("UP", 100), gpu_3=("UP", 100))
    one = page(gpu_1=("UP", 1), gpu_2=("UP", 100), gpu_3=("DOWN", 100))
    with served(two) as first, served(one) as second:
        assert ask(first, second) == Pool(1, 1)
        assert ask(first) == Pool(2, 1)


def test_a_page_that_cannot_be_read_makes_the_number_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # the site's proxy is not for this
    with served(page(gpu_1=("UP", 1), gpu_2=("UP", 100))) as good, served("no", status=503) as bad:
        assert ask(good).others == 1
        assert ask(good, bad).others is None
        assert "503" in ask(good, bad).words
        silent = ask(good, "http://127.0.0.1:1/;csv")
        assert silent.others is None
        assert "127.0.0.1:1" in silent.words
    assert ask().others is None


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "guard/state.json"
    memory = Memory(Rung.LEAST, 12.5, None, (3.0, 9.0), latched=True, stopped=True)
    kept = Kept(3600.0, {"chat.0": memory}, {"chat.0": 7.0}, {"GPU-0": (690, None)})
    book.write(file, kept, "boot-1")
    assert book.read(file, "boot-1") == kept
    again = book.read(file, "boot-2")
    assert again.memories == {"chat.0": Memory(latched=True)}  # units start by themselves, clocks are free
    assert again.observed_s == 3600.0
    assert again.limits == {}
    assert book.read(file, "").memories == {"chat.0": Memory(latched=True)}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"memories": []}', '{"memories": {"chat.0": 7}}'])
def test_a_torn_file_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    assert book.read(tmp_path / "state.json", "boot-1") == Kept()


def test_orders(tmp_path: Path) -> None:
    file = tmp_path / "guard-orders.json"
    assert book.read_orders(file) == Orders()
    file.write_text(json.dumps({"mode": "enforce", "unlatch": {"chat.0": 5}, "by": "ann"}))
    assert book.read_orders(file) == Orders("enforce", {"chat.0": 5.0})
    file.write_text('{"mode": "off"}')
    with pytest.raises(ValueError, match="mode is 'off', expected auto, observe, enforce"):
        book.read_orders(file)
