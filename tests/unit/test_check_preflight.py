"""What goes before a provision: who is refused by what opsctl check finds, and what is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_kit import host, overlaid, read

from opsctl.checking import preflight
from opsctl.checking.model import Finding
from opsctl.checking.table import CHECKS, findings_for
from opsctl.engines.events import Event, Note
from opsctl.errors import ExitCode, OpsctlError, RefusedError, UsageError

WELL = Finding("clock", "", "pass", "chrony keeps the clock")
HURTS = Finding("iommu", "", "warn", "the IOMMU translates", "opsctl exec --limit gpu-1 -- update-grub")
BROKEN = Finding("ecc", "", "fix", "memory errors", "opsctl drain gpu-1")
STOPS = Finding("driver-run-file", "", "fix", "a driver came from a .run file", "opsctl exec --limit gpu-1 -- it", True)
FULL = Finding("disk-system", "", "fix", "too little free space", "opsctl exec --limit gpu-2 -- df -h", True)
OLD = Finding("driver-version", "", "warn", "driver 570 is loaded", "opsctl provision --limit gpu-1")
DRAINED = Finding("driver-layers", "", "fix", "they differ", "opsctl drain gpu-1, then opsctl provision --limit gpu-1")


def told(found: dict[str, tuple[Finding, ...]], *allowed: str) -> tuple[list[tuple[str, str]], OpsctlError | None]:
    """Host and first word of each line, and the refusal."""
    heard: list[Event] = []
    refusal = None
    try:
        preflight.tell(found, frozenset(allowed), heard.append)
    except OpsctlError as error:
        refusal = error
    return [(one.host, one.message.partition(":")[0]) for one in heard if isinstance(one, Note)], refusal


def test_what_would_break_a_provision_is_refused_with_host_finding_and_command() -> None:
    lines, refusal = told({"gpu-1": (WELL, STOPS, HURTS), "gpu-2": (FULL,)})
    assert lines == [("gpu-1", "iommu"), ("", "how each of these is mended")]
    assert isinstance(refusal, RefusedError)
    assert refusal.exit_code is ExitCode.REFUSED
    assert refusal.code == "check.stops_provision"
    assert refusal.message == "gpu-1: driver-run-file: a driver came from a .run file (1 more below)."
    assert refusal.hint.startswith("opsctl exec --limit gpu-1 -- it; nothing was changed.")
    assert refusal.hint.endswith("--allow-finding driver-run-file --allow-finding disk-system")
    assert refusal.log_tail == ("gpu-2: disk-system: too little free space; opsctl exec --limit gpu-2 -- df -h",)


def test_who_knows_better_goes_on_and_is_told_so() -> None:
    assert told({"gpu-1": (STOPS,)}, "driver-run-file") == ([("gpu-1", "driver-run-file")], None)
    _, refusal = told({"gpu-1": (STOPS,), "gpu-2": (FULL,)}, "driver-run-file")
    assert refusal is not None
    assert refusal.message.startswith("gpu-2: disk-system"), "one that was allowed allows no other"


@pytest.mark.parametrize(("found", "lines"), [
    ((WELL,), []),
    ((BROKEN, HURTS), [("gpu-1", "ecc"), ("gpu-1", "iommu"), ("", "how each of these is mended")]),
    ((OLD, DRAINED), []),
])
def test_what_hurts_is_told_and_what_the_provision_mends_is_not(found: tuple[Finding, ...],
                                                               lines: list[tuple[str, str]]) -> None:
    assert told({"gpu-1": found}) == (lines, None)


def test_an_id_that_no_check_has_is_named_with_those_that_there_are() -> None:
    assert preflight.check_allowed(["mok", "reachable"]) == {"mok", "reachable"}
    with pytest.raises(UsageError, match="driver-runfile") as wrong:
        preflight.check_allowed(["driver-runfile"])
    assert "driver-run-file" in wrong.value.hint


@pytest.mark.parametrize("captures", [
    {},
    # a fresh Debian drives the GPUs with nouveau
    {"files": {"/proc/modules": "nouveau 2400256 1 - Live 0x0000000000000000\n"},
     "commands": {"modprobe-config": {"exit": 0, "out": ""}}},
    # neither services nor a bundle yet, and no source of its own
    {"commands": {"apt-update": {"exit": 0, "out": "Reading package lists...\n"}}, "bundle": None},
    {"commands": {"apt-update": None}},
    # who is not root yet, because a password is to be asked
    {"root": False},
], ids=["bare", "nouveau", "no sources", "apt not asked", "no sudo"])
def test_a_bare_host_is_refused_for_nothing_that_a_provision_brings(captures: dict[str, object]) -> None:
    findings = findings_for("gpu-1", *read(overlaid(host("bare"), captures)))
    assert preflight.judge({"gpu-1": findings}, frozenset()) is None


def test_the_page_tells_which_findings_can_stop_a_provision() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    assert preflight.ALLOW in page
    assert "check.stops_provision" in page
    assert len(CHECKS) > 40
