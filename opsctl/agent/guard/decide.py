"""The guard's decision about one instance: policy, memory and situation to a rung and the reasons. Pure.

Down at once, and past rungs where heat asks for it; up one rung per dwell, with margin and no rising slope. The worst
of its GPUs moves the whole instance. A stop is for an instance that was at LEAST for a while and still heats, while
enough others serve; otherwise it stays at LEAST, the least that still serves. Without readings nothing climbs, nothing
is stopped and no clock moves: only the weight falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opsctl.agent.guard.heat import Heat, heat, not_helped
from opsctl.agent.guard.model import Decision, Memory, Policy, Rung, Situation, Trend

HALF_WEIGHT = 50
TOLD_GPUS = 3
LATCHED_TRIES = 2
STOP_TAKES_S = 720.0  # the unit allows a drain 660; who still runs then was not told: the setter is down
SAY_STOP_S = 5.0  # an order may come while another is under way: so long each look says it
STOP_AGAIN_S = 60.0
STOPPING, STOPPED = "too hot: stopping", "too hot: stopped by the guard"


def decide(policy: Policy, memory: Memory, situation: Situation) -> tuple[Memory, Decision]:
    """What to do now, and what to remember until the next time."""
    memory = _caught_up(policy, memory, situation)
    lost = _lost(situation)
    if lost:
        return _at(memory, situation, calm=False), Decision(
            memory.rung, memory.rung, policy.least_weight, down=f"{lost} lost", acts=situation.enforcing,
            reasons=(f"{lost} is lost or not there: this instance cannot serve.",))
    if situation.age_s > policy.hold_age_s or not situation.readings:
        return _blind(policy, _at(memory, situation, calm=False), situation)
    seen = _Seen.of(policy, memory, situation)
    if memory.stopped:
        return _stopped(policy, memory, situation, seen)
    return _alive(policy, memory, situation, seen)


@dataclass(frozen=True)
class _Seen:
    """All GPUs of the instance: ``heats`` the worst first."""

    heats: tuple[Heat, ...]
    wanted: Rung
    calm: bool
    unreadable: tuple[str, ...]

    @classmethod
    def of(cls, policy: Policy, memory: Memory, situation: Situation) -> _Seen:
        heats = []
        lasting = memory.rung >= Rung.LEAST and situation.now_s - memory.since_s >= policy.stop_after_s
        for reading in situation.readings:
            if reading.state == "ok":
                trend = situation.trends.get(reading.uuid, Trend())
                found = heat(policy, reading, trend)
                if lasting and not_helped(reading, trend):
                    found = replace(found, rung=max(found.rung, Rung.STOP))
                heats.append(found)
        heats.sort(key=lambda one: (-one.rung, one.reading.margin_c or 0.0, one.reading.index))
        unreadable = tuple(f"GPU {one.index}" for one in situation.readings if one.state != "ok")
        calm = bool(heats) and not unreadable and all(one.calm for one in heats)
        return cls(tuple(heats), max((one.rung for one in heats), default=Rung.NORMAL), calm, unreadable)

    def words(self, action: str) -> list[str]:
        """A sentence for each of the worst GPUs, what is done about them in the first."""
        hot = [one for one in self.heats if one.rung > Rung.NORMAL]
        told = [f"{one.words}: {action}." if one is hot[0] else f"{one.words}." for one in hot[:TOLD_GPUS]]
        if len(hot) > TOLD_GPUS:
            told.append(f"{len(hot) - TOLD_GPUS} more of its GPUs are hot.")
        return told


def _alive(policy: Policy, memory: Memory, situation: Situation, seen: _Seen) -> tuple[Memory, Decision]:
    after, notes = _moved(policy, memory, situation, seen)
    decision = Decision(after.rung, seen.wanted, 100)
    if after.rung >= Rung.STOP:
        refused = _no_stop(situation)
        if refused:
            notes.append(f"It was told to stop, and is not told again: {refused}.")
        else:
            after, said = _told_to_stop(after, situation.now_s, seen)
            decision = replace(decision, down=STOPPING)
            if said:
                decision = replace(decision, stop="now" if after.rung == Rung.STOP_NOW else "drain")
    decision = _decision(policy, after, situation, seen, decision)
    return after, replace(decision, reasons=(*decision.reasons, *notes))


def _told_to_stop(memory: Memory, now_s: float, seen: _Seen) -> tuple[Memory, bool]:
    """Whether to say so now: on coming to this rung, and again while it is too hot, for an order may get lost."""
    told_s = memory.told_stop_s
    if told_s is None or told_s < memory.since_s or (now_s - told_s >= STOP_AGAIN_S and seen.wanted >= Rung.STOP):
        return replace(memory, told_stop_s=now_s), True
    return memory, now_s - told_s < SAY_STOP_S


def _moved(policy: Policy, memory: Memory, situation: Situation, seen: _Seen) -> tuple[Memory, list[str]]:
    """Down at once, or up a rung if it was calm for long enough; and what there is to say of it."""
    now_s, notes = situation.now_s, []
    allowed, refused = _deepest(policy, memory, situation, seen)
    if refused and seen.wanted >= Rung.STOP:
        notes.append(refused)
    rung = min(seen.wanted, allowed)
    if rung > memory.rung:
        after = _descended(policy, memory, rung, now_s)
        if after.latched:
            notes.append(_latch_words(policy, after))
        return after, notes
    if memory.latched:
        notes.append(_latch_words(policy, memory))
        # From the least to SLOWED it may, whose clocks are as low by then: else a service lacks more than it must.
        if memory.rung != Rung.LEAST or len(memory.descents_s) >= policy.flap_descents + LATCHED_TRIES:
            return _at(memory, situation, calm=False), notes
    after = _at(memory, situation, calm=seen.calm and seen.wanted < memory.rung)
    if memory.rung == Rung.NORMAL or memory.rung >= Rung.STOP:  # what drains stays there until it has ended
        return after, notes
    if after.calm_since_s is None or memory.told_stop_s is not None:
        if memory.told_stop_s is not None:  # it may drain still, though its order failed or the mode changed
            notes.append(f"Stays at {memory.rung.word}: told to stop {now_s - memory.told_stop_s:.0f} s ago.")
        elif seen.wanted < memory.rung:
            notes.append(f"Stays at {memory.rung.word}: {_why_no_climb(policy, seen)}.")
        return after, notes
    calm_s = now_s - after.calm_since_s
    above = _above(memory.rung)
    if calm_s >= policy.climb_dwell_s:
        return replace(after, rung=above, since_s=now_s, calm_since_s=now_s, climbed=True), [
            *notes, f"Calm for {calm_s:.0f} s: up to {above.word}."]
    notes.append(f"Calm for {calm_s:.0f} s; up to {above.word} after {policy.climb_dwell_s:g} s.")
    return after, notes


def _deepest(policy: Policy, memory: Memory, situation: Situation, seen: _Seen) -> tuple[Rung, str]:
    """How far down it may go now, and why not further."""
    if not situation.enforcing:
        return Rung.LEAST, "Would stop, but only observes yet."
    if not situation.alive:  # whoever stopped it will start it: the guard does not count it as its own
        return Rung.LEAST, "Would stop, but it does not run."
    refused = _no_stop(situation)
    if refused:
        return max(Rung.LEAST, memory.rung), f"Would stop, but {refused}."
    waited = situation.now_s - memory.since_s
    if memory.rung < Rung.LEAST or (memory.rung == Rung.LEAST and waited < policy.stop_after_s):
        return Rung.LEAST, f"Stops when it was at {Rung.LEAST.word} for {policy.stop_after_s:g} s."
    return (Rung.STOP if memory.rung == Rung.LEAST else Rung.STOP_NOW), ""


def _no_stop(situation: Situation) -> str:
    pool = situation.pool
    if pool.others is None:
        return f"the load balancer's page cannot be read: {pool.words or 'nobody knows how many others serve'}"
    if pool.others < pool.min_serving:
        return f"only {pool.others} others serve, and {pool.min_serving} must" + (f" ({pool.words})" if pool.words
                                                                                  else "")
    return ""


def _stopped(policy: Policy, memory: Memory, situation: Situation, seen: _Seen) -> tuple[Memory, Decision]:
    """Its unit was stopped by the guard and does not run: start it once it is cool, unless it flapped."""
    after = _at(memory, situation, calm=seen.calm)
    start, words = False, f"Stopped by the guard: {_why_no_climb(policy, seen)}."
    if memory.latched:
        words = f"Stopped by the guard. {_latch_words(policy, memory)}"
    elif after.calm_since_s is not None:
        calm_s = situation.now_s - after.calm_since_s
        cool = calm_s >= policy.climb_dwell_s
        start = cool and situation.enforcing
        words = f"Stopped by the guard; calm for {calm_s:.0f} s: it may run again" + (
            "." if cool else f" after {policy.climb_dwell_s:g} s.")
        if not situation.enforcing:
            words += " The guard only observes now: start it by hand, or type `opsctl guard mode enforce`."
    decision = _decision(policy, after, situation, seen, Decision(
        memory.rung, seen.wanted, 100, STOPPED, start=start))
    return after, replace(decision, reasons=(words, *decision.reasons))


def _blind(policy: Policy, memory: Memory, situation: Situation) -> tuple[Memory, Decision]:
    """No young readings: hold, then halve, then the least; nothing else."""
    age, weight = max(0.0, situation.age_s), _weight(policy, memory.rung)
    if age > policy.least_age_s:
        weight = min(weight, policy.least_weight)
    elif age > policy.halve_age_s:
        weight = min(weight, HALF_WEIGHT)
    held = "" if memory.rung == Rung.NORMAL else f", held at {memory.rung.word}"
    words = f"No reading of its GPUs for {age:.0f} s: weight {weight} %{held}; clocks and unit stay as they are."
    down = STOPPED if memory.stopped else ""
    return memory, Decision(memory.rung, memory.rung, weight, down, _clock_percent(policy, memory),
                            acts=situation.enforcing, reasons=(words,))


def _decision(policy: Policy, memory: Memory, situation: Situation, seen: _Seen, decision: Decision) -> Decision:
    """Weight, clocks and words of the rung that it came to."""
    weight = _weight(policy, memory.rung)
    words = seen.words(_action(policy, memory, situation))
    if seen.unreadable:
        weight = min(weight, HALF_WEIGHT)
        words.append(f"{', '.join(seen.unreadable)} cannot be read: weight at most {HALF_WEIGHT} %, no way up.")
    return replace(decision, weight=weight, clock_percent=_clock_percent(policy, memory),
                   acts=situation.enforcing, reasons=tuple(words))


def _action(policy: Policy, memory: Memory, situation: Situation) -> str:
    weight, clocks = f"weight {_weight(policy, memory.rung)} %", _clock_percent(policy, memory)
    if clocks is None:
        return weight
    done = f"clocks {clocks} %" if situation.enforcing else f"would set clocks to {clocks} %"
    stop = {Rung.STOP: ", an orderly stop", Rung.STOP_NOW: ", stop now"}.get(memory.rung, "")
    return f"{done}, {weight}{stop}"


def _caught_up(policy: Policy, memory: Memory, situation: Situation) -> Memory:
    """What became of the unit since, and a clock that began anew."""
    now_s = situation.now_s
    if memory.since_s > now_s:  # remembered from another boot
        memory = replace(memory, since_s=now_s, calm_since_s=None)
    descents = tuple(at for at in memory.descents_s if 0 <= now_s - at < policy.flap_window_s)
    if not memory.latched and len(descents) >= policy.flap_descents:  # a person lifted the latch
        descents = ()
    memory = replace(memory, descents_s=descents)
    told_s = memory.since_s if memory.told_stop_s is None else memory.told_stop_s
    over = not 0 <= now_s - told_s < STOP_TAKES_S
    if over:
        memory = replace(memory, told_stop_s=None)
    if not situation.alive:
        # On any rung, in any mode, also when the order seemed to fail: nobody else would start what the guard ended.
        if memory.stopped or (memory.rung < Rung.STOP and memory.told_stop_s is None):
            return memory
        return replace(memory, stopped=True, rung=Rung.STOP, since_s=now_s, calm_since_s=None, told_stop_s=None)
    if memory.stopped:  # started, by the guard's order or by somebody: it comes back at LEAST
        return replace(memory, stopped=False, rung=Rung.LEAST, since_s=now_s, calm_since_s=None, climbed=True,
                       told_stop_s=None)
    if memory.rung >= Rung.STOP and (over or not situation.enforcing):
        return replace(memory, rung=Rung.LEAST, since_s=now_s, calm_since_s=None)
    return memory


def _descended(policy: Policy, memory: Memory, rung: Rung, now_s: float) -> Memory:
    """One way down may take many steps, however slow: a new one begins at normal, or after a climb.

    A stop counts as one more, once for each way down: the second within the window latches.
    """
    descents, counted_s = memory.descents_s, memory.stop_counted_s
    if memory.rung == Rung.NORMAL or memory.climbed or not descents:
        descents, counted_s = (*descents, now_s), None
    if memory.rung < Rung.STOP <= rung and counted_s not in descents:
        descents, counted_s = (*descents, now_s), now_s
    latched = memory.latched or len(descents) >= policy.flap_descents
    return replace(memory, rung=rung, since_s=now_s, calm_since_s=None, descents_s=descents, latched=latched,
                   climbed=False, stop_counted_s=counted_s)


def _at(memory: Memory, situation: Situation, *, calm: bool) -> Memory:
    """The same rung, a moment later."""
    if not calm:
        return replace(memory, calm_since_s=None)
    if memory.calm_since_s is None or memory.calm_since_s > situation.now_s:
        return replace(memory, calm_since_s=situation.now_s)
    return memory


def _lost(situation: Situation) -> str:
    """The GPUs that are not there, in words fit for a load balancer's page."""
    known = {reading.uuid: reading.index for reading in situation.readings}
    gone = {*situation.missing, *(reading.uuid for reading in situation.readings if reading.state == "lost")}
    names = sorted(f"GPU {known[uuid]}" if known.get(uuid, -1) >= 0 else _plain(uuid) for uuid in gone)
    return ", ".join(names[:TOLD_GPUS]) + (f" and {len(names) - TOLD_GPUS} more" if len(names) > TOLD_GPUS else "")


