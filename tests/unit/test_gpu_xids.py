"""XIDs: twice told is once, twice happened is twice, and the kernel's log is read as it comes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from opsctl.agent.gpu import kernel_log
from opsctl.agent.gpu.kernel_log import Entry, entry_of, follow, journal_entry, kmsg_entry
from opsctl.agent.gpu.xids import WORDS, Xids, grade_of

PCI = "00000000:1A:00.0"
LINE = "NVRM: Xid (PCI:0000:1a:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


@pytest.mark.parametrize(("told", "count", "at"), [
    ([("event", 100.0)], 1, 100.0),
    ([("event", 100.0), ("log", 101.0)], 1, 100.0),
    ([("log", 100.0), ("event", 103.0)], 1, 100.0),
    ([("event", 100.0), ("event", 100.5)], 2, 100.5),
    ([("event", 100.0), ("event", 100.5), ("log", 100.1), ("log", 100.6)], 2, 100.5),
    ([("log", 100.0), ("log", 100.0)], 2, 100.0),
    ([("event", 100.0), ("log", 106.0)], 2, 106.0),
    ([("log", 200.0), ("log", 100.0)], 2, 200.0),
])
def test_how_often(told: list[tuple[str, float]], count: int, at: float) -> None:
    xids = Xids()
    for source, when in told:
        xids.seen(source, PCI, 79, when)
    assert (xids.of(PCI)[79].count, xids.of(PCI)[79].at) == (count, at)


def test_a_wall_clock_that_is_set_back_changes_no_count_and_no_order() -> None:
    xids = Xids()
    xids.settle(1_700_000_000.0)
    assert xids.seen("event", PCI, 31, 100.0)
    xids.settle(1_700_000_000.2)  # steered: what was exported stays as it was
    assert xids.wall(xids.of(PCI)[31].at) == 1_700_000_100.0
    xids.settle(1_699_996_400.0)  # an hour back, between the two tellings
    assert not xids.seen("log", PCI, 31, 100.4)
    assert xids.seen("event", PCI, 79, 101.0)
    assert xids.last(PCI) == 79
    assert [(one["xid"], one["at"]) for one in xids.recent(PCI, 102.0)] == [(79, 1_699_996_501.0),
                                                                            (31, 1_699_996_500.0)]


def test_errors_and_gpus_are_told_apart() -> None:
    xids = Xids()
    for source, pci, xid, when in (("log", PCI, 31, 10.0), ("event", PCI, 79, 20.0), ("log", "other", 79, 20.0),
                                   ("log", PCI, 13, 15.0)):
        assert xids.seen(source, pci, xid, when)
    assert {xid: one.count for xid, one in xids.of(PCI).items()} == {13: 1, 31: 1, 79: 1}
    assert (xids.last(PCI), xids.last("other"), xids.last("none")) == (79, 79, 0)
    assert [one["xid"] for one in xids.recent(PCI, 30.0)] == [79, 13, 31]
    assert xids.recent(PCI, 20.0 + 25 * 3600) == []


@pytest.mark.parametrize(("text", "expected"), [
    (LINE, Entry(PCI, 79, 5.0)),
    ("NVRM: Xid (0000:1a:00): 31, Ch 00000010", Entry(PCI, 31, 5.0)),
    ("NVRM: Xid (PCI:0000:1a:00 GPU-I:02): 31, pid=1", Entry(PCI, 31, 5.0)),
    ("NVRM: Xid (PCI:0010:c1:00): 62, 32a5", Entry("00000010:C1:00.0", 62, 5.0)),
    ("NVRM: loading NVIDIA UNIX Open Kernel Module", None),
    ("nothing of the kind: Xid 79", None),
])
def test_a_line_of_the_log(text: str, expected: Entry | None) -> None:
    assert entry_of(text, 5.0) == expected


def test_the_kernels_own_times() -> None:
    assert kmsg_entry(f"4,1234,5000000,-;{LINE}", 1000.0, 8_000_000) == Entry(PCI, 79, 997.0)
    assert kmsg_entry(" SUBSYSTEM=pci", 1000.0, 8_000_000) is None
    assert kmsg_entry(LINE, 1000.0, 8_000_000) == Entry(PCI, 79, 1000.0)
    document = {"MESSAGE": LINE, "__MONOTONIC_TIMESTAMP": "5000000", "_TRANSPORT": "kernel"}
    assert journal_entry(json.dumps(document), 1000.0, 8_000_000) == Entry(PCI, 79, 997.0)
    for line in ("", "{", "[]", json.dumps({"MESSAGE": [1, 2], "__MONOTONIC_TIMESTAMP": "x"})):
        assert journal_entry(line, 1000.0, 8_000_000) is None


def test_the_log_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe stands in for /dev/kmsg: opened without waiting, read record by record."""
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.PAUSE_S", 0.01)
    kmsg = tmp_path / "kmsg"
    os.mkfifo(kmsg)
    writer = os.open(kmsg, os.O_RDWR)
    os.write(writer, f"6,1,1,-;something else\n4,2,2,-;{LINE}\n SUBSYSTEM=pci\n".encode())
    found: list[int] = []

    async def listen() -> None:
        async for entry in follow(lambda _: None, kmsg):
            found.append(entry.xid)
            if len(found) == 2:
                return
            os.write(writer, b"4,3,3,-;NVRM: Xid (PCI:0000:1a:00): 31, x\n")

    asyncio.run(asyncio.wait_for(listen(), 10))
    os.close(writer)
    assert found == [79, 31]


