"""The whole agent on a simulated host of 8 GPUs for an hour: its memory does not grow, nor does a scrape get slow.

OPSCTL_SOAK_S makes it shorter. All that happens to a long-lived agent happens here more often: a scrape each second in
turns of both formats, GPUs that get hot and cold, errors, and a call that hangs now and then.
"""

from __future__ import annotations

import gzip
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
from lab_gpu_kit import NEEDS_GCC, built_library, simulated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.exporter import GPUS, agent, cpu_s, processes_of, resident_mib, scrape, ticking, until_served

SECONDS = float(os.environ.get("OPSCTL_SOAK_S", "3600"))
pytestmark = [NEEDS_GCC, pytest.mark.slow, pytest.mark.timeout(SECONDS + 120)]
GROWTH_MIB, RESIDENT_MIB, SCRAPE_P99_MS, CPU_PERCENT = 1.0, 40.0, 30.0, 1.0
SETTLE_S = 20.0


def test_it_is_as_small_after_an_hour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with built_library() as library, simulated(library, "H200", GPUS) as gpus, ticking(gpus), \
            agent(gpus, tmp_path) as (pid, port):
        until_served(port)
        time.sleep(min(SETTLE_S, SECONDS / 10))
        pids = processes_of(pid)
        assert len(pids) == 2
        memory: dict[int, list[float]] = {one: [] for one in pids}
        took: list[float] = []
        machine: list[float] = []  # what a page that costs nothing takes on a machine that others use, too
        began, used = time.monotonic(), sum(map(cpu_s, pids))
        while time.monotonic() - began < SECONDS:
            second = len(took)
            if second % 30 == 29:
                gpus.state.happened(second % GPUS, 79)
            if second % 60 == 40:  # a driver that takes its time
                gpus.state.machine.gpus[0].hang_until_ns = time.monotonic_ns() + 2 * 10**9
            at = time.perf_counter()
            page = scrape(port)
            took.append((time.perf_counter() - at) * 1000)
            at = time.perf_counter()
            scrape(port, "/healthz")
            machine.append((time.perf_counter() - at) * 1000)
            assert b"opsctl_gpus" in unpacked(page)
            for one in pids:
                memory[one].append(resident_mib(one))
            time.sleep(max(0.0, began + len(took) - time.monotonic()))
        assert processes_of(pid) == pids  # none was replaced
        used = (sum(map(cpu_s, pids)) - used) / (time.monotonic() - began) * 100
    quarter = len(took) // 4
    growth = [statistics.mean(found[-quarter:]) - statistics.mean(found[:quarter]) for found in memory.values()]
    p99, idle = statistics.quantiles(took, n=100)[98], statistics.quantiles(machine, n=100)[98]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{SECONDS:.0f} s: grew by {' and '.join(f'{one:+.2f}' for one in growth)} MiB to "
            f"{' and '.join(f'{found[-1]:.1f}' for found in memory.values())}; {used:.2f} % of a core with a scrape a "
            f"second; scrapes: median {statistics.median(took):.1f} ms, p99 {p99:.1f} ms, of /healthz {idle:.1f}\n")
    assert max(growth) < GROWTH_MIB
    assert max(found[-1] for found in memory.values()) < RESIDENT_MIB
    assert p99 < SCRAPE_P99_MS  # what /healthz took, above, says how busy the machine was


def unpacked(body: bytes) -> bytes:
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def test_what_it_costs(tmp_path: Path) -> None:
    """1 Hz, 8 GPUs, a scrape each 5 s: less than a hundredth of a core, in all."""
    with built_library() as library, simulated(library, "H200", GPUS) as gpus, ticking(gpus), \
            agent(gpus, tmp_path) as (pid, port):
        until_served(port)
        time.sleep(5)
        pids = processes_of(pid)
        began, before = time.monotonic(), sum(map(cpu_s, pids))
        for _ in range(6):
            scrape(port)
            time.sleep(5)
        used = (sum(map(cpu_s, pids)) - before) / (time.monotonic() - began) * 100
    assert used < CPU_PERCENT

