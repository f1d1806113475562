/* What root may set: persistence, power limit, locked clocks. Written into the shared state, where the silicon acts. */
#include "lab.h"
#include <unistd.h>

#define NEED_ROOT                                                                                                      \
    do {                                                                                                               \
        if (geteuid() != 0 || !state_writable())                                                                       \
            return NVML_ERROR_NO_PERMISSION;                                                                           \
    } while (0)

#define LIMIT(function, value)                                                                                         \
    nvmlReturn_t function(nvmlDevice_t device, unsigned *milliwatts) {                                                 \
        REACH_WHOLE(device);                                                                                           \
        NEED(milliwatts);                                                                                              \
        *milliwatts = (value);                                                                                         \
        return NVML_SUCCESS;                                                                                           \
    }

LIMIT(nvmlDeviceGetPowerManagementLimit, load_word(&settings_of(device)->power_limit_mw))
LIMIT(nvmlDeviceGetEnforcedPowerLimit, load_word(&settings_of(device)->power_limit_mw))
LIMIT(nvmlDeviceGetPowerManagementDefaultLimit, fixed_of(device)->power_default_mw)
LIMIT(nvmlDeviceGetPowerManagementMode, 1)
LIMIT(nvmlDeviceGetPersistenceMode, load_word(&settings_of(device)->persistence))

nvmlReturn_t nvmlDeviceGetPowerManagementLimitConstraints(nvmlDevice_t device, unsigned *least, unsigned *most) {
    REACH_WHOLE(device);
    NEED(least);
    NEED(most);
    *least = fixed_of(device)->power_min_mw;
    *most = fixed_of(device)->power_max_mw;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceSetPowerManagementLimit(nvmlDevice_t device, unsigned milliwatts) {
    REACH_WHOLE(device);
    NEED_ROOT;
    if (milliwatts < fixed_of(device)->power_min_mw || milliwatts > fixed_of(device)->power_max_mw)
        return NVML_ERROR_INVALID_ARGUMENT;
    store_word(&settings_of(device)->power_limit_mw, milliwatts);
    return NVML_SUCCESS;
}

struct power_value {
    unsigned version, scope, milliwatts;
};
#define POWER_VALUE_V2 0x0200000Cu

nvmlReturn_t nvmlDeviceSetPowerManagementLimit_v2(nvmlDevice_t device, const struct power_value *wanted) {
    NEED(wanted);
    if (wanted->version != POWER_VALUE_V2)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (wanted->scope != 0) /* the GPU; modules and memory have no limit of their own here */
        return NVML_ERROR_NOT_SUPPORTED;
    return nvmlDeviceSetPowerManagementLimit(device, wanted->milliwatts);
}

nvmlReturn_t nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned mode) {
    REACH_WHOLE(device);
    NEED_ROOT;
    if (mode > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    store_word(&settings_of(device)->persistence, mode);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceSetGpuLockedClocks(nvmlDevice_t device, unsigned least_mhz, unsigned most_mhz) {
    REACH_WHOLE(device);
    NEED_ROOT;
    const struct lab_fixed *fixed = fixed_of(device);
    if (least_mhz > most_mhz || most_mhz < fixed->clock_sm_min_mhz || least_mhz > fixed->clock_sm_max_mhz)
        return NVML_ERROR_INVALID_ARGUMENT;
    store_word(&settings_of(device)->locked_min_mhz, least_mhz);
    store_word(&settings_of(device)->locked_max_mhz, most_mhz);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceResetGpuLockedClocks(nvmlDevice_t device) {
    REACH_WHOLE(device);
    NEED_ROOT;
    store_word(&settings_of(device)->locked_max_mhz, 0);
    store_word(&settings_of(device)->locked_min_mhz, 0);
    return NVML_SUCCESS;
}
