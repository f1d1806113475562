"""A cutover: one instance from one release to another, or from nothing, or back to where it was.

Everything is checked first. Then: write down the undo, which holds traffic away whatever becomes of the owner's lease;
measure the engine that serves; stop; flip ``current.<n>``; start; wait until it is well; gate. Whatever fails after the
undo was written is undone at once. Who was killed in the middle is undone by his unit's ``ExecStopPost=``
(``undo_left``), after a power cut at boot (``recover``), before any instance starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from opsctl.agent import drains, environment, gate, passed, probes, systemd, trust, unfinished
from opsctl.agent.durable import point_symlink, remove_durably
from opsctl.agent.gate import Baseline, Check, Report, Target
from opsctl.agent.guard import slowed
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, read_placement
from opsctl.agent.state import current_release
from opsctl.agent.store import Stored
from opsctl.agent.systemd import Run, Unit
from opsctl.agent.unfinished import Record
from opsctl.errors import LockedError, MixedError, OpsctlError, PausedError, RefusedError, RolledBackError
from opsctl.serving import adapter
from opsctl.serving.adapter import Adapter, served_names

POLL_S = 0.2
START_TIMEOUT_S = 600  # of an engine whose releases do not say
STOP_TIMEOUT_S = 700.0  # systemd gives up waiting for the engine's drain before that: TimeoutStopSec of its unit
LOG_LINES = 20
MIN_SPEED_PERCENT = 50


@dataclass(frozen=True)
class Order:
    """``from_release`` is empty for a first start. ``owner``: of the drain that ends with the cutover, or empty."""

    instance: str
    release: str
    from_release: str = ""
    owner: str = ""
    min_speed_percent: int = MIN_SPEED_PERCENT


@dataclass(frozen=True)
class Tools:
    """The world, replaceable in tests. ``doing`` hears the phases: measure, stop, flip, start, gate, undo."""

    run: Run = systemd.run
    doing: Callable[[str], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Startable:
    """A release that could be started here; ``context`` in tokens, 0 when it does not say."""

    engine: Adapter
    start_timeout_s: float
    context: int


def job_name(instance: str) -> str:
    return f"opsctl-cutover@{instance}"


def cutover(paths: Paths, order: Order, tools: Tools) -> dict[str, Any]:
    """Carries out ``order``; at its end, whatever that is, the owner's drain is gone.

    Returns ``{"changed", "instance", "release", "from", "verdict", "checks", "tokens_per_second",
    "baseline_tokens_per_second", "stop_s", "start_s", "gate_s"}``; ``release`` is what it serves now. A first start
    leaves an instance alone that has served, and nobody is moved to where it is already.

    Raises:
        RefusedError: before anything was touched.
        RolledBackError: it did not start, or its gate was unhealthy; the release before serves again.
        PausedError: its gate was inconclusive; the release before serves again.
        MixedError: and the release before did not come back.
    """
    try:
        with unfinished.held(paths, order.instance):
            return _cutover(paths, order, tools)
    finally:
        _end_drain(paths, order.instance, order.owner)


def undo_left(paths: Paths, instance: str, owner: str, tools: Tools) -> tuple[Record | None, str]:
    """Undoes the cutover of a worker that is gone. The record it left, and what keeps the release before from serving.

    Raises:
        LockedError: somebody works on the instance.
        OpsctlError: ``instance.not_stopped``; the record stays.
    """
    with unfinished.held(paths, instance, wait=False) as mine:
        if not mine:
            raise LockedError("cutover.at_work", f"a cutover works on {instance}.",
                              hint=f"opsctl-host cutover-status {instance} shows how far it is")
        record = unfinished.read(paths, instance)
        trouble = _undo(paths, record, tools) if record else ""
        _end_drain(paths, instance, owner)
    return record, trouble


def recover(paths: Paths, run: Run = systemd.run) -> dict[str, Any]:
    """Undoes every cutover that ended with an earlier boot; ``{"changed", "undone"}``. Runs before instances do.

    Raises:
        OpsctlError: a unit that runs would not stop, or a record cannot be read; all others were looked after.
    """
    undone: list[str] = []
    failed: list[OpsctlError] = []
    for instance in unfinished.instances(paths):
        with unfinished.held(paths, instance, wait=False) as mine:
            if not mine or not unfinished.of_earlier_boot(paths, instance):
                continue
            try:
                record = unfinished.read(paths, instance)
                trouble = _undo(paths, record, Tools(run), wait=False) if record else ""
                undone.append(instance)
                if trouble:
                    failed.append(OpsctlError("cutover.not_undone", f"{instance} cannot be started: {trouble}.",
                                              hint=f"systemctl status inference@{instance}.service"))
            except OpsctlError as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return {"changed": bool(undone), "undone": undone}


def undo_timeout_s(paths: Paths, instance: str, from_release: str) -> float:
    """How long an undo may take at the most: to stop what was tried and to start what served before."""
    start_s = 0.0
    if from_release:
        try:
            start_s = startable(paths, read_placement(paths, instance), from_release).start_timeout_s
        except OpsctlError:  # it says so when it is to be started
            start_s = START_TIMEOUT_S
    return STOP_TIMEOUT_S + start_s + 60


def _cutover(paths: Paths, order: Order, tools: Tools) -> dict[str, Any]:
    placement = read_placement(paths, order.instance)
    left = unfinished.read(paths, order.instance)
    if left:
        _undo(paths, left, tools)
    serving = current_release(paths, placement)
    if serving and (serving == order.release or not order.from_release):
        return _unchanged(paths, order, placement, serving)
    if serving != order.from_release:
        raise RefusedError("cutover.moved", f"{order.instance} is on {serving or 'no release'}, not on "
                           f"{order.from_release or 'none'} as the order says.",
                           hint="somebody moved it meanwhile; opsctl status, then the same command again")
    new = startable(paths, placement, order.release)
    running = systemd.show([placement.unit], tools.run)[placement.unit].active == "active"
    record = Record(order.instance, order.from_release, order.release, order.owner,
                    running or (left is not None and left.ran), touched=False)
    unfinished.write(paths, record)
    try:
        tools.doing("measure")
        baseline = _baseline(paths, order, placement, running, tools)
        record = replace(record, touched=True)
        unfinished.write(paths, record)
    except (OpsctlError, OSError):
        _undo(paths, replace(record, touched=False), tools)
        raise
    try:
        result = _act(paths, order, placement, new, baseline, tools)
    except (OpsctlError, OSError) as error:
        log = last_words(record, tools.run)
        raise _undone(paths, record, error, log, tools) from error
    # The drain first: between the two the record still keeps traffic away, and whoever dies there is undone.
    _end_drain(paths, order.instance, order.owner)
    unfinished.remove(paths, order.instance)
    return result


def _act(paths: Paths, order: Order, placement: Placement, new: Startable, baseline: Baseline, tools: Tools
         ) -> dict[str, Any]:
    """Stop, flip, start, gate. Raises OpsctlError or OSError; undoes nothing."""
    tools.doing("stop")
    began = tools.clock()
    _stop(placement.unit, tools)
    stopped = tools.clock()
    tools.doing("flip")
    point_symlink(paths.current(placement.service, placement.index), f"releases/{order.release}")
    tools.doing("start")
    _start_and_wait(placement, new, order.release, tools)
    started = tools.clock()
    tools.doing("gate")
    report = gate.check(_target(placement, new, order.release), baseline, order.min_speed_percent, pause=tools.pause,
                        slowed=lambda: slowed.now(paths, order.instance))
    checks = (*report.checks, _steady(systemd.show([placement.unit], tools.run)[placement.unit]))
    report = Report(checks, report.tokens_per_second)
    if report.verdict != "healthy":
        raise OpsctlError(f"gate.{report.verdict}", gate.wrong(checks))
    seconds = {"stop_s": round(stopped - began, 3), "start_s": round(started - stopped, 3),
               "gate_s": round(tools.clock() - started, 3)}
    speed = _rounded(report.tokens_per_second)
    passed.write(paths, order.instance, order.release,
                 {"tokens_per_second": speed, "chat": report.chat, **seconds})
    return {"changed": True, "instance": order.instance, "release": order.release, "from": order.from_release,
            "verdict": report.verdict, "checks": [check.as_document() for check in checks],
            "tokens_per_second": speed, "baseline_tokens_per_second": _rounded(baseline.tokens_per_second), **seconds}


def _unchanged(paths: Paths, order: Order, placement: Placement, serving: str) -> dict[str, Any]:
    """It is there already, as its last gate left it; or this is a first start, and it has served.

    Raises:
        RefusedError: it is there and not healthy: nobody could say that this cutover is done.
    """
    if order.from_release and not probes.is_healthy(placement, startable(paths, placement, serving).engine):
        raise RefusedError("cutover.moved", f"{order.instance} is on {serving} already, and is not healthy.",
                           hint=f"systemctl status {placement.unit} on the host")
    last = passed.read(paths, order.instance, serving) or {}
    return {"changed": False, "instance": order.instance, "release": serving, "from": order.from_release,
            "verdict": "healthy", "checks": [], "baseline_tokens_per_second": None,
            **{key: last.get(key) for key in ("tokens_per_second", "stop_s", "start_s", "gate_s")}}


def accept(paths: Paths, instance: str, tools: Tools) -> dict[str, Any]:
    """Starts what the instance served, unless it is well, and asks it the gate's questions; speed is not judged.

    Raises:
        OpsctlError: ``instance.*``, it does not start; ``gate.unhealthy``, ``gate.inconclusive``.
        RefusedError: ``instance.no_release``: it has never served.
    """
    placement = read_placement(paths, instance)
    release = current_release(paths, placement)
    if not release:
        raise RefusedError("instance.no_release", f"{instance} has never served.", hint="opsctl provision starts it")
    found = startable(paths, placement, release)
    unit = systemd.show([placement.unit], tools.run)[placement.unit]
    started = not (unit.active == "active" and probes.is_healthy(placement, found.engine))
    if started:
        if unit.busy:
            _stop(placement.unit, tools)
        _start_and_wait(placement, found, release, tools)
    checks = gate.check(_target(placement, found, release), Baseline(), 0, pause=tools.pause).checks
    verdict = gate.overall(checks)
    if verdict != "healthy":
        raise OpsctlError(f"gate.{verdict}", f"{instance}: {gate.wrong(checks)}",
                          hint=f"journalctl -u {placement.unit}")
    return {"instance": instance, "release": release, "started": started, "verdict": verdict}


def startable(paths: Paths, placement: Placement, release: str) -> Startable:
    """The release in folder ``release``, if it is whole, signed, and its engine built.

    Raises:
        RefusedError: it is not.
    """
    directory = paths.releases(placement.service) / release
    stage = f"opsctl-host stage --service {placement.service} --release {release}"
    if not directory.is_dir():
        raise RefusedError("release.not_staged", f"{release} is not staged on this host ({directory}).", hint=stage)
    signed = trust.read_signed(directory, paths.allowed_signers)
    found = signed.release
    if found.service != placement.service:
        raise RefusedError("release.tampered", f"{directory} is a release of {found.service}.", hint=stage)
    if not Stored(directory, found, signed.digest).complete() or not environment.is_complete(paths, found.engine):
        raise RefusedError("release.not_staged", f"{release} or its engine is only partly on this host.", hint=stage)
    return Startable(adapter(found.engine.name), float(found.arguments.get("start_timeout_s", START_TIMEOUT_S)),
                     int(found.arguments.get("max_model_len", 0)))


def _baseline(paths: Paths, order: Order, placement: Placement, running: bool, tools: Tools) -> Baseline:
    """What the release before shows now; where it cannot be asked, what it showed at its last gate."""
    if not order.from_release:
        return Baseline()
    last = passed.read(paths, order.instance, order.from_release) or {}
    known = Baseline(last.get("tokens_per_second"), bool(last.get("chat")))
    try:
        before = startable(paths, placement, order.from_release)
    except OpsctlError:  # lost files or engine; all the more reason to leave it
        return known
    if not running or not probes.is_healthy(placement, before.engine):
        return known
    now = gate.measure(_target(placement, before, order.from_release), pause=tools.pause)
    if slowed.now(paths, order.instance):  # a release that is measured in the heat is no measure for the next
        return Baseline(known.tokens_per_second, now.chat or known.chat)
    return Baseline(now.tokens_per_second or known.tokens_per_second, now.chat or known.chat)


def _target(placement: Placement, found: Startable, release: str) -> Target:
    return Target(placement, found.engine, served_names(placement.service, release)[1], found.context)


def _steady(unit: Unit) -> Check:
    """It may have died and come back between two questions of the gate."""
    if unit.active == "active" and not unit.restarts:
        return Check("unit", "healthy")
    return Check("unit", "unhealthy", f"ended while it was asked ({unit.active}, {unit.restarts} restarts)")


def _start_and_wait(placement: Placement, found: Startable, release: str, tools: Tools, *, crashes: bool = False
                    ) -> None:
    """Until it is healthy and says the release's name. ``crashes``: systemd may start it again meanwhile."""
    deadline = tools.clock() + found.start_timeout_s
    _reset(placement.unit, tools)
    done = tools.run(["systemctl", "start", "--", placement.unit], timeout_s=found.start_timeout_s)
    if done.returncode and not crashes:
        raise OpsctlError("instance.start", f"systemctl start failed: {done.stderr.strip()}")
    name = served_names(placement.service, release)[1]
    while True:
        unit = systemd.show([placement.unit], tools.run)[placement.unit]
        if unit.active in ("failed", "inactive") or (unit.restarts and not crashes):
            raise OpsctlError("instance.died", f"{placement.unit} ended ({unit.active}, {unit.sub})")
        if unit.active == "active" and probes.is_healthy(placement, found.engine):
            names = probes.served_names(placement)
            if name in names:
                return
            if names:  # none at all: it had no time to answer, or does not know them yet
                raise OpsctlError("instance.identity", f"{placement.address}:{placement.port} serves "
                                  f"{', '.join(sorted(names))}, not {name}")
            lacks = "healthy, but without a name under /v1/models,"
        else:
            lacks = "not healthy"
        if tools.clock() >= deadline:
            raise OpsctlError("instance.not_healthy", f"{lacks} after {found.start_timeout_s:.0f} s")
        tools.pause(POLL_S)


