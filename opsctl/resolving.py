"""Asks GPU hosts what they have, and releases what they need, and puts both to the resolver; decides nothing.

What a host has of GPUs is read by the role's own program, ``roles/nvidia_driver/files/driver_facts.py``, sent to its
Python: there may be neither a driver nor an agent yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from opsctl.engines.events import Emit, Note, PhaseStarted
from opsctl.engines.session import Session, on_each
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet.gpus import FABRIC_MANAGER, FLAVOUR, VERSION, source_of
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases.listing import Listed, list_releases
from opsctl.resources import resource
from opsctl.stack.knowledge import Knowledge, knowledge
from opsctl.stack.lock import Entry, HostFacts, Lock, branch_ended, ended, entry_of, holds, read
from opsctl.stack.naming import Request, Unknown, answer, boards_seen, refused
from opsctl.stack.question import Answer
from opsctl.stack.versions import branch_of, is_driver_version

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Overrides:
    """What the operator typed, for every host; empty: the inventory and the releases say it."""

    engines: tuple[str, ...] = ()
    cuda: str = ""
    policy: str = "long"
    driver: str = ""


@dataclass(frozen=True)
class Found:
    """A host's facts and the answer for it."""

    facts: HostFacts
    answer: Answer


def ask_hosts(fleet: Fleet, hosts: Sequence[Host]) -> dict[str, HostFacts | OpsctlError]:
    """PCI device ids, NVSwitches and distribution of each host, without its engines."""
    return on_each(fleet, hosts, look)


def look(session: Session) -> HostFacts:
    """What one host has.

    Raises:
        RefusedError: ``stack.no_facts``: it cannot say; and what the session raises.
    """
    host = session.host.name
    program = resource("roles") / "nvidia_driver" / "files" / "driver_facts.py"
    said = session.run(["python3", "-"], stdin=program.read_bytes(), timeout_s=TIMEOUT_S)
    release = session.run(["cat", "/etc/os-release"], sudo=False, timeout_s=TIMEOUT_S)
    if said.returncode or release.returncode:
        failed = said if said.returncode else release
        raise RefusedError("stack.no_facts", f"{host} cannot say what it has: exit code {failed.returncode}.",
                           hint="it needs python3 and /etc/os-release", log_tail=failed.stderr.splitlines()[-5:])
    seen = json.loads(said.stdout)["seen"]
    return HostFacts(tuple(seen["gpus"]), system_in(release.stdout), (), int(seen["switches"]))


def system_in(text: str) -> str:
    """``debian12``, ``ubuntu24.04`` from ``/etc/os-release``."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return "".join(values.get(key, "").strip().strip("\"'") for key in ("ID", "VERSION_ID"))


def engines_of(fleet: Fleet, hosts: Sequence[Host]) -> tuple[dict[str, tuple[str, ...]], str]:
    """The engines that each host's services need, by their ledgers, and why the gateway was silent, if it was."""
    services = [service for service in fleet.services if service.gpus_per_instance]
    if not services:
        return {}, ""
    listed = list_releases(fleet, [service.name for service in services], fleet.directory / "bundle")
    pinned = {service.name: engine_in(listed, service) for service in services}
    return {host.name: tuple(dict.fromkeys(pinned[service.name] for service in services
                                           if service.group in host.groups and pinned[service.name]))
            for host in hosts}, listed.silence


def engine_in(listed: Listed, service: Service) -> str:
    """``vllm==0.33.0``: what the release is pinned to that the ledger, or else ``first_release``, wants; or empty."""
    mine = [row for row in listed.releases if row["service"] == service.name]
    wanted = [row for row in mine if row["now"]] or [row for row in mine if row["version"] == service.first_release]
    if not wanted:
        return ""
    name, _, version = str(wanted[0]["engine"]).rpartition("-")[0].partition("-")
    return f"{name}=={version}"


