"""What a role does to a host that never had it: read from the role's own tasks, so that no list of it can grow old.

Ansible's check mode cannot tell: it stops at the first package whose source an earlier task would have written. This
reads the same files, keeps what changes something, and works out the names that are known before anybody asks the host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from opsctl.resources import resource

# What a module changes, in a word; all others look, count or say something.
KINDS = {"apt": "packages", "dpkg_selections": "hold", "user": "user", "file": "file", "copy": "file",
         "template": "file", "unarchive": "file", "systemd_service": "unit", "command": "command", "reboot": "reboot"}
NAMED_BY = {"packages": "name", "hold": "name", "user": "name", "unit": "name"}  # the argument that says what
PREFIX = "ansible.builtin."
VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
EVALUATOR = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - names, not HTML
NOT_KNOWN = (jinja2.TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class Deed:
    """One task that would change something. ``what``: packages, paths or units, where they are known before."""

    role: str
    task: str
    kind: str
    what: tuple[str, ...] = ()


def kind_of(module: str) -> str:
    """``ansible.builtin.template`` -> ``file``; of a module that only looks or says something, ``change``."""
    return KINDS.get(module.removeprefix(PREFIX), "change")


def deeds(role: str, given: Mapping[str, Any], entry: str = "main") -> tuple[Deed, ...]:
    """What a role does on a host that never had it, in order. ``given``: the variables that are known, by name."""
    folder = resource("roles") / role
    known = {**_plain(folder / "defaults" / "main.yml"), **_plain(folder / "vars" / "main.yml"), **given,
             "ansible_check_mode": False}
    return tuple(deed for task in _tasks(folder / "tasks" / f"{entry}.yml") if (deed := _deed(role, task, known)))


def packages_of(role: str) -> tuple[str, ...]:
    """The Debian packages in the role's defaults (``*_packages``)."""
    return _listed(role, "_packages")


def holds_of(role: str) -> tuple[str, ...]:
    """Those that only opsctl upgrades (``*_holds``)."""
    return _listed(role, "_holds")


def defaults_of(role: str) -> dict[str, Any]:
    """The role's defaults, without those that Ansible has to work out."""
    return _plain(resource("roles") / role / "defaults" / "main.yml")


def _listed(role: str, ending: str) -> tuple[str, ...]:
    return tuple(name for key, names in defaults_of(role).items() if key.endswith(ending) for name in names)


def _plain(path: Path) -> dict[str, Any]:
    read = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in (read or {}).items() if "{{" not in str(value)}


def _tasks(path: Path, when: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Tasks of a file and of those that it imports, with the conditions of what they stand in."""
    for task in yaml.safe_load(path.read_text(encoding="utf-8")):
        yield from _flat(path, task, when)


def _flat(path: Path, task: dict[str, Any], above: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    own = task.get("when", [])
    when = (*above, *map(str, own if isinstance(own, list) else [own]))
    if "block" in task:
        for inner in task["block"]:
            yield from _flat(path, inner, when)
    elif f"{PREFIX}import_tasks" in task:
        yield from _tasks(path.parent / task[f"{PREFIX}import_tasks"], when)
    else:
        yield {**task, "when": when}


def _deed(role: str, task: Mapping[str, Any], known: Mapping[str, Any]) -> Deed | None:
    if task.get("changed_when") is False or not all(_may_hold(condition, known) for condition in task["when"]):
        return None
    name = str(task.get("name", "")).rstrip(".")
    given = task.get("vars", {})
    if "base_unit" in given or "base_pinned" in given:  # base's unit.yml and pinned.yml
        return Deed(role, name, "unit", (str(given["base_unit"]),)) if "base_unit" in given else \
            Deed(role, name, "packages", tuple(known.get(f"{role}_pinned", ())))
    module = next((key for key in task if key.startswith(PREFIX) and key.removeprefix(PREFIX) in KINDS), "")
    if not module:
        return None
    kind, arguments = kind_of(module), task[module]
    if "loop" not in task:
        return Deed(role, name, kind, _what(kind, arguments, known))
    items = _value(task["loop"], known)
    if isinstance(items, list):
        what = tuple(name for item in items for name in _what(kind, arguments, {**known, "item": item}))
        return Deed(role, name, kind, what) if items and arguments.get("state") != "absent" else None
    # Over what is found on the host: nothing is there yet, unless something is made of it.
    return Deed(role, name, kind) if arguments.get("enabled") is True else None


def _may_hold(condition: str, known: Mapping[str, Any]) -> bool:
    """False only where what is known before says so."""
    try:
        return bool(EVALUATOR.compile_expression(condition, undefined_to_none=False)(**known))
    except NOT_KNOWN:
        return True


def _what(kind: str, arguments: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, ...]:
    said = arguments.get(NAMED_BY[kind]) if kind in NAMED_BY else arguments.get("dest", arguments.get("path"))
    value = _value(said, known)
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),) if value else ()


def _value(said: Any, known: Mapping[str, Any]) -> Any:
    """A literal, a variable's value, or a text with its names filled in; None when somebody else must say."""
    if isinstance(said, list):
        return [_value(one, known) for one in said]
    if isinstance(said, dict):
        return {key: _value(one, known) for key, one in said.items()}
    if not isinstance(said, str):
        return said
    if (alone := VARIABLE.fullmatch(said.strip())) is not None:
        return known.get(alone[1])
    try:
        return EVALUATOR.from_string(said).render(**known)
    except NOT_KNOWN:
        return None
