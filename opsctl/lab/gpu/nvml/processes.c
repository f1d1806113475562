/* Which processes compute on a GPU: those that the silicon found. */
#include "lab.h"

struct process_info {
    unsigned pid;
    unsigned long long memory_bytes;
    unsigned gpu_instance, compute_instance;
};
struct process_sample {
    unsigned pid;
    unsigned long long time_us;
    unsigned sm, memory, encoder, decoder;
};

/* Told how many there are when there is too little room: NVML's way to ask for a count. */
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, struct process_info *out) {
    REACH(device);
    NEED(count);
    struct lab_now now;
    now_of(device, &now);
    unsigned room = *count, found = now.process_count < LAB_PROCESSES ? now.process_count : LAB_PROCESSES;
    if (device->mig >= 0)
        found = 0;
    *count = found;
    if (found > room || (found && !out))
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned index = 0; index < found; index++)
        out[index] = (struct process_info){.pid = now.processes[index].pid,
                                           .memory_bytes = now.processes[index].memory_bytes,
                                           .gpu_instance = NOT_AVAILABLE, .compute_instance = NOT_AVAILABLE};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, struct process_info *out) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, out);
}

static nvmlReturn_t none(nvmlDevice_t device, unsigned *count) {
    REACH(device);
    NEED(count);
    *count = 0;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned *count, struct process_info *out) {
    (void)out;
    return none(device, count);
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v2(nvmlDevice_t device, unsigned *count, struct process_info *out) {
    (void)out;
    return none(device, count);
}

nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count,
                                                        struct process_info *out) {
    (void)out;
    return none(device, count);
}

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, struct process_sample *out, unsigned *count,
                                             unsigned long long after_us) {
    REACH_WHOLE(device);
    NEED(count);
    struct lab_now now;
    now_of(device, &now);
    unsigned room = *count, found = now.process_count < LAB_PROCESSES ? now.process_count : LAB_PROCESSES;
    *count = found;
    if (!found || now.time_us <= after_us)
        return NVML_ERROR_NOT_FOUND;
    if (!out || found > room)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned index = 0; index < found; index++)
        out[index] = (struct process_sample){.pid = now.processes[index].pid, .time_us = now.time_us,
                                             .sm = now.processes[index].utilization_percent,
                                             .memory = now.memory_utilization_percent};
    return NVML_SUCCESS;
}
