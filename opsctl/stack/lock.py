"""``stack.lock``: which stack each host is to have, beside the inventory and reviewed in git like code. Pure.

``opsctl stack resolve --write`` writes it; ``read`` and ``render`` are each other's inverse; ``holds`` says what of an
entry is no longer so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any

from opsctl.errors import ConfigurationError
from opsctl.fleet.strict_yaml import Block, read_blocks
from opsctl.stack.catalogue import catalogue
from opsctl.stack.knowledge import Knowledge
from opsctl.stack.naming import Request, Unknown, answer, boards_seen
from opsctl.stack.question import Answer
from opsctl.stack.versions import is_driver_version

FILE = "stack.lock"
SCHEMA = "opsctl.stack-lock/v1"
HEADER = """\
# Which stack each host is to have: driver, kernel module, fabric manager, CUDA, and why. opsctl stack resolve --write
# writes it from what the hosts have, the inventory wishes and the releases need; review its changes like code.
"""
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # hosts that need no quotes
REMAKE = "take it from git again; or remove it, and opsctl stack resolve --write makes it anew"


@dataclass(frozen=True)
class Entry:
    """What one host is to have. ``gpus``: PCI device ids with how many there are; ``models``: for people.

    ``engines``: requirements, ``vllm==0.33.0``; ``own_packages``: those with versions of their own.
    """

    gpus: Mapping[str, int]
    os: str
    branch: int
    version: str
    module: str
    fabric_manager: bool
    cuda: str
    engines: tuple[str, ...] = ()
    own_packages: tuple[str, ...] = ()
    absent_packages: tuple[str, ...] = ()
    kernel_modules: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def variables(self) -> dict[str, Any]:
        """The role nvidia_driver's variables that bring a host there."""
        return {"nvidia_driver_version": self.version, "nvidia_driver_flavour": self.module,
                "nvidia_driver_fabric_manager": "present" if self.fabric_manager else "absent",
                "nvidia_driver_own": list(self.own_packages)}


@dataclass(frozen=True)
class Lock:
    hosts: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class HostFacts:
    """What a host has and what is wanted of it now. ``gpus``: PCI device ids; ``engines``: what its releases pin.

    ``driver``: the version that the inventory wishes, empty where it says nothing.
    """

    gpus: tuple[str, ...]
    os: str
    engines: tuple[str, ...]
    switches: int = 0
    driver: str = ""


def entry_of(found: Answer, gpus: Sequence[str]) -> Entry:
    """The entry of a host whose question has an answer. ``gpus``: its PCI device ids.

    Raises:
        ValueError: it has none.
    """
    stack = found.stack
    if stack is None:
        raise ValueError("a refusal cannot be locked")
    return Entry(_counted(gpus), found.system, stack.branch, stack.version, stack.module, stack.fabric_manager,
                 stack.cuda, tuple(engine.requirement for engine in found.engines), stack.own, stack.absent, stack.load,
                 found.models, found.reasons)


def holds(entry: Entry, facts: HostFacts, known: Knowledge, today: date) -> tuple[str, ...]:
    """What no longer holds of an entry, in words; nothing when all does.

    Another engine than the locked one is no matter as long as the locked driver runs it; nor is the end of its branch,
    which ``ended`` tells: a fleet has to be mended on that day too.
    """
    wrong = []
    if dict(entry.gpus) != _counted(facts.gpus):
        wrong.append(f"it was locked with {_named(entry.gpus)}, and it has {_named(_counted(facts.gpus))}")
    if entry.os != facts.os:
        wrong.append(f"it was locked with {entry.os}, and it runs {facts.os}")
    if facts.driver and facts.driver != entry.version:
        wrong.append(f"it was locked with driver {entry.version}, and the inventory wishes {facts.driver}")
    if not wrong and set(facts.engines) != set(entry.engines):
        wrong += _beyond(entry, facts, known, today)
    return tuple(wrong)


def ended(entry: Entry, known: Knowledge, today: date) -> str:
    """That the locked driver's branch gets no fixes any more, in words; empty while it does."""
    return branch_ended(entry.branch, known, today)


def branch_ended(number: int, known: Knowledge, today: date) -> str:
    """That a branch gets no fixes of NVIDIA's any more, in words; empty while it does, or is not known."""
    branch = next((one for one in known.branches if one.number == number and not one.gets_fixes(today)), None)
    if branch is None:
        return ""
    return f"driver branch {number} gets no fixes any more" + (f": it ended with {branch.ends}" if branch.ends else "")


def read(text: str, path: object) -> Lock:
    """What a ``stack.lock`` says. ``path`` is what errors call it.

    Raises:
        ConfigurationError: ``stack_lock.*``: file, line and key are named.
    """
    try:
        block = read_blocks(text, str(path))
    except ConfigurationError as error:
        code = error.code.rpartition(".")[2]
        raise ConfigurationError(f"stack_lock.{code}", error.message.replace("a service's name", "schema"),
                                 hint=REMAKE) from None
    _keys(block, ("schema", "hosts"), path)
    if block.values["schema"] != SCHEMA:
        raise _wrong(path, block, "schema", f"is {block.values['schema']!r}, and this version of opsctl reads {SCHEMA}")
    hosts = block.values["hosts"]
    if not isinstance(hosts, Block):
        raise _wrong(path, block, "hosts", "has no hosts below it")
    return Lock({name: _entry(hosts, name, path) for name in hosts.values})


