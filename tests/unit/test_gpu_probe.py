"""The probe on simulated GPUs: it reads and never sets, and its capture, played back, gives the same samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_gpu_kit import NEEDS_GCC, VERSION, Simulated, built_library, simulated
from replayed_nvml import Replayed

from opsctl.agent.gpu import probe, sample
from opsctl.agent.gpu.nvml import Nvml

pytestmark = NEEDS_GCC
SETTERS = ("Set", "Reset", "Clear", "Create", "Destroy", "Modify", "Remove", "Freeze", "Register")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with built_library() as found:
        yield found


def capture(gpus: Simulated, *words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "opsctl.agent.gpu.probe", *words], env=gpus.environment, check=True,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize(("model", "mig"), [("H200", 0), ("H200", 2), ("A100", 0), ("L40S", 0), ("RTX 4090", 0)])
def test_a_capture_played_back_gives_the_same_samples(folder: Path, model: str, mig: int) -> None:
    with simulated(folder, model, mig=mig) as gpus:
        captured = capture(gpus)
        text = json.dumps(captured)
        assert not any(uuid in text for uuid in gpus.uuids)
    assert (captured["schema"], captured["driver"]) == (probe.SCHEMA, VERSION)
    assert not [name for name in captured["calls"] if any(word in name for word in SETTERS)]
    nvml = Nvml(Replayed(captured))
    nvml.start()
    assert sample.host_facts(nvml) == {"driver": VERSION, "cuda": "13.0"}
    opened = sample.open_gpus(nvml)
    for gpu in opened:
        sample.sample(nvml, gpu)
    for gpu, one in zip(opened, captured["gpus"], strict=True):
        assert sample.sample(nvml, gpu) == one["sample"]
        assert sample.thermal(nvml, gpu) == one["thermal"]
        assert one["sample"]["temperature_c"] == 61
        assert ("mig" in one["sample"]) == bool(mig)


def test_what_it_says_of_fields_and_cost(folder: Path) -> None:
    with simulated(folder, "H200") as gpus:
        captured = capture(gpus, "--names")
        assert [one["sample"]["uuid"] for one in captured["gpus"]] == gpus.uuids
    first = captured["gpus"][0]
    assert first["fields"]["82"] == {"type": first["fields"]["82"]["type"], "value": 65, "us": 0}
    assert first["fields"]["194"]["value"] == -2
    assert "299" not in first["fields"]
    assert first["more"]["nvmlDeviceGetCudaComputeCapability"] == [9, 0]
    assert first["more"]["nvmlDeviceGetFanSpeed"]["error"] == 3
    cost = captured["cost"]
    assert 0 < cost["thermal_ms"]["median"] < cost["sample_ms"]["median"] < 1000
    assert cost["calls_ms"]["nvmlDeviceGetPowerUsage"] > 0


def test_it_cannot_set_anything() -> None:
    import pynvml

    recorder = probe.Recorder(pynvml)
    names = [name for name in dir(pynvml) if name.startswith("nvml") and callable(getattr(pynvml, name))
             and "Get" not in name and any(word in name for word in SETTERS)]
    assert len(names) > 50
    for name in names:
        with pytest.raises(AttributeError):
            getattr(recorder, name)


def test_where_there_is_no_nvml_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "opsctl.agent.gpu.probe"], capture_output=True, text=True, check=False,
                          env={"LD_LIBRARY_PATH": "/nowhere"})
    assert (done.returncode, done.stdout) == (1, "")
    assert "NVML cannot be asked" in done.stderr
