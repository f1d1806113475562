/* What a GPU does: temperatures, clocks, power, use, errors. */
#include "lab.h"
#include <string.h>

enum { CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEM, CLOCK_VIDEO };
enum { THRESHOLD_SHUTDOWN, THRESHOLD_SLOWDOWN, THRESHOLD_MEM_MAX, THRESHOLD_GPU_MAX };
#define TEMPERATURE_V1 0x100000Cu
#define MARGIN_V1 0x1000008u
#define SUPPORTED_REASONS 511u /* all bits up to "display", as a capture of an H200 says */

struct temperature {
    unsigned version, sensor;
    int celsius;
};
struct margin {
    unsigned version;
    int celsius;
};
struct utilization {
    unsigned gpu, memory;
};
struct violation {
    unsigned long long reference_us, violation_ns;
};

#define READ(function, type, value)                                                                                    \
    nvmlReturn_t function(nvmlDevice_t device, type *out) {                                                            \
        REACH_WHOLE(device);                                                                                           \
        NEED(out);                                                                                                     \
        struct lab_now now;                                                                                            \
        now_of(device, &now);                                                                                          \
        *out = (type)(value);                                                                                          \
        return NVML_SUCCESS;                                                                                           \
    }

READ(nvmlDeviceGetPowerUsage, unsigned, now.power_mean_mw)
READ(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, now.energy_mj)
READ(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, now.reasons)
READ(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, now.reasons)
READ(nvmlDeviceGetPerformanceState, unsigned, now.performance_state)
READ(nvmlDeviceGetPowerState, unsigned, now.performance_state)
READ(nvmlDeviceGetPcieReplayCounter, unsigned, now.pcie_replays)

static nvmlReturn_t core_temperature(nvmlDevice_t device, unsigned sensor, int *celsius) {
    REACH(device);
    NEED(celsius);
    if (sensor)
        return NVML_ERROR_INVALID_ARGUMENT;
    struct lab_now now;
    now_of(device, &now);
    *celsius = now.temperature_c;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius) {
    return core_temperature(device, sensor, (int *)celsius);
}

nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, struct temperature *temperature) {
    NEED(temperature);
    if (temperature->version != TEMPERATURE_V1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    return core_temperature(device, temperature->sensor, &temperature->celsius);
}

nvmlReturn_t nvmlDeviceGetMarginTemperature(nvmlDevice_t device, struct margin *margin) {
    REACH_WHOLE(device);
    NEED(margin);
    if (margin->version != MARGIN_V1)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    NEED_ABILITY(device, CAN_T_LIMIT);
    struct lab_now now;
    now_of(device, &now);
    margin->celsius = now.margin_c;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned kind, unsigned *celsius) {
    REACH_WHOLE(device);
    NEED(celsius);
    const struct lab_fixed *fixed = fixed_of(device);
    switch (kind) {
    case THRESHOLD_SHUTDOWN: *celsius = (unsigned)fixed->shutdown_c; return NVML_SUCCESS;
    case THRESHOLD_SLOWDOWN: *celsius = (unsigned)fixed->slowdown_c; return NVML_SUCCESS;
    case THRESHOLD_GPU_MAX: *celsius = (unsigned)fixed->max_operating_c; return NVML_SUCCESS;
    case THRESHOLD_MEM_MAX:
        NEED_ABILITY(device, CAN_MEMORY_SENSOR);
        *celsius = (unsigned)fixed->memory_max_c;
        return NVML_SUCCESS;
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz) {
    REACH_WHOLE(device);
    NEED(mhz);
    struct lab_now now;
    now_of(device, &now);
    switch (kind) {
    case CLOCK_GRAPHICS:
    case CLOCK_SM: *mhz = now.clock_sm_mhz; return NVML_SUCCESS;
    case CLOCK_MEM: *mhz = now.clock_memory_mhz; return NVML_SUCCESS;
    case CLOCK_VIDEO: *mhz = now.clock_video_mhz; return NVML_SUCCESS;
    default: return NVML_ERROR_INVALID_ARGUMENT;
    }
}

nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned kind, unsigned *mhz) {
    REACH_WHOLE(device);
    NEED(mhz);
    const struct lab_fixed *fixed = fixed_of(device);
    switch (kind) {
    case CLOCK_GRAPHICS:
    case CLOCK_SM: *mhz = fixed->clock_sm_max_mhz; return NVML_SUCCESS;
    case CLOCK_MEM: *mhz = fixed->clock_memory_mhz; return NVML_SUCCESS;
    case CLOCK_VIDEO: *mhz = fixed->clock_video_mhz; return NVML_SUCCESS;
    default: return NVML_ERROR_INVALID_ARGUMENT;
    }
}

/* clock_id: 0 is the clock of this moment; application clocks are no longer supported by drivers this new. */
nvmlReturn_t nvmlDeviceGetClock(nvmlDevice_t device, unsigned kind, unsigned clock_id, unsigned *mhz) {
    return clock_id == 0 ? nvmlDeviceGetClockInfo(device, kind, mhz) : NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct utilization *rates) {
    REACH_WHOLE(device);
    NEED(rates);
    if (fixed_of(device)->mig_count) /* with MIG on there is no such number */
        return NVML_ERROR_NOT_SUPPORTED;
    struct lab_now now;
    now_of(device, &now);
    *rates = (struct utilization){.gpu = now.utilization_percent, .memory = now.memory_utilization_percent};
    return NVML_SUCCESS;
}

/* Encoders and decoders stand still: nothing in a lab decodes video. */
static nvmlReturn_t idle_engine(nvmlDevice_t device, unsigned *percent, unsigned *period_us) {
    REACH_WHOLE(device);
    NEED(percent);
    NEED(period_us);
    *percent = 0;
    *period_us = 167000;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetEncoderUtilization(nvmlDevice_t device, unsigned *percent, unsigned *period_us) {
    return idle_engine(device, percent, period_us);
}

nvmlReturn_t nvmlDeviceGetDecoderUtilization(nvmlDevice_t device, unsigned *percent, unsigned *period_us) {
    return idle_engine(device, percent, period_us);
}

nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons) {
    REACH_WHOLE(device);
    NEED(reasons);
    *reasons = SUPPORTED_REASONS;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons) {
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

nvmlReturn_t nvmlDeviceGetViolationStatus(nvmlDevice_t device, unsigned policy, struct violation *violation) {
    REACH_WHOLE(device);
    NEED(violation);
    struct lab_now now;
    now_of(device, &now);
    violation->reference_us = now.time_us;
    switch (policy) {
    case 0: violation->violation_ns = now.power_cap_ns; return NVML_SUCCESS;
    case 1: violation->violation_ns = now.sw_thermal_ns + now.hw_thermal_ns; return NVML_SUCCESS;
    case 2: violation->violation_ns = now.sync_boost_ns; return NVML_SUCCESS;
    case 3:
    case 4:
    case 5: violation->violation_ns = 0; return NVML_SUCCESS; /* board limit, low utilisation, reliability */
    default: return NVML_ERROR_NOT_SUPPORTED;
    }
}

nvmlReturn_t nvmlDeviceGetFanSpeed(nvmlDevice_t device, unsigned *percent) {
    REACH_WHOLE(device);
    NEED(percent);
    NEED_ABILITY(device, CAN_FAN);
    struct lab_now now;
    now_of(device, &now);
    *percent = now.fan_percent;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNumFans(nvmlDevice_t device, unsigned *count) {
    REACH_WHOLE(device);
    NEED(count);
    *count = can(device, CAN_FAN) ? 2 : 0;
    return NVML_SUCCESS;
}

/* A bus carries what the load says; counter 0 sends, 1 receives. */
nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, unsigned counter, unsigned *kib_per_s) {
    REACH_WHOLE(device);
    NEED(kib_per_s);
    if (counter > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    struct lab_now now;
    now_of(device, &now);
    *kib_per_s = now.utilization_percent * (counter ? 8192u : 2048u);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    REACH_WHOLE(device);
    NEED(current);
    NEED(pending);
    NEED_ABILITY(device, CAN_ECC);
    *current = *pending = 1;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned kind, unsigned counter,
                                         unsigned long long *count) {
    (void)counter; /* the lab's GPUs are new: since the driver and since ever is the same */
    REACH_WHOLE(device);
    NEED(count);
    NEED_ABILITY(device, CAN_ECC);
    struct lab_now now;
    now_of(device, &now);
    *count = kind ? now.ecc_double : now.ecc_single;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, unsigned kind, unsigned counter, unsigned location,
                                             unsigned long long *count) {
    REACH_WHOLE(device);
    if (location != 2) { /* all simulated errors are in device memory */
        NEED(count);
        NEED_ABILITY(device, CAN_ECC);
        *count = 0;
        return NVML_SUCCESS;
    }
    return nvmlDeviceGetTotalEccErrors(device, kind, counter, count);
}

nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned *correctable, unsigned *uncorrectable,
                                       unsigned *pending, unsigned *failed) {
    REACH_WHOLE(device);
    NEED(correctable && uncorrectable && pending && failed ? device : NULL);
    NEED_ABILITY(device, CAN_ROW_REMAP);
    struct lab_now now;
    now_of(device, &now);
    *correctable = now.remapped_correctable;
    *uncorrectable = now.remapped_uncorrectable;
    *pending = now.remapping_pending;
    *failed = now.remapping_failed;
    return NVML_SUCCESS;
}
