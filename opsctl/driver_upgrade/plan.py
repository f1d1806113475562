"""What a change of driver will do, host by host, before it does anything. Pure.

A host is the unit: all instances of all services on it are away while its driver is changed, so the budget is one of
every service at once. Who serves nobody goes first, the machine that opsctl runs on last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.gpus import BUNDLE_VERSIONS, SOURCE, VERSION
from opsctl.fleet.model import Host, Placement, Service
from opsctl.releases.plan import ALL_HEARD, Unheard, left_by_runs, serves, split

# ``finish``: a boot of its own brought it to an end, which is to be told; ``back``: it is on its way back.
Action = Literal["change", "finish", "back", "nothing"]
ACTIONS: Mapping[str, Action] = {"accepted": "finish", "back": "finish", "restored": "back", "broken": "back"}


@dataclass(frozen=True)
class Instance:
    """``serving``: it gets requests now; ``active``: its unit runs, or ran when the change began.

    ``ours`` and ``by_hand``: load balancers that a run which did not end took it out in itself, and those in which a
    person had done so before.
    """

    name: str  # gpu-1.chat.0
    instance: str
    service: str
    active: bool
    serving: bool
    drained_by: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    by_hand: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One host. ``now``: the versions of its driver's packages; ``loaded``: of the module in its kernel.

    ``phase`` and ``before``: of a change that did not end, how far it is and what it goes back to.
    """

    host: str
    now: tuple[str, ...]
    loaded: str
    action: Action
    instances: tuple[Instance, ...] = ()
    wave: int = 0
    local: bool = False
    phase: str = ""
    before: str = ""

    @property
    def serving(self) -> bool:
        return any(instance.serving for instance in self.instances)

    @property
    def takes(self) -> tuple[Instance, ...]:
        """The instances that stop for it, and are started again."""
        return tuple(instance for instance in self.instances if instance.active)

    @property
    def old(self) -> str:
        """The driver that it goes back to."""
        return self.before or "".join(self.now[:1])


@dataclass(frozen=True)
class Plan:
    """``serving``: by service the names of all instances that get requests now. ``short``: services that would have
    fewer than min_serving at some time."""

    to: str
    steps: tuple[Step, ...]
    services: tuple[Service, ...]
    serving: Mapping[str, frozenset[str]]
    silent: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def moves(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.action != "nothing")

    @property
    def waves(self) -> int:
        return max((step.wave for step in self.moves), default=0)


def make_plan(to: str, hosts: Sequence[Host], services: Sequence[Service], placements: Sequence[Placement],
              states: Mapping[str, Any], looks: Mapping[str, Any], *, waves: str, rotating: Collection[str]) -> Plan:
    """The plan for bringing ``hosts`` to the driver ``to``.

    ``states``: documents of ``opsctl-host state`` of every host with instances, or its error; ``looks``: what
    ``driver-keep look`` says of each of ``hosts``, or its error. ``rotating``: servers that load balancers send to.

    Raises:
        UsageError: the waves cannot be read.
    """
    serving = serving_now(placements, states, rotating)
    silent = tuple(host.name for host in hosts if isinstance(looks[host.name], OpsctlError)
                   or isinstance(states.get(host.name), OpsctlError))
    steps = [_step(to, host, placements, states.get(host.name), looks[host.name], serving)
             for host in hosts if host.name not in silent]
    numbered = {step.host: number for number, wave in enumerate(in_waves(steps, waves), 1) for step in wave}
    planned = tuple(replace(step, wave=numbered.get(step.host, 0)) for step in steps)
    there = {instance.service for step in planned for instance in step.instances}
    known = tuple(service for service in services if service.name in there)
    return Plan(to, planned, known, serving, silent, _short(planned, known, serving))


def serving_now(placements: Sequence[Placement], states: Mapping[str, Any], rotating: Collection[str]
                ) -> dict[str, frozenset[str]]:
    """By service, the names of the instances that get requests: well by their word, and in rotation."""
    found: dict[str, set[str]] = {placement.service: set() for placement in placements}
    for placement in placements:
        name = f"{placement.host}.{placement.instance}"
        instance = _instance(states.get(placement.host), placement.instance)
        if instance is not None and name in rotating and serves(instance):
            found[placement.service].add(name)
    return {service: frozenset(names) for service, names in found.items()}


def in_waves(steps: Sequence[Step], waves: str) -> list[list[Step]]:
    """Who serves nobody, all at once; the others by ``waves``; the machine that opsctl runs on, alone."""
    moving = [step for step in steps if step.action != "nothing"]
    idle = [step for step in moving if not step.serving and not step.local]
    others = split([step for step in moving if step.serving and not step.local], waves)
    local = [[step] for step in moving if step.local]
    return [*([idle] if idle else []), *others, *local]


def room(steps: Sequence[Step], services: Sequence[Service], serving: Mapping[str, Collection[str]],
         unheard: Unheard = ALL_HEARD) -> list[Step]:
    """Those of ``steps`` that may be away together, in their order: every service keeps ``min_serving``."""
    left = {service.name: len(serving.get(service.name, ())) - service.min_serving for service in services}
    found = []
    for step in steps:
        costs = cost(step, serving, unheard)
        if all(count <= left.get(service, 0) for service, count in costs.items()):
            found.append(step)
            for service, count in costs.items():
                left[service] = left.get(service, 0) - count
    return found


