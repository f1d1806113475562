"""Versions are text. INI and YAML make an unquoted 12.10 the number 12.1: refused, with the line to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsctl.errors import ConfigurationError
from opsctl.fleet.source import at, inventory_files, text_of

# A variable holds a version when its name ends in one of these words (`cuda`, `driver_branch`; not `driver_timeout_s`)
VERSION_WORDS = frozenset({
    "cuda", "cudnn", "driver", "nccl", "release", "branch", "tag", "python", "toolkit", "torch", "kernel", "vllm",
    "sglang", "xllamacpp",
})
# ... or has this anywhere.
VERSION = "version"
SECTION = re.compile(r"^\s*\[(?P<title>[^\]]+)\]")


def holds_version(name: str) -> bool:
    """Whether a variable's name says that it holds a version. Ansible's own (``ansible_...``) never do."""
    last_word = re.split(r"[^a-z0-9]+", name.lower())[-1]
    return not name.startswith("ansible_") and (VERSION in name.lower() or last_word in VERSION_WORDS)


def version_values(variables: Mapping[str, Any], inside: str = "", above: bool = False
                   ) -> Iterator[tuple[str, str, Any]]:
    """Every plain value that should be a version, also in mappings and lists: path (``stack.cuda``), key, value."""
    for key, value in variables.items():
        path, wanted = f"{inside}{key}", above or holds_version(str(key))
        if isinstance(value, Mapping):
            if "__ansible_vault" not in value:
                yield from version_values(value, f"{path}.", above or (wanted and VERSION in str(key).lower()))
        elif isinstance(value, list):
            yield from ((path, str(key), item) for item in value if wanted and not isinstance(item, Mapping | list))
        elif wanted:
            yield path, str(key), value


def check_versions(host: str, variables: Mapping[str, Any], inventory: Path) -> None:
    """Refuses versions that have become numbers with a fraction, and those that carry quotes as part of their text.

    Raises:
        ConfigurationError: ``inventory.float_version`` or ``inventory.quoted_version``.
    """
    for path, key, value in version_values(variables):
        if isinstance(value, float) and not isinstance(value, bool):
            raise _float_version(host, path, key, value, inventory)
        if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            found = _find(key, inventory, lambda text, value=value: value in text)
            raise ConfigurationError(
                "inventory.quoted_version", f"{at(found.path, found.line)}: {path}={value} on {host} has quotes as "
                "part of its text.", hint=f"in a [...:vars] section one pair is right: {key}=\"{value[1:-1]}\"")


def versions_as_text(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The same variables, with whole numbers that are versions (``driver_branch=570``) as text."""
    return {key: str(value) if isinstance(value, int) and not isinstance(value, bool) and holds_version(key) else value
            for key, value in variables.items()}


@dataclass(frozen=True)
class _Found:
    path: Path
    line: int  # 0: not found
    text: str  # as the operator wrote it
    quoting: str  # host, vars or yaml


def _float_version(host: str, path: str, key: str, value: float, inventory: Path) -> ConfigurationError:
    def is_it(text: str) -> bool:
        try:
            return float(text) == value
        except ValueError:
            return False

    found = _find(key, inventory, is_it)
    text = found.text or str(value)
    if found.quoting == "yaml":
        write = f'{key}: "{text}"'
    elif found.quoting == "vars":
        write = f'{key}="{text}"'
    else:  # a host's own line loses one pair of quotes to the shell-like split, and the other to Python's reader
        write = f"{key}='\"{text}\"'"
    lost = f", and {text} has become {value}" if text != str(value) else ""
    return ConfigurationError(
        "inventory.float_version",
        f"{at(found.path, found.line)}: {path} of {host} is a version and must be text, not the number {text}{lost}.",
        hint=f"write {write}")


def _find(key: str, inventory: Path, is_it: Any) -> _Found:
    """Where a variable got its value: the first assignment to it whose text ``is_it``."""
    assignment = re.compile(rf"(?:^|[\s{{,])[\"']?{re.escape(key)}[\"']?\s*[=:]\s*"
                            r"(?P<text>'[^']*'|\"[^\"]*\"|[^\s#,}]+)")
    for path in inventory_files(inventory):
        section, in_yaml = "", path.suffix in (".yml", ".yaml") or path != inventory
        for number, line in enumerate(text_of(path).splitlines(), start=1):
            title = SECTION.match(line)
            if title and not in_yaml:
                section = title["title"]
            elif not line.lstrip().startswith(("#", ";")):
                for match in assignment.finditer(line):
                    text = match["text"]
                    bare = text[1:-1] if text[0] in "'\"" else text
                    if is_it(bare) or is_it(text):
                        quoting = "yaml" if in_yaml else "vars" if section.endswith(":vars") else "host"
                        return _Found(path, number, bare, quoting)
    return _Found(inventory, 0, "", "host")
