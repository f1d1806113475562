"""The reader on the lab's NVML: the real nvidia-ml-py, a C library of each driver and GPU model, and its faults."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import reader, sample, verdict
from opsctl.agent.gpu.metrics import Known, values
from opsctl.agent.gpu.nvml import Nvml
from opsctl.agent.gpu.page import render
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.verdict import judge
from opsctl.agent.gpu.xids import Xids

pytest.importorskip("opsctl.lab.gpu.library", reason="this opsctl has no simulated GPUs")
import lab_gpu_kit
import played_nvml
import test_exporter

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not on this machine")

DRIVER = "580.126.09"
FIRST, SECOND = (f"GPU-00000000-0000-0000-0000-00000000000{number}" for number in (1, 2))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a library: one as it should be, and one of a driver that does not know the margin."""
    from opsctl.lab.gpu.library import NAME, build

    found = {}
    for name, without in (("whole", ()), ("older", ("nvmlDeviceGetMarginTemperature", "nvmlDeviceGetTemperatureV"))):
        folder = tmp_path_factory.mktemp(name)
        build(DRIVER, folder / NAME, without=without)
        found[name] = folder
    return found


class Simulated:
    """A machine's GPUs in a file, one tick old, and a reader process on them."""

    def __init__(self, folder: Path, library: Path, model: str, loaded: str = DRIVER) -> None:
        from opsctl.lab.gpu import board, profiles, state_file

        self.profile = profiles.named(model)
        state_file.create(folder / "state", [FIRST, SECOND], self.profile)
        self.state = state_file.StateFile(folder / "state")
        self.board = board.Board(self.profile, self.state, self.well())
        self.board.boot()
        self.state.machine.module_version = loaded.encode()
        self.tick()
        (folder / "dev").mkdir()
        for name in ("nvidiactl", "nvidia0", "nvidia1"):
            (folder / "dev" / name).touch()
        environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "OPSCTL_LAB_GPU_STATE": str(folder / "state"),
                       "OPSCTL_LAB_GPU_DEVICES": str(folder / "dev")}
        self.reader = subprocess.Popen([sys.executable, "-I", "-m", "opsctl.agent.gpu.child", str(folder / "lock")],
                                       stdout=subprocess.PIPE, env=environment)

    @staticmethod
    def well() -> Any:
        from opsctl.lab.gpu.faults import Faults

        return Faults()

    def tick(self) -> None:
        self.board.tick(self.well(), 0.1)

    def next(self, kind: str) -> dict[str, Any]:
        """The next line of that kind."""
        for _ in range(40):
            document = self.next_of_all()
            if document["kind"] == kind:
                return document
        raise AssertionError(f"no {kind} among 40 lines")

    def next_of_all(self) -> dict[str, Any]:
        assert self.reader.stdout is not None
        line = self.reader.stdout.readline()
        assert line, "the reader has ended"
        document: dict[str, Any] = json.loads(line)
        return document

    def shows(self, index: int, **values: int) -> None:
        """A GPU shows these values, and else what it did before."""
        from opsctl.lab.gpu import layout

        now = layout.Now.from_buffer_copy(self.state.machine.gpus[index].now)
        for name, value in values.items():
            setattr(now, name, value)
        self.state.publish(index, now)


@pytest.fixture
def simulated(tmp_path: Path, libraries: dict[str, Path]) -> Iterator[Any]:
    made: list[Simulated] = []

    @contextmanager
    def make(model: str = "H200", library: str = "whole", **more: Any) -> Iterator[Simulated]:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        one = Simulated(folder, libraries[library], model, **more)
        made.append(one)
        try:
            yield one
        finally:
            for gpu in one.state.machine.gpus:
                gpu.hang_until_ns = 0
            one.reader.send_signal(signal.SIGTERM)
            one.reader.communicate(timeout=120)

    return make


MODELS = ["H100", "H200", "B200", "A100", "L40S", "T4", "RTX 4090", "V100"]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_read_as_it_is(simulated: Any, model: str) -> None:
    with simulated(model) as one:
        sample = one.next("sample")
        if one.profile.gpm:  # what lies between two samples, which are of two ticks
            one.tick()
            sample = one.next("sample")
    first, _ = sample["gpus"]
    assert (sample["state"], sample["driver"], sample["cuda"]) == ("ok", DRIVER, "13.0")
    assert (first["state"], first["words"], first["uuid"], first["pci"]) == ("ok", "", FIRST, "00000000:1A:00.0")
    assert first["margin_source"] == ("margin_api" if one.profile.t_limit else "thresholds")
    assert ("memory_temperature_c" in first) == (one.profile.memory_max_c is not None)
    assert ("profile" in first) == one.profile.gpm
    assert ("remapped" in first) == one.profile.row_remapper
    assert first["memory_total_mib"] == one.profile.memory_mib
    assert first["power_limits_w"] == {"default": one.profile.power_default_w, "min": one.profile.power_min_w,
                                       "max": one.profile.power_max_w, "enforced": one.profile.power_default_w}
    assert sample["took_s"] < 1


