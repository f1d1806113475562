"""One streamed chat completion, read as its bytes arrive: HTTP/1.1, server-sent events, what counts as whole. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from urllib.parse import SplitResult

INSTANCE_HEADER = "x-opsctl-instance"
OK = 200
HEAD_END = b"\r\n\r\n"
EVENT = b"data: "
LAST_EVENT = b"[DONE]"
EXCERPT = 120  # characters of an error's text that a person is shown


def request(url: SplitResult, model: str, tokens: int) -> bytes:
    """A whole HTTP request for one stream of exactly ``tokens`` tokens; the connection is not used again."""
    body = json.dumps({
        "model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }).encode()
    head = (f"POST {url.path.rstrip('/')}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n")
    return head.encode() + body


@dataclass
class Response:
    """One HTTP/1.1 answer as its bytes arrive. ``text`` is its body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: bytearray = field(default_factory=bytearray)
    complete: bool = False  # nothing more can come; one without chunks ends with its connection
    _buffer: bytearray = field(default_factory=bytearray)
    _left: int = 0  # bytes of the current chunk, its line end included
    _chunked: bool = False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the connection.

        Raises:
            ValueError: they are no HTTP answer.
        """
        self._buffer += data
        if not self.status and not self._head():
            return
        if not self._chunked:
            self._body(bytes(self._buffer))
            self._buffer.clear()
            return
        while not self.complete and self._chunk():
            pass

    def _body(self, data: bytes) -> None:
        self.text += data

    def _head(self) -> bool:
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/") or not rest[:3].isdigit():
            raise ValueError(f"not an HTTP answer: {first[:EXCERPT]!r}")
        self.status = int(rest[:3])
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        del self._buffer[:end + len(HEAD_END)]
        return True

    def _chunk(self) -> bool:
        """Takes what there is of one chunk; False when more must arrive first."""
        if not self._left:
            end = self._buffer.find(b"\r\n")
            if end < 0:
                return False
            size = int(self._buffer[:end].partition(b";")[0], 16)
            del self._buffer[:end + 2]
            if not size:
                self.complete = True
                return False
            self._left = size + 2
        if len(self._buffer) < self._left:
            return False
        self._body(bytes(self._buffer[:self._left - 2]))
        del self._buffer[:self._left]
        self._left = 0
        return True


@dataclass
class Answer(Response):
    """A streamed completion. ``tokens`` is what the engine itself counted; None until its last words.

    ``events`` counts pieces of text: at most one a token, for half a character is not sent. ``text`` is kept of errors
    only.
    """

    events: int = 0
    tokens: int | None = None
    done: bool = False  # data: [DONE] arrived
    _line: bytearray = field(default_factory=bytearray)

    @property
    def instance(self) -> str:
        """The server that the load balancer chose, ``gpu-1.chat.0``; empty while no header has arrived."""
        return self.headers.get(INSTANCE_HEADER, "")

    def whole(self, wanted: int) -> bool:
        """HTTP 200, ``data: [DONE]``, and exactly as many tokens as were asked for."""
        return self.status == OK and self.done and self.tokens == wanted

    def lacking(self, wanted: int) -> str:
        """Why it is not whole, in words; empty when it is."""
        if self.whole(wanted):
            return ""
        if not self.status:
            return "no answer"
        if self.status != OK:
            said = " ".join(self.text.decode("utf-8", "replace").split())[:EXCERPT]
            return f"HTTP {self.status}" + (f": {said}" if said else "")
        if not self.done:
            return "ended in the middle" if self.events else "ended before the first token"
        return f"{self.tokens} tokens instead of {wanted}" if self.tokens is not None else "no count of tokens came"

    def _body(self, data: bytes) -> None:
        if self.status != OK:
            super()._body(data)
            return
        self._line += data
        *lines, self._line = self._line.split(b"\n")
        for line in lines:
            if line.startswith(EVENT):
                self._event(line[len(EVENT):].strip())

    def _event(self, text: bytes | bytearray) -> None:
        if text == LAST_EVENT:
            self.done = True
            return
        if b'"usage"' in text:
            usage = json.loads(text).get("usage")
            if usage:
                self.tokens = int(usage["completion_tokens"])
                return
        self.events += 1
