/* GPU performance monitoring, since Hopper: two samples, and what happened between them. */
#include "lab.h"
#include <stdlib.h>
#include <string.h>

#define GPM_VERSION 1u

struct gpm_sample {
    struct lab_now now;
    bool taken;
};
struct gpm_metric {
    unsigned id;
    int result;
    double value;
    char *short_name, *long_name, *unit;
};
struct gpm_metrics {
    unsigned version, count;
    struct gpm_sample *first, *second;
    struct gpm_metric metrics[];
};
struct gpm_support {
    unsigned version, supported;
};

nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, struct gpm_support *support) {
    REACH_WHOLE(device);
    NEED(support);
    if (support->version != GPM_VERSION)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    support->supported = can(device, CAN_GPM);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmSampleAlloc(struct gpm_sample **sample) {
    NEED(sample);
    *sample = calloc(1, sizeof **sample);
    return *sample ? NVML_SUCCESS : NVML_ERROR_MEMORY;
}

nvmlReturn_t nvmlGpmSampleFree(struct gpm_sample *sample) {
    NEED(sample);
    free(sample);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, struct gpm_sample *sample) {
    REACH_WHOLE(device);
    NEED(sample);
    NEED_ABILITY(device, CAN_GPM);
    now_of(device, &sample->now);
    sample->taken = true;
    return NVML_SUCCESS;
}

/* Shares of the busy time are made up, the same for every load: an engine's tensor cores are not simulated. */
static int measure(const struct lab_now *first, const struct lab_now *second, struct gpm_metric *metric) {
    double seconds = (double)(second->time_us - first->time_us) / 1e6;
    double busy = (double)(second->busy_ns - first->busy_ns) / (seconds * 1e7);
    double memory_busy = (double)(second->memory_busy_ns - first->memory_busy_ns) / (seconds * 1e7);
    double mib = 1048576.0 * seconds;
    switch (metric->id) {
    case 1: metric->value = busy; break;
    case 2: metric->value = 0.9 * busy; break;
    case 3: metric->value = 0.25 * busy; break;
    case 4: metric->value = 0.1 * busy; break;
    case 5:
    case 7: metric->value = 0.35 * busy; break;
    case 6:
    case 9:
    case 11: metric->value = 0; break;
    case 10: metric->value = memory_busy; break;
    case 12: metric->value = 0.1 * busy; break;
    case 13: metric->value = 0.05 * busy; break;
    case 20: metric->value = (double)(second->pcie_tx_bytes - first->pcie_tx_bytes) / mib; break;
    case 21: metric->value = (double)(second->pcie_rx_bytes - first->pcie_rx_bytes) / mib; break;
    case 60: metric->value = (double)(second->nvlink_rx_kib - first->nvlink_rx_kib) / 1024.0 / seconds; break;
    case 61: metric->value = (double)(second->nvlink_tx_kib - first->nvlink_tx_kib) / 1024.0 / seconds; break;
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlGpmMetricsGet(struct gpm_metrics *wanted) {
    NEED(wanted);
    if (wanted->version != GPM_VERSION)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    NEED(wanted->first && wanted->second && wanted->first->taken && wanted->second->taken ? wanted : NULL);
    if (wanted->second->now.time_us <= wanted->first->now.time_us) /* both of the same tick */
        return NVML_ERROR_INVALID_ARGUMENT;
    for (unsigned index = 0; index < wanted->count; index++) {
        struct gpm_metric *metric = &wanted->metrics[index];
        metric->value = 0;
        metric->result = measure(&wanted->first->now, &wanted->second->now, metric);
    }
    return NVML_SUCCESS;
}
