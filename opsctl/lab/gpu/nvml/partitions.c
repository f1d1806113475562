/* MIG and the fabric: how a GPU is cut, and how a board's GPUs are joined. */
#include "lab.h"
#include <string.h>

struct attributes {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpeg, ofa, gpu_slices, compute_slices;
    unsigned long long memory_mib;
};
struct fabric {
    unsigned char cluster[16];
    int status;
    uint32_t clique, state;
};
struct fabric_v {
    unsigned version;
    struct fabric fabric;
    uint32_t health_mask;
    unsigned char health_summary;
};
#define FABRIC_V2 0x02000024u
#define FABRIC_V3 0x03000028u
#define SM_PER_SLICE 16u /* a 1g slice of Hopper and Ampere has 14 to 16 */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending) {
    REACH_WHOLE(device);
    NEED(current);
    NEED(pending);
    NEED_ABILITY(device, CAN_MIG);
    *current = *pending = fixed_of(device)->mig_count > 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count) {
    REACH_WHOLE(device);
    NEED(count);
    *count = fixed_of(device)->mig_slices; /* 0 where there is no MIG: real ones say so too */
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *found) {
    REACH_WHOLE(device);
    NEED(found);
    NEED_ABILITY(device, CAN_MIG);
    if (index >= fixed_of(device)->mig_slices)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (index >= fixed_of(device)->mig_count)
        return NVML_ERROR_NOT_FOUND;
    *found = mig_device(device->gpu, (int)index);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is_mig) {
    REACH(device);
    NEED(is_mig);
    *is_mig = device->mig >= 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t device, nvmlDevice_t *whole) {
    REACH(device);
    NEED(whole);
    if (device->mig < 0)
        return NVML_ERROR_INVALID_ARGUMENT;
    *whole = device_at((unsigned)device->index);
    return NVML_SUCCESS;
}

#define OF_MIG(function, value)                                                                                        \
    nvmlReturn_t function(nvmlDevice_t device, unsigned *out) {                                                        \
        REACH(device);                                                                                                 \
        NEED(out);                                                                                                     \
        if (device->mig < 0)                                                                                           \
            return NVML_ERROR_NOT_SUPPORTED;                                                                           \
        *out = fixed_of(device)->mig[device->mig].value;                                                               \
        return NVML_SUCCESS;                                                                                           \
    }

OF_MIG(nvmlDeviceGetGpuInstanceId, gpu_instance)
OF_MIG(nvmlDeviceGetComputeInstanceId, compute_instance)

nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, struct attributes *attributes) {
    REACH(device);
    NEED(attributes);
    if (device->mig < 0)
        return NVML_ERROR_NOT_SUPPORTED;
    const struct lab_mig *mig = &fixed_of(device)->mig[device->mig];
    *attributes = (struct attributes){.multiprocessors = SM_PER_SLICE * mig->slices, .copy_engines = mig->slices,
                                      .decoders = mig->slices, .jpeg = mig->slices, .gpu_slices = mig->slices,
                                      .compute_slices = mig->slices, .memory_mib = mig->memory_mib};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, struct fabric *fabric) {
    REACH_WHOLE(device);
    NEED(fabric);
    NEED_ABILITY(device, CAN_FABRIC);
    memset(fabric, 0, sizeof *fabric);
    fabric->state = load_word(&state()->fabric_state);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, struct fabric_v *fabric) {
    NEED(fabric);
    if (fabric->version != FABRIC_V2 && fabric->version != FABRIC_V3)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    nvmlReturn_t result = nvmlDeviceGetGpuFabricInfo(device, &fabric->fabric);
    if (result != NVML_SUCCESS)
        return result;
    fabric->health_mask = 0;
    if (fabric->version == FABRIC_V3)
        fabric->health_summary = 1; /* healthy */
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned link, unsigned *active) {
    REACH_WHOLE(device);
    NEED(active);
    NEED_ABILITY(device, CAN_NVLINK);
    if (link >= fixed_of(device)->nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    *active = 1;
    return NVML_SUCCESS;
}
