"""The exporter as Prometheus, load balancer and opsctl-host meet it, with a real reader process on a played NVML."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from played_nvml import Played
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from opsctl.agent.drains import boot_clock
from opsctl.agent.gpu import exporter as exporter_module
from opsctl.agent.gpu import sample, series, told, web
from opsctl.agent.gpu.exporter import Exporter
from opsctl.agent.gpu.metrics import Known, entries, values
from opsctl.agent.gpu.nvml import Nvml
from opsctl.agent.gpu.page import render
from opsctl.agent.gpu.reader import View
from opsctl.agent.gpu.verdict import judge
from opsctl.agent.gpu.xids import Xids, words_of
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Settings
from opsctl.agent.supervisor import Voice

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


GUARD: dict[str, Any] = {
    "schema": "opsctl.guard/v1", "enforcing": True, "setter": "",
    "gpus": [{"uuid": f"GPU-{index}", "index": index, "model": "NVIDIA H200", "instance": "chat.0", "state": "ok",
              "memory_margin_c": 19.0, "slope_c_per_s": 0.75, "time_to_slowdown_s": 24.0, "clock_limit_mhz": limit,
              "power_limit_set_w": None if limit is None else 500.0} for index, limit in ((0, None), (1, 1590))],
    "instances": [{"instance": "chat.0", "service": "chat", "rung": 2, "weight": 30, "latched": True, "stopped": False,
                   "moves_total": {"down": 3, "up": 1}}]}


def known(*, xids: Xids | None = None, age_s: float = 0.0, guard: Any = GUARD, **answers: Any) -> Known:
    """Two GPUs, sampled twice, as the agent knows them."""
    nvml = Nvml(Played({"answers": answers}))
    gpus = sample.open_gpus(nvml)
    for gpu in gpus:
        sample.sample(nvml, gpu)
    now = boot_clock()
    view = View(wanted_since=now - 100, began=now - 100)
    view.hear({"kind": "sample", "at": now - age_s, "state": "ok", "words": "", "took_s": 0.01,
               **sample.host_facts(nvml), "gpus": [sample.sample(nvml, gpu) for gpu in gpus]}, now - age_s)
    expected = ["GPU-0", "GPU-1", "GPU-2"]
    return Known("gpu-1", "0.1.0+abcd", view, judge(view, now, True, expected), xids or Xids(), expected,
                 {"GPU-1": "chat.0"}, now, guard)


def text_of(found: Known, accept: str = "") -> str:
    status, _, body = render(list(values(found)), "", {"accept": accept})
    assert status == 200
    return body.decode()


def samples(found: Known) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    by_name: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse_text(text_of(found)):
        for one in family.samples:
            by_name.setdefault(one.name, {})[tuple(sorted(one.labels.items()))] = one.value
    return by_name


def one_value(found: Known, name: str, **labels: str) -> float:
    (value,) = [value for key, value in samples(found)[name].items() if labels.items() <= dict(key).items()]
    return value


def two_xids() -> Xids:
    xids = Xids()
    for at in (100.0, 100.5):
        xids.seen("event", "00000000:1A:00.0", 79, at)
        xids.seen("log", "00000000:1A:00.0", 79, at)
    return xids


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_the_names_are_exactly_those_of_the_table(accept: str, parse: Callable[[str], Any]) -> None:
    found = {one.name for family in parse(text_of(known(xids=two_xids()), accept)) for one in family.samples}
    assert found == series.names()


def test_the_labels_are_those_of_dcgm() -> None:
    labels = dict(next(iter(samples(known())["DCGM_FI_DEV_GPU_TEMP"])))
    assert labels == {"gpu": "0", "UUID": "GPU-0", "pci_bus_id": "00000000:1A:00.0", "device": "nvidia0",
                      "modelName": "NVIDIA H200", "Hostname": "gpu-1", "hostname": "gpu-1"}
    own = dict(next(iter(samples(known())["opsctl_gpu_lost"])))
    assert own == {name: value for name, value in labels.items() if name != "Hostname"}


def test_the_device_is_called_by_its_index_as_dcgm_does() -> None:
    """Its node in /dev has the minor number, which may be another."""
    found = known()
    assert found.view.sample is not None
    found.view.sample["gpus"][1]["minor"] = 5
    assert one_value(found, "DCGM_FI_DEV_GPU_TEMP", gpu="1", device="nvidia1") == 71
    assert one_value(found, "opsctl_gpu_info", gpu="1", minor="5") == 1


def test_the_last_error_is_said_in_words_as_dcgm_does() -> None:
    found, name = known(xids=two_xids()), "DCGM_FI_DEV_XID_ERRORS"
    assert one_value(found, name, gpu="0", err_code="79", err_msg="GPU has fallen off the bus") == 79
    assert one_value(found, name, gpu="1", err_code="0", err_msg="No Error") == 0
    assert words_of(9999) == "Unknown Error"


@pytest.mark.parametrize(("name", "labels", "value"), [
    ("DCGM_FI_DEV_GPU_TEMP", {}, 71), ("DCGM_FI_DEV_MEMORY_TEMP", {}, 76), ("DCGM_FI_DEV_POWER_USAGE", {}, 412),
    ("DCGM_FI_DEV_FB_USED", {}, 120_000), ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", {}, 123_456),
    ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", {}, 0.55), ("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", {}, 2),
    ("opsctl_gpu_power_limit_watts", {"limit": "enforced"}, 650),
    ("opsctl_gpu_clock_event_reason", {"reason": "sw_power_cap"}, 1),
    ("opsctl_gpu_clock_event_reason", {"reason": "hw_thermal_slowdown"}, 0),
    ("opsctl_gpu_thermal_offset_celsius", {"threshold": "slowdown"}, -2),
    ("opsctl_gpu_temperature_threshold_celsius", {"threshold": "max_operating"}, 87),
    ("opsctl_gpu_thermal_margin_source_info", {"source": "margin_api"}, 1),
    ("opsctl_gpu_slowdown_nanoseconds_total", {"reason": "sw_thermal_slowdown"}, 7),
    ("opsctl_gpu_info", {"driver_version": "580.126.09", "cuda_version": "13.0", "serial": "165000", "minor": "1"}, 1),
    ("opsctl_gpu_instance_info", {"service": "chat", "inference_instance": "chat.0"}, 1),
])
def test_a_value_of_gpu_1(name: str, labels: dict[str, str], value: float) -> None:
    assert one_value(known(), name, gpu="1", **labels) == pytest.approx(value)


@pytest.mark.parametrize(("name", "labels", "value"), [
    ("opsctl_guard_rung", {"service": "chat", "inference_instance": "chat.0", "hostname": "gpu-1"}, 2),
    ("opsctl_guard_weight_percent", {"inference_instance": "chat.0"}, 30), ("opsctl_guard_latched", {}, 1),
    ("opsctl_guard_stopped", {}, 0), ("opsctl_guard_moves_total", {"direction": "down"}, 3),
    ("opsctl_guard_moves_total", {"direction": "up"}, 1), ("opsctl_guard_enforcing", {}, 1),
    ("opsctl_guard_setter_up", {}, 1), ("opsctl_gpu_time_to_slowdown_seconds", {"gpu": "1"}, 24),
    ("opsctl_gpu_thermal_slope_celsius_per_second", {"gpu": "0"}, 0.75),
    ("opsctl_gpu_memory_margin_celsius", {"gpu": "0"}, 19), ("opsctl_guard_clock_limit_mhz", {}, 1590),
    ("opsctl_guard_power_limit_watts", {}, 500),
])
def test_what_the_guard_is_at(name: str, labels: dict[str, str], value: float) -> None:
    """The two limits are there only for the GPU of which they are set: GPU 0 is throttled by its driver, if at all."""
    assert one_value(known(), name, **labels) == value


def test_a_setter_that_is_away_and_a_guard_that_is_not_there() -> None:
    assert one_value(known(guard={**GUARD, "setter": "no connection"}), "opsctl_guard_setter_up") == 0
    assert not [name for name in samples(known(guard=None)) if "guard" in name]


def test_what_the_guard_set_is_told_also_while_nobody_sees_the_gpu() -> None:
    blind = samples(known(age_s=20))
    (labels,) = blind["opsctl_guard_clock_limit_mhz"]
    assert dict(labels)["pci_bus_id"] == "00000000:1B:00.0"
    assert "opsctl_gpu_memory_margin_celsius" not in blind
    assert "DCGM_FI_DEV_GPU_TEMP" not in blind


@pytest.mark.parametrize("margin", [16, 0, -3])
def test_a_margin_that_is_used_up_is_exported(margin: int) -> None:
    found = known(nvmlDeviceGetMarginTemperature=margin)
    assert one_value(found, "opsctl_gpu_thermal_margin_celsius", gpu="0") == margin


def test_what_a_gpu_does_not_have_is_not_exported() -> None:
    found = samples(known(nvmlDeviceGetUtilizationRates=None, nvmlDeviceGetMarginTemperature=None, gpm=None,
                          nvmlDeviceGetTemperatureThreshold=None))
    assert not {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_PROF_SM_ACTIVE", "opsctl_gpu_thermal_margin_celsius",
                "opsctl_gpu_temperature_threshold_celsius"} & set(found)
    assert "opsctl_gpu_xid_total" not in found  # and an error that never was
    assert "opsctl_gpu_instance_info" in found
    assert len(found["opsctl_gpu_instance_info"]) == 1


def test_an_error_that_came_twice_counts_twice() -> None:
    found = known(xids=two_xids())
    assert one_value(found, "opsctl_gpu_xid_total", gpu="0", xid="79", action="RESTART_BM", severity="critical") == 2
    assert one_value(found, "opsctl_gpu_xid_last_timestamp_seconds", gpu="0", xid="79") == 100.5
    assert one_value(found, "DCGM_FI_DEV_XID_ERRORS", gpu="0") == 79
    assert one_value(found, "DCGM_FI_DEV_XID_ERRORS", gpu="1") == 0


def test_old_samples_are_not_exported_but_errors_and_their_age_are() -> None:
    found = known(xids=two_xids(), age_s=20)
    there = samples(found)
    assert "DCGM_FI_DEV_GPU_TEMP" not in there
    assert "opsctl_gpus" not in there
    assert one_value(found, "opsctl_gpu_xid_total", UUID="GPU-0") == 2
    assert one_value(found, "opsctl_gpu_sample_age_seconds") == pytest.approx(20, abs=2)
    assert one_value(found, "opsctl_gpus_expected") == 3


def test_a_lost_gpu_is_told_by_name() -> None:
    found = known()
    assert found.view.sample is not None
    lost = {key: found.view.sample["gpus"][1][key] for key in ("index", "uuid", "pci", "minor", "name")}
    found.view.sample["gpus"][1] = {**lost, "state": "lost", "words": "fell off the bus"}
    assert one_value(found, "opsctl_gpu_lost", UUID="GPU-1") == 1
    assert one_value(found, "opsctl_gpu_lost", UUID="GPU-0") == 0
    assert one_value(found, "opsctl_gpus") == 1
    assert len(samples(found)["DCGM_FI_DEV_GPU_TEMP"]) == 1
    assert one_value(found, "opsctl_gpus_missing") == 2  # GPU-2, which was never there, and this one


def test_a_gpu_that_answers_with_errors_alone_does_not_count_as_seen() -> None:
    found = known()
    assert found.view.sample is not None
    found.view.sample["gpus"][1] |= {"state": "unreadable", "words": "nvmlDeviceGetPowerUsage: Unknown Error"}
    assert one_value(found, "opsctl_gpu_lost", UUID="GPU-1") == 1
    assert one_value(found, "opsctl_gpus") == 1
    assert one_value(found, "opsctl_gpus_missing") == 2


def test_a_gpu_that_nobody_expects_stands_for_none_that_is_gone() -> None:
    found = known()
    assert found.view.sample is not None
    found.view.sample["gpus"][0]["uuid"] = "GPU-9"
    assert one_value(found, "opsctl_gpus") == 2
    assert one_value(found, "opsctl_gpus_missing") == 2  # GPU-0 and GPU-2
    found.view.sample["gpus"][0]["mig"] = [{"id": 1, "profile": "x", "uuid": "GPU-0"}, {"id": 2, "profile": "x",
                                                                                       "uuid": "GPU-2"}]
    assert one_value(found, "opsctl_gpus_missing") == 0


@pytest.mark.parametrize("state", ["no_driver", "mismatch", "no_library", "failed"])
def test_how_many_gpus_there_are_is_not_said_where_nvml_cannot_be_asked(state: str) -> None:
    now = boot_clock()
    view = View(wanted_since=now - 100, began=now - 100)
    view.hear({"kind": "sample", "at": now, "state": state, "words": "", "gpus": []}, now)
    there = samples(Known("gpu-1", "0.1", view, judge(view, now, True, ["GPU-0"]), Xids(), ["GPU-0"], {}, now))
    assert not {"opsctl_gpus", "opsctl_gpus_missing"} & set(there)
    assert "opsctl_gpus_expected" in there


def test_the_parts_of_a_gpu_that_is_cut() -> None:
    found = known()
    assert found.view.sample is not None
    found.view.sample["gpus"][0]["mig"] = [{"id": 3, "profile": "1g.18gb", "uuid": "MIG-1", "memory_used_mib": 5.0}]
    assert one_value(found, "DCGM_FI_DEV_FB_USED", GPU_I_PROFILE="1g.18gb", GPU_I_ID="3", gpu="0") == 5
    assert sum(samples(found)["DCGM_FI_DEV_FB_USED"].values()) == 120_005  # the whole counts no second time
    assert len(samples(found)["DCGM_FI_DEV_FB_FREE"]) == 1


def test_every_row_of_the_table_can_be_filled() -> None:
    gpu = {**json.loads((Path(__file__).parent / "fixtures/gpu/h200.json").read_text())}
    dcgm = {one.name for one in series.DCGM if entries(one, gpu)}
    assert {one.name for one in series.DCGM} - dcgm == {"DCGM_FI_DEV_XID_ERRORS"}  # that one is not NVML's


# The whole thing, with a reader process


@dataclass
class Running:
    """An exporter in a loop; ``orders`` rules the NVML of its reader, ``skip`` moves the clock."""

    exporter: Exporter
    paths: Paths
    port: int
    orders_file: Path
    said: list[str] = field(default_factory=list)
    skipped_s: float = 0.0
    rounds: int = 0  # of the exporter's loop

    def order(self, **orders: Any) -> None:
        beside = self.orders_file.with_suffix(".new")
        beside.write_text(json.dumps(orders))
        beside.rename(self.orders_file)

    async def get(self, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
        head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        writer.close()
        first, *lines = head.decode().split("\r\n")
        return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body

    async def until(self, true: Callable[[], bool], what: str) -> None:
        for _ in range(500):
            if true():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"{what}: {self.exporter.verdict()}, {self.said}")

    async def turns(self, count: int) -> None:
        goal = self.rounds + count
        await self.until(lambda: self.rounds >= goal, "its loop turns")

    async def state(self, wanted: str) -> None:
        await self.until(lambda: self.exporter.verdict().state == wanted, wanted)


@asynccontextmanager
async def running(root: Path, gpus: tuple[str, ...] = ("GPU-0", "GPU-1"), command: tuple[str, ...] = ()
                  ) -> AsyncIterator[Running]:
    """``command``: another reader than the played one."""
    paths = Paths(root)
    paths.gpus.parent.mkdir(parents=True, exist_ok=True)
    orders = root / "orders.json"
    settings = Settings("gpu-1", "127.0.0.1", 0, "http://x", 1, gpus)
    said: list[str] = []
    one = Running(None, paths, 0, orders, said)  # type: ignore[arg-type]
    one.exporter = Exporter(paths, settings, "0.1.0", said.append, lambda: boot_clock() + one.skipped_s)
    look = one.exporter.look

    def counted() -> None:
        one.rounds += 1
        look()

    one.exporter.look = counted  # type: ignore[method-assign]
    reader = one.exporter.reader
    reader._command = command or (sys.executable, str(Path(__file__).with_name("played_nvml.py")), str(orders),
                                  str(paths.gpu_reader_lock))
    one.order()
    server = await web.Web(one.exporter.answer).serve("127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    tending = asyncio.create_task(one.exporter.tend())
    try:
        yield one
    finally:
        one.order()  # nothing hangs any more
        tending.cancel()
        with suppress(asyncio.CancelledError):
            await tending
        server.close()
        if reader._process is not None:
            reader._process.wait(10)


def play(tmp_path: Path, work: Callable[[Running], Awaitable[None]], **more: Any) -> None:
    async def whole() -> None:
        async with running(tmp_path, **more) as one:
            await asyncio.wait_for(work(one), 60)
    asyncio.run(whole())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "TICK_S", 0.02)


def test_a_scrape(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        assert (await one.get("/health"))[0] == 503  # no sample yet
        await one.state("ok")
        assert (await one.get("/health"))[::2] == (200, b"ok\n")
        status, headers, body = await one.get("/metrics", f"Accept: {OPENMETRICS}", "Accept-Encoding: gzip")
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        text = gzip.decompress(body).decode()
        assert text.endswith("# EOF\n")
        assert 'opsctl_gpus{hostname="gpu-1"} 2\n' in text
        plain = await one.get("/metrics")
        assert plain[1]["Content-Type"].startswith("text/plain")
        assert "DCGM_FI_DEV_GPU_TEMP" in plain[2].decode()
        assert (await one.get("/favicon.ico"))[0] == 404
    play(tmp_path, work)


def test_a_call_that_hangs_is_told_within_the_bound_and_nobody_is_killed(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        voice = Voice(one.paths)
        server = await voice.serve("127.0.0.1", 0)
        await one.state("ok")
        pid = one.exporter.reader.view.pid
        one.order(hang="nvmlDeviceGetPowerUsage")
        await one.until(lambda: one.exporter.reader.view.call is not None, "the call is told")
        assert (await one.get("/health"))[0] == 200  # it may be slow
        one.skipped_s = 16.0
        for path in ("/readyz", "/health"):
            status, _, body = await one.get(path)
            assert (status, body[:33]) == (503, b"hung: nvmlDeviceGetPowerUsage of ")
        assert (await one.get("/healthz"))[::2] == (200, b"alive\n")  # nobody restarts it for what the driver does
        text = (await one.get("/metrics"))[2].decode()
        assert "DCGM_FI_DEV_GPU_TEMP" not in text
        (age,) = [line for line in text.splitlines() if line.startswith("opsctl_gpu_nvml_call_age_seconds{")]
        assert float(age.split()[1]) > 15
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"chat.0\n")
        assert await asyncio.wait_for(reader.readline(), 1) == b"down #unknown instance\n"
        writer.close()
        await one.until(lambda: one.exporter.reader.view.told_to_end is not None, "it is told to end")
        one.skipped_s = 3600.0  # long after: one reader, alive, and no other
        await one.turns(5)
        assert one.exporter.reader.view.pid == pid
        os.kill(pid, 0)
        assert (await one.get("/health"))[0] == 503
        one.order()  # the driver comes back: the old one ends by itself, a new one reads
        await one.until(lambda: one.exporter.reader.view.pid != pid, "a new reader")
        one.skipped_s = 0.0
        await one.state("ok")
        assert one.exporter.reader.view.restarts == 1
        server.close()
    play(tmp_path, work)


def test_a_reader_that_is_killed_is_started_again_and_that_is_said(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        await one.state("ok")
        view = one.exporter.reader.view
        pid = view.pid
        os.kill(pid, signal.SIGKILL)
        await one.until(lambda: view.pid != pid and view.samples > 1 and view.began is not None, "another reader")
        assert any(f"the GPU reader (process {pid}) ended by signal 9" in words for words in one.said)
        await one.state("ok")
        assert b'opsctl_gpu_reader_restarts_total{hostname="gpu-1"} 1\n' in (await one.get("/metrics"))[2]
    play(tmp_path, work)


def test_errors_of_gpus_come_by_event_and_by_log(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        await one.state("ok")
        one.order(xids=[[1, 79], [1, 79]])
        words = "XID 79 of GPU 1 (GPU-1), told by the driver"
        await one.until(lambda: sum(words in line for line in one.said) == 2, "two errors")
        assert b'xid="79",action="RESTART_BM",severity="critical"} 2\n' in (await one.get("/metrics"))[2]
    play(tmp_path, work)


def test_a_wall_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages, readiness and the reader go by the boot clock; an error's time follows the wall clock as it goes now."""
    async def work(one: Running) -> None:
        await one.state("ok")
        one.order(xids=[[1, 79]])
        await one.until(lambda: bool(one.said), "an error")
        right = time.time()
        monkeypatch.setattr(time, "time", lambda: right - 3600.0)
        samples_before = one.exporter.reader.view.samples
        await one.until(lambda: one.exporter.reader.view.samples > samples_before + 2, "more samples")
        one.exporter._seen("log", "00000000:1B:00.0", 79, boot_clock())  # the same error, told by the kernel's log
        text = (await one.get("/metrics"))[2].decode()
        found = {family.name: family.samples for family in parse_text(text)}
        assert [one.value for one in found["opsctl_gpu_xid"]] == [1]
        (last,) = found["opsctl_gpu_xid_last_timestamp_seconds"]
        assert right - 3660 < last.value < right - 3590
        assert found["opsctl_gpu_sample_age_seconds"][0].value < 5
        assert (await one.get("/readyz"))[0] == 200
        await one.until(lambda: '"xid": 79' in one.paths.gpus.read_text(), "the file")
        told_age = told.read(one.paths.gpus, ["GPU-0"], boot_clock())
        assert told_age is not None
        assert told_age["age_s"] < 5
    play(tmp_path, work)


