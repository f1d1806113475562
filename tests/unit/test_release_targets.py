"""Which release a rollback goes to, and which one is not served again."""

from __future__ import annotations

from typing import Any

import pytest

from opsctl.agent.ledger import Line
from opsctl.errors import OpsctlError, RefusedError
from opsctl.releases.targets import check_not_bad, rollback_target

DIGESTS = {f"v{number}": f"{number}" * 64 for number in range(5)}


def ledger(*said: str) -> list[Line]:
    """``ledger("v1", "v2", "bad v2")``."""
    found = []
    for number, words in enumerate(said, 1):
        *marks, version = words.split()
        found.append(Line(number, version, DIGESTS[version], f"2026-11-22T03:0{number}:00Z", "ann@desk",
                          note="too slow" if marks else "", action="bad" if marks else "serve"))
    return found


def host(*versions: str, **flaws: dict[str, bool]) -> dict[str, Any]:
    """A host's state with these releases; ``v1={"engine_built": False}``."""
    return {"instances": [], "releases": [
        {"version": version, "digest": DIGESTS[version], "complete": True, "engine_built": True}
        | flaws.get(version, {}) for version in versions]}


ALL = {"gpu-1": host(*DIGESTS), "gpu-2": host(*DIGESTS)}


@pytest.mark.parametrize(("said", "version"), [
    (["v1", "v2"], "v1"),
    (["v1", "v2", "v3"], "v2"),
    (["v0", "v1", "v2", "v1", "bad v2"], "v0"),  # not to v2, which was left, and not to v1, which serves
    (["v1", "v2", "v1", "bad v2", "v3"], "v1"),
    (["v1", "v2", "v1", "bad v2", "v2"], "v1"),  # served again in spite of its mark
    (["v1", "v2", "bad v2"], "v1"),
    (["v1", "v2", "v2"], "v1"),
])
def test_back_to_the_newest_earlier_release_that_is_not_bad(said: list[str], version: str) -> None:
    target = rollback_target(ledger(*said), ALL)
    assert (target.version, target.release) == (version, f"{version}-{DIGESTS[version][:12]}")


@pytest.mark.parametrize(("second", "reason"), [
    (host("v1", "v3"), "is not on gpu-2"),
    (host("v1", "v2", v2={"complete": False}), "is not whole on gpu-2"),
    (host("v1", "v2", v2={"engine_built": False}), "has no engine built on gpu-2"),
])
def test_one_that_a_host_lacks_is_passed_over_and_said(second: dict[str, Any], reason: str) -> None:
    target = rollback_target(ledger("v1", "v2", "v3"), {"gpu-1": ALL["gpu-1"], "gpu-2": second})
    assert target.version == "v1"
    assert [(one.version, one.reason) for one in target.skipped] == [("v2", reason)]


@pytest.mark.parametrize(("said", "states", "wanted", "says", "hint"), [
    ([], ALL, "", "names no release yet", "opsctl provision"),
    (["v1"], ALL, "", "has no release before v1", "opsctl update-model"),
    (["v1", "v2"], ALL, "v3", "has no release v3 before v2", "opsctl update-model"),
    (["v1", "v2", "bad v1"], ALL, "", "v1 is bad: ann@desk, 2026-11-22 03:03 UTC: too slow",
     "opsctl update-model --version v1 --allow-bad"),
    (["v1", "v2"], {"gpu-1": host("v2"), "gpu-2": host("v1", v1={"engine_built": False})}, "",
     "v1 is not on gpu-1, has no engine built on gpu-2", "opsctl stage --version v1"),
    (["v0", "v1", "v2", "bad v1"], {"gpu-1": host("v2")}, "", "v1 is bad: ann@desk, 2026-11-22 03:04 UTC: too slow; "
     "v0 is not on gpu-1", "opsctl stage --version v0"),
    (["v1", "v2"], {"gpu-1": OpsctlError("host.unreachable", "x")}, "", "v1 gpu-1 does not answer", "opsctl stage"),
])
def test_nothing_to_go_back_to(said: list[str], states: dict[str, Any], wanted: str, says: str, hint: str) -> None:
    with pytest.raises(RefusedError) as refused:
        rollback_target(ledger(*said), states, wanted)
    assert refused.value.code == "rollback.no_target"
    assert says in refused.value.message
    assert hint in refused.value.hint


def test_a_release_of_ones_choice() -> None:
    assert rollback_target(ledger("v1", "v2", "v3"), ALL, "v1").version == "v1"


def test_a_marked_release_is_served_only_when_said_so() -> None:
    lines = ledger("v1", "v2", "v1", "bad v2")
    check_not_bad(lines, DIGESTS["v1"], allow_bad=False)
    check_not_bad(lines, DIGESTS["v2"], allow_bad=True)
    with pytest.raises(RefusedError) as refused:
        check_not_bad(lines, DIGESTS["v2"], allow_bad=False)
    assert refused.value.code == "release.bad"
    assert refused.value.message == "v2 was marked bad by ann@desk, 2026-11-22 03:04 UTC: too slow."
    assert "--allow-bad" in refused.value.hint
