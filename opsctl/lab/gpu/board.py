"""The GPUs of one machine, stepped: from what its instances compute and what is broken, to what NVML says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from opsctl.lab.gpu import faults, layout, plant
from opsctl.lab.gpu.faults import Faults
from opsctl.lab.gpu.load import MEMORY_LOAD, Use, cpu_limit, load_of, observe
from opsctl.lab.gpu.profiles import Profile
from opsctl.lab.gpu.state_file import StateFile
from opsctl.lab.gpu.units import Instance, cpu_time_ns, memory_bytes

XID_OFF_THE_BUS = 79
RECOVERY_NONE, RECOVERY_REBOOT = 0, 2  # NVML_GPU_RECOVERY_ACTION_NONE, _NODE_REBOOT
NVLINK_KIB_S = 20 * 1024 * 1024  # of a fully busy GPU that shares its model with others; made up
PCIE_TX_BYTES_S, PCIE_RX_BYTES_S = 200_000_000, 800_000_000  # likewise
LOST_SHARE = 0.01  # an engine whose GPU is gone stands as good as still
KERNEL_MIB = 3  # what the driver itself takes of a GPU's memory


class Board:
    """State between ticks; ``tick`` does everything. What it reads of processes is all it does besides its file."""

    def __init__(self, profile: Profile, state: StateFile, broken: Faults) -> None:
        """Goes on where an earlier silicon ended: temperatures and counters are in the file."""
        self.profile = profile
        self.state = state
        count = state.machine.gpu_count
        self.plants = [_last(profile, gpu, index in broken.lost)
                       for index, gpu in enumerate(state.machine.gpus[:count])]
        self.instances: tuple[Instance, ...] = ()
        self.uses: dict[str, Use] = {}
        self.limits: dict[str, float | None] = {}
        self._cpu_ns: dict[int, int] = {}
        self._memory: dict[int, int] = {}
        self._xids_told = broken.xid_count  # those of before have happened already
        self._links = [0.0] * count  # seconds of full use, of each GPU's links

    def boot(self) -> None:
        """A GPU that the heat had shut down starts again; counters begin anew, as with a driver's load."""
        self.plants = [plant.State(state.core_c, state.memory_c, state.power_w, state.power_mean_w)
                       for state in self.plants]
        self._links = [0.0] * len(self.plants)
        self.state.boot()

    def mend(self) -> None:
        """GPUs that the heat had shut down are back: someone cleared the faults."""
        self.plants = [replace(state, shut_down=False) for state in self.plants]

    def found(self, instances: tuple[Instance, ...]) -> None:
        """Which instances run now; looked for less often than they are measured."""
        self.instances = instances
        self.uses = {instance.name: self.uses.get(instance.name, Use()) for instance in instances}
        pids = {worker.pid for instance in instances for worker in instance.workers}
        self._cpu_ns = {pid: self._cpu_ns[pid] for pid in pids if pid in self._cpu_ns}
        self._memory = {pid: memory_bytes(pid) for pid in pids}

    def tick(self, broken: Faults, seconds: float) -> list[tuple[int, int]]:
        """Steps everything and publishes it; returns the XIDs that happened, as (GPU, number)."""
        for instance in self.instances:
            share = self._share(instance.gpus)
            self.uses[instance.name] = observe(self.uses[instance.name], self._computed_s(instance), seconds, share)
            self.limits[instance.name] = cpu_limit(self.uses[instance.name], share)
        happened = self._asked_xids(broken)
        for index in range(len(self.plants)):
            if self._step(index, broken, seconds):
                happened.append((index, XID_OFF_THE_BUS))
        for index, xid in happened:
            self.state.happened(index, xid)
        hanging = [broken.hang_until_ns.get(index, 0) for index in range(len(self.plants))]
        self.state.machine.hang_until_ns = min(hanging, default=0)  # of all GPUs: then the driver itself, init too
        self.state.machine.beat_ns = faults.monotonic_ns()
        return happened

    def _share(self, gpus: Sequence[int]) -> float:
        """The clock of the slowest: GPUs that serve together wait for each other."""
        shares = [LOST_SHARE if self.state.machine.gpus[gpu].lost else self.plants[gpu].share for gpu in gpus]
        return min(shares, default=1.0)

    def _computed_s(self, instance: Instance) -> float:
        """CPU seconds of an instance since the last tick; what a new process did before counts not."""
        total = 0
        for worker in instance.workers:
            now = cpu_time_ns(worker.pid)
            if now is None:
                continue
            total += now - self._cpu_ns.get(worker.pid, now)
            self._cpu_ns[worker.pid] = now
        return total / 1e9

    def _asked_xids(self, broken: Faults) -> list[tuple[int, int]]:
        """XIDs of the faults file that are new."""
        new = [(entry.gpu, entry.xid) for entry in broken.xids if entry.number > self._xids_told]
        self._xids_told = broken.xid_count
        return new

    def _step(self, index: int, broken: Faults, seconds: float) -> bool:
        """One GPU; whether the heat has just taken it off the bus."""
        gpu, before = self.state.machine.gpus[index], self.plants[index]
        serving = [instance for instance in self.instances if index in instance.gpus]
        busy = 0.0 if gpu.lost else min(1.0, sum(load_of(self.uses[one.name], before.share) for one in serving))
        settings = gpu.settings
        drive = plant.Drive(busy, settings.power_limit_mw / 1000, broken.cooling.get(index, 1.0),
                            settings.locked_min_mhz, settings.locked_max_mhz, tau_s=broken.tau_s.get(index))
        after = self.plants[index] = plant.step(self.profile, before, drive, seconds)
        together = any(len(instance.gpus) > 1 for instance in serving)
        self._links[index] += busy * seconds * together
        gpu.hang_until_ns = broken.hang_until_ns.get(index, 0)
        gpu.lost = int(after.shut_down or index in broken.lost)
        gpu.recovery_action = RECOVERY_REBOOT if gpu.lost else RECOVERY_NONE
        self.state.publish(index, self._now(index, drive, serving))
        return after.shut_down and not before.shut_down

    def _now(self, index: int, drive: plant.Drive, serving: Sequence[Instance]) -> layout.Now:
        state, profile = self.plants[index], self.profile
        idle = bool(state.reasons & plant.IDLE)
        clock = plant.clock_mhz(profile, state, drive)
        now = layout.Now(
            time_us=time.time_ns() // 1000, energy_mj=round(state.energy_j * 1000), reasons=state.reasons,
            busy_ns=round(state.busy_s * 1e9), memory_busy_ns=round(state.busy_s * MEMORY_LOAD * 1e9),
            power_cap_ns=round(state.power_cap_s * 1e9), sw_thermal_ns=round(state.sw_thermal_s * 1e9),
            hw_thermal_ns=round(state.hw_thermal_s * 1e9),
            nvlink_tx_kib=round(self._links[index] * NVLINK_KIB_S) if profile.nvlinks else 0,
            nvlink_rx_kib=round(self._links[index] * NVLINK_KIB_S) if profile.nvlinks else 0,
            pcie_tx_bytes=round(state.busy_s * PCIE_TX_BYTES_S), pcie_rx_bytes=round(state.busy_s * PCIE_RX_BYTES_S),
            temperature_c=int(state.core_c), memory_temperature_c=int(state.memory_c),
            margin_c=plant.margin_c(profile, state), power_mw=round(state.power_w * 1000),
            power_mean_mw=round(state.power_mean_w * 1000), clock_sm_mhz=clock,
            clock_memory_mhz=profile.clock_memory_mhz,
            clock_video_mhz=profile.clock_video_mhz * clock // profile.clock_sm_max_mhz,
            utilization_percent=round(drive.load * 100),
            memory_utilization_percent=round(drive.load * MEMORY_LOAD * 100),
            performance_state=8 if idle and not profile.gpm else 0, fan_percent=fan_percent(profile, state))
        used = KERNEL_MIB * 1024**2
        workers = [(worker, len(instance.gpus)) for instance in serving for worker in instance.workers
                   if index in worker.gpus][:layout.PROCESSES]
        for slot, (worker, shared) in zip(now.processes, workers, strict=False):
            slot.pid, slot.memory_bytes = worker.inside, self._memory.get(worker.pid, 0) // shared
            slot.utilization_percent = now.utilization_percent // len(workers)
            used += slot.memory_bytes
        now.process_count, now.memory_used_bytes = len(workers), used
        return now


def _last(profile: Profile, gpu: layout.Gpu, broken: bool) -> plant.State:
    """A GPU as its file has it; one that is lost without being broken is so by its heat."""
    now = gpu.now
    if not now.time_us:
        return plant.at_rest(profile)
    return plant.State(
        now.temperature_c, now.memory_temperature_c, now.power_mw / 1000, now.power_mean_mw / 1000,
        energy_j=now.energy_mj / 1000, busy_s=now.busy_ns / 1e9, power_cap_s=now.power_cap_ns / 1e9,
        sw_thermal_s=now.sw_thermal_ns / 1e9, hw_thermal_s=now.hw_thermal_ns / 1e9,
        shut_down=bool(gpu.lost) and not broken)


def fan_percent(profile: Profile, state: plant.State) -> int:
    """A fan of the card's own, from 30 % at 50 C to all at the maximum operating temperature."""
    if not profile.fan:
        return 0
    span = (state.core_c - 50) / (profile.max_operating_c - 50)
    return round(30 + 70 * min(1.0, max(0.0, span)))