@pytest.mark.parametrize(("orders", "state", "status"), [
    ({"init": 9}, "no_driver", 503), ({"init": 18}, "mismatch", 503), ({"lost": [1]}, "lost", 200),
    ({"gpus": 1}, "missing", 200)])
def test_what_is_wrong_is_a_state_and_no_crash(tmp_path: Path, orders: dict[str, Any], state: str, status: int) -> None:
    async def work(one: Running) -> None:
        await one.state("ok")
        one.order(**orders)
        if state != "lost":  # those show when it begins anew
            os.kill(one.exporter.reader.view.pid, signal.SIGTERM)
        await one.state(state)
        found = await one.get("/health")
        assert (found[0], found[2].split(b":")[0].decode()) == (status, state)
        assert f'state="{state}"' in (await one.get("/metrics"))[2].decode()
        await one.until(lambda: json.loads(one.paths.gpus.read_text())["state"] == state, "the file")
        assert one.exporter.reader.view.failures == 0
    play(tmp_path, work)


def test_a_host_without_gpus_has_no_reader(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        await one.turns(5)
        assert one.exporter.reader.view.pid == 0
        assert (await one.get("/health"))[::2] == (200, b"none: this host has no GPUs\n")
        text = (await one.get("/metrics"))[2].decode()
        assert 'opsctl_agent_info{hostname="gpu-1",version="0.1.0"} 1\n' in text
        assert "sample_age" not in text
        assert not one.paths.gpus.exists()
    play(tmp_path, work, gpus=())


def test_what_opsctl_host_tells(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        await one.state("ok")
        await one.until(lambda: one.paths.gpus.exists() and '"GPU-1"' in one.paths.gpus.read_text(), "the file")
        found = told.read(one.paths.gpus, ["GPU-0"], boot_clock())
        assert found is not None
        assert (found["state"], found["expected"], found["driver"]) == ("ok", 2, "580.126.09")
        assert found["age_s"] < 5
        first = found["devices"][0]
        assert {key: first[key] for key in ("temperature_c", "margin_c", "power_w", "power_limit_w", "reasons")} == {
            "temperature_c": 71, "margin_c": 16, "power_w": 412.0, "power_limit_w": 650.0, "reasons": ["power cap"]}
        old = told.read(one.paths.gpus, ["GPU-0"], boot_clock() + 60)
        assert old is not None
        assert (old["state"], "said nothing for 60 s" in old["words"]) == ("stale", True)
        assert one.paths.gpus.stat().st_mode & 0o777 == 0o644
    play(tmp_path, work)
    assert told.read(Paths(tmp_path).gpus, [], 0.0) is None  # the agent took it away at its end
    gone = told.read(Paths(tmp_path).gpus, ["GPU-0"], 0.0)
    assert gone is not None
    assert gone["state"] == "no_agent"


def test_a_host_that_has_gpus_no_more_is_not_stale_for_good(tmp_path: Path) -> None:
    async def work(one: Running) -> None:
        await one.state("ok")
        await one.until(one.paths.gpus.exists, "the file")
        one.exporter._expected, one.exporter._settings = (), replace(one.exporter._settings, gpus=())
        await one.until(lambda: json.loads(one.paths.gpus.read_text())["state"] == "none", "its last word")
        assert told.read(one.paths.gpus, [], boot_clock()) is None
        assert told.read(one.paths.gpus, [], boot_clock() + 3600) is None
        again = told.read(one.paths.gpus, ["GPU-0"], boot_clock() + 3600)  # it has one again, and nobody looks
        assert again is not None
        assert again["state"] == "stale"
    play(tmp_path, work)


def test_who_computes_on_a_gpu(tmp_path: Path) -> None:
    for pid, cgroup in ((1, "0::/system.slice/system-inference.slice/inference@chat.0.service\n"),
                        (2, "0::/system.slice/system-inference.slice/inference@chat.0.service/child\n"),
                        (3, "0::/user.slice/session-1.scope\n")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(cgroup)
        (tmp_path / str(pid) / "comm").write_text("python3\n")
    assert told.users([1, 2, 3, 4], tmp_path) == ["chat.0", "python3"]


def test_a_page_that_cannot_be_made_stops_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter_module, "values", lambda _: 1 / 0)

    async def work(one: Running) -> None:
        await one.state("ok")
        for _ in range(2):
            assert (await one.get("/metrics"))[0] == 500
        assert sum("no metrics: ZeroDivisionError" in words for words in one.said) == 1
        assert (await one.get("/readyz"))[0] == 200
    play(tmp_path, work)


def test_a_reader_without_nvidia_ml_py_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pynvml'] = None; from opsctl.agent.gpu import child; sys.exit(child.main())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")], capture_output=True, check=True)
    line = json.loads(done.stdout)
    assert line["state"] == "no_library"
    assert "nvidia-ml-py cannot be loaded" in line["words"]


def test_whoever_is_slow_or_many_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CONNECTIONS", 2)
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.5)

    async def work(one: Running) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", one.port) for _ in range(2)]
        assert (await one.get("/health"))[0] == 503
        for reader, writer in idle:
            assert await asyncio.wait_for(reader.read(), 5) == b""  # given up, without a word
            writer.close()
        assert b"no GPUs" in (await one.get("/health"))[2]
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000)
        assert b" 400 " in await asyncio.wait_for(reader.read(), 5)
        writer.close()
    play(tmp_path, work, gpus=())


@pytest.mark.parametrize(("text", "expected"), [
    (b"GET /metrics?name[]=a HTTP/1.1\r\nAccept:  text/plain\r\n", web.Request("/metrics", "name[]=a", {
        "accept": "text/plain"})),
    (b"POST /metrics HTTP/1.1\r\n", 405), (b"nonsense\r\n", 400), (b"GET / SMTP\r\n", 400)])
def test_a_request(text: bytes, expected: web.Request | int) -> None:
    assert web.parse(text.removesuffix(b"\r\n")) == expected
