/* What a GPU is: names, places, sizes. */
#include "lab.h"
#include <stdio.h>
#include <string.h>

struct pci_info {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};
struct memory {
    unsigned long long total, free, used;
};
struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
#define MEMORY_V2 0x02000028u

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *out, unsigned length) {
    REACH(device);
    if (device->mig < 0)
        return write_text(out, length, fixed_of(device)->name);
    const struct lab_mig *mig = &fixed_of(device)->mig[device->mig];
    char name[2 * LAB_TEXT];
    snprintf(name, sizeof name, "%s MIG %ug.%llugb", fixed_of(device)->name, mig->slices,
             (unsigned long long)(mig->memory_mib + 1023) / 1024);
    return write_text(out, length, name);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *out, unsigned length) {
    REACH(device);
    const struct lab_fixed *fixed = fixed_of(device);
    return write_text(out, length, device->mig < 0 ? fixed->uuid : fixed->mig[device->mig].uuid);
}

nvmlReturn_t nvmlDeviceGetSerial(nvmlDevice_t device, char *out, unsigned length) {
    REACH(device);
    if (!fixed_of(device)->serial[0])
        return NVML_ERROR_NOT_SUPPORTED;
    return write_text(out, length, fixed_of(device)->serial);
}

nvmlReturn_t nvmlDeviceGetVbiosVersion(nvmlDevice_t device, char *out, unsigned length) {
    REACH(device);
    return write_text(out, length, fixed_of(device)->vbios);
}

nvmlReturn_t nvmlDeviceGetBoardPartNumber(nvmlDevice_t device, char *out, unsigned length) {
    REACH(device);
    return write_text(out, length, fixed_of(device)->board_part_number);
}

nvmlReturn_t nvmlDeviceGetBoardId(nvmlDevice_t device, unsigned *board) {
    REACH(device);
    NEED(board);
    *board = fixed_of(device)->pci_bus << 8;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index) {
    REACH(device);
    NEED(index);
    *index = (unsigned)(device->mig < 0 ? device->index : device->mig);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor) {
    REACH_WHOLE(device);
    NEED(minor);
    *minor = fixed_of(device)->minor;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetBrand(nvmlDevice_t device, unsigned *brand) {
    REACH(device);
    NEED(brand);
    const char *name = fixed_of(device)->name;
    *brand = strstr(name, "GeForce") ? 5 : strstr(name, "Tesla") ? 2 : 14; /* NVML_BRAND_GEFORCE, _TESLA, _NVIDIA */
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture) {
    REACH(device);
    NEED(architecture);
    *architecture = fixed_of(device)->architecture;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    REACH(device);
    NEED(major);
    NEED(minor);
    *major = (int)fixed_of(device)->capability_major;
    *minor = (int)fixed_of(device)->capability_minor;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, struct pci_info *info) {
    REACH_WHOLE(device);
    NEED(info);
    const struct lab_fixed *fixed = fixed_of(device);
    memset(info, 0, sizeof *info);
    info->domain = fixed->pci_domain;
    info->bus = fixed->pci_bus;
    info->device = fixed->pci_device;
    info->device_id = fixed->pci_id;
    info->subsystem_id = fixed->pci_subsystem;
    snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", info->domain & 0xffff,
             info->bus & 0xff, info->device & 0x1f);
    snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.0", info->domain, info->bus & 0xff,
             info->device & 0x1f);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v2(nvmlDevice_t device, struct pci_info *info) {
    return nvmlDeviceGetPciInfo_v3(device, info);
}

/* What a process of a MIG device sees is that device's part. */
static void memory_of(nvmlDevice_t device, struct memory_v2 *memory) {
    const struct lab_fixed *fixed = fixed_of(device);
    struct lab_now now;
    now_of(device, &now);
    memory->total = fixed->memory_bytes;
    memory->reserved = fixed->memory_reserved_bytes;
    memory->used = now.memory_used_bytes;
    if (device->mig >= 0) {
        memory->total = fixed->mig[device->mig].memory_mib << 20;
        memory->reserved = 0;
        memory->used = 0;
    }
    unsigned long long taken = memory->reserved + memory->used;
    memory->free = taken < memory->total ? memory->total - taken : 0;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, struct memory *memory) {
    REACH(device);
    NEED(memory);
    struct memory_v2 whole;
    memory_of(device, &whole);
    *memory = (struct memory){.total = whole.total, .free = whole.free, .used = whole.used + whole.reserved};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, struct memory_v2 *memory) {
    REACH(device);
    NEED(memory);
    if (memory->version != MEMORY_V2)
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memory_of(device, memory);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, struct memory *memory) {
    REACH(device);
    NEED(memory);
    unsigned long long total = fixed_of(device)->bar1_bytes, used = total < (2u << 20) ? total : 2u << 20;
    *memory = (struct memory){.total = total, .free = total - used, .used = used};
    return NVML_SUCCESS;
}

#define ANSWER(function, type, value)                                                                                  \
    nvmlReturn_t function(nvmlDevice_t device, type *out) {                                                            \
        REACH_WHOLE(device);                                                                                           \
        NEED(out);                                                                                                     \
        *out = (type)(value);                                                                                          \
        return NVML_SUCCESS;                                                                                           \
    }

ANSWER(nvmlDeviceGetComputeMode, unsigned, 0)
ANSWER(nvmlDeviceGetDisplayMode, unsigned, 0)
ANSWER(nvmlDeviceGetDisplayActive, unsigned, 0)
ANSWER(nvmlDeviceGetMaxPcieLinkGeneration, unsigned, fixed_of(device)->pcie_generation)
ANSWER(nvmlDeviceGetGpuMaxPcieLinkGeneration, unsigned, fixed_of(device)->pcie_generation)
ANSWER(nvmlDeviceGetCurrPcieLinkGeneration, unsigned, fixed_of(device)->pcie_generation)
ANSWER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, 16)
ANSWER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16)
