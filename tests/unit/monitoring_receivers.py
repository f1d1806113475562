"""What Alertmanager talks to in tests: a webhook and a mail server that keep what they get; exporters of ours."""

from __future__ import annotations

import base64
import email
import email.policy
import http.server
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from typing import Any

DEADLINE_S = 45.0


class Inbox:
    """What arrived, and who waits for it."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self._news = threading.Condition()

    def put(self, one: Any) -> None:
        with self._news:
            self.got.append(one)
            self._news.notify_all()

    def wait_for(self, what: Callable[[Any], bool]) -> Any:
        """The first thing of which ``what`` is true, now or within the deadline.

        Raises:
            AssertionError: nothing of the kind came.
        """
        end = time.monotonic() + DEADLINE_S
        with self._news:
            while True:
                found = next((one for one in self.got if what(one)), None)
                if found is not None:
                    return found
                if not self._news.wait(end - time.monotonic()):
                    raise AssertionError(f"nothing of the kind came in {DEADLINE_S:g} s; there is {self.got}")


class Webhook(http.server.BaseHTTPRequestHandler):
    inbox: Inbox

    def do_POST(self) -> None:
        self.inbox.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Smtp(socketserver.StreamRequestHandler):
    """As much of SMTP as a relay that wants a login."""

    inbox: Inbox
    password: bytes

    def handle(self) -> None:
        self.say("220 relay.test ESMTP")
        known, recipients = False, []
        for line in self.rfile:
            words = line.decode().strip()
            verb = words.split(" ")[0].split(":")[0].upper()
            if verb == "EHLO":
                self.say("250-relay.test")
                self.say("250 AUTH PLAIN")
            elif verb == "AUTH":
                known = base64.b64decode(words.split(" ")[2]) == b"\0opsctl\0" + self.password
                self.say("235 known" if known else "535 unknown")
            elif verb == "RCPT":
                recipients.append(words.split("<")[1].split(">")[0])
                self.say("250 ok" if known else "530 who are you?")
            elif verb == "DATA":
                self.say("354 go on")
                text = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.inbox.put((recipients, email.message_from_bytes(text, policy=email.policy.default)))
                self.say("250 taken")
            elif verb == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("250 ok")

    def say(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\r\n")


def text_of(message: EmailMessage) -> str:
    body = message.get_body(("plain",))
    assert body is not None
    return str(body.get_content()).replace("\r\n", "\n")


class Exporter(http.server.BaseHTTPRequestHandler):
    """``/gpu``, ``/engine`` and ``/lb``: the text of ``pages``. The engine does as prometheus_client 0.23 and later do:
    an OpenMetrics scrape that does not ask for UTF-8 names gets ``_`` for every colon.
    """

    pages: dict[str, str]

    def do_GET(self) -> None:
        accepted = self.headers.get("Accept", "")
        text, kind = self.pages[self.path], "text/plain; version=0.0.4"
        if self.path == "/engine" and "application/openmetrics-text" in accepted and "allow-utf-8" not in accepted:
            text, kind = text.replace(":", "_") + "# EOF\n", "application/openmetrics-text; version=1.0.0"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


@contextmanager
def serving(handler: type[socketserver.BaseRequestHandler], **given: Any) -> Iterator[int]:
    """A server on loopback with ``given`` as its handler's own; yields its port."""
    with Server(("127.0.0.1", 0), type("Own", (handler,), given)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