def _stop(unit: str, tools: Tools) -> None:
    done = tools.run(["systemctl", "stop", "--", unit], timeout_s=STOP_TIMEOUT_S)
    if done.returncode:
        raise OpsctlError("instance.not_stopped", f"systemctl stop {unit} failed: {done.stderr.strip()}",
                          hint=f"systemctl status {unit} on the host; its cutover is still to be undone")


def _reset(unit: str, tools: Tools) -> None:
    """Forgets failures and counted starts, of which an hour has ten: these are ordered ones.

    Its exit code says only that the unit is not loaded, and then nothing was counted.
    """
    tools.run(["systemctl", "reset-failed", "--", unit])


def _undone(paths: Paths, record: Record, error: OpsctlError | OSError, log: tuple[str, ...], tools: Tools
            ) -> OpsctlError:
    """Undoes, and says how the cutover ended."""
    try:
        trouble = _undo(paths, record, tools)
    except OpsctlError as stuck:
        return MixedError("cutover.not_undone", f"{record.instance} did not come up on {record.to_release} ({error}), "
                          f"and cannot be brought back: {stuck.message}.", hint=stuck.hint, log_tail=log)
    if trouble:
        log += last_words(record, tools.run)
    return failure(record, error, trouble, log)


NOT_PASSED = {
    "gate.unhealthy": "does not pass the gate",
    "gate.inconclusive": "could not be judged by the gate",
    "instance.not_stopped": "was not tried",
    "cutover.killed": "was not tried to the end",
}


