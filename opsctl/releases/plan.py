"""What a change of release will do, instance by instance, before it does anything. Pure.

``make_plan`` joins placements, what the hosts said, and the release that is wanted; ``check`` refuses what must not be
begun. Nothing here asks a host: facts come in, a ``Plan`` goes out, and the operator reads it before saying yes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from opsctl.agent import ledger
from opsctl.agent.ledger import SERVE, Line
from opsctl.agent.locks import OWNED_BY_RUN
from opsctl.agent.manifest import directory_name
from opsctl.errors import OpsctlError, RefusedError, UsageError
from opsctl.fleet.model import Placement, Service

WAVES = "1,25%,100%"  # one canary, then a quarter, then the rest
WAVE = re.compile(r"(?P<count>[1-9]\d*)(?P<percent>%?)")

T = TypeVar("T")
Action = Literal["move", "nothing"]


@dataclass(frozen=True)
class Target:
    """The release that a change brings: version, sha256 of its manifest, and bytes of its files."""

    service: str
    version: str
    digest: str
    size: int = 0

    @property
    def release(self) -> str:
        """``v2-0123456789ab``."""
        return directory_name(self.version, self.digest)


@dataclass(frozen=True)
class Step:
    """One instance. ``now`` and ``back`` are release folders, empty for none; ``serving``: it gets requests now.

    ``back`` is where it goes when the rollout fails; ``earlier``: an unfinished rollout has moved it already.
    ``out_s`` is how long it was out of service at its last change, None when nobody measured.
    """

    host: str
    instance: str
    now: str
    next: str
    action: Action
    serving: bool
    wave: int = 0
    back: str = ""
    earlier: bool = False
    out_s: float | None = None
    drained_by: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As load balancers call it: ``gpu-1.chat.0``."""
        return f"{self.host}.{self.instance}"


@dataclass(frozen=True)
class HostPart:
    """What staging does to a host. Bytes; ``free_after`` None when the host does not say."""

    host: str
    staged: bool
    fetch: int
    links: int
    free_after: int | None
    fits: bool


@dataclass(frozen=True)
class Plan:
    """All that will be done. ``serving`` counts the instances that get requests now, all over the service."""

    service: Service
    target: Target
    steps: tuple[Step, ...]
    hosts: tuple[HostPart, ...]
    serving: int
    silent: tuple[str, ...] = ()  # hosts that did not answer
    outage: bool = False  # moving leaves fewer than min_serving at some time

    @property
    def moves(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.action == "move")

    @property
    def waves(self) -> int:
        return max((step.wave for step in self.moves), default=0)

    @property
    def least_serving(self) -> int:
        """How many are left while it goes on, when nothing fails: budget and waves allow no more to be away."""
        budget = max(self.serving - self.service.min_serving, 1 if self.moves else 0)
        sizes = [sum(step.serving for step in self.moves if step.wave == wave) for wave in range(1, self.waves + 1)]
        return self.serving - min(budget, max(sizes, default=0))

    @property
    def expected_outage_s(self) -> float | None:
        """Seconds without enough instances, by what the last changes took; None when nobody measured."""
        moving = [step for step in self.moves if step.serving]
        known = [step.out_s for step in moving if step.out_s is not None]
        return sum(known) if known and len(known) == len(moving) else None


@dataclass(frozen=True)
class Unheard:
    """What is not known of who serves now, which is no word that it does not.

    ``names``: instances of hosts that did not answer; ``why``: set when a load balancer did not, so nobody is known.
    """

    names: frozenset[str] = frozenset()
    why: str = ""


ALL_HEARD = Unheard()


def serves(instance: Mapping[str, Any]) -> bool:
    """Whether an instance (of ``opsctl-host state``) gets requests now: healthy, not drained, its gate passed."""
    return (instance["unit"] == "active" and instance["health"] == "healthy" and int(instance.get("weight", 100)) > 0
            and not instance.get("unfinished"))


