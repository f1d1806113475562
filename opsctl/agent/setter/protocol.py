"""What the setter may be asked, and how it answers: one JSON object a line each way. Pure.

``clocks`` {gpu, max_mhz}, ``power`` {gpu, watts}, ``release`` {gpu}, ``release-all``, ``stop`` {instance, how},
``start`` {instance}, ``state``; anything else, one key too many, or a number out of range is refused as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

LINE_LIMIT = 4096  # bytes
HIGHEST_MHZ = 10_000
HIGHEST_WATTS = 10_000
GPU = re.compile(r"GPU-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
INSTANCE = re.compile(r"[a-z][a-z0-9-]{0,30}\.[0-9]{1,3}")
HOW = ("drain", "now")
UNITS = ("stop", "start")  # these have nothing to do with a GPU

Answer = dict[str, Any]


class RefusedRequest(Exception):  # noqa: N818 - an answer, not a failure of ours
    """``code`` is one of the contract's: not_supported, no_permission, invalid, unknown_gpu, lost, hangs ..."""

    def __init__(self, code: str, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.words = words


def read(line: bytes) -> dict[str, Any]:
    """A request that is one. Raises RefusedRequest."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise RefusedRequest("invalid", "this line is no JSON") from None
    if not isinstance(request, dict):
        raise RefusedRequest("invalid", "a request is an object with a verb")
    verb = request.get("verb")
    wanted = VERBS.get(verb) if isinstance(verb, str) else None
    if wanted is None:
        raise RefusedRequest("invalid", f"there is no verb {verb!r}; there are " + ", ".join(VERBS))
    keys = set(request) - {"verb"}
    if keys != set(wanted):
        raise RefusedRequest("invalid", f"{verb} takes {', '.join(wanted) or 'nothing'}, and got "
                             + (", ".join(sorted(map(str, keys))) or "nothing"))
    for key, good in wanted.items():
        if not good(request[key]):
            raise RefusedRequest("invalid", f"{key}={request[key]!r} of {verb} cannot be")
    return request


def line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


def refusal(error: RefusedRequest) -> Answer:
    return {"ok": False, "code": error.code, "words": error.words}


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _between(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


VERBS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "clocks": {"gpu": _matches(GPU), "max_mhz": _between(1, HIGHEST_MHZ)},
    "power": {"gpu": _matches(GPU), "watts": _between(1, HIGHEST_WATTS)},
    "release": {"gpu": _matches(GPU)},
    "release-all": {},
    "stop": {"instance": _matches(INSTANCE), "how": lambda value: value in HOW},
    "start": {"instance": _matches(INSTANCE)},
    "state": {},
}
