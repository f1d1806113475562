"""Every series that the exporter gives, in one table: to rename one, as DCGM 4.6 does with its own, edit it here.

A GPU's series has the labels gpu, UUID, pci_bus_id, device, modelName and the host's name (``HOST_LABELS``), a host's
the last alone. ``key`` is where the value lies in a sample (``sample.py``) or among the host's numbers
(``metrics.py``); where it leads to a table, each entry becomes one series with that ``label``. What is not there is not
exported. The names of DCGM are those
that dashboards know (default-counters.csv of dcgm-exporter); its counters lack ``_total``, which OpenMetrics would add,
so they go out without a type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

GPU_LABELS = ("gpu", "UUID", "pci_bus_id", "device", "modelName")
MIG_LABELS = ("GPU_I_PROFILE", "GPU_I_ID")
# The host's name, by the beginning of a series' name. dcgm-exporter wrote Hostname until 2026-05 and hostname since
# (its pull request 655): DCGM's names have both, so that dashboards of either age find what they look for.
HOST_LABELS = (("DCGM_", ("Hostname", "hostname")), ("opsctl_", ("hostname",)))


@dataclass(frozen=True)
class Series:
    """One name. ``source`` is what NVML is asked, or where else it comes from."""

    name: str
    kind: Literal["gauge", "counter", "unknown"]
    unit: str
    key: str
    source: str
    help: str
    label: str = ""

    @cached_property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))

    @cached_property
    def host_labels(self) -> tuple[str, ...]:
        return next(labels for begin, labels in HOST_LABELS if self.name.startswith(begin))


def _gpu(*rows: tuple[str, Literal["gauge", "counter", "unknown"], str, str, str, str]) -> tuple[Series, ...]:
    return tuple(Series(*row) for row in rows)


DCGM = _gpu(
    ("DCGM_FI_DEV_SM_CLOCK", "gauge", "MHz", "clock_sm_mhz", "ClockInfo(SM)", "Clock of the multiprocessors"),
    ("DCGM_FI_DEV_MAX_SM_CLOCK", "gauge", "MHz", "clock_sm_max_mhz", "MaxClockInfo(SM)",
     "Highest clock of the multiprocessors"),
    ("DCGM_FI_DEV_MEM_CLOCK", "gauge", "MHz", "clock_memory_mhz", "ClockInfo(MEM)", "Clock of the memory"),
    ("DCGM_FI_DEV_GPU_TEMP", "gauge", "C", "temperature_c", "TemperatureV, Temperature", "Temperature of the core"),
    ("DCGM_FI_DEV_MEMORY_TEMP", "gauge", "C", "memory_temperature_c", "field 82", "Temperature of the memory"),
    ("DCGM_FI_DEV_GPU_TEMP_LIMIT", "gauge", "C", "margin_c", "MarginTemperature, else worked out",
     "Degrees until the driver slows the GPU down"),
    ("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "gauge", "", "reasons", "CurrentClocksEventReasons",
     "Why the clock is lowered, as bits"),
    ("DCGM_FI_DEV_POWER_USAGE", "gauge", "W", "power_w", "PowerUsage", "Power drawn"),
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "unknown", "mJ", "energy_mj", "TotalEnergyConsumption",
     "Energy since the driver was loaded"),
    ("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "unknown", "", "pcie_replays", "PcieReplayCounter", "PCIe retries"),
    ("DCGM_FI_DEV_GPU_UTIL", "gauge", "%", "utilisation_percent", "UtilizationRates.gpu",
     "Share of time in which a kernel ran"),
    ("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "%", "memory_utilisation_percent", "UtilizationRates.memory",
     "Share of time in which memory was read or written"),
    ("DCGM_FI_DEV_ENC_UTIL", "gauge", "%", "encoder_percent", "EncoderUtilization", "Use of the video encoder"),
    ("DCGM_FI_DEV_DEC_UTIL", "gauge", "%", "decoder_percent", "DecoderUtilization", "Use of the video decoder"),
    ("DCGM_FI_DEV_XID_ERRORS", "gauge", "", "xid_last", "events, kernel log",
     "The last XID; 0: none that we know; err_code and err_msg say it again"),
    ("DCGM_FI_DEV_FB_USED", "gauge", "MiB", "memory_used_mib", "MemoryInfo_v2.used", "Memory in use"),
    ("DCGM_FI_DEV_FB_FREE", "gauge", "MiB", "memory_free_mib", "MemoryInfo_v2.free", "Memory free"),
    ("DCGM_FI_DEV_FB_TOTAL", "gauge", "MiB", "memory_total_mib", "MemoryInfo_v2.total", "Memory in all"),
    ("DCGM_FI_DEV_FB_RESERVED", "gauge", "MiB", "memory_reserved_mib", "MemoryInfo_v2.reserved",
     "Memory that the driver keeps"),
    ("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", "unknown", "KiB", "nvlink_kib", "fields 138 and 139",
     "Sent and received over NVLink"),
    ("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "unknown", "", "remapped.correctable", "RemappedRows",
     "Rows of memory replaced after correctable errors"),
    ("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "unknown", "", "remapped.uncorrectable", "RemappedRows",
     "Rows of memory replaced after uncorrectable errors"),
    ("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "", "remapped.failure", "RemappedRows", "A row could not be replaced"),
    ("DCGM_FI_DEV_ROW_REMAP_PENDING", "gauge", "", "remapped.pending", "RemappedRows",
     "A row is replaced at the next reset"),
    ("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "unknown", "", "ecc.sbe_volatile", "field 3",
     "Single-bit errors since the driver was loaded"),
    ("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "unknown", "", "ecc.dbe_volatile", "field 4",
     "Double-bit errors since the driver was loaded"),
    ("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", "unknown", "", "ecc.sbe_aggregate", "field 5", "Single-bit errors ever"),
    ("DCGM_FI_DEV_ECC_DBE_AGG_TOTAL", "unknown", "", "ecc.dbe_aggregate", "field 6", "Double-bit errors ever"),
    ("DCGM_FI_DEV_POWER_VIOLATION", "unknown", "ns", "violations_ns.power", "field 74", "Slowed down for power"),
    ("DCGM_FI_DEV_THERMAL_VIOLATION", "unknown", "ns", "violations_ns.thermal", "field 75", "Slowed down for heat"),
    ("DCGM_FI_DEV_SYNC_BOOST_VIOLATION", "unknown", "ns", "violations_ns.sync_boost", "field 76",
     "Slowed down with a slower GPU"),
    ("DCGM_FI_DEV_BOARD_LIMIT_VIOLATION", "unknown", "ns", "violations_ns.board_limit", "field 77",
     "Slowed down for the board's limit"),
    ("DCGM_FI_DEV_LOW_UTIL_VIOLATION", "unknown", "ns", "violations_ns.low_utilisation", "field 78",
     "Slowed down for want of work"),
    ("DCGM_FI_DEV_RELIABILITY_VIOLATION", "unknown", "ns", "violations_ns.reliability", "field 79",
     "Slowed down for reliability"),
    ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "gauge", "0-1", "profile.gr_engine_active", "GPM 1", "Graphics engine busy"),
    ("DCGM_FI_PROF_SM_ACTIVE", "gauge", "0-1", "profile.sm_active", "GPM 2", "Multiprocessors with work"),
    ("DCGM_FI_PROF_SM_OCCUPANCY", "gauge", "0-1", "profile.sm_occupancy", "GPM 3", "Warps of those possible"),
    ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "gauge", "0-1", "profile.pipe_tensor_active", "GPM 5", "Tensor cores busy"),
    ("DCGM_FI_PROF_DRAM_ACTIVE", "gauge", "0-1", "profile.dram_active", "GPM 10", "Memory interface busy"),
    ("DCGM_FI_PROF_PIPE_FP64_ACTIVE", "gauge", "0-1", "profile.pipe_fp64_active", "GPM 11", "FP64 units busy"),
    ("DCGM_FI_PROF_PIPE_FP32_ACTIVE", "gauge", "0-1", "profile.pipe_fp32_active", "GPM 12", "FP32 units busy"),
    ("DCGM_FI_PROF_PIPE_FP16_ACTIVE", "gauge", "0-1", "profile.pipe_fp16_active", "GPM 13", "FP16 units busy"),
    ("DCGM_FI_PROF_PCIE_TX_BYTES", "gauge", "B/s", "profile.pcie_tx_bytes", "GPM 20", "Sent over PCIe"),
    ("DCGM_FI_PROF_PCIE_RX_BYTES", "gauge", "B/s", "profile.pcie_rx_bytes", "GPM 21", "Received over PCIe"),
    ("DCGM_FI_PROF_NVLINK_RX_BYTES", "gauge", "B/s", "profile.nvlink_rx_bytes", "GPM 60", "Received over NVLink"),
    ("DCGM_FI_PROF_NVLINK_TX_BYTES", "gauge", "B/s", "profile.nvlink_tx_bytes", "GPM 61", "Sent over NVLink"),
)

OWN = (
    Series("opsctl_gpu_thermal_margin_celsius", "gauge", "C", "margin_c", "MarginTemperature, else worked out",
           "Degrees until the driver slows the GPU down; 0 or less: it does"),
    Series("opsctl_gpu_thermal_margin_source_info", "gauge", "", "margin_sources", "which of three was to be had",
           "1; source says where the margin comes from", "source"),
    Series("opsctl_gpu_thermal_offset_celsius", "gauge", "C", "offsets_c", "fields 193-196",
           "The margin at which the GPU is slowed down or shut down; negative", "threshold"),
    Series("opsctl_gpu_temperature_threshold_celsius", "gauge", "C", "thresholds_c", "TemperatureThreshold",
           "Temperature of a limit", "threshold"),
    Series("opsctl_gpu_power_limit_watts", "gauge", "W", "power_limits_w",
           "EnforcedPowerLimit, PowerManagementDefaultLimit, PowerManagementLimitConstraints", "Limits of the power",
           "limit"),
    Series("opsctl_gpu_clock_event_reason", "gauge", "", "reason_bits", "CurrentClocksEventReasons",
           "1 while the clock is lowered for this reason", "reason"),
    Series("opsctl_gpu_slowdown_nanoseconds", "counter", "ns", "slowdowns_ns", "fields 269-271",
           "How long the clock was lowered for this reason", "reason"),
    Series("opsctl_gpu_recovery_action", "gauge", "", "recovery_action", "field 230",
           "What the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 drain peers, 4 drain and reset"),
    Series("opsctl_gpu_lost", "gauge", "", "lost", "GPU_IS_LOST, RESET_REQUIRED, errors alone",
           "1: the GPU answers no more"),
    Series("opsctl_gpu_xid", "counter", "", "xid_counts", "events, kernel log",
           "Critical errors since the agent began, and those that the kernel's log still had; action is NVIDIA's"),
    Series("opsctl_gpu_xid_last_timestamp_seconds", "gauge", "s", "xid_times", "events, kernel log",
           "When this error was last seen, since 1970"),
    Series("opsctl_gpu_time_to_slowdown_seconds", "gauge", "s", "guard.time_to_slowdown_s", "the guard",
           "Until the hardware slows the GPU down, if it goes on getting hotter as now; absent when it does not"),
    Series("opsctl_gpu_thermal_slope_celsius_per_second", "gauge", "C/s", "guard.slope_c_per_s", "the guard",
           "How fast the margin goes; more than 0: it gets hotter"),
    Series("opsctl_gpu_memory_margin_celsius", "gauge", "C", "guard.memory_margin_c", "the guard",
           "Degrees until the memory is at its own limit"),
    Series("opsctl_guard_clock_limit_mhz", "gauge", "MHz", "guard.clock_limit_mhz", "the guard",
           "The highest clock that the guard allows now; absent when it leaves the clocks alone"),
    Series("opsctl_guard_power_limit_watts", "gauge", "W", "guard.power_limit_set_w", "the guard",
           "The power limit that the guard set; absent when it did not"),
    Series("opsctl_gpu_info", "gauge", "", "info", "versions and numbers", "1; the labels say it"),
    Series("opsctl_gpu_instance_info", "gauge", "", "instance", "/etc/opsctl/instances",
           "1; the instance that this GPU is placed to"),
)

HOST = (
    Series("opsctl_gpus_expected", "gauge", "", "expected", "agent.toml and placements", "GPUs that should be there"),
    Series("opsctl_gpus", "gauge", "", "seen", "DeviceGetCount", "GPUs that are there and answer"),
    Series("opsctl_gpus_missing", "gauge", "", "missing", "UUIDs expected and seen",
           "GPUs that should be there, and are not or do not answer; one that nobody expects stands for none of them"),
    Series("opsctl_gpu_sample_age_seconds", "gauge", "s", "sample_age_s", "the reader",
           "Since the last good sample; since the agent began, when there was none"),
    Series("opsctl_gpu_sample_duration_seconds", "gauge", "s", "took_s", "the reader", "What the last sample took"),
    Series("opsctl_gpu_nvml_call_age_seconds", "gauge", "s", "call_age_s", "the reader",
           "How long a call of NVML has not returned; 0 when none is late"),
    Series("opsctl_gpu_samples", "counter", "", "samples", "the reader", "Good samples since the agent began"),
    Series("opsctl_gpu_reader_restarts", "counter", "", "restarts", "the reader",
           "How often the reader had to be replaced"),
    Series("opsctl_gpu_state_info", "gauge", "", "states", "the reader", "1; what the agent makes of them", "state"),
    Series("opsctl_agent_info", "gauge", "", "version", "the agent's wheel", "1; its version", "version"),
)

# Of the guard's document (guard/told.py); instances have the labels service and inference_instance.
GUARD = (
    Series("opsctl_guard_rung", "gauge", "", "rungs", "the guard",
           "0 normal, 1 less weight, 2 slowed, 3 least, 4 orderly stop, 5 stop now"),
    Series("opsctl_guard_weight_percent", "gauge", "%", "weights", "the guard",
           "The weight that the guard gives the instance"),
    Series("opsctl_guard_latched", "gauge", "", "latched", "the guard",
           "1: it flapped, and stays where it is until a person lifts the latch"),
    Series("opsctl_guard_stopped", "gauge", "", "stopped", "the guard", "1: the guard stopped the instance's unit"),
    Series("opsctl_guard_moves", "counter", "", "moves", "the guard", "Rungs taken, by direction"),
    Series("opsctl_guard_enforcing", "gauge", "", "enforcing", "the guard",
           "1: it sets clocks and stops units; 0: it only says what it would do"),
    Series("opsctl_guard_setter_up", "gauge", "", "setter_up", "the guard",
           "1: the part that sets clocks and stops units answers"),
)
GPU = (*DCGM, *OWN)
MIG = tuple(one for one in DCGM if one.key.startswith("memory_") and one.unit == "MiB")


def names() -> set[str]:
    """As they stand in a scrape."""
    return {one.name + ("_total" if one.kind == "counter" else "") for one in (*GPU, *GUARD, *HOST)}