def test_a_library_without_the_newer_names(simulated: Any) -> None:
    with simulated("H200", "older") as one:
        first = one.next("sample")["gpus"][0]
    assert first["margin_source"] == "fields"
    assert first["margin_c"] == one.profile.max_operating_c - first["temperature_c"]


def test_a_margin_that_is_used_up(simulated: Any) -> None:
    with simulated() as one:
        one.next("sample")
        one.shows(0, margin_c=-3)
        for _ in range(2):  # one may be on its way
            first, second = one.next("sample")["gpus"]
        assert first["margin_c"] == -3
        assert second["margin_c"] > 0


QUICK = {"index", "uuid", "pci", "state", "words", "temperature_c", "margin_c", "margin_source", "reasons"}


@pytest.mark.parametrize(("model", "source"), [("H200", "margin_api"), ("A100", "thresholds")])
def test_temperatures_come_four_times_a_second_while_one_gpu_is_near_its_limit(
        simulated: Any, model: str, source: str) -> None:
    with simulated(model) as one:
        sample = one.next("sample")
        hot = one.profile.max_operating_c - 5
        one.shows(1, temperature_c=hot, margin_c=5, reasons=0x20)
        while sample["gpus"][1]["margin_c"] != 5:
            sample = one.next("sample")
        quick = [one.next("thermal") for _ in range(4)]
        assert [set(gpu) for gpu in quick[0]["gpus"]] == [QUICK | {"memory_temperature_c"}] * 2
        second = quick[0]["gpus"][1]
        assert (second["temperature_c"], second["margin_c"], second["margin_source"], second["reasons"]) == (
            hot, 5, source, 0x20)
        steps = [later["at"] - earlier["at"] for earlier, later in pairwise(quick)]
        assert 0.15 < min(steps) < max(steps) < 0.9
        one.shows(1, temperature_c=30, margin_c=50)
        while sample["gpus"][1]["margin_c"] == 5:
            sample = one.next("sample")
        assert one.next_of_all()["kind"] == one.next_of_all()["kind"] == "sample"  # and then no more


def test_what_is_asked_of_a_gpu_four_times_a_second() -> None:
    played = played_nvml.Played()
    nvml = Nvml(played)
    gpu = sample.open_gpus(nvml)[0]
    whole = sample.sample(nvml, gpu)
    played.asked.clear()
    quick = sample.thermal(nvml, gpu)
    assert len(played.asked) == 4
    assert quick == {key: whole[key] for key in QUICK | {"memory_temperature_c"}}


def test_a_hang_is_told_while_it_lasts_and_ended_in_good_order(simulated: Any) -> None:
    with simulated() as one:
        one.next("sample")
        one.state.machine.gpus[1].hang_until_ns = time.monotonic_ns() + 3600 * 10**9
        told = one.next("waiting")
        assert told["gpu"] == 1
        assert told["call"].startswith("nvml")
        one.reader.send_signal(signal.SIGTERM)
        one.next("waiting")  # it lives, and says so
        assert one.reader.poll() is None
        one.state.machine.gpus[1].hang_until_ns = 0
        assert one.reader.wait(20) == 0


def test_a_gpu_that_falls_off_the_bus(simulated: Any) -> None:
    with simulated() as one:
        one.next("sample")
        one.state.machine.gpus[1].lost = 1
        one.state.happened(1, 79)
        event = one.next("xid")
        assert (event["xid"], event["pci"]) == (79, "00000000:3D:00.0")
        one.state.happened(1, 79)
        assert one.next("xid")["xid"] == 79
        for _ in range(2):
            first, second = one.next("sample")["gpus"]
    assert first["state"] == "ok"
    assert (second["state"], second["uuid"]) == ("lost", SECOND)
    assert "temperature_c" not in second


@pytest.mark.parametrize(("loaded", "state"), [("", "no_driver"), ("580.159.04", "mismatch")])
def test_a_driver_that_is_another(simulated: Any, loaded: str, state: str) -> None:
    with simulated(loaded=loaded) as one:
        assert one.next("sample")["state"] == state
        assert one.reader.wait(10) == 0