def cost(step: Step, serving: Mapping[str, Collection[str]], unheard: Unheard = ALL_HEARD) -> dict[str, int]:
    """By service, how many of those that serve now go with a host; none with one that is only told of.

    One that served when this was planned and is not heard now may serve still.
    """
    if step.action == "finish":
        return {}
    mine = [(instance.service, instance.name in serving.get(instance.service, ())
             or (instance.serving and instance.name in unheard.names)) for instance in step.instances]
    return {service: count for service in dict(mine) if (count := mine.count((service, True)))}


def check(plan: Plan, *, allow_outage: bool) -> None:
    """Refuses a plan that must not begin.

    Raises:
        RefusedError: ``driver.outage``.
    """
    if not plan.short or allow_outage:
        return
    words = [f"{service.name} has {len(plan.serving.get(service.name, ()))} serving, and min_serving is "
             f"{service.min_serving}" for service in plan.services if service.name in plan.short]
    raise RefusedError("driver.outage", f"{'; '.join(words)}: with one host away it would be below that, for as long "
                       "as packages, perhaps a reboot, and the engine's start take.",
                       hint="--allow-outage goes ahead (clients get 503 with Retry-After meanwhile); an instance on "
                            "another host makes it lossless")


def check_inventory(hosts: Sequence[Host], to: str, places: Mapping[str, str]) -> None:
    """Refuses hosts whose inventory wants another driver: the next provision would undo the change.

    ``places``: ``inventory.ini:12`` by host, where its variable stands.

    Raises:
        RefusedError: ``driver.inventory_differs``.
    """
    for host in hosts:
        wanted = str(host.variables.get(VERSION, ""))
        if wanted != to:
            raise RefusedError(
                "driver.inventory_differs", f"{places[host.name]}: {VERSION}={wanted} of {host.name}, and --to is "
                f"{to}: the next provision would undo the change.",
                hint=f'write {VERSION}="{to}" there and "{wanted}" into {BUNDLE_VERSIONS}, for the way back; or '
                     "--limit leaves the host out")


def check_source(hosts: Sequence[Host]) -> None:
    """Refuses hosts whose driver is Debian's own: what is kept of a driver would not bring that one back.

    Raises:
        RefusedError: ``driver.debian``.
    """
    names = [host.name for host in hosts if host.variables.get(SOURCE) == "debian"]
    if names:
        one = names[0]
        raise RefusedError(
            "driver.debian", f"{', '.join(names)}: {SOURCE}=debian: Debian's driver has packages with versions of "
            "their own and a file of preferences, which are not kept for a way back; upgrade-driver changes the "
            "vendor's only.",
            hint=f"one host at a time: opsctl drain {one}; opsctl exec --limit {one} -- systemctl stop "
                 f"'inference@*.service'; opsctl provision --limit {one}; opsctl undrain {one}; or --limit leaves it "
                 "out")


def _step(to: str, host: Host, placements: Sequence[Placement], state: Any, look: Mapping[str, Any],
          serving: Mapping[str, frozenset[str]]) -> Step:
    change = look["change"]
    began = set(change["instances"]) if change else set()
    instances = []
    for placement in placements:
        instance = _instance(state, placement.instance) if placement.host == host.name else None
        if instance is None:
            continue
        name = f"{host.name}.{placement.instance}"
        drained = tuple(drain["owner"] for drain in state.get("drains", ())
                        if drain["instance"] == placement.instance and drain["weight"] == 0)
        runs = instance["unit"] in ("active", "activating", "reloading") or placement.instance in began
        out = look["rotation"].get(placement.instance, {})
        instances.append(Instance(name, placement.instance, placement.service, runs,
                                  name in serving[placement.service], drained, tuple(out.get("ours", ())),
                                  tuple(out.get("by_hand", ()))))
    has = tuple(look["versions"])
    whole = has == (to,) and look["loaded"] == to and not look["states"]
    action: Action = "nothing" if whole else "change"
    if change and change["to"] == to:
        action = ACTIONS.get(change["phase"], "change")
    elif change and ACTIONS.get(change["phase"]) == "finish":  # a run that was given up; it is over all the same
        change = None
    elif change:
        action = "change"
    return Step(host.name, has, look["loaded"], action, tuple(instances), local=host.connection == "local",
                phase=change["phase"] if change else "", before=change["from"] if change else "")


def _instance(state: Any, name: str) -> Mapping[str, Any] | None:
    if state is None or isinstance(state, OpsctlError):
        return None
    return next((one for one in state["instances"] if one["instance"] == name), None)


def _short(steps: Sequence[Step], services: Sequence[Service], serving: Mapping[str, frozenset[str]]
           ) -> tuple[str, ...]:
    """Who serves nobody now and is coming counts: it goes first, and should it not come up, the budget pauses."""
    moving = [step for step in steps if step.action != "nothing"]
    coming = [instance for step in moving for instance in step.takes if not instance.serving
              and (not instance.drained_by or left_by_runs(instance.drained_by))]
    found = []
    for service in services:
        have = len(serving[service.name]) + sum(instance.service == service.name for instance in coming)
        most = max((cost(step, serving).get(service.name, 0) for step in moving), default=0)
        if most and have - most < service.min_serving:
            found.append(service.name)
    return tuple(found)
