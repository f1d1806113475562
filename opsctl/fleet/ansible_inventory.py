"""Runs ``ansible-inventory --list``, the only reader of inventories: what it says becomes plain data or errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opsctl.engines.ansible_programs import ansible_program, inherited
from opsctl.errors import ConfigurationError
from opsctl.fleet.source import at, find_line, inventory_files, text_of

TIMEOUT_S = 60

# How a message of Ansible's ini parser leads to the line at fault: a pattern of the message, and the text of its
# group to look for. The parser knows the line and does not say it.
CULPRITS = (
    re.compile(r"Section (?P<text>\[[^\]]+\])"),
    re.compile(r"Error parsing host definition '(?P<text>.+)': "),
    re.compile(r"Expected (?:host|group|key=value)[^:]*, got: (?P<text>\S.*?)\s*$"),
    re.compile(r"Invalid section entry: '(?P<text>.+?)'"),
    re.compile(r"Invalid host pattern '(?P<text>.+?)' supplied"),
)
UNBALANCED = r"^\s*\[[^\]\n]*$|^[^#;'\"=\n]*\[[^\]\n]*(\s|$)"  # "[gpu" or "gpu-[1:3 a=b"


@dataclass(frozen=True)
class RawInventory:
    """What ansible-inventory read, in order: variables of each host; hosts of each group, its children's included."""

    hostvars: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, tuple[str, ...]]


def read_raw(inventory: Path) -> RawInventory:
    """Runs ansible-inventory on a file, folder or script (about half a second).

    Raises:
        ConfigurationError: ansible-inventory failed or warned; the message names file and line where they are known.
    """
    try:
        done = subprocess.run(
            [ansible_program("ansible-inventory"), "--inventory", str(inventory), "--list"], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, timeout=TIMEOUT_S,
            env=environment(os.environ, inventory.parent),
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError("inventory.too_slow", f"{inventory}: ansible-inventory took more than {TIMEOUT_S} s.",
                                 hint=f"ansible-inventory --inventory {inventory} --list shows why") from None
    problem = complaint(done.stderr)
    if done.returncode != 0 or problem:
        raise explain(inventory, problem or f"ansible-inventory stopped with exit code {done.returncode}", done.stderr)
    return from_document(json.loads(done.stdout))


def environment(base: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Ansible's environment while it reads an inventory: it fails where it would only warn."""
    return inherited(base, directory) | {
        "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "True",
        "ANSIBLE_INVENTORY_UNPARSED_FAILED": "True",
        "ANSIBLE_TRANSFORM_INVALID_GROUP_CHARS": "ignore",  # rack-a is a fine name
        "ANSIBLE_DEPRECATION_WARNINGS": "False",
        "COLUMNS": "1000",  # it wraps its messages
    }


def from_document(document: Mapping[str, Any]) -> RawInventory:
    """The JSON of ``ansible-inventory --list``. Hosts without variables stand in the groups only."""
    children = {name: tuple(body.get("children", ())) for name, body in document.items() if name != "_meta"}
    direct = {name: tuple(body.get("hosts", ())) for name, body in document.items() if name != "_meta"}

    def members(group: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
        found = list(direct.get(group, ()))
        for child in children.get(group, ()):
            if child not in above:
                found += members(child, (*above, group))
        return tuple(dict.fromkeys(found))

    known = document.get("_meta", {}).get("hostvars", {})
    names = dict.fromkeys((*direct, *sum(children.values(), ())))
    return RawInventory(hostvars={host: known.get(host, {}) for host in members("all")},
                        groups={group: members(group) for group in names})


def complaint(stderr: str) -> str:
    """The innermost thing that Ansible complains of; empty when it is content."""
    blocks = re.split(r"^\[(?:WARNING|ERROR)\]: |^ERROR!? ", stderr, flags=re.MULTILINE)[1:]
    if not blocks:
        return ""
    first = blocks[0].strip()
    origin = re.search(r"^Origin: (?P<where>\S.*:\d+)(?::\d+)?$", first, re.MULTILINE)
    sentence = first.splitlines()[0]
    sentence = re.sub(r"^Failed to parse inventory with '\w+' plugin: ", "", sentence)
    sentence = re.sub(r"^Failed to parse inventory: ", "", sentence).rstrip(".")
    return f"{origin['where']}: {sentence}" if origin else sentence


def _broken_yaml(inventory: Path) -> str:
    """Which file of variables is not YAML, and where; Ansible does not say."""
    for path in inventory_files(inventory):
        try:
            if path.suffix in (".yml", ".yaml"):
                yaml.compose(text_of(path))
        except yaml.MarkedYAMLError as error:
            return at(path, error.problem_mark.line + 1 if error.problem_mark else 0)
        except yaml.YAMLError:
            return str(path)
    return ""


def explain(inventory: Path, problem: str, stderr: str) -> ConfigurationError:
    """The error for a complaint of Ansible's, with the line at fault where it can be found."""
    hint = f"ansible-inventory --inventory {inventory} --list says more"
    tail = tuple(line for line in stderr.strip().splitlines() if line.strip())[-20:]
    if re.match(r"\S.*:\d+: ", problem):
        return ConfigurationError("inventory.unreadable", f"{problem}.", hint=hint, log_tail=tail)
    if problem.startswith("YAML parsing failed") and (where := _broken_yaml(inventory)):
        return ConfigurationError("inventory.unreadable", f"{where}: {problem}.", hint=hint, log_tail=tail)
    if "not enough values to unpack" in problem:
        line = find_line(inventory, UNBALANCED)
        return ConfigurationError("inventory.unreadable", f"{at(inventory, line)}: a bracket is opened and not closed.",
                                  hint="close it with ]", log_tail=tail)
    for culprit in CULPRITS:
        match = culprit.search(problem)
        if match:
            line = find_line(inventory, r"^[^#;\n]*" + re.escape(match["text"]))
            if "undefined group" in problem:
                name = problem.rsplit("'", 2)[-2]
                return ConfigurationError("inventory.unknown_group", f"{at(inventory, line)}: {match['text']} names "
                                          f"the group {name}, which is nowhere in the inventory.",
                                          hint=f"correct the name, or add a [{name}] section", log_tail=tail)
            return ConfigurationError("inventory.unreadable", f"{at(inventory, line)}: {problem}.", hint=hint,
                                      log_tail=tail)
    return ConfigurationError("inventory.unreadable", f"{inventory}: {problem}.", hint=hint, log_tail=tail)
