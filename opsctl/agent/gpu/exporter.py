"""The GPUs of this host, in the agent: reader, kernel log, page and file together. Nothing here may stop the voice.

A host without GPUs, where no placement names one and no driver made device nodes, has no reader and pays for nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import kernel_log, told, web_config
from opsctl.agent.gpu.metrics import Known, values
from opsctl.agent.gpu.page import render
from opsctl.agent.gpu.reader import TICK_S, Reader
from opsctl.agent.gpu.verdict import INCOMPLETE_STATES, Verdict, judge
from opsctl.agent.gpu.web import PAGES, Answer, Request, Web
from opsctl.agent.gpu.xids import Xids
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Settings, read_placements
from opsctl.errors import OpsctlError

WRITE_S = 0.9  # the file is not written again within, unless it says something else
LATE_S = 1.5  # nor is a sample waited for any longer
LOOK_S = 10.0  # at placements and device nodes
LISTEN_AGAIN_S = 10.0
WEB_LOOK_S = 2.0  # at the files of web.toml


class Exporter:
    """Port 9400 and ``/run/opsctl/agent/gpus.json``.

    ``guard`` gives the guard's document (``guard/told.py``) or None; ``on_sample`` is the reader's.
    """

    def __init__(self, paths: Paths, settings: Settings, version: str, say: Callable[[str], None],
                 clock: Callable[[], float] = boot_clock, guard: Callable[[], Mapping[str, Any] | None] = lambda: None,
                 on_sample: Callable[[], None] = lambda: None) -> None:
        self._paths, self._settings, self._version, self._say, self._clock = paths, settings, version, say, clock
        self._xids = Xids()
        self.reader = Reader(paths.gpu_reader_lock, say, lambda pci, xid, at: self._seen("event", pci, xid, at),
                             clock=clock, on_sample=self._sampled)
        self._on_sample = on_sample
        self._guard = guard
        self._owners: dict[str, str] = {}
        self._expected: tuple[str, ...] = settings.gpus
        self._nodes = False
        self._looked = self._written = -math.inf
        self._written_state = ""
        self._broken = ""
        self._guarded = False  # web.toml was there since this agent began
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scrape")  # one page at a time, beside the loop

    @property
    def wanted(self) -> bool:
        """Whether this host has GPUs, or should have."""
        return self._nodes or bool(self._expected)

    def verdict(self) -> Verdict:
        return judge(self.reader.view, self._clock(), self.wanted, self._expected,
                     lambda: told.loaded_driver(self._paths.root))

    def known(self) -> Known:
        self._xids.settle(time.time() - boot_clock())
        return Known(self._settings.host, self._version, self.reader.view, self.verdict(), self._xids, self._expected,
                     self._owners, self._clock(), self._guard())

    def look(self) -> None:
        """At the placements and device nodes, now and then: Ansible changes them while the agent runs."""
        if self._clock() - self._looked < LOOK_S:
            return
        self._looked = self._clock()
        self._nodes = told.has_nodes(self._paths.root)
        with suppress(OpsctlError):  # opsctl-host state says what is wrong with a placement
            placed = read_placements(self._paths)
            self._owners = {uuid: one.instance for one in placed for uuid in one.gpus}
            self._expected = tuple(dict.fromkeys([*self._settings.gpus, *self._owners]))

    async def tend(self) -> None:
        """Looks after reader and file for ever."""
        written = False
        try:
            while True:
                self.look()
                view = self.reader.view
                incomplete = view.fresh(self._clock()) and self.verdict().state in INCOMPLETE_STATES
                self.reader.tick(self.wanted, incomplete)
                if (self.wanted or written) and self._due(LATE_S):
                    written = self._write()
                await asyncio.sleep(TICK_S)
        finally:
            self.reader.stop()
            self._paths.gpus.unlink(missing_ok=True)

    async def hear_kernel(self) -> None:
        """Takes errors from the kernel's log for ever; waits until this host has GPUs."""
        while not self.wanted:
            await asyncio.sleep(LOOK_S)
        async for entry in kernel_log.follow(self._say):
            self._seen("log", entry.pci, entry.xid, entry.at)

    async def serve(self) -> None:
        """Listens for ever; an address that is taken is tried again, and changed files of web.toml are read anew."""
        if not self._settings.exporter_port:
            return
        complained = ""
        while True:
            try:
                guarded = web_config.read(self._paths.settings.with_name("web.toml"), was_there=self._guarded)
                self._guarded = guarded.there
                server = await Web(self.answer, guarded).serve(self._settings.listen, self._settings.exporter_port)
            except (OSError, OpsctlError) as error:
                self._guarded |= isinstance(error, OpsctlError)  # a wrong file is one, and no reason to open
                if str(error) != complained:
                    hint = f" {error.hint}." if isinstance(error, OpsctlError) else ""
                    self._say(f"metrics cannot be served: {str(error).rstrip('.')}; trying again.{hint}")
                complained = str(error)
                await asyncio.sleep(LISTEN_AGAIN_S if isinstance(error, OSError) else WEB_LOOK_S)
                continue
            complained = ""
            try:
                while web_config.look(guarded.files) == guarded.seen:
                    await asyncio.sleep(WEB_LOOK_S)
            finally:
                server.close()  # who is being answered gets the answer

    async def answer(self, request: Request) -> Answer:
        """``/metrics``, ``/healthz`` (alive), ``/readyz`` (what is exported can be believed)."""
        if request.path == "/healthz":
            return Answer(200, b"alive\n")
        if request.path in ("/readyz", "/health"):  # the second is its older name
            verdict = self.verdict()
            return Answer(200 if verdict.healthy else 503, f"{verdict.state}: {verdict.words}".rstrip(": ").encode()
                          + b"\n")
        if request.path != "/metrics":
            return Answer(404, PAGES)
        try:
            status, headers, body = await asyncio.get_running_loop().run_in_executor(
                self._pool, render, list(values(self.known())), request.query, request.headers)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the page, the voice goes on
            words = f"no metrics: {type(error).__name__}: {error}"
            if words != self._broken:
                self._say(words)
            self._broken = words
            return Answer(500, words.encode() + b"\n")
        return Answer(status, body, headers)

    def _sampled(self) -> None:
        self._on_sample()
        if self._due(WRITE_S):
            self._write()

    def _due(self, age_s: float) -> bool:
        """Whether the file is that old, or says something else than is so."""
        now, state = self._clock(), self.verdict().state
        if now - self._written < age_s and state == self._written_state:
            return False
        self._written, self._written_state = now, state
        return True

    def _write(self) -> bool:
        known = self.known()
        try:
            told.write(self._paths.gpus, told.document(known.view, known.verdict, self._xids, self._expected,
                                                       self._owners, known.now))
        except OSError as error:
            if str(error) != self._broken:
                self._say(f"{self._paths.gpus} cannot be written: {error}")
            self._broken = str(error)
        return self.wanted

    def _seen(self, source: str, pci: str, xid: int, at: float) -> None:
        if self._xids.seen(source, pci, xid, at):
            self._xids.settle(time.time() - boot_clock())
            gpu = self.reader.view.gpus.get(pci, {})
            self._say(f"XID {xid} of GPU {gpu.get('index', '?')} ({gpu.get('uuid', pci)}), told by the "
                      f"{'driver' if source == 'event' else 'kernel log'} at {told.utc(self._xids.wall(at))}")
