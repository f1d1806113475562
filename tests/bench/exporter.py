"""``python -m tests.bench.exporter``: what the exporter costs, 8 GPUs of a played NVML; without a driver's time."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from rich.console import Console
from rich.table import Table
from test_exporter import running

GPUS, SCRAPES, SECONDS = 8, 50, 10.0


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024**2


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(root: Path) -> list[tuple[str, str]]:
    async with running(root, tuple(f"GPU-{index}" for index in range(GPUS))) as one:
        one.order(gpus=GPUS)
        await one.state("ok")
        body = (await one.get("/metrics"))[2]
        took = []
        for _ in range(SCRAPES):
            began = time.perf_counter()
            await one.get("/metrics")
            took.append((time.perf_counter() - began) * 1000)
        pid, own = one.exporter.reader.view.pid, cpu_s(os.getpid())
        await asyncio.sleep(SECONDS)
        idle = (cpu_s(os.getpid()) - own) / SECONDS * 100
        return [
            ("series", str(sum(not line.startswith(b"#") for line in body.splitlines()))),
            ("page", f"{len(body) / 1000:.0f} kB"),
            ("scrape, median", f"{statistics.median(took):.1f} ms"),
            ("scrape, slowest", f"{max(took):.1f} ms"),
            ("agent and pytest, resident", f"{resident_mib(os.getpid()):.0f} MiB"),
            ("agent's CPU between scrapes, 10 samples a second", f"{idle:.1f} %"),
            ("reader, resident", f"{resident_mib(pid):.0f} MiB"),
        ]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="opsctl-") as folder:
        found = asyncio.run(measure(Path(folder)))
    table = Table(title=f"The exporter, {GPUS} played GPUs", box=None)
    table.add_column("what")
    table.add_column("found", justify="right")
    for row in found:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
