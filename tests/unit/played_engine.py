"""Plays an engine for the front's tests: streams that take a while, metrics, and no drain of its own."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import sys
import threading

STREAM = "/stream/"
in_flight = 0
changing = threading.Lock()
never = threading.Event()


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global in_flight  # noqa: PLW0603 - one number, guarded
        if self.path == "/exit":
            os._exit(0)
        if self.path == "/crash":
            os.kill(os.getpid(), signal.SIGKILL)
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics" and "--no-metrics" not in sys.argv:
            self.wfile.write(f"vllm:num_requests_running{{engine=\"0\"}} {in_flight}.0\n"
                             "vllm:num_requests_waiting{engine=\"0\"} 0.0\n".encode())
        if self.path.startswith(STREAM):
            with changing:
                in_flight += 1
            self.wfile.write(b"data\n")
            never.wait(float(self.path.removeprefix(STREAM)))
            with changing:
                in_flight -= 1
            self.wfile.write(b"[DONE]")

    def log_message(self, *_: object) -> None:
        pass


def stop(*_: object) -> None:
    say(f"SIGTERM with {in_flight} in flight")
    if "--deaf" not in sys.argv:
        os._exit(0)


signal.signal(signal.SIGTERM, stop)
say(f"sees {os.environ.get('CUDA_VISIBLE_DEVICES')}")
address = ("127.0.0.1", int(sys.argv[1]))
if "--never-ready" in sys.argv:
    bound = socket.socket()  # as vLLM does: the port is taken before the model loads, and nobody listens
    bound.bind(address)
    say("loading")
    never.wait()
server = http.server.ThreadingHTTPServer(address, Handler)
say("ready")
server.serve_forever()
