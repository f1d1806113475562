"""``opsctl guard explain``: what a guard sees, which numbers count, why it is where it is, what comes next. Pure.

Sentences in sections, ``(heading, lines)``; ``opsctl/cli/guard.py`` prints them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from opsctl.agent.guard.model import WORDS, Policy, Rung
from opsctl.guarding.rows import clock_words, hours, is_old, mode_words

SOURCES = {"margin_api": "the driver's margin", "fields": "T.Limit fields", "thresholds": "absolute thresholds",
           "configured": "the configured fallback"}
UNASKED = "the load balancers have not been asked"  # as agent/guard/keeper.py says it
MOVES = 8  # the newest
Section = tuple[str, list[str]]


def policy_of(document: Mapping[str, Any]) -> Policy:
    """The numbers that the host's guard goes by; opsctl's own where its agent does not tell them."""
    told = document.get("policy") or {}
    return Policy(**{field.name: told[field.name] for field in fields(Policy) if field.name in told})


def explain(host: str, document: Mapping[str, Any]) -> list[Section]:
    """The host's section, then one for each instance."""
    policy = policy_of(document)
    found: list[Section] = [(f"{host}: {mode_words(document)}", _host_lines(host, document, policy))]
    for one in document["instances"]:
        gpus = [gpu for gpu in document["gpus"] if gpu["instance"] == one["instance"]]
        found.append((_title(one), _instance_lines(host, document, one, gpus, policy)))
    return found


def _title(one: Mapping[str, Any]) -> str:
    down = f"; down: {one['down']}" if one["down"] else ""
    return f"{one['instance']}: {rung_words(one['rung'])} for {hours(one['since_s'])}{down}"


def rung_words(rung: int) -> str:
    """``rung 2, slowed``."""
    return f"rung {rung}, {WORDS[Rung(rung)]}"


def _host_lines(host: str, document: Mapping[str, Any], policy: Policy) -> list[str]:
    lines = [f"guard:   {document['words']}" if document["words"] else
             f"guard:   heard {document['age_s']:.1f} s ago" + _sample_words(document)]
    if document["setter"]:
        lines.append(f"setter:  {document['setter']}: clocks and stops have no effect; weights have")
    if not document["enforcing"] and document["instances"]:
        lines.append("mode:    weights act; clocks and stops are decided and left alone"
                     + _until(document) + f"; now: opsctl guard mode enforce --limit {host}")
    if document.get("policy_words"):
        lines.append(f"numbers: {document['policy_words']} The guard's own count:")
    lines.append("numbers: " + threshold_words(policy))
    lines.append("         " + memory_words(policy))
    lines.append(f"         up a rung: {calm_words(policy)}; {policy.flap_descents} times down within "
                 f"{hours(policy.flap_window_s)}: latched")
    lines.append(f"         no sample for {policy.hold_age_s:g} s: hold; {policy.halve_age_s:g} s: half the weight; "
                 f"{policy.least_age_s:g} s: weight {policy.least_weight} %; never a stop")
    return lines


def _sample_words(document: Mapping[str, Any]) -> str:
    age_s = document["sample_age_s"]
    if age_s is None:
        return "; no GPU was ever seen"
    return f"; GPUs seen {age_s:.1f} s ago" + (", which is old" if is_old(document) else "")


def _until(document: Mapping[str, Any]) -> str:
    if document["mode"] != "auto" or document["observe_s"] is None:
        return ""
    return f", {hours(max(0.0, document['observe_s'] - document['observed_s']))} more (a host's first day)"


def threshold_words(policy: Policy) -> str:
    """The ladder of the core: margins in °C, and how near the slowdown must be for a jump."""
    margins = ", ".join(f"{word} at {value:g}" for word, value in _margins(policy))
    return (f"margin °C: {margins}; slowdown nearer than {policy.slowed_time_s:g} s: slowed, "
            f"{policy.least_time_s:g} s: least")


def calm_words(policy: Policy) -> str:
    """What a way up asks for."""
    return (f"margin above {policy.climb_margin_c:g} °C (memory {policy.memory_climb_margin_c:g}) and not heating for "
            f"{policy.climb_dwell_s:g} s")


def memory_words(policy: Policy) -> str:
    return (f"memory °C: less at {policy.memory_less_margin_c:g}, slowed at {policy.memory_slowed_margin_c:g}, "
            f"least at {policy.memory_least_margin_c:g}")


def _margins(policy: Policy) -> tuple[tuple[str, float], ...]:
    return ((WORDS[Rung.LESS], policy.less_margin_c), (WORDS[Rung.SLOWED], policy.slowed_margin_c),
            (WORDS[Rung.LEAST], policy.least_margin_c), (WORDS[Rung.STOP], policy.stop_margin_c),
            (WORDS[Rung.STOP_NOW], policy.stop_now_margin_c))


