"""An engine and load balancer in one, over real sockets: streams tokens, names its instance, fails when told."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import struct
import threading
from http.server import BaseHTTPRequestHandler
from typing import Any


class Engine(socketserver.ThreadingTCPServer):
    """``fails``: how the next streams end: ``cut``, ``reset``, ``short``, ``busy``; afterwards all is well."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, *, release: str = "v1-aaaaaaaaaaaa", pause_s: float = 0.002, context: int = 512) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.release = release
        self.pause_s = pause_s
        self.context = context
        self.fails: list[str] = []
        self.weight = 100
        self.asked = 0  # streams
        self.go = threading.Event()  # streams end only when it is set
        self.go.set()
        self.never = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go are no errors."""


class _Handler(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(json.dumps({"data": [{"id": "chat", "aliases": [f"chat@{self.server.release}"],
                                             "meta": {"n_ctx": self.server.context}}]}).encode())
        else:
            self._send(b"# pxname,svname,scur,status,weight\nchat,FRONTEND,1,OPEN,\n"
                       + f"chat,gpu-1.chat.0,3,UP,{self.server.weight}\n".encode())

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["max_tokens"]
        self.server.asked += 1
        how = self.server.fails.pop(0) if self.server.fails else "well"
        self.close_connection = True
        if how == "busy":
            self._send(b"no instance", status=503)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("x-opsctl-instance", "gpu-1.chat.0")
        self.end_headers()
        for number in range(wanted):
            self._event({"choices": [{"delta": {"content": "x"}}]})
            if number == wanted // 2 and how in ("cut", "reset"):
                if how == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())
                return
            self.server.never.wait(self.server.pause_s)
        self.server.go.wait(30)
        self._event({"choices": [], "usage": {"completion_tokens": wanted - (how == "short")}})
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(document)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