def test_a_hang_of_some_seconds_is_told_outlived_and_nobody_is_killed(
        tmp_path: Path, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a minute does, with less patience: pages are answered throughout, ages grow, and it is well again."""
    monkeypatch.setattr(reader, "STALE_S", 1.5)
    monkeypatch.setattr(verdict, "STALE_S", 1.5)
    monkeypatch.setattr(test_exporter.exporter_module, "TICK_S", 0.1)
    with lab_gpu_kit.simulated(libraries["whole"], "H200") as gpus:
        needed = ("LD_LIBRARY_PATH", "OPSCTL_LAB_GPU_STATE", "OPSCTL_LAB_GPU_DEVICES")
        command = ("env", *(f"{name}={gpus.environment[name]}" for name in needed),
                   sys.executable, "-I", "-m", "opsctl.agent.gpu.child", str(tmp_path / "lock"))

        async def work(one: test_exporter.Running) -> None:
            await one.state("ok")
            pid, ages = one.exporter.reader.view.pid, []
            gpus.state.machine.hang_until_ns = time.monotonic_ns() + 3 * 10**9
            until, codes = time.monotonic() + 2.8, []
            while time.monotonic() < until:
                began = time.monotonic()
                page = (await one.get("/metrics"))[2].decode()
                assert time.monotonic() - began < 1.0
                ages += [float(line.split()[1]) for line in page.splitlines()
                         if line.startswith("opsctl_gpu_sample_age_seconds{")]
                codes.append((await one.get("/readyz"))[0])
                assert (await one.get("/healthz"))[0] == 200
                await asyncio.sleep(0.2)
            assert max(ages) > 2
            assert (codes[0], codes[-1]) == (200, 503)
            assert "DCGM_FI_DEV_GPU_TEMP" not in page
            await one.state("ok")
            await one.until(lambda: one.exporter.reader.view.pid != pid, "the one that hung has ended by itself")
            await one.state("ok")
            assert not [words for words in one.said if "signal" in words]

        async def whole() -> None:
            async with test_exporter.running(tmp_path, tuple(gpus.uuids), command) as one:
                await asyncio.wait_for(work(one), 60)

        asyncio.run(whole())


OTHERS = """
import gpustat, nvitop
print(json.dumps({
    "nvitop": {device.uuid(): [device.temperature(), device.power_usage() / 1000, device.gpu_utilization(),
                               device.memory_used() / 2**20, device.memory_total() / 2**20]
               for device in nvitop.Device.all()},
    "gpustat": {gpu.uuid: [gpu.temperature, gpu.power_draw, gpu.utilization, gpu.memory_used, gpu.memory_total]
                for gpu in gpustat.new_query()}}))
"""
# temperature, power, utilisation, memory used and in all, each by one series, or more that add up
SERIES = (("DCGM_FI_DEV_GPU_TEMP",), ("DCGM_FI_DEV_POWER_USAGE",), ("DCGM_FI_DEV_GPU_UTIL",), ("DCGM_FI_DEV_FB_USED",),
          ("DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_FB_RESERVED"))


def scraped(sample: dict[str, Any]) -> dict[str, list[float]]:
    """By UUID, what our page says of a sample of the reader's."""
    now = boot_clock()
    view = View(wanted_since=now, began=now)
    view.hear(sample, now)
    known = Known("gpu-1", "0.1", view, judge(view, now, True, ()), Xids(), (), {}, now)
    _, _, page = render(list(values(known)), "", {})
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(page.decode()):
        found |= {(one.name, one.labels.get("UUID", "")): one.value for one in family.samples}
    return {gpu["uuid"]: [sum(found[name, gpu["uuid"]] for name in names) for names in SERIES]
            for gpu in sample["gpus"]}


@pytest.mark.parametrize("model", ["H200", "L40S", "V100"])
def test_nvitop_and_gpustat_say_of_a_simulated_host_what_our_page_says(
        tmp_path: Path, libraries: dict[str, Path], model: str) -> None:
    """Programs that others wrote read the simulator, too: it was not made to fit our reader, nor our reader to it."""
    with lab_gpu_kit.simulated(libraries["whole"], model) as gpus:
        gpus.shows(0, temperature_c=47, utilization_percent=4, power_mean_mw=97_000, power_mw=99_000,
                   memory_used_bytes=3 * 2**30)
        gpus.shows(1, temperature_c=83, utilization_percent=96, power_mean_mw=261_000, power_mw=255_000,
                   memory_used_bytes=11 * 2**30)
        others = gpus.run(OTHERS)
        with subprocess.Popen([sys.executable, "-I", "-m", "opsctl.agent.gpu.child", str(tmp_path / "lock")],
                              stdout=subprocess.PIPE, env=gpus.environment) as reader:
            assert reader.stdout is not None
            ours = scraped(json.loads(reader.stdout.readline()))
            reader.send_signal(signal.SIGTERM)
            reader.stdout.read()
        used = [[47, 97, 4, 3 * 1024], [83, 261, 96, 11 * 1024]]
        assert [ours[uuid][:4] for uuid in gpus.uuids] == used
    assert ours == others["nvitop"]
    assert ours == others["gpustat"]