def _instance_lines(host: str, document: Mapping[str, Any], one: Mapping[str, Any], gpus: Sequence[Mapping[str, Any]],
                    policy: Policy) -> list[str]:
    clocks = clock_words(one, gpus) or "left to the driver"
    lines = [f"does:    weight {one['weight']} %; clocks {clocks}"]
    lines += [f"why:     {words}" for words in one["reasons"] or ["nothing is too hot"]]
    if one["wanted"] != one["rung"]:
        lines.append(f"wants:   {rung_words(one['wanted'])} by heat alone")
    lines += [f"sees:    {gpu_words(gpu)}" for gpu in gpus] or ["sees:    none of its GPUs"]
    lines += [f"next:    {words}" for words in next_words(one, policy)]
    lines.append(f"pool:    {pool_words(one['pool'])}")
    moves = one["moves"][-MOVES:]
    lines += [f"moved:   {move_words(move)}" for move in moves] or ["moved:   never, as far as it knows"]
    return lines + [f"type:    {command}" for command in commands(host, document, one)]


def gpu_words(gpu: Mapping[str, Any]) -> str:
    """``GPU 0 H200: 88 °C, margin -1 °C (the driver's margin), memory margin 30 °C, +0.4 °C/s, slowdown in 2.5 s``."""
    model = str(gpu.get("model") or "").removeprefix("NVIDIA ")
    if gpu["state"] != "ok":
        return f"GPU {gpu['index']} {model}: {gpu['state']}"
    parts = [] if gpu["temperature_c"] is None else [f"{gpu['temperature_c']:.0f} °C"]
    if gpu["margin_c"] is not None:
        source = gpu["margin_source"] or ""
        parts.append(f"margin {gpu['margin_c']:.0f} °C ({SOURCES.get(source, source or 'of unknown source')})")
    if gpu["memory_margin_c"] is not None:
        parts.append(f"memory margin {gpu['memory_margin_c']:.0f} °C")
    if gpu["slope_c_per_s"] is not None:
        parts.append(f"{gpu['slope_c_per_s']:+.1f} °C/s")
    if gpu["time_to_slowdown_s"] is not None:
        parts.append(f"slowdown in {gpu['time_to_slowdown_s']:.1f} s")
    if gpu["clock_limit_mhz"] is not None:
        parts.append(f"clocks held at {gpu['clock_limit_mhz']:.0f} of {gpu['clock_max_mhz'] or 0:.0f} MHz by the guard")
    return f"GPU {gpu['index']} {model}: " + ", ".join([*parts, *gpu["reasons"]] or ["it tells nothing"])


def next_words(one: Mapping[str, Any], policy: Policy) -> list[str]:
    """What would move the instance from where it is, down and up."""
    if one["stopped"]:
        return [f"starts again: {calm_words(policy)}"]
    rung = Rung(one["rung"])
    found = []
    if rung < Rung.STOP_NOW:
        below = Rung(rung + 1)
        at = dict(_margins(policy))[WORDS[below]]
        allowed = "" if below < Rung.STOP else f" for {policy.stop_after_s:g} s, if the pool allows it"
        found.append(f"{WORDS[below]} at margin {at:g} °C{allowed}: {does_words(below, policy)}")
    if one["latched"]:
        found.append("no way up to normal before somebody unlatches it")
    elif rung > Rung.NORMAL:
        above = Rung(rung - 1)
        found.append(f"{WORDS[above]} with {calm_words(policy)}: {does_words(above, policy)}")
    return found


def does_words(rung: Rung, policy: Policy) -> str:
    """What a rung does, for a person."""
    return {Rung.NORMAL: "all its weight, clocks free", Rung.LESS: f"weight {policy.less_weight} %",
            Rung.SLOWED: f"weight {policy.slowed_weight} %, clocks {policy.slowed_clock_percent} % or less",
            Rung.LEAST: f"weight {policy.least_weight} %, clocks {policy.least_clock_percent} %",
            Rung.STOP: "the engine finishes what it has and stops",
            Rung.STOP_NOW: "the engine is stopped at once"}[rung]


def pool_words(pool: Mapping[str, Any]) -> str:
    """May it be stopped, as its load balancers see it."""
    words = f" ({pool['words']})" if pool["words"] else ""
    if pool["others"] is None and pool["words"].startswith(UNASKED):
        return f"its load balancers are asked once it is at {WORDS[Rung.LEAST]}; min_serving {pool['min_serving']}"
    if pool["others"] is None:
        return f"how many others serve is not known, so it would not be stopped{words}"
    serve = "1 other serves" if pool["others"] == 1 else f"{pool['others']} others serve"
    verdict = "it might be stopped" if pool["others"] >= pool["min_serving"] else "it would not be stopped"
    return f"{serve}, min_serving {pool['min_serving']}: {verdict}{words}"


def commands(host: str, document: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """What a person might type now, the most useful first."""
    name = one["instance"]
    if one["latched"]:
        found = [f"opsctl guard unlatch {host} {name}   when the cooling is mended"]
    elif one["rung"] or one["wanted"]:
        found = [f"opsctl drain {host}:{name} -m hot   takes it out until you say so"]
    else:
        found = []
    if document["words"]:
        found.append(f"opsctl logs --unit opsctl-agent --limit {host}")
    if one["rung"] and document["enforcing"]:
        found.append(f"opsctl guard mode observe --limit {host}   leaves clocks and the unit alone")
    return [*found, f"opsctl top --limit {host}"]


def move_words(move: Mapping[str, Any]) -> str:
    """``21:59:48  less -> slowed: GPU 0: margin ...``, by the operator's local time."""
    at = time.strftime("%H:%M:%S", time.localtime(move["at"]))
    return f"{at}  {WORDS[Rung(move['from'])]} -> {WORDS[Rung(move['to'])]}: {move['words']}"