def _plain(uuid: str) -> str:
    kept = "".join(letter for letter in uuid if letter.isascii() and (letter.isalnum() or letter == "-"))
    return kept[:12] or "a GPU"


def _why_no_climb(policy: Policy, seen: _Seen) -> str:
    if seen.unreadable:
        return f"{', '.join(seen.unreadable)} cannot be read"
    worst = min(seen.heats, key=lambda one: one.calm, default=None)
    if worst is None or worst.calm:
        return "not calm yet"
    return (f"GPU {worst.reading.index} has a margin of {worst.reading.margin_c:g} C, "
            f"and {policy.climb_margin_c:g} C without heating count")


def _latch_words(policy: Policy, memory: Memory) -> str:
    beyond = f" beyond {Rung.SLOWED.word}" if memory.rung == Rung.LEAST else ""
    return (f"Latched at {memory.rung.word}: {policy.flap_descents} ways down in {policy.flap_window_s / 60:g} min. "
            f"No way up{beyond} before `opsctl guard unlatch HOST`.")


def _above(rung: Rung) -> Rung:
    return Rung.LEAST if rung >= Rung.STOP else Rung(rung - 1)


def _weight(policy: Policy, rung: Rung) -> int:
    weights: Sequence[int] = (100, policy.less_weight, policy.slowed_weight, policy.least_weight)
    return min(100, max(1, weights[min(rung, Rung.LEAST)]))


def _clock_percent(policy: Policy, memory: Memory) -> int | None:
    """Of the highest clock; SLOWED has less each time that its clocks were too high."""
    if memory.rung <= Rung.LESS:
        return None
    if memory.rung >= Rung.LEAST:
        return policy.least_clock_percent
    again = max(0, len(memory.descents_s) - 1)
    return max(policy.least_clock_percent,
               policy.slowed_clock_percent - again * policy.slowed_clock_step_percent)


