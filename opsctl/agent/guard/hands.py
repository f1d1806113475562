"""Brings clocks, power limits and units to what the guard decided, through the setter (``opsctl/agent/setter/``).

What is wanted of a GPU is asserted until the setter has done it, and again when the setter is another process than
before: it restores what it set whenever it ends. A GPU that lets nobody lock its clocks gets a power limit instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from opsctl.agent.drains import boot_clock

AGAIN_S = 10.0  # after a refusal
CHECK_S = 1.0
NO_CLOCKS = ("not_supported",)
PERHAPS = ("hangs", "failed")  # what was asked may have happened all the same
Answer = Mapping[str, Any]


class Setter(Protocol):
    """``opsctl.agent.setter.client``. ``generation`` is another number whenever what was set may be lost."""

    @property
    def generation(self) -> int: ...

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Never raises: a setter that is not there, or does not answer, answers so."""


@dataclass(frozen=True)
class Limit:
    """The most that a GPU shall do. ``watts``: what to set where clocks cannot be locked; None: nothing can."""

    max_mhz: int | None
    watts: int | None


UNKNOWN = Limit(None, -1)  # set by a connection that is gone: perhaps it is still so


@dataclass(frozen=True)
class Refusal:
    """Why an order was not carried out; ``perhaps``: it may have been all the same."""

    words: str
    perhaps: bool


class Hands:
    """``limits``: what is in force by GPU, ``{"max_mhz": 1584}`` or ``{"watts": 420}``. ``trouble``: why not more."""

    def __init__(self, setter: Setter, say: Callable[[str], None], clock: Callable[[], float] = boot_clock) -> None:
        self._setter, self._say, self._clock = setter, say, clock
        self._wanted: dict[str, Limit] = {}
        self._done: dict[str, Limit] = {}
        self._generation = setter.generation
        self._no_clocks: set[str] = set()
        self._not_before: dict[str, float] = {}  # by GPU: refused, asked again then
        self._news = asyncio.Event()
        self.limits: dict[str, dict[str, Any]] = {}
        self.trouble = ""

    def want(self, wanted: Mapping[str, Limit]) -> None:
        """By UUID; a GPU that is not named is left to its driver."""
        if wanted != self._wanted:
            self._not_before = {uuid: at for uuid, at in self._not_before.items()
                                if wanted.get(uuid) == self._wanted.get(uuid)}
            self._wanted = dict(wanted)
            self._news.set()

    async def work(self) -> None:
        """For ever. Nothing is asked of the setter while nothing is wanted or set."""
        while True:
            self._news.clear()
            if self._setter.generation != self._generation:
                self._generation = self._setter.generation
                self._done, self.limits, self._not_before = dict.fromkeys(self._done, UNKNOWN), {}, {}
            for uuid in self._due():
                await self._bring(uuid)
            if not self._wanted and not self._done:
                self.trouble = ""
            try:
                await asyncio.wait_for(self._news.wait(), CHECK_S if self._wanted or self._done else None)
            except asyncio.TimeoutError:
                continue

    async def order(self, instance: str, order: str) -> Refusal | None:
        """``drain`` and ``now`` stop its unit, ``start`` starts it. None: done."""
        answer = await self._setter.ask({"verb": "start", "instance": instance} if order == "start" else
                                        {"verb": "stop", "instance": instance, "how": order})
        words = self._heard(answer)
        return Refusal(words, answer.get("code") in PERHAPS) if words else None

    async def leave(self) -> None:
        """The agent ends in order: what is set is restored at once."""
        if self._done:
            await self._setter.ask({"verb": "release-all"})
            self._done, self.limits = {}, {}

    def _due(self) -> list[str]:
        now = self._clock()
        uuids = dict.fromkeys([*self._wanted, *self._done])
        return [uuid for uuid in uuids if self._wanted.get(uuid) != self._done.get(uuid)
                and now >= self._not_before.get(uuid, now)]

    async def _bring(self, uuid: str) -> None:
        wanted = self._wanted.get(uuid)
        answer, power = await self._ask(uuid, wanted)
        words = self._heard(answer)
        if words:
            self._not_before[uuid] = self._clock() + AGAIN_S
            return
        self.trouble = ""
        if wanted is None:
            self._done.pop(uuid, None)
            self.limits.pop(uuid, None)
            return
        if power and self._no_clocks_any_more(uuid):
            self._say(f"clocks of {uuid} cannot be locked: its power limit is set instead")
        self._done[uuid] = wanted
        self.limits[uuid] = {key: answer[key] for key in ("max_mhz", "watts") if key in answer}

    async def _ask(self, uuid: str, wanted: Limit | None) -> tuple[Answer, bool]:
        """The answer, and whether it was asked for a power limit."""
        if wanted is None:
            return await self._setter.ask({"verb": "release", "gpu": uuid}), False
        answer: Answer = {"ok": False, "code": NO_CLOCKS[0], "words": f"{uuid} tells no highest clock and no power"}
        if wanted.max_mhz is not None and uuid not in self._no_clocks:
            answer = await self._setter.ask({"verb": "clocks", "gpu": uuid, "max_mhz": wanted.max_mhz})
            if answer.get("ok") or answer.get("code") not in NO_CLOCKS:
                return answer, False
        if wanted.watts is None:
            return answer, False
        return await self._setter.ask({"verb": "power", "gpu": uuid, "watts": wanted.watts}), True

    def _no_clocks_any_more(self, uuid: str) -> bool:
        """True the first time."""
        new = uuid not in self._no_clocks
        self._no_clocks.add(uuid)
        return new

    def _heard(self, answer: Answer) -> str:
        if answer.get("ok"):
            return ""
        words = str(answer.get("words") or answer.get("code") or "no answer")
        if words != self.trouble:
            self._say(f"the setter: {words}")
        self.trouble = words
        return words
