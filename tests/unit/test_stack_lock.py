"""stack.lock: written and read back the same, wrong ones told by line, and what of it no longer holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from opsctl.errors import ConfigurationError
from opsctl.stack.knowledge import knowledge
from opsctl.stack.lock import Entry, HostFacts, Lock, changes, ended, entry_of, holds, read, render
from opsctl.stack.naming import Request, answer, boards_seen

TODAY = date(2026, 11, 22)
H200S = ("2335",) * 8


def locked(gpus: tuple[str, ...] = H200S, system: str = "debian12", *engines: str, **wishes: str) -> Entry:
    request = Request(boards_seen(gpus), system, engines, **wishes)
    return entry_of(answer(request, knowledge(), TODAY), gpus)


LOCK = Lock({"gpu-2": locked(H200S, "debian12", "vllm==0.33.0"), "gpu-1": locked(("1db1", "20b2")),
             "ten: 10": locked(("2684",))})
TEXT = render(LOCK)


def test_it_is_read_as_it_was_written() -> None:
    assert read(TEXT, "stack.lock") == LOCK
    assert render(read(TEXT, "stack.lock")) == TEXT
    assert read(render(Lock()), "stack.lock") == Lock()


def test_hosts_stand_in_order_and_the_file_says_what_it_is() -> None:
    assert TEXT.startswith("# Which stack each host is to have")
    assert TEXT.index("gpu-1:") < TEXT.index("gpu-2:")
    assert render(Lock(dict(reversed(LOCK.hosts.items())))) == TEXT


@pytest.mark.parametrize(("old", "new", "says"), [
    ("schema: opsctl.stack-lock/v1", "schema: opsctl.stack-lock/v2", "stack.lock:3: schema is"),
    ('version: "580.178.04"', "version: 580.17", "version is no exact version as text"),
    ('module: "open"', 'module: "opne"', "module is neither open nor proprietary"),
    ("branch: 580", "branch: true", "branch is no branch"),
    ("fabric_manager: true", "fabric_manager: 1", "fabric_manager is neither true nor false"),
    ('"2335": 8', '"2335": 0', "2335 is no PCI device id"),
    ('cuda: "13.0"', "cuda: 13.0", "cuda is no text"),
    ("    engines: []", "    engines: vllm", "engines is no list of texts"),
    ("    os:", "    osx:", "osx is no key of a stack.lock here"),
    ("hosts:", "hosts: []\nothers:", "others is no key"),
    ("  gpu-1:", "  gpu-2:", "gpu-2 is given a second time"),
    ("  gpu-1:", "  - gpu-1:", "this is not YAML"),
])
def test_a_wrong_one_is_told_with_its_line(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigurationError) as caught:
        read(TEXT.replace(old, new, 1), "stack.lock")
    assert says in caught.value.message
    assert caught.value.code.startswith("stack_lock.")
    assert "stack.lock:" in caught.value.message


def test_a_key_that_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="cuda is missing"):
        read(TEXT.replace('    cuda: "12.9"\n', "", 1), "stack.lock")


ENTRY = LOCK.hosts["gpu-2"]
FACTS = HostFacts(H200S, "debian12", ("vllm==0.33.0",))


@pytest.mark.parametrize(("entry", "facts", "today", "says"), [
    (ENTRY, FACTS, TODAY, ""),
    (ENTRY, replace(FACTS, gpus=H200S[:7]), TODAY, "locked with 8 x H200 SXM 141GB, and it has 7 x H200 SXM 141GB"),
    (ENTRY, replace(FACTS, gpus=("26b9",)), TODAY, "it has 1 x L40S"),
    (ENTRY, replace(FACTS, gpus=()), TODAY, "it has no GPU"),
    (ENTRY, replace(FACTS, os="debian13"), TODAY, "locked with debian12, and it runs debian13"),
    (ENTRY, FACTS, date(2028, 7, 1), ""),  # its branch has ended, and the fleet has to be mended all the same
    (ENTRY, replace(FACTS, driver="580.178.04"), TODAY, ""),
    (ENTRY, replace(FACTS, driver="595.84"), TODAY, "locked with driver 580.178.04, and the inventory wishes 595.84"),
    (ENTRY, replace(FACTS, engines=("vllm==0.31.0",)), TODAY, ""),
    (ENTRY, replace(FACTS, engines=()), TODAY, ""),
    (ENTRY, replace(FACTS, engines=("vllm==0.99.0",)), TODAY, "vllm 0.99.0 is not known"),
    (locked(("26b9",), "debian12", "vllm==0.19.1", driver="580.65.06"),
     HostFacts(("26b9",), "debian12", ("vllm==0.33.0",)), TODAY, ""),
    (locked(("1db1",), "debian12", "vllm==0.10.1.1"), HostFacts(("1db1",), "debian12", ("vllm==0.20.0",)), TODAY,
     "its releases need vllm==0.20.0, beyond what was locked for vllm==0.10.1.1"),
])
def test_what_no_longer_holds(entry: Entry, facts: HostFacts, today: date, says: str) -> None:
    wrong = holds(entry, facts, knowledge(), today)
    assert bool(wrong) == bool(says)
    assert says in "; ".join(wrong)


def test_a_branch_that_has_ended_is_told() -> None:
    assert ended(ENTRY, knowledge(), date(2028, 7, 1)) == \
        "driver branch 580 gets no fixes any more: it ended with 2028-06"
    assert ended(ENTRY, knowledge(), TODAY) == ""


def test_an_entry_as_variables_of_the_role() -> None:
    assert ENTRY.variables() == {
        "nvidia_driver_version": "580.178.04", "nvidia_driver_flavour": "open",
        "nvidia_driver_fabric_manager": "present", "nvidia_driver_own": ["linux-headers-amd64"]}


def test_what_changes() -> None:
    moved = Lock({"gpu-2": replace(ENTRY, version="595.91.07", branch=595), "gpu-3": ENTRY})
    assert changes(LOCK, LOCK) == ()
    said = changes(LOCK, moved)
    assert [line[:8] for line in said] == ["- gpu-1:", "~ gpu-2:", "+ gpu-3:", "- ten: 1"]
    assert said[1] == "~ gpu-2: branch 580 -> 595; version 580.178.04 -> 595.91.07"
    assert len(changes(None, LOCK)) == 3


def test_a_refusal_is_not_locked() -> None:
    with pytest.raises(ValueError, match="refusal"):
        entry_of(answer(Request(boards_seen(("1db1", "2901")), "debian12"), knowledge(), TODAY), ("1db1", "2901"))