def render(lock: Lock) -> str:
    """The text of a lock: the same for the same lock, hosts in order."""
    lines = [HEADER + f"schema: {SCHEMA}", "hosts:" if lock.hosts else "hosts: {}"]
    for name, entry in sorted(lock.hosts.items()):
        lines += [f"  {name if PLAIN.fullmatch(name) else _text(name)}:",
                  "    gpus:", *(f"      {_text(device)}: {count}" for device, count in sorted(entry.gpus.items())),
                  f"    os: {_text(entry.os)}", "    driver:", f"      branch: {entry.branch}",
                  f"      version: {_text(entry.version)}", f"      module: {_text(entry.module)}",
                  f"    fabric_manager: {str(entry.fabric_manager).lower()}", f"    cuda: {_text(entry.cuda)}"]
        for key in LISTS:
            values = getattr(entry, key)
            lines += [f"    {key}:", *(f"      - {_text(value)}" for value in values)] if values else [f"    {key}: []"]
    return "\n".join(lines) + "\n"


def changes(before: Lock | None, after: Lock) -> tuple[str, ...]:
    """What is different in a new lock, a line for each host that changes."""
    old = before.hosts if before else {}
    said = []
    for name in sorted({*old, *after.hosts}):
        if name not in after.hosts:
            said.append(f"- {name}: {_short(old[name])}")
        elif name not in old:
            said.append(f"+ {name}: {_short(after.hosts[name])}")
        elif old[name] != after.hosts[name]:
            one, other = old[name], after.hosts[name]
            keys = [key.name for key in fields(Entry) if getattr(one, key.name) != getattr(other, key.name)]
            said.append(f"~ {name}: " + "; ".join(
                f"{key} {_value(getattr(one, key))} -> {_value(getattr(other, key))}" for key in keys
                if key != "reasons" or keys == ["reasons"]))
    return tuple(said)


LISTS = ("engines", "own_packages", "absent_packages", "kernel_modules", "models", "reasons")


def _beyond(entry: Entry, facts: HostFacts, known: Knowledge, today: date) -> list[str]:
    fabric = "present" if entry.fabric_manager else "absent"
    try:
        request = Request(boards_seen(facts.gpus), facts.os, facts.engines, driver=entry.version, flavour=entry.module,
                          fabric_manager=fabric)
    except Unknown as unknown:
        return ["; ".join(unknown.facts)]
    found = answer(request, known, today)
    if found.stack is not None:
        return []
    return [f"its releases need {', '.join(facts.engines) or 'no engine'}, beyond what was locked for "
            f"{', '.join(entry.engines) or 'none'}: {'; '.join(found.clash)}"]


def _entry(hosts: Block, name: str, path: object) -> Entry:
    block = hosts.values[name]
    if not isinstance(block, Block):
        raise _wrong(path, hosts, name, "has nothing below it")
    _keys(block, ("gpus", "os", "driver", "fabric_manager", "cuda", *LISTS), path)
    gpus, driver = block.values["gpus"], block.values["driver"]
    for key, value in (("gpus", gpus), ("driver", driver)):
        if not isinstance(value, Block):
            raise _wrong(path, block, key, "has nothing below it")
    for device, count in gpus.values.items():
        if not re.fullmatch(r"[0-9a-f]{4}", device) or not _is_count(count):
            raise _wrong(path, gpus, device, 'is no PCI device id with how many there are, such as "2335": 8')
    _check_driver(driver, path)
    if not isinstance(block.values["fabric_manager"], bool):
        raise _wrong(path, block, "fabric_manager", "is neither true nor false")
    for key in ("os", "cuda"):
        if not isinstance(block.values[key], str):
            raise _wrong(path, block, key, "is no text")
    lists = {key: tuple(block.values[key]) if _is_list(block.values[key]) else None for key in LISTS}
    for key, values in lists.items():
        if values is None:
            raise _wrong(path, block, key, "is no list of texts")
    return Entry(dict(gpus.values), block.values["os"], driver.values["branch"], driver.values["version"],
                 driver.values["module"], block.values["fabric_manager"], block.values["cuda"],
                 **{key: values or () for key, values in lists.items()})


def _check_driver(driver: Block, path: object) -> None:
    _keys(driver, ("branch", "version", "module"), path)
    if not _is_count(driver.values["branch"]):
        raise _wrong(path, driver, "branch", "is no branch, such as 580")
    if not isinstance(driver.values["version"], str) or not is_driver_version(driver.values["version"]):
        raise _wrong(path, driver, "version", 'is no exact version as text, such as "580.126.09"')
    if driver.values["module"] not in ("open", "proprietary"):
        raise _wrong(path, driver, "module", "is neither open nor proprietary")


def _keys(block: Block, wanted: Sequence[str], path: object) -> None:
    for key in block.values:
        if key not in wanted:
            raise _wrong(path, block, key, "is no key of a stack.lock here")
    for key in wanted:
        if key not in block.values:
            raise ConfigurationError("stack_lock.missing_key", f"{path}:{block.line}: {key} is missing here.",
                                     hint=REMAKE)


def _wrong(path: object, block: Block, key: str, problem: str) -> ConfigurationError:
    return ConfigurationError("stack_lock.bad_value", f"{path}:{block.lines.get(key, block.line)}: {key} {problem}.",
                              hint=REMAKE)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _counted(gpus: Sequence[str]) -> dict[str, int]:
    return {device: list(gpus).count(device) for device in dict.fromkeys(gpus)}


def _named(gpus: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {catalogue()[device].name if device in catalogue() else f'10de:{device}'}"
                     for device, count in sorted(gpus.items())) or "no GPU"


def _short(entry: Entry) -> str:
    fabric = ", fabric manager" if entry.fabric_manager else ""
    return f"driver {entry.version} ({entry.module}){fabric}, CUDA {entry.cuda}, for {', '.join(entry.models)}"


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "nothing"
    return _named(value) if isinstance(value, Mapping) else str(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=True)