def test_a_kernel_that_talks_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies unread keeps the log readable: waiting for it must not spin."""
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.PAUSE_S", 1.0)
    kmsg = tmp_path / "kmsg"
    os.mkfifo(kmsg)
    writer = os.open(kmsg, os.O_RDWR)

    async def listen() -> None:
        async for _ in follow(lambda _: None, kmsg):
            os.write(writer, f"4,3,3,-;{LINE}\n".encode())  # unread for the whole pause

    os.write(writer, f"4,2,2,-;{LINE}\n".encode())
    before = time.process_time()
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(listen(), 1.6))
    os.close(writer)
    assert time.process_time() - before < 0.2


@pytest.mark.parametrize("kmsg", [Path("/nowhere/kmsg"), Path("/dev/null")])  # the second: as containers have it
def test_where_nothing_can_be_read_it_is_said_once(kmsg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.JOURNAL", ("false",))
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.JOURNAL_AGAIN_S", 0.01)
    said: list[str] = []

    async def listen() -> None:
        async for _ in follow(said.append, kmsg):
            raise AssertionError

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(listen(), 0.5))
    assert len(said) == 1
    assert "only errors that NVML reports are seen" in said[0]


JOURNALD = Path("/usr/lib/systemd/systemd-journald")
# A journal of its own: nothing of this machine's is read or written, nor is the kernel told anything.
OWN_NAMESPACES = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc")
OWN_JOURNAL = """
mount -t tmpfs none /run && mount -t tmpfs none /var/log && mkdir -p /run/systemd/journald.conf.d
printf '[Journal]\\nAudit=no\\nReadKMsg=no\\nRateLimitBurst=0\\n' > /run/systemd/journald.conf.d/own.conf
"$0" 2>&1 & journald=$!
until [ -S /run/systemd/journal/stdout ]; do kill -0 $journald || exit 9; sleep 0.1; done
{ echo "$1"; seq 1 2000 | sed 's/^/a host that talks a lot /'; echo "$2"; } | systemd-cat --identifier=kernel
shift 2
until journalctl --quiet --lines=1 --grep='Xid .*: 31,' > /dev/null; do sleep 0.1; done
timeout 3 "$@"
kill $journald; wait $journald
exit 0
"""


@pytest.mark.skipif(os.geteuid() != 0 or not JOURNALD.exists() or shutil.which("unshare") is None,
                    reason="a journal of its own needs root, systemd-journald and unshare")
def test_an_old_error_is_found_on_a_host_that_talks_a_lot() -> None:
    """The real journald and journalctl: what --lines counts are lines before they are searched."""
    other = LINE.replace(": 79,", ": 31,")
    done = subprocess.run([*OWN_NAMESPACES, "sh", "-c", OWN_JOURNAL, JOURNALD, LINE, other, *kernel_log.JOURNAL],
                          capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"no journal of its own here: {done.stderr.strip()[-200:]}")
    found = [journal_entry(line, 0.0, 0) for line in done.stdout.splitlines()]
    assert [one.xid for one in found if one is not None] == [79, 31]


def test_the_journal_is_read_where_the_kernels_log_may_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"MESSAGE": LINE, "__MONOTONIC_TIMESTAMP": "500000"})
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.JOURNAL", ("printf", f"{line}\\n{line}\\n"))
    monkeypatch.setattr("opsctl.agent.gpu.kernel_log.JOURNAL_AGAIN_S", 0.01)
    found: list[Entry] = []

    async def listen() -> None:
        async for entry in follow(lambda _: None, tmp_path / "none"):
            found.append(entry)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(listen(), 0.5))
    assert [(one.pci, one.xid) for one in found] == [(PCI, 79)] * 2  # it was started many times


def test_every_row_of_the_catalogue_is_whole() -> None:
    rows = [line.split("\t") for line in WORDS.read_text().splitlines() if not line.startswith("#")]
    numbers = [int(row[0]) for row in rows]
    assert numbers == sorted(set(numbers))
    for _, words, action, severity, source in rows:
        assert words
        assert re.fullmatch("-|[A-Z][A-Z0-9_]+", action)
        assert severity in ("info", "warning", "critical")
        assert source.startswith("docs.nvidia.com/")


@pytest.mark.parametrize(("xid", "action", "severity"), [
    (13, "RESTART_APP", "warning"), (43, "IGNORE", "info"), (48, "WORKFLOW_XID_48", "critical"),
    (63, "IGNORE", "info"), (64, "RESET_GPU", "critical"), (74, "WORKFLOW_NVLINK_ERR", "critical"),
    (79, "RESTART_BM", "critical"), (94, "RESTART_APP", "warning"), (95, "RESET_GPU", "critical"),
    (119, "RESET_GPU", "critical"), (167, "CONTACT_SUPPORT", "warning"), (9999, "CONTACT_SUPPORT", "warning")])
def test_what_to_do_about_it(xid: int, action: str, severity: str) -> None:
    assert (grade_of(xid).action, grade_of(xid).severity) == (action, severity)
