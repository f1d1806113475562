"""``NVRM: Xid`` in the kernel's log: some errors never come as an event, and after some NVML itself hangs.

``/dev/kmsg`` where the agent may read it, else the journal (group systemd-journal). Both begin with this boot's.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import select
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent.drains import boot_clock

KMSG = Path("/dev/kmsg")
XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<pci>[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f]+)[^)]*\): (?P<xid>\d+)")
RECORD = re.compile(r"^\d+,\d+,(?P<us>\d+),[^;]*;(?P<text>.*)")
# The kernel's own lines, and those that root hands on in its name, as happens in containers and with syslog daemons.
# All of this boot's: what --lines counts are lines before they are searched, and hosts talk a lot.
JOURNAL = ("journalctl", "--boot", "--follow", "--no-tail", "--output=json", "--no-pager", "--quiet",
           "--output-fields=MESSAGE", "--grep=NVRM: Xid",
           "_TRANSPORT=kernel", "+", "SYSLOG_IDENTIFIER=kernel", "_UID=0")
PAUSE_S = 0.5  # of a kernel that says a lot, much is taken at once
RECORDS_AT_ONCE = 10_000
BYTES = 65_536
JOURNAL_AGAIN_S = 30.0
SAME_S = 0.05  # what reading two clocks after each other may make of one time


@dataclass(frozen=True)
class Entry:
    """An error in the log: PCI address as NVML writes it, number, when by the boot clock, in seconds."""

    pci: str
    xid: int
    at: float


def pci_address(text: str) -> str:
    """``0000:1a:00`` -> ``00000000:1A:00.0``, as NVML writes it."""
    domain, bus, device = (int(part, 16) for part in text.partition(".")[0].split(":"))
    return f"{domain:08X}:{bus:02X}:{device:02X}.0"


def entry_of(text: str, at: float) -> Entry | None:
    """The error in one line of the log, if it is one."""
    found = XID.search(text)
    return Entry(pci_address(found["pci"]), int(found["xid"]), at) if found else None


def kmsg_entry(line: str, now: float, now_us: int) -> Entry | None:
    """A record of ``/dev/kmsg``: ``4,1234,5000000,-;NVRM: Xid ...`` with microseconds by the monotonic clock.

    ``now`` and ``now_us`` are the same moment by the boot clock and by that one, which stands still in suspension.
    """
    record = RECORD.match(line)
    if record is None:
        return entry_of(line, now)
    return entry_of(record["text"], now - max(0, now_us - int(record["us"])) / 1e6)


def journal_entry(line: str, now: float, now_us: int) -> Entry | None:
    """A line of ``journalctl --output=json``; clocks as in ``kmsg_entry``."""
    try:
        document = json.loads(line)
        at = now - (now_us - int(document["__MONOTONIC_TIMESTAMP"])) / 1e6
        return entry_of(str(document["MESSAGE"]), at)
    except (ValueError, KeyError, TypeError):
        return None


async def follow(say: Callable[[str], None], kmsg: Path = KMSG) -> AsyncIterator[Entry]:
    """Every error since boot, then each as it comes. Says once when nothing can be read."""
    descriptor = _opened(kmsg)
    source = _journal(say) if descriptor < 0 else _kernel(descriptor)
    async for entry in source:
        yield entry


def _opened(kmsg: Path) -> int:
    """-1: it may not be read, or nobody can wait for it (a container's is often /dev/null)."""
    try:
        descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        with select.epoll() as waiting:
            waiting.register(descriptor, select.EPOLLIN)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


async def _kernel(descriptor: int) -> AsyncIterator[Entry]:
    loop, came = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        loop.remove_reader(descriptor)  # until it is read it stays readable, and the loop would spin
        came.set()

    try:
        while True:
            came.clear()
            for line in _read(descriptor):
                entry = kmsg_entry(line, boot_clock(), time.monotonic_ns() // 1000)
                if entry is not None:
                    yield entry
            loop.add_reader(descriptor, wake)
            await came.wait()
            await asyncio.sleep(PAUSE_S)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _read(descriptor: int) -> list[str]:
    """What came since; a read gives one record, and the next one after records were overwritten."""
    found: list[str] = []
    for _ in range(RECORDS_AT_ONCE):
        try:
            data = os.read(descriptor, BYTES)
        except BlockingIOError:
            break
        except BrokenPipeError:
            continue
        if not data:
            break
        found += data.decode(errors="replace").splitlines()
    return found


async def _journal(say: Callable[[str], None]) -> AsyncIterator[Entry]:
    complained = False
    newest = -math.inf
    while True:
        process, told = None, newest
        try:
            process = await asyncio.create_subprocess_exec(
                *JOURNAL, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL, limit=1 << 20)
            assert process.stdout is not None  # noqa: S101 - it was asked for
            async for line in process.stdout:
                entry = journal_entry(line.decode(errors="replace"), boot_clock(), time.monotonic_ns() // 1000)
                if entry is not None and entry.at > told + SAME_S:  # journalctl, started again, repeats
                    newest = max(newest, entry.at)
                    yield entry
            if await process.wait():
                raise OSError(f"journalctl ended with {process.returncode}")
        except (OSError, ValueError) as error:
            if not complained:
                say(f"the kernel's log cannot be read ({error}); only errors that NVML reports are seen")
            complained = True
        finally:
            if process is not None and process.returncode is None:
                with suppress(ProcessLookupError):
                    process.terminate()
        await asyncio.sleep(JOURNAL_AGAIN_S)
