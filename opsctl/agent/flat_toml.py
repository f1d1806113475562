"""Reads the TOML that opsctl writes on hosts: flat tables of text, whole numbers, true/false, and lists of these.

Python 3.10 (Ubuntu 22.04) has no tomllib; this reader then stands in for the subset that we write ourselves.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

KEY = re.compile(r"[A-Za-z0-9_-]+")
BLANK = re.compile(r"[ \t]*(#.*)?")
NUMBER = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)(?![\w.])")
BASIC_TEXT = re.compile(r'"([^"\\\x00-\x08\x0a-\x1f]|\\["\\bfnrt]|\\u[0-9A-Fa-f]{4})*"')
LITERAL_TEXT = re.compile(r"'([^'\x00-\x08\x0a-\x1f]*)'")


def loads(text: str) -> dict[str, Any]:
    """The table in ``text``.

    Raises:
        ValueError: not TOML, or, where tomllib is missing, more than the subset we write.
    """
    return _reader()(text)


def read_flat(text: str) -> dict[str, Any]:
    """The same without tomllib: ``key = value`` lines, blank lines, comments."""
    table: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if BLANK.fullmatch(line):
            continue
        try:
            key, value = _assignment(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}: {line.strip()}") from None
        if key in table:
            raise ValueError(f"line {number}: {key} is written twice")
        table[key] = value
    return table


def _reader() -> Callable[[str], dict[str, Any]]:
    if sys.version_info < (3, 11):
        return read_flat
    import tomllib  # noqa: PLC0415 - not in Python 3.10

    return tomllib.loads


def _assignment(line: str) -> tuple[str, Any]:
    found = re.match(rf"[ \t]*({KEY.pattern})[ \t]*=[ \t]*", line)
    if found is None:
        raise ValueError("expected key = value")
    value, end = _value(line, found.end())
    if not BLANK.fullmatch(line, end):
        raise ValueError("something follows the value")
    return found.group(1), value


def _value(line: str, at: int) -> tuple[Any, int]:
    for word, value in (("true", True), ("false", False)):
        if line.startswith(word, at):
            return value, at + len(word)
    if line.startswith("[", at):
        return _list(line, at + 1)
    if line.startswith(('"""', "'''"), at):
        raise ValueError("text over several lines is not read here")
    if found := BASIC_TEXT.match(line, at):
        # json refuses a tab in text, TOML takes it; all other escapes of the pattern mean the same in both
        return json.loads(found.group().replace("\t", "\\t")), found.end()
    if found := LITERAL_TEXT.match(line, at):
        return found.group(1), found.end()
    if found := NUMBER.match(line, at):
        return int(found.group().replace("_", "")), found.end()
    raise ValueError("expected text, a whole number, true, false or a list on one line")


def _list(line: str, at: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    while True:
        at = _skip(line, at)
        if line.startswith("]", at):
            return values, at + 1
        value, at = _value(line, at)
        values.append(value)
        at = _skip(line, at)
        if line.startswith(",", at):
            at += 1
        elif not line.startswith("]", at):
            raise ValueError("expected , or ] in a list on one line")


def _skip(line: str, at: int) -> int:
    while at < len(line) and line[at] in " \t":
        at += 1
    return at