def request_of(host: Host, facts: HostFacts, typed: Overrides) -> Request:
    """The question of a host: what it has, what its inventory wishes, what was typed.

    Raises:
        Unknown: a GPU of it.
    """
    variables = {key: value for key, value in host.variables.items() if key not in host.locked}
    return Request(boards_seen(facts.gpus), facts.os, typed.engines or facts.engines, typed.cuda, typed.policy,
                   typed.driver or str(variables.get(VERSION) or ""), str(variables.get(FLAVOUR) or ""),
                   str(variables.get(FABRIC_MANAGER) or "auto"), facts.switches)


def answers(hosts: Sequence[Host], facts: Mapping[str, HostFacts], typed: Overrides, known: Knowledge, today: date
            ) -> dict[str, Found]:
    """The answer for every host that has GPUs. Pure."""
    found = {}
    for host in hosts:
        mine = facts.get(host.name)
        if mine is None or not mine.gpus:
            continue
        mine = replace(mine, engines=typed.engines or mine.engines)
        try:
            found[host.name] = Found(mine, answer(request_of(host, mine, typed), known, today))
        except Unknown as unknown:
            found[host.name] = Found(mine, refused(unknown, (), Request((), mine.os)))
    return found


def lock_of(fleet: Fleet, facts: Mapping[str, HostFacts], found: Mapping[str, Found], before: Lock | None) -> Lock:
    """The new lock: hosts that have an answer anew, the others of the inventory as they were. Pure.

    Who was asked and has no GPU any more goes.
    """
    there = {host.name for host in fleet.group("gpu")} - (set(facts) - set(found))
    kept: dict[str, Entry] = {name: entry for name, entry in (before.hosts if before else {}).items() if name in there}
    return Lock(kept | {name: entry_of(one.answer, one.facts.gpus) for name, one in found.items() if one.answer.stack})


def read_lock(path: Path) -> Lock | None:
    """The lock beside an inventory; None when there is none.

    Raises:
        ConfigurationError: it is wrong; file and line are named.
    """
    try:
        return read(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ConfigurationError("stack_lock.not_yaml", f"{path} is not UTF-8.", hint="save it as UTF-8 text") from None


def warn_of_ended(hosts: Sequence[Host], emit: Emit, today: date) -> None:
    """Says of hosts that are to have Debian's own driver when its branch has ended: stack resolve chooses none such."""
    for host in hosts:
        version = str(host.variables.get(VERSION) or "")
        if source_of(host.variables) != "debian" or not is_driver_version(version):
            continue
        if over := branch_ended(branch_of(version), knowledge(), today):
            emit(Note(f"Debian's own driver {version}: {over}; opsctl stack resolve names one of the vendor's",
                      "warning", host.name))


def check_lock(fleet: Fleet, hosts: Sequence[Host], emit: Emit, today: date) -> None:
    """Refuses when stack.lock no longer holds for one of these hosts: another GPU, distribution, driver or engine.

    Raises:
        RefusedError: ``stack_lock.does_not_hold``; nothing was changed.
        OpsctlError: a host does not say what it has.
    """
    lock = read_lock(fleet.lock_file)
    locked = [host for host in hosts if lock and host.name in lock.hosts]
    if lock is None or not locked:
        return
    emit(PhaseStarted("Compare stack.lock with the hosts", tuple(host.name for host in locked)))
    facts = ask_hosts(fleet, locked)
    engines, silence = engines_of(fleet, locked)
    if silence:
        emit(Note(f"which engines the releases need is not known: {silence}", "warning"))
    for host in locked:
        mine = facts[host.name]
        if isinstance(mine, OpsctlError):
            raise mine
        entry = lock.hosts[host.name]
        written = "" if VERSION in host.locked else str(host.variables.get(VERSION) or "")
        now = replace(mine, engines=engines.get(host.name, ()) or entry.engines, driver=written)
        if over := ended(entry, knowledge(), today):
            emit(Note(f"{over}; opsctl stack resolve names another", "warning", host.name))
        wrong = holds(entry, now, knowledge(), today)
        if wrong:
            raise RefusedError("stack_lock.does_not_hold", f"{host.name}: {fleet.lock_file.name} no longer holds: "
                               f"{'; '.join(wrong)}.",
                               hint="opsctl stack resolve --write makes it anew and shows what changes; review that")
