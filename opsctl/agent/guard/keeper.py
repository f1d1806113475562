"""Looks, decides and acts: the part of the guard that has a clock. ``decide.py`` says what is to be done.

Weights act through the load balancer's voice, which asks ``weight`` and ``down``. Clocks and units are the setter's,
through ``hands.py``. Every move is a line in the journal, with its reason (``journalctl -t opsctl-audit``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opsctl.agent import audit, unfinished
from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import told as gpus_told
from opsctl.agent.guard import book, pool, told
from opsctl.agent.guard.book import Kept, Orders
from opsctl.agent.guard.decide import decide
from opsctl.agent.guard.hands import Hands, Limit
from opsctl.agent.guard.model import Decision, Memory, Policy, Pool, Reading, Rung, Situation, Trend
from opsctl.agent.guard.policy import read_policy
from opsctl.agent.guard.readings import readings
from opsctl.agent.guard.trend import Trends
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, instance_names, read_placement
from opsctl.errors import OpsctlError

TICK_S = 0.5
TELL_S = 1.0
LOOK_S = 5.0  # at placements, policy, orders
SAVE_S = 300.0  # how long it was observed; a move is saved at once
FRESH_S = 5.0  # observed is what was seen
AGAIN_S = 10.0  # an order is given again, when it was refused or nothing came of it
SEEN_S = 1.0  # until load balancers and the other hosts have seen the weight of 1 %
ASK_S = 1.0  # between two looks at the load balancers' pages
POOL_S = 3.0  # a page that is older counts no more
CLOCK_STEP_MHZ = 15  # of NVIDIA's GPUs; locked clocks are rounded to it
FULL = 100
RUNNING = ("active", "reloading", "activating", "deactivating")
UNASKED = "the load balancers have not been asked yet"


@dataclass
class Watched:
    """One instance, from one decision to the next."""

    memory: Memory = field(default_factory=Memory)
    decision: Decision | None = None
    course: told.Course = field(default_factory=told.Course)
    pool: Pool = field(default_factory=lambda: Pool(None, 1, UNASKED))
    pool_at: float = float("-inf")
    asking: asyncio.Task[None] | None = None
    ordered: str = ""  # the last order: drain, now, start
    ordered_at: float = float("-inf")
    refused: str = ""  # why it was not carried out
    before: Memory = field(default_factory=Memory)  # the way to the stop
    ordering: asyncio.Task[None] | None = None


def lesser(one: Limit, other: Limit) -> Limit:
    """The lower of each. Pure."""
    mhz = [value for value in (one.max_mhz, other.max_mhz) if value is not None]
    watts = [value for value in (one.watts, other.watts) if value is not None]
    return Limit(min(mhz, default=None), min(watts, default=None))


class Keeper:
    """The guard of this host. ``active`` gives a unit's ActiveState by instance, empty when nobody knows it."""

    def __init__(self, paths: Paths, host: str, hands: Hands, active: Callable[[str], str],
                 say: Callable[[str], None], clock: Callable[[], float] = boot_clock,
                 wall: Callable[[], float] = time.time) -> None:
        self._paths, self._host, self._hands, self._active = paths, host, hands, active
        self._say, self._clock, self._wall = say, clock, wall
        self._boot = unfinished.boot(paths)
        kept = book.read(paths.guard_state, self._boot)
        self._watched = {name: Watched(memory) for name, memory in kept.memories.items()}
        self._observed_s, self._unlatched = kept.observed_s, dict(kept.unlatched)
        self._limits = {uuid: Limit(*pair) for uuid, pair in kept.limits.items()}
        self._orders, self._policy, self._placements = Orders(), Policy(), list[Placement]()
        self._trends = Trends()
        self._gpus: Sequence[Mapping[str, Any]] = ()
        self._readings: dict[str, Reading] = {}
        self._good_at = self._began = clock()
        self._looked = self._told = self._saved = float("-inf")
        self._ticked = clock()
        self._dirty, self._wrong = False, ""
        self.document: dict[str, Any] | None = None

    def weight(self, instance: str) -> int:
        """Per cent; 100 for an instance that is not guarded."""
        decision = self._decision(instance)
        return FULL if decision is None else decision.weight

    def down(self, instance: str) -> str:
        """Why it cannot serve; empty when it can."""
        decision = self._decision(instance)
        return "" if decision is None else decision.down

    def stopped(self, instance: str) -> bool:
        """Whether the guard stopped it."""
        return instance in self._watched and self._watched[instance].memory.stopped

    def see(self, gpus: Sequence[Mapping[str, Any]], at_s: float) -> None:
        """A good sample, as the reader gives it."""
        self._gpus, self._good_at = gpus, at_s
        self._readings = readings(gpus, at_s, self._policy)
        self._trends.see(self._readings)
        self._decide()

    async def tend(self) -> None:
        """For ever: also what no sample brings about, such as that there is none."""
        hands = asyncio.create_task(self._hands.work())
        try:
            while True:
                if hands.done():
                    hands.result()  # raises; whoever tends the keeper says it and begins again
                self._tick()
                if self._dirty:
                    await self._save()
                await asyncio.sleep(TICK_S)
        finally:
            hands.cancel()

    async def leave(self) -> None:
        """The agent ends in order: clocks are the driver's again, units and rungs stay."""
        await self._hands.leave()
        if self._watched:
            await self._save()

    def _tick(self) -> None:
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        if now - self._good_at <= FRESH_S and self._guarded():
            self._observed_s += min(TICK_S * 2, now - self._ticked)
        self._ticked = now
        if now - self._saved >= SAVE_S and self._guarded():
            self._dirty = True
        self._decide()

    def _look(self) -> None:
        """At what Ansible and people write; what cannot be read stays as it was, and is said once."""
        wrong = []
        try:
            self._policy = read_policy(self._paths.guard_policy)
        except OpsctlError as error:
            wrong.append(error.message)
        try:
            self._orders = book.read_orders(self._paths.guard_orders)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            wrong.append(str(error))
        self._placements = self._read_placements(wrong)
        words = "; ".join(wrong)
        if words and words != self._wrong:
            self._say(f"guard: {words}; going on as before")
        self._wrong = words

    def _read_placements(self, wrong: list[str]) -> list[Placement]:
        """Each by itself: a file that somebody left there, or that is torn, leaves no other instance unguarded."""
        known = {placement.instance: placement for placement in self._placements}
        found = []
        for name in instance_names(self._paths):
            try:
                found.append(read_placement(self._paths, name))
            except OpsctlError as error:
                wrong.append(error.message)
                found += [known[name]] if name in known else []
        return found

    def _guarded(self) -> list[Placement]:
        return [placement for placement in self._placements if placement.gpus]

    def _enforcing(self) -> bool:
        if self._orders.mode == "auto":
            return self._observed_s >= self._policy.observe_s
        return self._orders.mode == "enforce"

    def _decision(self, instance: str) -> Decision | None:
        return self._watched[instance].decision if instance in self._watched else None

    def _decide(self) -> None:
        now, moved = self._clock(), False
        limits: dict[str, Limit] = {}
        guarded = self._guarded()
        for placement in guarded:
            one = self._watched.setdefault(placement.instance, Watched(Memory(since_s=now)))
            moved |= self._decide_one(placement, one, now)
            if one.decision is not None and one.decision.acts and one.decision.clock_percent is not None:
                found = {uuid: self._limit(uuid, one.decision.clock_percent) for uuid in self._whole(placement.gpus)}
                for uuid, limit in found.items():
                    if limit is not None:  # two instances may share a GPU that is cut by MIG
                        limits[uuid] = lesser(limits.get(uuid, limit), limit)
        for gone in self._watched.keys() - {placement.instance for placement in guarded}:
            if self._placements:  # nobody can say while they cannot be read
                del self._watched[gone]
        self._hands.want(limits)
        self._limits = limits
        self._dirty |= moved
        if moved or now - self._told >= TELL_S:
            self._told = now
            self._tell(now)

    def _decide_one(self, placement: Placement, one: Watched, now: float) -> bool:
        """True when it moved."""
        self._unlatch(placement.instance, one)
        state = self._active(placement.instance)
        alive = state in RUNNING if state else not one.memory.stopped
        before, was = one.memory, one.decision
        one.memory, one.decision = decide(self._policy, one.memory, Situation(
            now_s=now, readings=tuple(self._readings[uuid] for uuid in self._whole(placement.gpus)
                                      if uuid in self._readings),
            trends={uuid: self._trends.of(uuid, now) for uuid in self._whole(placement.gpus)},
            age_s=max(0.0, now - self._good_at), missing=self._missing(placement),
            pool=self._pool(placement, one, now), alive=alive, enforcing=self._enforcing()))
        decision = one.decision
        if one.memory.rung >= Rung.STOP > before.rung:
            one.before = before
        order = decision.stop or ("start" if decision.start and decision.acts else "")
        if order and one.ordering is None and (order != one.ordered or now - one.ordered_at >= AGAIN_S):
            one.ordering = asyncio.get_running_loop().create_task(self._order(placement.instance, one, order))
        rung = was.rung if was is not None else before.rung
        told_before = (rung, was.weight if was else decision.weight, was.down if was else "", before.latched,
                       before.stopped)
        moved = told_before != (decision.rung, decision.weight, decision.down, one.memory.latched, one.memory.stopped)
        if moved:
            self._moved(placement.instance, one, rung, decision)
        return moved

    def _moved(self, instance: str, one: Watched, before: Rung, decision: Decision) -> None:
        words = " ".join(decision.reasons) or "all is well"
        if decision.rung != before:
            one.course.moved(int(before), int(decision.rung), words, self._wall())
        acts = "" if decision.acts else " (observed only: clocks and stops are left alone)"
        self._say(f"guard: {instance}: {before.word} -> {decision.rung.word}, "
                  f"weight {decision.weight} %{acts}: {words}")
        audit.record("guard", {"instance": instance, "from": before.word, "to": decision.rung.word,
                               "weight": decision.weight, "down": decision.down, "acts": decision.acts,
                               "why": words})

    def _unlatch(self, instance: str, one: Watched) -> None:
        ordered = self._orders.unlatch.get(instance)
        if ordered is not None and ordered != self._unlatched.get(instance):
            self._unlatched[instance] = ordered
            one.memory = replace(one.memory, latched=False, descents_s=())
            self._dirty = True

    def _missing(self, placement: Placement) -> tuple[str, ...]:
        """Only of a sample that counts: one that is old says nothing of what is there now."""
        if not self._gpus or self._clock() - self._good_at > FRESH_S:
            return ()
        there = {gpu.get("uuid") for gpu in self._gpus if gpu["state"] != "lost"}
        there |= {part.get("uuid") for gpu in self._gpus if gpu["state"] != "lost" for part in gpu.get("mig", ())}
        return tuple(uuid for uuid in placement.gpus if uuid not in there)

    def _whole(self, uuids: Sequence[str]) -> list[str]:
        """Whole GPUs: one that is cut by MIG stands for its parts, which have no clocks of their own."""
        whole = {part.get("uuid"): gpu.get("uuid", "") for gpu in self._gpus for part in gpu.get("mig", ())}
        return list(dict.fromkeys(str(whole.get(uuid, uuid)) for uuid in uuids))

    def _limit(self, uuid: str, percent: int) -> Limit | None:
        """None: nobody knows what it can do. An agent that begins while it is blind holds what the one before held."""
        gpu = next((gpu for gpu in self._gpus if gpu.get("uuid") == uuid and gpu["state"] == "ok"), None)
        if gpu is None:
            return self._limits.get(uuid)
        highest, default = gpu.get("clock_sm_max_mhz"), gpu.get("power_limits_w", {}).get("default")
        mhz = None if not highest else int(highest * percent / 100 // CLOCK_STEP_MHZ * CLOCK_STEP_MHZ)
        return Limit(mhz, None if not default else int(default * percent / 100))

    def _pool(self, placement: Placement, one: Watched, now: float) -> Pool:
        """Asked only where a stop may come, and not before the others can have seen how this instance does."""
        if one.refused and now - one.ordered_at < AGAIN_S:
            return Pool(None, placement.min_serving, one.refused)
        if one.memory.rung < Rung.LEAST or now - one.memory.since_s < SEEN_S:
            one.pool_at = float("-inf")
        elif now - one.pool_at >= ASK_S and one.asking is None:
            one.asking = asyncio.get_running_loop().create_task(self._ask(placement, one))
        return self._young(placement, one, now)

    def _young(self, placement: Placement, one: Watched, now: float) -> Pool:
        return one.pool if now - one.pool_at <= POOL_S else Pool(None, placement.min_serving, UNASKED)

    async def _ask(self, placement: Placement, one: Watched) -> None:
        try:
            asked = self._clock()
            one.pool = await pool.look(placement.statistics, placement.service,
                                       f"{self._host}.{placement.instance}", placement.min_serving)
            one.pool_at = asked
        finally:
            one.asking = None

    async def _order(self, instance: str, one: Watched, order: str) -> None:
        """Has the unit stopped or started. An instance that nobody would stop is at the least that serves."""
        try:
            one.ordered, one.ordered_at = order, self._clock()
            refusal = await self._hands.order(instance, order)
            one.refused = refusal.words if refusal else ""
            if refusal is not None:
                self._say(f"guard: {instance}: {order}: {refusal.words}")
                if order != "start" and not one.memory.stopped:
                    one.memory = replace(
                        one.memory, rung=Rung.LEAST, since_s=self._clock(), descents_s=one.before.descents_s,
                        latched=one.before.latched, told_stop_s=one.memory.told_stop_s if refusal.perhaps else None)
        finally:
            self._dirty, one.ordering = True, None

    def _tell(self, now: float) -> None:
        guarded = self._guarded()
        if not guarded and not self._gpus:
            if self.document is not None:
                self.document = None
                self._paths.guard.unlink(missing_ok=True)
            return
        owners = {uuid: placement.instance for placement in guarded for uuid in self._whole(placement.gpus)}
        gpus = [told.gpu(gpu, self._readings.get(gpu.get("uuid", "")), self._trends.of(gpu.get("uuid", ""), now)
                         if gpu.get("uuid") else Trend(), owners.get(gpu.get("uuid", ""), ""),
                         self._hands.limits.get(gpu.get("uuid", ""), {})) for gpu in self._gpus]
        instances = [told.instance(placement.instance, one.memory, one.decision, self._young(placement, one, now),
                                   one.course, now)
                     for placement in guarded
                     if (one := self._watched[placement.instance]).decision is not None]
        self.document = told.document(now, self._orders.mode, self._enforcing(), self._observed_s,
                                      self._policy.observe_s, self._hands.trouble, gpus, instances)
        try:
            gpus_told.write(self._paths.guard, self.document)
        except OSError as error:
            if str(error) != self._wrong:
                self._say(f"{self._paths.guard} cannot be written: {error}")
            self._wrong = str(error)

    async def _save(self) -> None:
        """Beside the loop: an fsync may take long."""
        self._dirty, self._saved = False, self._clock()
        kept = Kept(self._observed_s, {name: one.memory for name, one in self._watched.items()}, self._unlatched,
                    {uuid: (limit.max_mhz, limit.watts) for uuid, limit in self._limits.items()})
        try:
            await asyncio.to_thread(book.write, self._paths.guard_state, kept, self._boot)
        except OSError as error:
            self._say(f"guard: {self._paths.guard_state} cannot be written: {error}")
