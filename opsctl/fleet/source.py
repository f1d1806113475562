"""Where in the operator's files a thing stands: for messages only, never for meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def at(path: Path, line: int) -> str:
    """``inventory.ini:12``, or the name alone when the line (counted from 1) is 0: not known."""
    return f"{path}:{line}" if line else str(path)


def find_line(path: Path, pattern: str) -> int:
    """The number of the first line that matches (``^`` and ``$`` are a line's ends); 0 when there is none."""
    text = text_of(path)
    match = re.search(pattern, text, re.MULTILINE)
    return text.count("\n", 0, match.start()) + 1 if match else 0


def text_of(path: Path) -> str:
    """The text of a file; empty when it is none (a folder, a script's output, something binary)."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def inventory_files(inventory: Path) -> Iterator[Path]:
    """The files that an inventory's variables may come from: itself, then group_vars/ and host_vars/ beside it."""
    yield inventory
    for folder in ("host_vars", "group_vars"):
        yield from sorted(path for path in (inventory.parent / folder).rglob("*") if path.is_file())
