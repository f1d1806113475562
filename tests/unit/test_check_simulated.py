"""opsctl check on the lab's simulated GPUs: what its nvidia-smi says, through the probe's own questions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from check_kit import host, overlaid, read
from lab_gpu_kit import NEEDS_GCC, VERSION, Simulated, built_library, simulated

from opsctl.checking import probe
from opsctl.checking.model import Finding
from opsctl.checking.table import findings_for
from opsctl.lab.gpu.faults import Faults, happen, kernel_line
from opsctl.lab.gpu.trees import version_text
from opsctl.lab.vendor.catalogue import fill
from opsctl.lab.vendor.debs import HERE

pytestmark = NEEDS_GCC


@pytest.fixture(scope="module")
def library_folder() -> Iterator[Path]:
    with built_library() as folder:
        yield folder


@pytest.fixture
def gpus(library_folder: Path) -> Iterator[Simulated]:
    with simulated(library_folder, "H100") as running:
        yield running


def found(gpus: Simulated, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 20.0, xids: str = ""
          ) -> dict[str, Finding]:
    """The findings of a host whose nvidia-smi is the lab's."""
    program = gpus.folder / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(fill((HERE / "programs/nvidia_smi.py").read_text(), {"UPSTREAM": VERSION}))
    program.chmod(0o755)
    for name, value in {**gpus.environment, "PATH": f"{program.parent}:{gpus.environment['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.path.exists", lambda path: path == "/proc/driver/nvidia/version")
    asked = {name: argv for name, (argv, _) in probe.programs("/nowhere", "").items() if argv[0] == "nvidia-smi"}
    said = {name: probe.run(argv, timeout_s) for name, argv in asked.items()}
    document = overlaid(host("gpu-host"), {
        "commands": {**said, "driver": {"exit": 0, "out": version_text(VERSION, "open")},
                     "xids": {"exit": 0 if xids else 1, "out": xids}},
        "wanted": {"gpu_uuids": gpus.uuids}})
    return {one.id: one for one in findings_for("gpu-1", *read(document))}


def test_sound_gpus_are_told_as_such(gpus: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    said = found(gpus, monkeypatch)
    assert {said[name].verdict for name in ("driver-answers", "gpu-count", "ecc", "gpu-throttling", "xids")} == {"pass"}
    assert said["driver-answers"].what == "the driver answers for 2 GPUs"
    assert {said[name].verdict for name in ("row-remap", "rebar", "nvlink")} == {"skip"}, "it knows no XML, no links"


def test_a_lost_gpu_is_missing(gpus: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.state.machine.gpus[1].lost = 1
    said = found(gpus, monkeypatch)
    assert said["gpu-count"].verdict == "fix"
    assert "1 of 2 GPUs do not answer (GPU1: " in said["gpu-count"].what


def test_a_hot_gpu_is_slowed_down(gpus: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.shows(0, reasons=0x48)
    said = found(gpus, monkeypatch)
    assert said["gpu-throttling"].verdict == "warn"
    assert "hardware thermal slowdown" in said["gpu-throttling"].what


def test_a_driver_that_hangs_is_told_in_time(gpus: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.state.machine.hang_until_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 60 * 10**9
    began = time.monotonic()
    said = found(gpus, monkeypatch, timeout_s=1.0)
    assert said["driver-answers"].verdict == "fix"
    assert "hangs" in said["driver-answers"].what
    assert time.monotonic() - began < 15.0


def test_an_xid_is_told(gpus: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    (xid,) = happen(Faults(), [0], 79).xids
    said = found(gpus, monkeypatch, xids=kernel_line(0x1A, xid.xid) + "\n")
    assert said["xids"].verdict == "warn"
    assert "XID 79 on 0000:1a:00" in said["xids"].what
