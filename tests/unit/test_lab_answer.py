"""A stream is whole only when all of it arrived, however its bytes were cut on the way."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from opsctl.lab.answer import Answer, Response, request

HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
        b"X-Opsctl-Instance: gpu-2.chat.0\r\n\r\n")
BUSY = (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 50\r\nretry-after: 5\r\n\r\n"
        b'{"error": {"message": "No instance of chat serves"}}')


def event(text: str) -> bytes:
    line = f"data: {text}\n\n".encode()
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def piece(text: str) -> bytes:
    return event(json.dumps({"choices": [{"delta": {"content": text}}], "model": "chat"}))


def usage(tokens: int) -> bytes:
    return event(json.dumps({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 3}}))


DONE, END = event("[DONE]"), b"0\r\n\r\n"
PIECES = piece("a") + piece("�") + piece("c")
WHOLE = HEAD + PIECES + usage(4) + DONE + END


def fed(data: bytes, size: int = 0) -> Answer:
    answer = Answer()
    for start in range(0, len(data), size or len(data) or 1):
        answer.feed(data[start:start + (size or len(data))])
    return answer


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 64, 200])
def test_a_whole_stream_is_whole_however_it_is_cut(size: int) -> None:
    answer = fed(WHOLE, size)
    assert (answer.status, answer.instance, answer.events, answer.tokens) == (200, "gpu-2.chat.0", 3, 4)
    assert answer.done
    assert answer.complete
    assert answer.lacking(4) == ""


@pytest.mark.parametrize(("data", "why"), [
    (b"", "no answer"),
    (HEAD[:40], "no answer"),
    (HEAD, "ended before the first token"),
    (HEAD + PIECES, "ended in the middle"),
    (HEAD + PIECES + usage(4), "ended in the middle"),
    (HEAD + PIECES + usage(4) + DONE[:8], "ended in the middle"),
    (HEAD + PIECES + DONE + END, "no count of tokens came"),
    (HEAD + PIECES + usage(3) + DONE + END, "3 tokens instead of 4"),
    (HEAD + PIECES + usage(5) + DONE + END, "5 tokens instead of 4"),
    (BUSY, 'HTTP 503: {"error": {"message": "No instance of chat serves"}}'),
    (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "HTTP 502"),
])
def test_why_a_stream_is_not_whole(data: bytes, why: str) -> None:
    assert fed(data, 5).lacking(4) == why


def test_no_prefix_of_a_whole_stream_is_whole() -> None:
    """The teeth of every count: wherever an engine is cut off before its last event, the stream is lost."""
    assert not [cut for cut in range(len(WHOLE) - len(END)) if fed(WHOLE[:cut]).whole(4)]
    assert fed(WHOLE[:-len(END)]).whole(4)


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", HEAD + b"not a size\r\n"])
def test_what_is_no_http_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        fed(data)


def test_a_plain_page_is_read_to_its_end() -> None:
    page = Response()
    page.feed(b"HTTP/1.1 200 OK\r\n\r\n# pxname,svname\n")
    page.feed(b"chat,gpu-1.chat.0\n")
    assert page.text == b"# pxname,svname\nchat,gpu-1.chat.0\n"


def test_a_request_wants_exactly_its_tokens_on_a_connection_of_its_own() -> None:
    head, _, body = request(urlsplit("http://10.0.0.2:8000/v1"), "chat", 57).partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [
        "POST /v1/chat/completions HTTP/1.1", "Host: 10.0.0.2:8000", "Content-Type: application/json",
        f"Content-Length: {len(body)}", "Connection: close"]
    wanted = json.loads(body)
    assert (wanted["max_tokens"], wanted["ignore_eos"], wanted["stream"]) == (57, True, True)
    assert wanted["stream_options"] == {"include_usage": True}
