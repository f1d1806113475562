"""Which releases stay on a host, and that the history reads like the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsctl.agent.ledger import Line
from opsctl.collecting import keep, left_behind
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases.history import history, mark

DIGESTS = {f"v{number}": f"{number}" * 64 for number in range(6)}
FOLDERS = {version: f"{version}-{digest[:12]}" for version, digest in DIGESTS.items()}


def ledger(*said: str) -> list[Line]:
    found = []
    for number, words in enumerate(said, 1):
        *marks, version = words.split()
        found.append(Line(number, version, DIGESTS[version], f"2026-11-22T03:0{number}:00Z", "ann@desk",
                          action="bad" if marks else "serve"))
    return found


def host(serves: str, *versions: str) -> dict[str, Any]:
    """A host whose chat.0 serves a version, with releases imported in the order of their numbers."""
    chat = {"instance": "chat.0", "service": "chat", "release": serves, "digest": DIGESTS.get(serves, "")}
    return {"instances": [chat,
                          {"instance": "embed.0", "service": "embed", "release": "v5", "digest": DIGESTS["v5"]}],
            "releases": [{"service": "chat", "version": version, "digest": DIGESTS[version], "created": version}
                         for version in versions]}


@pytest.mark.parametrize(("said", "state", "target", "more", "stays"), [
    (["v1", "v2", "v3"], host("v3", "v0", "v1", "v2", "v3"), "v2", 1, "v3 v2 v1"),
    (["v1", "v2", "v3"], host("v3", "v0", "v1", "v2", "v3"), "v2", 0, "v3 v2"),
    (["v1", "v2", "v3"], host("v3", "v0", "v1", "v2", "v3"), "v2", 9, "v3 v2 v1 v0"),
    (["v1", "v2", "v1", "bad v2"], host("v1", "v0", "v1", "v2"), "", 1, "v1 v0"),  # not the bad one
    (["v1", "v2"], host("v2", "v1", "v2", "v3"), "v1", 1, "v2 v1 v3"),  # staged for the next update
    (["v1", "v2"], host("v1", "v0", "v1", "v2"), "v1", 0, "v1 v2"),  # behind: where the ledger wants it stays too
    (["v1", "v2"], host("v3", "v1", "v2", "v3"), "v1", 0, "v3 v2 v1"),  # ahead: a rollout is under way
    (["v1", "v2", "bad v2"], host("v2", "v1", "v2"), "v1", 0, "v2 v1"),  # bad and served: it stays until it is left
    ([], host("", "v1", "v2"), "", 1, "v2"),
    ([], host("", "v1", "v2"), "", 0, ""),
    (["v1", "v2"], host("v2", "v2"), "v1", 1, "v2"),  # what is not there cannot stay
])
def test_what_stays(said: list[str], state: dict[str, Any], target: str, more: int, stays: str) -> None:
    found = keep("chat", ledger(*said), state, FOLDERS[target] if target else "", more)
    assert list(found) == [FOLDERS[version] for version in stays.split()]
    assert all(found.values())


def test_a_service_that_left_has_releases_that_can_be_named() -> None:
    fleet = Fleet(Path("/fleet"), Path("/fleet/inventory.ini"), (Host("gpu-1", "10.0.0.11", ("gpu",)),),
                  (Service("embed", "gpu", 8200, 8001),))
    assert left_behind(fleet, {"gpu-1": host("", "v1"), "gpu-2": host("")}) == {"chat": ["gpu-1"]}


def test_the_history_says_what_is_served_and_what_is_bad() -> None:
    rows = history(ledger("v1", "v2", "v1", "bad v2"))
    assert [(row["number"], row["action"], row["version"], mark(row)) for row in rows] == [
        (1, "serve", "v1", ""), (2, "serve", "v2", "bad"), (3, "serve", "v1", "serving now"), (4, "bad", "v2", "")]
    assert history([]) == []
