"""Every GPU model of the lab, as it is and with parts missing, through our reader, our page, nvitop and gpustat.

A value is right or it is not there: never a zero for what a GPU does not have.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lab_gpu_kit import NEEDS_GCC, VERSION, Simulated, built_library, simulated
from prometheus_client.parser import text_string_to_metric_families

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu.metrics import Known, values
from opsctl.agent.gpu.page import render
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.verdict import judge
from opsctl.agent.gpu.xids import Xids
from opsctl.lab.gpu import layout, library, state_file
from opsctl.lab.gpu.profiles import Profile, known, named

pytestmark = NEEDS_GCC

# What is taken away: abilities of the board, functions that the driver does not know yet, parts of MIG.
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {}, "no T.Limit": {"abilities": ("t_limit",)}, "no memory sensor": {"abilities": ("memory_sensor",)},
    "no GPM": {"abilities": ("gpm",)}, "nothing of it": {"abilities": ("t_limit", "memory_sensor", "gpm")},
    "an older driver": {"library": "older"}, "MIG": {"mig": 2},
    "MIG, no T.Limit, no sensor": {"mig": 2, "abilities": ("t_limit", "memory_sensor")},
}
OLDER = ("nvmlDeviceGetMarginTemperature", "nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons",
         "nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet")
# For each line that comes: two samples, with a moment of the GPU's between them.
READ = """
from opsctl.agent.gpu import sample
from opsctl.agent.gpu.nvml import Nvml
asker = Nvml(nvml)
asker.start()
while sys.stdin.readline():
    gpus = sample.open_gpus(asker)
    for gpu in gpus: sample.sample(asker, gpu)
    print("once", flush=True); sys.stdin.readline()
    print(json.dumps({
        "gpus": [sample.sample(asker, gpu) for gpu in gpus],
        "thermal": [sample.thermal(asker, gpu) for gpu in gpus]}), flush=True)
"""
# What other people's programs say, in a process of their own: they change nvidia-ml-py while they are imported.
OTHERS = """
import gpustat, nvitop
while sys.stdin.readline():
    print(json.dumps(
        [[device.uuid(), device.temperature(), device.power_usage() / 1000, device.gpu_utilization(),
          device.memory_total() / 2**20] for device in nvitop.PhysicalDevice.all()]
        + [[gpu.uuid, gpu.temperature, gpu.power_draw, gpu.utilization, gpu.memory_total]
           for gpu in gpustat.new_query()], default=str), flush=True)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    older = tmp_path_factory.mktemp("older")
    library.build(VERSION, older / library.NAME, without=OLDER)
    with built_library() as whole:
        yield {"whole": whole, "older": older}


def read(libraries: dict[str, Path], model: str, variants: list[str], mig: int) -> Iterator[tuple[str, Profile, Any]]:
    """Variant by variant the profile as it leaves it, and what was read of two such GPUs."""
    which = {VARIANTS[variant].get("library", "whole") for variant in variants}
    with simulated(libraries[which.pop()], model, mig=mig) as gpus:
        assert not which
        ours, others = gpus.start(READ), gpus.start(OTHERS)
        try:
            for variant in variants:
                said = twice(gpus, ours, VARIANTS[variant].get("abilities", ()))
                yield variant, less_of(named(model), variant), {**said, "others": json.loads(asked(others))}
        finally:
            for process in (ours, others):
                process.kill()
                process.communicate()


def less_of(profile: Profile, variant: str) -> Profile:
    less: dict[str, dict[str, Any]] = {"t_limit": {"t_limit": False}, "memory_sensor": {"memory_max_c": None},
                                       "gpm": {"gpm": False}}
    for name in VARIANTS[variant].get("abilities", ()):
        profile = dataclasses.replace(profile, **less[name])
    return profile


def twice(gpus: Simulated, process: subprocess.Popen[str], missing: Sequence[str]) -> Any:
    """What our reader says of the GPUs with these abilities missing."""
    for gpu in gpus.state.machine.gpus[:2]:
        gpu.fixed.abilities = state_file.abilities(named(gpus.model))
        gpu.fixed.abilities &= ~sum(layout.ABILITIES[name] for name in missing)
    for index in range(2):
        gpus.shows(index)
    assert asked(process) == "once\n"
    for index in range(2):
        gpus.shows(index, time_us=2_000_000, busy_ns=700_000_000, memory_busy_ns=300_000_000)
    return json.loads(asked(process))


def asked(process: subprocess.Popen[str]) -> str:
    """The line that it answers with."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line


def expected_margin(profile: Profile, variant: str) -> tuple[int, str]:
    """What the margin of a GPU is that shows 61 and 65 degrees, and 26 by the driver's own account."""
    if profile.t_limit and "older" not in VARIANTS[variant].get("library", ""):
        return 26, "margin_api"
    margins = [profile.max_operating_c - 61]
    if profile.memory_max_c is not None:
        margins.append(profile.memory_max_c - 65)
    return min(margins), "fields" if profile.t_limit else "thresholds"


