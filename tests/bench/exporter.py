"""``python -m tests.bench.exporter``: the agent against nvitop-exporter on the same simulated host of 8 H200, at 1 Hz.

Each alone: CPU and memory of all its processes, time of a scrape, size of a page. The library answers at once, so no
driver's time is in it. ``OPSCTL_BENCH_S`` is how long each is watched. nvitop-exporter is installed into
a folder of its own in the user's cache, from the package index that pip knows.
"""

from __future__ import annotations

import gzip
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from lab_gpu_kit import Simulated, built_library, simulated
from rich.console import Console
from rich.table import Table

GPUS, SCRAPES, WARM_S = 8, 300, 4.0
SECONDS = float(os.environ.get("OPSCTL_BENCH_S", "30"))
THEIRS = "nvitop-exporter"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opsctl-tests"
AGENT = ("import asyncio, sys; from pathlib import Path; from opsctl.agent.paths import Paths; "
         "from opsctl.agent.supervisor import supervise; asyncio.run(supervise(Paths(Path(sys.argv[1]))))")


@dataclass(frozen=True)
class Found:
    """What one of them showed: per cent of one core, MiB by process, milliseconds, series, bytes on the wire.

    ``proportional``: pages that processes share are counted once, in parts.
    """

    cpu: float
    resident: tuple[float, ...]
    proportional: float
    scrapes: tuple[float, ...]
    series: int
    page: int


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024**2


def proportional_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def cpu_s(pid: int) -> float:
    """By the process's own clock, threads that ended included: the ticks of /proc are too coarse for so little."""
    return time.clock_gettime((~pid << 3) | 2)


def processes_of(pid: int) -> list[int]:
    """It and its children, those that live."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in processes_of(int(child)))]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def scrape(port: int, path: str = "/metrics") -> bytes:
    """As Prometheus does: packed, on a connection of its own."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={
        "Accept": "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4",
        "Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return bytes(response.read())


@contextmanager
def agent(gpus: Simulated, root: Path) -> Iterator[tuple[int, int]]:
    """The whole of opsctl-agent on the simulated host: its process and its port."""
    port = free_port()
    (root / "etc/opsctl").mkdir(parents=True, exist_ok=True)
    (root / "run/opsctl/agent").mkdir(parents=True, exist_ok=True)
    listed = ", ".join(f'"{uuid}"' for uuid in gpus.uuids)
    (root / "etc/opsctl/agent.toml").write_text(
        f'host = "gpu-1"\nlisten = "127.0.0.1"\nagent_check_port = {free_port()}\ngateway_url = "http://127.0.0.1:1"\n'
        f"exporter_port = {port}\ngpus = [{listed}]\n")
    with running([sys.executable, "-c", AGENT, str(root)], gpus) as pid:
        yield pid, port


@contextmanager
def ticking(gpus: Simulated) -> Iterator[None]:
    """Time goes by for the GPUs: profiling counters are what lies between two moments."""
    stop = threading.Event()

    def tick() -> None:
        second = 1
        while not stop.wait(0.5):
            second += 1
            for index in range(GPUS):
                gpus.shows(index, time_us=second * 500_000, energy_mj=second * 200_000, busy_ns=second * 400_000_000)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def nvitop(gpus: Simulated) -> Iterator[tuple[int, int]]:
    port = free_port()
    with running([str(installed() / "bin" / THEIRS), "--port", str(port), "--interval", "1"], gpus) as pid:
        yield pid, port


@contextmanager
def running(arguments: Sequence[str], gpus: Simulated) -> Iterator[int]:
    with subprocess.Popen(arguments, env=gpus.environment, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(20)


def installed() -> Path:
    """Where nvitop-exporter is; put there when it is not."""
    folder = CACHE / THEIRS
    if not (folder / "bin" / THEIRS).exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", THEIRS], check=True)
    return folder


def watch(pid: int, port: int, seconds: float) -> Found:
    """CPU and memory of quiet seconds with a scrape each 5 s, then many scrapes."""
    until_served(port)
    time.sleep(WARM_S)
    pids = processes_of(pid)
    began, before = time.perf_counter(), sum(map(cpu_s, pids))
    while (left := began + seconds - time.perf_counter()) > 0:
        scrape(port)
        time.sleep(max(0.0, min(5.0, left)))
    used = (sum(map(cpu_s, pids)) - before) / (time.perf_counter() - began) * 100
    took = []
    for _ in range(SCRAPES):
        at = time.perf_counter()
        body = scrape(port)
        took.append((time.perf_counter() - at) * 1000)
    resident = tuple(resident_mib(one) for one in pids)
    return Found(used, resident, sum(map(proportional_mib, pids)), tuple(took), lines(body), len(body))


def lines(body: bytes) -> int:
    """Series in a page."""
    text = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
    return sum(not line.startswith(b"#") for line in text.splitlines() if line)


def until_served(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        with suppress(OSError):
            if lines(scrape(port)) > 50:
                return
        if time.monotonic() > until:
            raise TimeoutError("it serves nothing")
        time.sleep(0.1)


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def rows(ours: Found, theirs: Found) -> list[tuple[str, float, float, str]]:
    return [
        ("CPU, % of one core", ours.cpu, theirs.cpu, "{:.2f}"),
        ("resident, largest process, MiB", max(ours.resident), max(theirs.resident), "{:.1f}"),
        ("memory of all processes, shared parts once, MiB", ours.proportional, theirs.proportional, "{:.1f}"),
        ("scrape, median, ms", statistics.median(ours.scrapes), statistics.median(theirs.scrapes), "{:.1f}"),
        ("scrape, p99, ms", p99(ours.scrapes), p99(theirs.scrapes), "{:.1f}"),
        ("page on the wire, bytes a series", ours.page / ours.series, theirs.page / theirs.series, "{:.1f}"),
        ("series (here more is better)", ours.series, theirs.series, "{:.0f}"),
    ]


def table(ours: Found, theirs: Found) -> Table:
    shown = Table("what", "opsctl-agent", THEIRS, "ratio",
                  title=f"{GPUS} simulated H200, 1 Hz, {SECONDS:.0f} s each; below 1: less than {THEIRS}", box=None)
    for what, mine, other, how in rows(ours, theirs):
        shown.add_row(what, how.format(mine), how.format(other), f"{mine / other:.2f}")
    processes = " + ".join(f"{one:.1f}" for one in ours.resident)
    shown.caption = f"opsctl-agent: supervisor + reader = {processes} MiB"
    return shown


def main() -> None:
    with built_library() as library, simulated(library, "H200", GPUS) as gpus, ticking(gpus), \
            TemporaryDirectory(dir="/dev/shm") as root:  # in memory, as /run is
        with nvitop(gpus) as (pid, port):
            theirs = watch(pid, port, SECONDS)
        with agent(gpus, Path(root)) as (pid, port):
            ours = watch(pid, port, SECONDS)
    Console().print(table(ours, theirs))


if __name__ == "__main__":
    main()
