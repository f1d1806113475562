"""YAML as mappings with the line of each key; a key given twice, which YAML lets slip, is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from opsctl.errors import ConfigurationError


@dataclass(frozen=True)
class Words:
    """How errors speak of a file: the first part of their codes, what stands at its left margin, and an example."""

    code: str
    name: str
    hint: str


SERVICES = Words("services", "a service's name", "chat: and its keys indented below it")


@dataclass(frozen=True)
class Block:
    """One mapping of a YAML file: its values, and the line (from 1) of each key."""

    line: int
    values: Mapping[str, Any] = field(default_factory=dict)  # a nested mapping is a Block
    lines: Mapping[str, int] = field(default_factory=dict)


def read_blocks(text: str, name: str, words: Words = SERVICES) -> Block:
    """The one mapping that ``text`` is; ``name`` is what errors call the file.

    Raises:
        ConfigurationError: not YAML, no mapping, a key twice, or a key that is not text; the message names the line.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Block(line=1)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigurationError(f"{words.code}.not_a_mapping", f"{name}:{_line(node)}: {words.name} and a colon "
                                     "are expected here.", hint=words.hint)
        return _block(loader, node, name, words)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigurationError(f"{words.code}.not_yaml", f"{where}: this is not YAML: {problem}.",
                                 hint="look at the line above too: a quote or a colon may be missing") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{words.code}.not_yaml", f"{name}: this is not YAML: {' '.join(str(error).split())}.",
                                 hint="save the file as UTF-8 text") from None
    finally:
        loader.dispose()


def _block(loader: yaml.SafeLoader, node: yaml.MappingNode, name: str, words: Words) -> Block:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigurationError(f"{words.code}.bad_key", f"{name}:{_line(key_node)}: the key {key_node.value} is "
                                     f"read as {key!r}, not as text.", hint=f'put it in quotes: "{key_node.value}":')
        if key in lines:
            raise ConfigurationError(f"{words.code}.duplicate_key", f"{name}:{_line(key_node)}: {key} is given a "
                                     f"second time; the first is on line {lines[key]}.", hint="remove one of the two")
        lines[key] = _line(key_node)
        values[key] = (_block(loader, value_node, name, words) if isinstance(value_node, yaml.MappingNode)
                       else loader.construct_object(value_node, deep=True))
    return Block(_line(node), values, lines)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