CASES = [(model, variants, mig) for model in known() for variants, mig in (
    ([name for name, changes in VARIANTS.items() if not changes.keys() & {"library", "mig"}], 0),
    (["an older driver"], 0), ([name for name in VARIANTS if "MIG" in name], 2)) if not mig or named(model).mig_slices]


@pytest.mark.parametrize(("model", "variants", "mig"), CASES)
def test_a_model_with_parts_missing(libraries: dict[str, Path], model: str, variants: list[str], mig: int) -> None:
    seen = 0
    for variant, profile, said in read(libraries, model, variants, mig):
        check_gpus(variant, profile, said)
        check_page(variant, profile, said)
        check_others(variant, profile, said)
        seen += 1
    assert seen == len(variants)


def check_gpus(variant: str, profile: Profile, said: dict[str, Any]) -> None:
    older, parts = VARIANTS[variant].get("library") == "older", VARIANTS[variant].get("mig", 0)
    sensor, gpm = profile.memory_max_c is not None, profile.gpm and not older
    for gpu, quick in zip(said["gpus"], said["thermal"], strict=True):
        assert (gpu["state"], gpu["words"], gpu["temperature_c"], gpu["power_w"]) == ("ok", "", 61, 430.0)
        assert (gpu["margin_c"], gpu["margin_source"]) == expected_margin(profile, variant)
        assert gpu.get("memory_temperature_c") == (65 if sensor else None)
        assert ("memory_max" in gpu["thresholds_c"]) == sensor
        limits = {"shutdown", "slowdown", "max_operating"} | ({"memory_max"} if sensor else set())
        assert set(gpu.get("offsets_c", ())) == (limits if profile.t_limit else set())
        assert ("profile" in gpu) == gpm
        assert not gpm or 0 < gpu["profile"]["sm_active"] <= 1
        assert ("ecc" in gpu, "remapped" in gpu) == (profile.ecc, profile.row_remapper)
        assert ("nvlink_kib" in gpu) == (profile.nvlinks > 0)
        assert len(gpu.get("mig", ())) == parts
        for part in gpu.get("mig", ()):
            assert part["memory_total_mib"] == profile.memory_mib // (profile.mig_slices + 1)
        assert gpu["memory_total_mib"] == profile.memory_mib
        assert gpu["reasons"] == 4
        same = ("index", "uuid", "pci", "state", "words", "temperature_c", "memory_temperature_c", "margin_c",
                "margin_source", "reasons")
        assert quick == {key: gpu[key] for key in same if key in gpu}


def check_page(variant: str, profile: Profile, said: dict[str, Any]) -> None:
    parts, there = VARIANTS[variant].get("mig", 0), on_the_page(said)
    gpm = profile.gpm and "older" not in VARIANTS[variant].get("library", "")
    assert ("DCGM_FI_DEV_MEMORY_TEMP" in there) == (profile.memory_max_c is not None), variant
    assert ("DCGM_FI_PROF_SM_ACTIVE" in there) == gpm
    assert ("opsctl_gpu_thermal_offset_celsius" in there) == profile.t_limit
    assert ("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL" in there) == profile.ecc
    assert ("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL" in there) == (profile.nvlinks > 0)
    assert there["opsctl_gpu_thermal_margin_celsius"] == [expected_margin(profile, variant)[0]] * 2
    assert len(there["DCGM_FI_DEV_FB_TOTAL"]) == (2 * parts or 2)


def check_others(variant: str, profile: Profile, said: dict[str, Any]) -> None:
    """Other people's programs: the simulator was not written around our reader."""
    assert len(said["others"]) == 4, variant
    for uuid, temperature, power, utilisation, memory in said["others"]:
        assert uuid.startswith("GPU-")
        assert (temperature, power, memory) == (61, 430, profile.memory_mib), variant
        assert utilisation == 87 or "MIG" in variant


def on_the_page(said: dict[str, Any]) -> dict[str, list[float]]:
    """By name, the values of what our page says of these GPUs."""
    now = boot_clock()
    view = View(wanted_since=now, began=now)
    view.hear({"kind": "sample", "at": now, "state": "ok", "words": "", "took_s": 0.0,
               "gpus": said["gpus"]}, now)
    page = render(list(values(Known("gpu-1", "0.1", view, judge(view, now, True, ()), Xids(), (), {}, now))), "", {})[2]
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for one in family.samples:
            found.setdefault(one.name, []).append(one.value)
    return found