def killed(word: Mapping[str, Any]) -> OpsctlError:
    """Why a worker left a record, from the last word of its job. Pure."""
    said = word.get("error", {}).get("message", "")
    return OpsctlError("cutover.killed", said.rstrip(".") or "the worker of its cutover was killed")


def failure(record: Record, error: OpsctlError | OSError, trouble: str, log: tuple[str, ...]) -> OpsctlError:
    """How a cutover ended that was undone. ``trouble`` keeps the release before from serving. Pure."""
    code = error.code if isinstance(error, OpsctlError) else ""
    before = record.from_release
    what = NOT_PASSED.get(code, "did not start")
    message = f"{record.instance}: {record.to_release} {what}: {str(error).rstrip('.')}"
    hint = f"journalctl -u inference@{record.instance}.service on the host says more"
    if trouble and record.ran:
        return MixedError("cutover.not_undone", f"{message}; and {before}, which served before, does not come back: "
                          f"{trouble}.", hint=hint, log_tail=log)
    if not before:
        message += "; it has no release again."
    elif trouble:
        message += f"; {before} did not run before and does not run now: {trouble}."
    else:
        message += f"; {before} serves again."
    if code == "gate.inconclusive":
        return PausedError(code, message, hint="the same command again, when nobody else sends it requests",
                           log_tail=log)
    return RolledBackError(code if code in NOT_PASSED else "instance.did_not_start", message, hint=hint, log_tail=log)


