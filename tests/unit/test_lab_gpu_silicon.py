"""The silicon's parts without machines: from CPU time to heat to less CPU time, faults, and the files of a machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from opsctl.errors import UsageError
from opsctl.lab import cgroups, fleet_files
from opsctl.lab.gpu import board as board_module
from opsctl.lab.gpu import faults, load, state_file, throttle, trees
from opsctl.lab.gpu.board import Board
from opsctl.lab.gpu.faults import Faults, Xid
from opsctl.lab.gpu.load import FULL_LOAD_CPUS, Use
from opsctl.lab.gpu.profiles import Gpus, named
from opsctl.lab.gpu.state_file import StateFile
from opsctl.lab.gpu.units import Instance, Worker
from opsctl.lab.state import Lab, Machine, decode, encode

TICK_S = 0.1
UUIDS = ("GPU-aa11", "GPU-ab22", "GPU-cc33")


@pytest.mark.parametrize(("setting", "wanted"), [
    (None, (0, 1, 2)), ("", ()), ("1", (1,)), ("2,0", (2, 0)), ("GPU-cc33,GPU-aa11", (2, 0)), ("GPU-ab", (1,)),
    ("GPU-a", ()), ("0,-1,2", (0,)), ("0,7,1", (0,)), ("1,1", (1,)), ("NoDevFiles", ()),
])
def test_the_gpus_that_a_process_sees(setting: str | None, wanted: tuple[int, ...]) -> None:
    assert load.visible_gpus(setting, UUIDS) == wanted


def test_an_instance_is_held_to_the_share_of_what_it_did_unhindered() -> None:
    use = Use()
    for _ in range(100):
        use = load.observe(use, 0.8 * TICK_S, TICK_S, share=1.0)
    assert load.cpu_limit(use, 1.0) is None
    assert load.cpu_limit(use, 0.5) == pytest.approx(0.4, rel=0.01)
    for _ in range(100):
        use = load.observe(use, 0.4 * TICK_S, TICK_S, share=0.5)
    assert load.cpu_limit(use, 0.5) == pytest.approx(0.4, rel=0.01)
    assert load.load_of(use, 0.5) == 1.0
    assert load.cpu_limit(Use(), 0.5) == 0.5 * FULL_LOAD_CPUS


@pytest.mark.parametrize(("limit", "quota"), [(None, -1), (0.5, 10_000), (0.001, 1_000), (2.0, 40_000)])
def test_quota(limit: float | None, quota: int) -> None:
    assert throttle.quota_us(limit) == quota


def test_the_throttle_of_cgroup_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "opsctl-lab-lab/gpu-1/chat.0"
    monkeypatch.setattr(cgroups, "cpu_group", lambda *_: group)
    held = throttle.Throttle("lab", "gpu-1", "chat.0", tmp_path / "unit")
    held.hold([17], 0.25)
    assert [(group / name).read_text() for name in ("cpu.cfs_period_us", "cpu.cfs_quota_us", "cgroup.procs")] == [
        "20000", "5000", "17"]
    held.hold([17], None)
    assert (group / "cpu.cfs_quota_us").read_text() == "-1"


def test_the_throttle_of_cgroup_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = tmp_path / "inference@chat.0.service"
    unit.mkdir()
    monkeypatch.setattr(cgroups, "cpu_group", lambda *_: None)
    monkeypatch.setattr(cgroups, "enable_cpu", lambda _: None)
    held = throttle.Throttle("lab", "gpu-1", "chat.0", unit)
    held.hold([17], 0.25)
    assert (unit / "cpu.max").read_text() == "5000 20000"
    held.hold([17], None)
    assert (unit / "cpu.max").read_text() == "max 20000"


class Engine:
    """A process that computes as fast as it may: ``wish`` CPU seconds a second, or what the silicon leaves it."""

    def __init__(self, board: Board, instance: Instance, wish: float) -> None:
        self.board, self.instance, self.wish, self.cpu_ns = board, instance, wish, 0
        board.found((instance,))

    def run(self, seconds: float, broken: Faults) -> list[tuple[int, int]]:
        happened = []
        for _ in range(round(seconds / TICK_S)):
            limit = self.board.limits.get(self.instance.name)
            self.cpu_ns += round((self.wish if limit is None else min(self.wish, limit)) * TICK_S * 1e9)
            happened += self.board.tick(broken, TICK_S)
        return happened


Start = Callable[..., Engine]


@pytest.fixture
def state_path(tmp_path: Path) -> Path:
    path = tmp_path / "lab-state"
    state_file.create(path, UUIDS[:2], named("H200"))
    return path


@pytest.fixture
def start(state_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    def begin(gpus: tuple[int, ...] = (0,), wish: float = 0.8, broken: Faults | None = None) -> Engine:
        board = Board(named("H200"), StateFile(state_path), broken or Faults())
        engine = Engine(board, Instance("chat.0", Path("/"), (Worker(17, 4, gpus),)), wish)
        monkeypatch.setattr(board_module, "cpu_time_ns", lambda _: engine.cpu_ns)
        return engine

    monkeypatch.setattr(board_module, "memory_bytes", lambda _: 800)
    yield begin


def test_load_heats_only_the_gpus_of_the_instance(start: Start) -> None:
    engine = start(gpus=(1,))
    engine.run(120, Faults())
    idle, busy = (gpu.now for gpu in engine.board.state.machine.gpus[:2])
    assert (idle.temperature_c, idle.reasons, idle.process_count) == (30, 1, 0)
    assert (busy.temperature_c, busy.utilization_percent, busy.power_mw, busy.margin_c) == (77, 100, 700_000, 10)
    assert (busy.process_count, busy.processes[0].pid, busy.processes[0].memory_bytes) == (1, 4, 800)
    assert engine.board.limits["chat.0"] is None


def test_what_heat_takes_from_the_clock_it_takes_from_the_engine(start: Start) -> None:
    engine = start()
    engine.run(60, Faults())
    engine.run(120, Faults(cooling={0: 2.0}))
    now, before = engine.board.state.machine.gpus[0].now, engine.cpu_ns
    share = now.clock_sm_mhz / 1980
    assert now.reasons & 0x20
    assert share == pytest.approx(0.52, abs=0.05)
    engine.run(10, Faults(cooling={0: 2.0}))
    assert (engine.cpu_ns - before) / 10e9 == pytest.approx(0.8 * share, abs=0.03)
    engine.run(60, Faults())
    assert engine.board.limits["chat.0"] is None


def test_gpus_that_serve_together_wait_for_the_slowest(start: Start) -> None:
    engine = start(gpus=(0, 1))
    engine.run(20, Faults())
    engine.board.state.machine.gpus[1].settings.locked_max_mhz = 990
    engine.run(20, Faults())
    first, second = (gpu.now for gpu in engine.board.state.machine.gpus[:2])
    assert engine.board.limits["chat.0"] == pytest.approx(0.4, abs=0.01)
    assert (second.clock_sm_mhz, second.utilization_percent) == (990, 100)
    assert first.utilization_percent == pytest.approx(80, abs=2)
    assert first.nvlink_tx_kib > 0


def test_an_xid_happens_once_and_again_when_asked_again(start: Start) -> None:
    old = faults.happen(Faults(), (0,), 31)
    engine = start(broken=old)
    assert engine.run(1, old) == []
    asked = faults.happen(faults.happen(old, (0,), 79), (1,), 79)
    assert engine.run(1, asked) == [(0, 79), (1, 79)]
    assert engine.run(1, faults.happen(asked, (0,), 79)) == [(0, 79)]
    assert engine.run(1, faults.clear(asked)) == []
    machine = engine.board.state.machine
    assert [(event.gpu, event.xid) for event in machine.events[:machine.event_count]] == [(0, 79), (1, 79), (0, 79)]


def test_no_cooling_at_all_ends_in_a_lost_gpu_and_its_xid(start: Start) -> None:
    engine = start()
    engine.run(60, Faults())
    dead = Faults(cooling={0: 20.0})
    assert engine.run(30, dead) == [(0, 79)]
    gpu = engine.board.state.machine.gpus[0]
    assert (gpu.lost, gpu.recovery_action) == (1, 2)
    assert engine.board.limits["chat.0"] == pytest.approx(0.01 * 0.8, abs=0.005)
    engine.board.mend()
    engine.run(1, Faults())
    assert gpu.lost == 0


def test_the_driver_hangs_when_all_its_gpus_do(start: Start) -> None:
    engine = start()
    machine = engine.board.state.machine
    engine.run(0.1, faults.hang(Faults(), (0,), 60, NOW_NS))
    assert [machine.gpus[0].hang_until_ns, machine.hang_until_ns] == [NOW_NS + 60 * 10**9, 0]
    engine.run(0.1, faults.hang(Faults(), (0, 1), 60, NOW_NS))
    assert machine.hang_until_ns == NOW_NS + 60 * 10**9
    engine.run(0.1, Faults())
    assert [machine.gpus[0].hang_until_ns, machine.hang_until_ns] == [0, 0]


def test_another_silicon_goes_on_where_one_ended(start: Start) -> None:
    first = start()
    first.run(120, Faults())
    was = first.board.state.machine.gpus[0].now
    temperature, energy = was.temperature_c, was.energy_mj
    first.board.state.machine.gpus[0].sequence += 1  # it died in a tick
    second = start()
    second.run(0.5, Faults())
    gpu = second.board.state.machine.gpus[0]
    assert gpu.sequence % 2 == 0
    assert gpu.now.temperature_c >= temperature - 3
    assert gpu.now.energy_mj > energy


def test_a_boot_unlocks_and_unloads(start: Start) -> None:
    engine = start()
    machine = engine.board.state.machine
    machine.module_version = b"580.126.09"
    machine.gpus[0].settings.locked_max_mhz = 990
    engine.run(5, Faults())
    engine.board.boot()
    assert (machine.module_version, machine.gpus[0].settings.locked_max_mhz, machine.boots) == (b"", 0, 1)
    engine.run(0.1, Faults())
    assert machine.gpus[0].now.energy_mj < 100_000


NOW_NS = 10**12


@pytest.mark.parametrize(("change", "said"), [
    (lambda f: faults.cool(f, (3,), 2.0), ("cooling x2 on GPU 3",)),
    (lambda f: faults.cool(faults.cool(f, (3,), 2.0), (3,), 1.0), ()),
    (lambda f: faults.hang(f, (0,), 60, NOW_NS), ("NVML of GPU 0 hangs for 60 s more",)),
    (lambda f: faults.hang(f, (0,), 60, NOW_NS - 61 * 10**9), ()),
    (lambda f: faults.lose(f, (1,)), ("GPU 1 lost",)),
    (lambda f: faults.happen(f, (0,), 48), ("XID 48 on GPU 0",)),
    (lambda f: faults.clear(faults.lose(faults.cool(f, (0,), 2), (1,))), ()),
])
def test_what_is_broken_in_words(change: Callable[[Faults], Faults], said: tuple[str, ...], tmp_path: Path) -> None:
    broken = change(Faults())
    assert faults.words(broken, NOW_NS) == said
    faults.save(tmp_path / "faults.json", broken)
    assert faults.load(tmp_path / "faults.json") == broken


def test_losing_a_gpu_twice_is_one_xid() -> None:
    once = faults.lose(Faults(), (1,))
    assert once.xids == (Xid(1, 1, 79),)
    assert faults.lose(once, (1,)) == once


@pytest.mark.parametrize(("wrong", "code"), [
    (lambda: faults.chosen(8, 8, "gpu-1"), "lab.no_such_gpu_index"),
    (lambda: faults.chosen(None, 0, "ops-1"), "lab.no_gpus"),
    (lambda: faults.cool(Faults(), (0,), 0), "lab.cooling_factor"),
    (lambda: faults.hang(Faults(), (0,), 7200, 0), "lab.hang_time"),
    (lambda: faults.happen(Faults(), (0,), 0), "lab.xid"),
])
def test_faults_that_make_no_sense(wrong: Callable[[], object], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        wrong()
    assert caught.value.code == code


@pytest.mark.parametrize(("words", "code"), [
    (["gpu-1", "melt"], "lab.no_such_fault"), (["gpu-1", "xid"], "lab.fault_value"),
    (["gpu-1", "lost", "3"], "lab.fault_value"), (["gpu-1", "nvml-hang", "soon"], "lab.hang_time"),
    (["gpu-1", "lost", "--factor", "2"], "lab.fault_value"),
])
def test_what_the_command_line_refuses(words: list[str], code: str) -> None:
    said = subprocess.run([sys.executable, "-m", "opsctl", "lab", "fault", *words], capture_output=True, text=True,
                          check=False)
    assert (said.returncode, code in said.stderr) == (2, True)


def test_the_kernel_line() -> None:
    assert faults.kernel_line(0x1A, 79) == (
        "NVRM: Xid (PCI:0000:1a:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.")


def test_the_files_of_a_machine(tmp_path: Path) -> None:
    trees.write(tmp_path, Gpus("H200", 8))
    devices = sorted((trees.shared(tmp_path) / "pci").iterdir())
    found = [(device.name, (device / "class").read_text().strip(), (device / "device").read_text().strip())
             for device in devices]
    assert found[:5] == [(f"0000:0{bus}:00.0", "0x068000", "0x22a3") for bus in "789a"] + [
        ("0000:1a:00.0", "0x030200", "0x2335")]
    assert len(found) == 12
    config = (devices[4] / "config").read_bytes()
    assert (config[:4].hex(), config[9:12].hex(), config[0x2C:0x30].hex()) == ("de103523", "000203", "de10be18")
    trees.show_module(tmp_path, "580.126.09", "open", named("H200"), UUIDS)
    driver = trees.state_path(tmp_path).parent
    assert (driver / "version").read_text().startswith(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.126.09  Release Build ")
    assert "GPU UUID: \t GPU-aa11" in (driver / "gpus/0000:1a:00.0/information").read_text()
    trees.hide_module(tmp_path)
    assert list(driver.iterdir()) == []


def test_graphics_cards_are_vga_controllers_and_have_no_switches() -> None:
    assert [device.class_code for device in trees.pci_devices(Gpus("RTX 4090", 2))] == [0x030000] * 2
    assert [device.class_code for device in trees.pci_devices(Gpus("L40S", 1))] == [0x030200]


def a_lab(*gpus: Gpus | None) -> Lab:
    machines = tuple(Machine(f"gpu-{index}", f"10.91.0.{10 + index}", ("gpu",), gpus=has)
                     for index, has in enumerate(gpus, 1))
    return Lab("lab", 1, "bookworm", IPv4Network("10.91.0.0/24"), Path("/fleet"),
               machines=(Machine("ops-1", "10.91.0.10", ("lb",)), *machines))


@pytest.mark.parametrize(("gpus", "count"), [
    ((None, None), 0), ((Gpus("H200", 8), Gpus("H200", 8)), 8), ((Gpus("H200", 8), Gpus("L40S", 4)), 4),
    ((Gpus("H200", 8), None), 0),
])
def test_an_instance_has_all_gpus_of_its_host(gpus: tuple[Gpus | None, ...], count: int) -> None:
    text = fleet_files.services(a_lab(*gpus))
    assert f"gpus_per_instance: {count}\n" in text
    assert (f"tensor_parallel: {count}\n" in text) == (count > 0)


def test_inventory_and_state_know_the_gpus() -> None:
    lab = a_lab(Gpus("RTX 4090", 2), None)
    text = fleet_files.inventory(lab)
    uuids = state_file.gpu_uuids("lab", "gpu-1", Gpus("RTX 4090", 2))
    assert "gpu_model=\"RTX 4090\"\n" in text
    assert "gpu_uuids" not in text  # nobody knows them before the driver tells them
    assert len(set(uuids)) == 2
    assert decode(encode(lab)) == replace(lab)


def test_a_lab_of_an_older_opsctl_is_read() -> None:
    document = encode(a_lab(None))
    for machine in document["machines"]:
        del machine["gpus"]
    assert decode(document).machines[1].gpus is None
