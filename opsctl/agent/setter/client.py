"""How the agent's loop asks the setter: one connection that holds what was set, and one of its own for each stop and
start, which never wait behind a driver that hangs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opsctl.agent.setter.protocol import LINE_LIMIT, line

TIMEOUT_S = 5.0
ALONE = ("stop", "start")
ANSWER_LIMIT = 16 * LINE_LIMIT  # the state of all GPUs is one line


class Setter:
    """``ask`` never raises: a setter that is not there is ``absent``, one that does not answer ``hangs``."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()
        self._lost = 0

    @property
    def generation(self) -> int:
        """Another number than before: the connection was lost since, and with it, sooner or later, what was set."""
        if self._kept is not None and self._kept[0].at_eof():
            self._drop()
        return self._lost

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The setter's answer, or ``{"ok": False, "code": ..., "words": ...}``."""
        if request["verb"] in ALONE:
            return await self._ask_alone(request)
        async with self._turn:
            _ = self.generation  # an end that nobody has noticed yet
            try:
                return await asyncio.wait_for(self._ask_kept(request), self._timeout_s)
            except (OSError, ValueError, asyncio.TimeoutError) as error:
                self._drop()
                return self._failure(error)
            except asyncio.CancelledError:
                self._drop()  # its answer would be taken for that of the next question
                raise

    def close(self) -> None:
        """What is set is restored some seconds later, unless somebody connects and sets it again."""
        self._drop()

    async def _ask_kept(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._kept is None:
            self._kept = await asyncio.open_unix_connection(str(self._path), limit=ANSWER_LIMIT)
        return await _converse(*self._kept, request)

    async def _ask_alone(self, request: Mapping[str, Any]) -> dict[str, Any]:
        async def converse() -> dict[str, Any]:
            reader, writer = await asyncio.open_unix_connection(str(self._path), limit=ANSWER_LIMIT)
            try:
                return await _converse(reader, writer, request)
            finally:
                writer.close()

        try:
            return await asyncio.wait_for(converse(), self._timeout_s)
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            return self._failure(error)

    def _drop(self) -> None:
        if self._kept is not None:
            with suppress(OSError, RuntimeError):  # RuntimeError: the loop is closed
                self._kept[1].close()
            self._kept = None
            self._lost += 1

    def _failure(self, error: Exception) -> dict[str, Any]:
        if isinstance(error, asyncio.TimeoutError):
            return {"ok": False, "code": "hangs", "words": f"the setter did not answer within {self._timeout_s:.0f} s"}
        return {"ok": False, "code": "absent", "words": f"the setter does not answer on {self._path}: {error}"}


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                    request: Mapping[str, Any]) -> dict[str, Any]:
    """One question and its answer. Raises OSError, or ValueError for what is no answer."""
    writer.write(line(request))
    await writer.drain()
    answer = await reader.readline()
    if not answer.endswith(b"\n"):
        raise ConnectionResetError("the connection ended")
    document = json.loads(answer)
    if not isinstance(document, dict):
        raise ValueError(f"{answer[:80]!r} is no answer")
    return document