def last_words(record: Record, run: Run = systemd.run) -> tuple[str, ...]:
    """What the unit wrote, if the journal can be read: the undo must not wait for a journal that cannot."""
    try:
        return systemd.log_tail(f"inference@{record.instance}.service", LOG_LINES, run)
    except OpsctlError as error:
        return (error.message,)


def _undo(paths: Paths, record: Record, tools: Tools, *, wait: bool = True) -> str:
    """Stops what was tried, flips back, starts what served; the record goes last. One that touched nothing only ends.

    ``wait``: until it is healthy. Without it, as at boot, only a unit that ran is ordered to start: the others start in
    systemd's own time. Returns what keeps the release before from serving, empty when nothing does. Needs no placement
    for what must not fail: the instance may have left.

    Raises:
        OpsctlError: ``instance.not_stopped``; the record stays.
    """
    tools.doing("undo")
    trouble = _undo_acts(paths, record, tools, wait=wait) if record.touched else ""
    _end_drain(paths, record.instance, record.owner)
    unfinished.remove(paths, record.instance)
    return trouble


def _undo_acts(paths: Paths, record: Record, tools: Tools, *, wait: bool) -> str:
    """What ``_undo`` does to unit and link; what keeps the release before from serving."""
    unit = f"inference@{record.instance}.service"
    service, _, index = record.instance.rpartition(".")
    link = paths.current(service, int(index))
    now = systemd.show([unit], tools.run)[unit].active
    # On the release before already: it was cut off before the flip or after the flip back, and nothing else runs.
    flipped = not record.from_release or not link.is_symlink() or link.readlink().name != record.from_release
    if now == "deactivating" or (flipped and now != "inactive"):
        _stop(unit, tools)
    if not record.from_release:
        remove_durably(link)
        _reset(unit, tools)
    elif flipped:
        point_symlink(link, f"releases/{record.from_release}")
    trouble = ""
    if record.from_release and wait:
        trouble = _bring_back(paths, record, tools)
    elif record.from_release and now != "inactive":
        _reset(unit, tools)
        # Never to be waited for: at boot the start waits for us.
        done = tools.run(["systemctl", "start", "--no-block", "--", unit])
        trouble = done.stderr.strip() if done.returncode else ""
    return trouble


def _bring_back(paths: Paths, record: Record, tools: Tools) -> str:
    """Starts the release before and waits until it is well; what keeps it from that, or nothing."""
    try:
        placement = read_placement(paths, record.instance)
        before = startable(paths, placement, record.from_release)
        # The one that was tried may not have given its memory back yet: systemd starts it again until it fits.
        _start_and_wait(placement, before, record.from_release, tools, crashes=True)
    except (OpsctlError, OSError) as error:
        return str(error).rstrip(".")
    return ""


def _end_drain(paths: Paths, instance: str, owner: str) -> None:
    if owner:
        drains.remove(paths, instance, owner)


def _rounded(tokens_per_second: float | None) -> float | None:
    return None if tokens_per_second is None else round(tokens_per_second, 2)
