"""The smallest HTTP server that a scrape needs, in the agent's own loop: GET, one request a connection, and limits that
prometheus_client's own server lacks. Who is slow or too many is sent away; nobody waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

from opsctl.agent.gpu.web_config import WebConfig

CONNECTIONS = 16
REQUEST_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
REQUEST_LIMIT = 16_384  # bytes
PAGES = b"GET /metrics, /healthz or /readyz\n"


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/plain; charset=utf-8"})


UNAUTHORIZED = Answer(HTTPStatus.UNAUTHORIZED, b"a name and a password\n", {
    "Content-Type": "text/plain; charset=utf-8", "WWW-Authenticate": 'Basic realm="opsctl", charset="UTF-8"'})


@dataclass(frozen=True)
class Request:
    """``headers`` by lower-case name."""

    path: str
    query: str
    headers: Mapping[str, str]


Answering = Callable[[Request], Awaitable[Answer]]


def parse(text: bytes) -> Request | int:
    """A request, or the status that says why it is none."""
    first, *lines = text.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return HTTPStatus.BAD_REQUEST
    if words[0] != "GET":
        return HTTPStatus.METHOD_NOT_ALLOWED
    headers = {name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines)
               if colon}
    path, _, query = words[1].partition("?")
    return Request(path, query, headers)


class Web:
    """Serves ``answer`` on one address."""

    def __init__(self, answer: Answering, guarded: WebConfig | None = None) -> None:
        self._answer = answer
        self._guarded = guarded or WebConfig()
        self._open = 0

    async def serve(self, address: str, port: int) -> asyncio.Server:
        """Raises OSError when the address is taken."""
        tls = self._guarded.tls
        return await asyncio.start_server(self._one, address, port, limit=REQUEST_LIMIT, reuse_address=True, ssl=tls,
                                          ssl_handshake_timeout=REQUEST_TIMEOUT_S if tls else None)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            with suppress(OSError, asyncio.TimeoutError):
                answer = await self._respond(reader)
                writer.write(head(answer) + answer.body)
                await asyncio.wait_for(writer.drain(), ANSWER_TIMEOUT_S)
                writer.close()
                await asyncio.wait_for(writer.wait_closed(), ANSWER_TIMEOUT_S)
        finally:
            self._open -= 1
            writer.transport.abort()  # what is left after an answer that nobody took

    async def _respond(self, reader: asyncio.StreamReader) -> Answer:
        if self._open > CONNECTIONS:
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, b"too many scrapes at once\n")
        try:
            text = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_TIMEOUT_S)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return Answer(HTTPStatus.BAD_REQUEST, b"no HTTP request\n")
        request = parse(text)
        if isinstance(request, int):
            return Answer(request, PAGES)
        return await asyncio.wait_for(self._answer_to(request), ANSWER_TIMEOUT_S)

    async def _answer_to(self, request: Request) -> Answer:
        passwords = self._guarded.passwords
        if passwords is not None and not await passwords.admit(request.headers.get("authorization", "")):
            return UNAUTHORIZED
        return await self._answer(request)


def head(answer: Answer) -> bytes:
    """Status line and headers."""
    lines = [f"HTTP/1.1 {int(answer.status)} {HTTPStatus(answer.status).phrase}",
             *(f"{name}: {value}" for name, value in answer.headers.items()),
             f"Content-Length: {len(answer.body)}", "Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
