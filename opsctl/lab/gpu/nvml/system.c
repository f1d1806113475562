/* The library itself: init, versions, errors, and the way to a handle. */
#include "lab.h"
#include <stdio.h>
#include <string.h>
#include <strings.h>

nvmlReturn_t nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    nvmlReturn_t result = state_attach();
    if (result == NVML_SUCCESS)
        system_reach();
    return result;
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    nvmlReturn_t reached = system_reach();
    if (reached == NVML_SUCCESS)
        state_detach();
    return reached;
}

const char *nvmlErrorString(nvmlReturn_t result) {
    switch ((int)result) {
    case 0: return "Success";
    case 1: return "Uninitialized";
    case 2: return "Invalid Argument";
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 6: return "Not Found";
    case 7: return "Insufficient Size";
    case 9: return "Driver Not Loaded";
    case 10: return "Timeout";
    case 13: return "Function Not Found";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 17: return "Unable to access /dev/nvidiactl";
    case 18: return "Driver/library version mismatch";
    case 20: return "Insufficient Memory";
    case 23: return "Insufficient resources to fulfill request";
    case 25: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned length) {
    nvmlReturn_t reached = system_reach();
    return reached == NVML_SUCCESS ? write_text(out, length, DRIVER_VERSION) : reached;
}

/* The library's own version: answered without a driver too. */
nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned length) { return write_text(out, length, NVML_VERSION); }

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version) {
    NEED(version);
    *version = CUDA_VERSION;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

nvmlReturn_t nvmlSystemGetProcessName(unsigned pid, char *out, unsigned length) {
    char path[64], name[1024] = "";
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *stream = fopen(path, "r");
    if (!stream)
        return NVML_ERROR_NOT_FOUND;
    size_t count = fread(name, 1, sizeof name - 1, stream);
    fclose(stream);
    name[count] = 0;
    return write_text(out, length, name);
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count) {
    NEED(count);
    nvmlReturn_t reached = system_reach();
    if (reached == NVML_SUCCESS)
        *count = device_count();
    return reached;
}

nvmlReturn_t nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device) {
    NEED(device);
    nvmlReturn_t reached = system_reach();
    if (reached != NVML_SUCCESS)
        return reached;
    nvmlDevice_t found = device_at(index);
    NEED(found);
    reached = device_reach(found);
    if (reached == NVML_SUCCESS)
        *device = found;
    return reached;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    NEED(uuid);
    NEED(device);
    nvmlReturn_t reached = system_reach();
    if (reached != NVML_SUCCESS)
        return reached;
    for (unsigned index = 0; index < device_count(); index++) {
        nvmlDevice_t found = device_at(index);
        const struct lab_fixed *fixed = fixed_of(found);
        if (strcmp(fixed->uuid, uuid) == 0)
            return nvmlDeviceGetHandleByIndex_v2(index, device);
        for (unsigned mig = 0; mig < fixed->mig_count && mig < LAB_MIG_DEVICES; mig++)
            if (strcmp(fixed->mig[mig].uuid, uuid) == 0) {
                *device = mig_device(found->gpu, (int)mig);
                return NVML_SUCCESS;
            }
    }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device) {
    NEED(serial);
    NEED(device);
    nvmlReturn_t reached = system_reach();
    for (unsigned index = 0; reached == NVML_SUCCESS && index < device_count(); index++)
        if (strcmp(fixed_of(device_at(index))->serial, serial) == 0)
            return nvmlDeviceGetHandleByIndex_v2(index, device);
    return reached == NVML_SUCCESS ? NVML_ERROR_NOT_FOUND : reached;
}

/* Bus ids are written with a domain of four or eight digits, or without one. */
nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *text, nvmlDevice_t *device) {
    unsigned domain = 0, bus, slot, function;
    NEED(text);
    NEED(device);
    nvmlReturn_t reached = system_reach();
    if (reached != NVML_SUCCESS)
        return reached;
    if (sscanf(text, "%x:%x:%x.%x", &domain, &bus, &slot, &function) != 4) {
        domain = 0;
        if (sscanf(text, "%x:%x.%x", &bus, &slot, &function) != 3)
            return NVML_ERROR_INVALID_ARGUMENT;
    }
    for (unsigned index = 0; index < device_count(); index++) {
        const struct lab_fixed *fixed = fixed_of(device_at(index));
        if (fixed->pci_domain == domain && fixed->pci_bus == bus && fixed->pci_device == slot)
            return nvmlDeviceGetHandleByIndex_v2(index, device);
    }
    return NVML_ERROR_NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char *text, nvmlDevice_t *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(text, device);
}
