"""An engine for tests: answers as llama.cpp and vLLM do, over real HTTP, and misbehaves in each way that one can."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from opsctl.agent.settings import Placement


@dataclass
class Moods:
    """What an engine answers. Times in seconds, lengths in tokens; the engine reads them at every request."""

    names: tuple[str, ...] = ()
    health: int = 200
    completions: int = 200  # status
    completions_later: int = 0  # so many 503 first
    chat: int = 200
    lacks: int = 0  # tokens that it says fewer than were asked for
    text: str = "x"
    done: bool = True
    usage: bool = True
    garbage: bytes = b""  # instead of what it would answer
    error: bool = False  # in the middle of a stream
    breaks: bool = False  # closes the connection in the middle
    hangs: threading.Event | None = None  # answers completions once this is set
    token_s: float = 0.0003
    trickles_s: float = 0.0  # between two bytes of an answer
    running: int = 0
    chunks_of: int = 1  # tokens in one event of a stream
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    moods: Moods
    stopped: threading.Event

    def do_GET(self) -> None:
        moods = self.moods
        if self.path == "/health":
            self._say(moods.health, b"{}")
        elif self.path == "/v1/models":
            document = {"data": [{"id": name} for name in moods.names]}
            self._say(200, moods.garbage or json.dumps(document).encode())
        elif self.path == "/metrics":
            self._say(200, f"llamacpp:requests_processing {moods.running}\nllamacpp:requests_deferred 0\n".encode())
        else:
            self._say(404, b"")

    def do_POST(self) -> None:
        moods = self.moods
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        moods.asked.append((self.path, body))
        if moods.hangs is not None:
            while not (moods.hangs.wait(0.05) or self.stopped.is_set()):
                pass
        status = moods.chat if self.path.endswith("/chat/completions") else moods.completions
        if moods.completions_later:
            moods.completions_later -= 1
            status = 503
        if status != 200:
            self._say(status, b"{}")
        elif moods.garbage:
            self._say(200, moods.garbage)
        elif body.get("stream"):
            self._stream(body["max_tokens"])
        else:
            choice: dict[str, Any] = {"text": moods.text}
            if self.path.endswith("/chat/completions"):
                choice = {"message": {"role": "assistant", "content": moods.text}}
            self._say(200, json.dumps({"choices": [choice], "usage": self._usage(body["max_tokens"])}).encode())

    def _usage(self, asked: int) -> dict[str, int]:
        return {"completion_tokens": asked - self.moods.lacks}

    def _stream(self, asked: int) -> None:
        moods = self.moods
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for token in range(0, asked - moods.lacks, moods.chunks_of):
            self.stopped.wait(moods.token_s * moods.chunks_of)
            if token > asked // 2 and moods.breaks:
                self.connection.close()
                return
            if token > asked // 2 and moods.error:
                self._event({"error": {"message": "out of memory"}})
            self._event({"choices": [{"text": moods.text, "index": 0}]})
        if moods.usage:
            self._event({"choices": [], "usage": self._usage(asked)})
        if moods.done:
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, document: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.moods.trickles_s and self.command == "POST":
            for byte in body:
                self.stopped.wait(self.moods.trickles_s)
                self.wfile.write(bytes([byte]))
                if self.stopped.is_set():
                    return
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Engine:
    """A running one. ``port`` on 127.0.0.1."""

    moods: Moods
    port: int

    @property
    def placement(self) -> Placement:
        return Placement("chat.0", "chat", 0, "127.0.0.1", self.port)


@contextmanager
def engine(**moods: Any) -> Iterator[Engine]:
    one = replace(Moods(), **moods)
    stopped = threading.Event()
    handler = type("Handler", (_Handler,), {"moods": one, "stopped": stopped})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] - clients that gave up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield Engine(one, server.server_address[1])
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
