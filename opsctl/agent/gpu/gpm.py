"""Profiling counters from NVML itself (GPM), on Hopper and later: the share of time in which a part of the GPU is busy.

A value is what happened between two samples, so the first second has none.
"""

from __future__ import annotations

from typing import Any

from opsctl.agent.gpu.nvml import Nvml

MIB = 1024 * 1024
# Our name, metric id of nvml.h, factor: GPM tells percent and MiB/s, DCGM's names mean 0 to 1 and bytes per second.
METRICS = (("gr_engine_active", 1, 0.01), ("sm_active", 2, 0.01), ("sm_occupancy", 3, 0.01),
           ("pipe_tensor_active", 5, 0.01), ("dram_active", 10, 0.01), ("pipe_fp64_active", 11, 0.01),
           ("pipe_fp32_active", 12, 0.01), ("pipe_fp16_active", 13, 0.01), ("pcie_tx_bytes", 20, MIB),
           ("pcie_rx_bytes", 21, MIB), ("nvlink_rx_bytes", 60, MIB), ("nvlink_tx_bytes", 61, MIB))


class Gpm:
    """The last sample of one GPU, and room for the next."""

    def __init__(self, index: int, handle: Any, samples: list[Any]) -> None:
        self._index = index
        self._handle = handle
        self._samples = samples  # the newest last
        self._taken = 0
        self._order: Any = None  # what is asked stays the same, and it is large
        self._refused = False

    @classmethod
    def of(cls, nvml: Nvml, index: int, handle: Any) -> Gpm | None:
        """None: this GPU has no such counters."""
        support = nvml.ask(index, ("nvmlGpmQueryDeviceSupport", handle))
        if support is None or not getattr(support, "isSupportedDevice", support):
            return None
        samples = [nvml.ask(index, ("nvmlGpmSampleAlloc",)) for _ in range(2)]
        return None if None in samples else cls(index, handle, samples)

    def metrics(self, nvml: Nvml) -> dict[str, float] | None:
        """Since the call before; None at the first, and for ever once the driver refuses."""
        if self._refused:
            return None
        self._samples.reverse()
        if nvml.ask(self._index, ("nvmlGpmSampleGet", self._handle, self._samples[1])) is None:
            self._refused = True
            return None
        self._taken += 1
        if self._taken < 2:
            return None
        if self._order is None:
            self._order = nvml.library.c_nvmlGpmMetricsGet_t()
            for place, (_, number, _) in enumerate(METRICS):
                self._order.metrics[place].metricId = number
        order = self._order
        order.version, order.numMetrics = nvml.library.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
        order.sample1, order.sample2 = self._samples
        answer = nvml.ask(self._index, ("nvmlGpmMetricsGet", order))
        if answer is None:
            return None
        return {name: answer.metrics[place].value * factor for place, (name, _, factor) in enumerate(METRICS)
                if answer.metrics[place].nvmlReturn == 0}
