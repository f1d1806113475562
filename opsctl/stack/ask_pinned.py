"""``python -m opsctl.stack.ask_pinned``: a role asks what a host lacks of a vendor's packages. JSON in, JSON out.

In: ``host``, ``versions`` and ``names`` by variable, ``seen`` by its fields in ``pinned.py``, and ``index``, the path
of a ``Packages`` file on this machine, or ``index_text``. Out: ``packages``, ``course`` and ``pending``, or ``error``.
Touches nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsctl.errors import OpsctlError, RefusedError
from opsctl.stack.index import parse_index
from opsctl.stack.pinned import Seen, course, packages_of, wishes

BUILD_HINT = "correct the version, or opsctl bundle build, which brings what the inventory names"


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The document for a question."""
    found = asked["seen"]
    seen = Seen(found["installed"], found["states"], frozenset(found["held"]), tuple(found["recorded"]))
    versions = {key: version for key, version in asked["versions"].items() if version}
    try:
        packages = packages_of(asked["host"], parse_index(_index_text(asked)), wishes(versions, asked["names"]),
                               BUILD_HINT)
    except OpsctlError as error:
        return {"error": f"{error.message.rstrip('.')}: {error.hint}.", "code": error.code}
    what = course(packages, seen)
    return {"packages": packages, "course": dataclasses.asdict(what),
            "pending": bool(what.install or what.remove or what.hold), "error": ""}


def _index_text(asked: Mapping[str, Any]) -> str:
    if "index_text" in asked:
        return str(asked["index_text"])
    path = Path(asked["index"])
    if not path.is_file():
        raise RefusedError("packages.no_index", f"{path} is missing.", hint="opsctl bundle build makes it")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
