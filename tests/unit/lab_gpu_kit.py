"""Simulated GPUs without a lab: the library, a state file, and files that stand for device nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opsctl.lab.gpu import layout, library, state_file
from opsctl.lab.gpu.profiles import named
from opsctl.lab.gpu.state_file import StateFile

VERSION = "580.126.09"
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
# What a reader's program begins with: it prints one JSON document.
PRELUDE = """
import json, os, sys
import pynvml as nvml
def asked(function, *words):
    try:
        return function(*words)
    except nvml.NVMLError as error:
        return type(error).__name__
"""


class Simulated:
    """GPUs that a process of its own reads: ``run`` gives what a program printed."""

    def __init__(self, folder: Path, library_folder: Path, model: str, count: int, mig: int) -> None:
        self.folder = folder
        self.model = model
        self.uuids = [state_file.gpu_uuid("test", "gpu-1", index) for index in range(count)]
        state_file.create(folder / "lab-state", self.uuids, named(model), mig=mig)
        for node in ("nvidiactl", *(f"nvidia{index}" for index in range(count))):
            (folder / node).touch()
            (folder / node).chmod(0o666)
        self.state = StateFile(folder / "lab-state")
        self.state.machine.module_version = VERSION.encode()
        for index in range(count):
            self.shows(index)
        self.environment = {**os.environ, "LD_LIBRARY_PATH": str(library_folder), "NO_COLOR": "1",
                            "OPSCTL_LAB_GPU_STATE": str(folder / "lab-state"),
                            "OPSCTL_LAB_GPU_DEVICES": str(folder)}

    def shows(self, index: int, **values: int) -> None:
        """A GPU shows these values, and of the others something that cannot be mistaken for nothing."""
        usual = {"time_us": 1_000_000, "temperature_c": 61, "memory_temperature_c": 65, "margin_c": 26,
                 "power_mw": 431_000, "power_mean_mw": 430_000, "clock_sm_mhz": 1710, "clock_memory_mhz": 3201,
                 "utilization_percent": 87, "memory_utilization_percent": 52, "memory_used_bytes": 5 * 1024**3,
                 "energy_mj": 123_456, "reasons": 0x4}
        self.state.publish(index, layout.Now(**(usual | values)))

    def start(self, program: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", PRELUDE + program], env=self.environment, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, program: str) -> Any:
        process = self.start(program)
        said, complained = process.communicate(timeout=60)
        assert process.returncode == 0, complained
        return json.loads(said)


@contextmanager
def built_library() -> Iterator[Path]:
    """A folder with the library in it."""
    with tempfile.TemporaryDirectory(prefix="opsctl-test-nvml-") as folder:
        Path(folder).chmod(0o755)
        library.build(VERSION, Path(folder) / library.NAME)
        yield Path(folder)


@contextmanager
def simulated(library_folder: Path, model: str, count: int = 2, mig: int = 0) -> Iterator[Simulated]:
    with tempfile.TemporaryDirectory(prefix="opsctl-test-gpus-") as folder:
        Path(folder).chmod(0o755)  # also a program that has given up root reads it
        yield Simulated(Path(folder), library_folder, model, count, mig)