def make_plan(
    service: Service, target: Target, placements: Sequence[Placement], states: Mapping[str, Any], *,
    stage_plans: Mapping[str, Mapping[str, Any]], waves: str = WAVES, tip: Target | None = None,
    chosen: frozenset[str] | None = None, rotating: frozenset[str] | None = None,
) -> Plan:
    """The plan for bringing ``service`` to ``target``.

    ``states`` are documents of ``opsctl-host state`` by host, or the error of a host that did not give one;
    ``stage_plans`` documents of ``opsctl-host stage-plan``. ``tip`` is what the ledger says now. ``chosen``: only
    these hosts are changed; all of them count. ``rotating``: servers that load balancers send requests to, None: all.

    Raises:
        UsageError: the waves cannot be read.
    """
    steps: list[Step] = []
    silent: list[str] = []
    serving = 0
    for placement in placements:
        state = states.get(placement.host)
        if state is None or isinstance(state, OpsctlError):
            if placement.host not in silent:
                silent.append(placement.host)
            continue
        instance = next((one for one in state["instances"] if one["instance"] == placement.instance), None)
        gets = rotating is None or f"{placement.host}.{placement.instance}" in rotating
        serving += instance is not None and gets and serves(instance)
        if chosen is not None and placement.host not in chosen:
            continue
        if instance is not None:
            step = _step(placement, instance, state, target, tip)
            steps.append(step if gets else replace(step, serving=False))
    moving = in_order([step for step in steps if step.action == "move"])
    numbered = {step.name: number for number, wave in enumerate(in_waves(moving, waves), 1) for step in wave}
    planned = tuple(replace(step, wave=numbered.get(step.name, 0)) for step in steps)
    # who serves nobody now goes first, and is counted on afterwards; should it not come up, the budget pauses
    coming = sum(not step.serving and not step.drained_by for step in moving)
    # a run that drained and died: its drain is taken back as soon as its lock is ours
    coming += sum(not step.serving and bool(step.drained_by) and left_by_runs(step.drained_by) for step in steps)
    outage = any(step.serving for step in moving) and serving + coming - service.min_serving < 1
    return Plan(service, target, planned, _hosts(moving, states, stage_plans, target), serving, tuple(silent),
                outage)


