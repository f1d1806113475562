"""``python -m opsctl.stack``: the role nvidia_driver asks what a host lacks. A JSON document in, one out.

In: ``wish``, ``names`` and ``seen`` by their fields in ``driver.py``, and ``index``, the path of a ``Packages`` file
on this machine, or ``index_text``. Out: ``desired``, ``preferences`` and ``course``, or ``error``. Touches nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsctl.errors import OpsctlError, RefusedError
from opsctl.stack.driver import Names, Seen, check_idle, course, desired
from opsctl.stack.fit import Wish
from opsctl.stack.index import parse_index


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The document for a question."""
    wish = Wish(**asked["wish"])
    names = Names(**{key: tuple(value) for key, value in asked["names"].items()})
    found: dict[str, Any] = {**asked["seen"], "gpus": tuple(asked["seen"]["gpus"]),
                             "held": frozenset(asked["seen"]["held"]), "serving": tuple(asked["seen"]["serving"])}
    seen = Seen(**found)
    try:
        index = parse_index(_index_text(asked))
        want = desired(wish, seen, names, index)
        what = course(want, seen, index)
        check_idle(wish.host, what, seen)
    except OpsctlError as error:
        return {"error": f"{error.message.rstrip('.')}: {error.hint}." if error.hint else error.message,
                "code": error.code}
    return {"desired": dataclasses.asdict(want), "preferences": want.preferences,
            "course": dataclasses.asdict(what), "error": ""}


def _index_text(asked: Mapping[str, Any]) -> str:
    if "index_text" in asked:
        return str(asked["index_text"])
    path = Path(asked["index"])
    if not path.is_file():
        raise RefusedError("driver.no_index", f"{path} is missing.", hint="opsctl bundle build makes it")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