def left_by_runs(owners: Sequence[str]) -> bool:
    """Whether all these owners of drains are runs, and no operator or guard is among them."""
    return all(owner.startswith(OWNED_BY_RUN) for owner in owners)


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Who goes first: those that serve nobody, for they cost nothing; then one of each host after the other."""
    seen: dict[str, int] = {}
    rank: dict[str, int] = {}
    for step in steps:
        rank[step.name] = seen.get(step.host, 0)
        seen[step.host] = rank[step.name] + 1
    return sorted(steps, key=lambda step: (step.serving, rank[step.name]))


def in_waves(steps: Sequence[Step], waves: str) -> list[list[Step]]:
    """First those that serve nobody, all at once: they cost nothing, and are no canary. Then the others, ``split``.

    Raises:
        UsageError: ``waves`` cannot be read.
    """
    idle = [step for step in steps if not step.serving]
    others = split([step for step in steps if step.serving], waves)
    return [idle, *others] if idle else others


def split(steps: Sequence[T], waves: str) -> list[list[T]]:
    """``steps`` in waves: ``1,25%,100%`` is one, then a quarter of all, then all that are left; the last repeats.

    Raises:
        UsageError: ``waves`` is not a list of counts and percentages.
    """
    sizes: list[int] = []
    for word in waves.split(","):
        match = WAVE.fullmatch(word.strip())
        if match is None:
            raise UsageError("update.bad_waves", f"--waves {waves}: {word.strip()!r} is neither a count nor a "
                             "percentage.", hint=f"such as {WAVES}: one instance, then a quarter, then the rest")
        count = int(match["count"])
        sizes.append(math.ceil(len(steps) * count / 100) if match["percent"] else count)
    left = list(steps)
    found: list[list[T]] = []
    while left:
        size = max(1, sizes[min(len(found), len(sizes) - 1)])
        found.append(left[:size])
        left = left[size:]
    return found


def check(plan: Plan, *, allow_outage: bool) -> None:
    """Refuses a plan that must not begin.

    Raises:
        RefusedError: a release does not fit a disk, or fewer than ``min_serving`` instances would be left.
    """
    full = [part for part in plan.hosts if not part.fits]
    if full:
        names = ", ".join(f"{part.host} ({_gb(part.fetch)} to fetch, {_gb((part.free_after or 0) + part.fetch)} free)"
                          for part in full)
        raise RefusedError("host.disk_full", f"{plan.target.version} does not fit beside what is there on {names}.",
                           hint="opsctl gc shows what may go; nothing was changed")
    if plan.outage and not allow_outage:
        service = plan.service
        seconds = plan.expected_outage_s
        long = f"about {math.ceil(seconds)} s by the last change" if seconds is not None else \
            "for as long as the engine takes to stop, load and pass its gate (not measured yet)"
        raise RefusedError(
            "update.outage", f"{service.name} has {plan.serving} serving, and min_serving is {service.min_serving}: "
            f"with one of them away it would be below that, {long}.",
            hint="--allow-outage goes ahead (clients get 503 with Retry-After meanwhile); instances_per_host: 2 in "
                 "services.yml or another host makes it lossless")


def unfinished(states: Mapping[str, Any], service: str, lines: Sequence[Line]) -> dict[str, str]:
    """Releases that a rollout brought to some instance and that nobody wanted to stay: digest -> version.

    The ledger never named them; or it marked them as bad, and the instance's gate passed after its last word: somebody
    tried again and did not come to the end. What the ledger names otherwise is behind, or on its way back.
    """
    now = ledger.tip(lines)
    if now is None:
        return {}
    known = {line.digest for line in lines if line.action == SERVE}
    bad = ledger.bad_digests(lines)
    found: dict[str, str] = {}
    for state in states.values():
        if isinstance(state, OpsctlError):
            continue
        for instance in state["instances"]:
            digest = instance["digest"]
            if instance["service"] != service or not digest or digest == now.digest:
                continue
            passed = str((instance.get("gate") or {}).get("at", ""))
            if digest not in known or (digest in bad and passed > now.at):
                found[digest] = instance["release"]
    return found


def _step(placement: Placement, instance: Mapping[str, Any], state: Mapping[str, Any], target: Target,
          tip: Target | None) -> Step:
    now = directory_name(instance["release"], instance["digest"]) if instance["digest"] else ""
    on_target = now == target.release and not instance.get("unfinished")
    serving = serves(instance)
    gate = instance.get("gate") or {}
    known = [gate.get(key) for key in ("stop_s", "start_s", "gate_s")]
    drained = tuple(drain["owner"] for drain in state.get("drains", ())
                    if drain["instance"] == placement.instance and drain["weight"] == 0)
    back = now
    if now == target.release:
        # moved by a rollout that did not end; of an instance that is simply up to date there is no way back
        back = tip.release if tip is not None and tip.digest != target.digest and _complete(state, tip) else ""
    return Step(
        placement.host, placement.instance, now, target.release, "nothing" if on_target else "move", serving,
        back=back, earlier=on_target and tip is not None and tip.digest != target.digest,
        out_s=sum(float(value) for value in known if value is not None) if all(
            value is not None for value in known) else None,
        drained_by=drained)


def _complete(state: Mapping[str, Any], target: Target) -> bool:
    return any(release["digest"] == target.digest and release["complete"] and release.get("engine_built", True)
               for release in state["releases"])


def _hosts(moving: Sequence[Step], states: Mapping[str, Any], stage_plans: Mapping[str, Mapping[str, Any]],
           target: Target) -> tuple[HostPart, ...]:
    found = []
    for host in dict.fromkeys(step.host for step in moving):
        known = stage_plans.get(host)
        if known is not None:
            found.append(HostPart(host, bool(known["staged"]), int(known["fetch_bytes"]), int(known["link_files"]),
                                  int(known["free_after_bytes"]), bool(known["fits"])))
            continue
        staged = _complete(states[host], target)
        fetch = 0 if staged else target.size
        free = states[host].get("free_bytes")
        after = None if free is None else int(free) - fetch
        found.append(HostPart(host, staged, fetch, 0, after, after is None or staged or after >= 0))
    return tuple(found)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
