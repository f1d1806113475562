/* What the parts of the lab's libnvidia-ml.so.1 share. layout.h is written by layout.py at build. */
#pragma once
#include "layout.h"
#include <stdbool.h>
#include <stddef.h>

/* nvml.h is not there to include: the names and numbers used here are NVIDIA's. */
enum nvml_return {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NO_PERMISSION = 4,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18,
    NVML_ERROR_MEMORY = 20,
    NVML_ERROR_INSUFFICIENT_RESOURCES = 23,
    NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25,
};
typedef enum nvml_return nvmlReturn_t;

/* A handle: a GPU, or one of its MIG devices (mig >= 0). */
struct device {
    int gpu;   /* in the shared state, in PCI order */
    int index; /* among those whose device node this process may open */
    int mig;
    bool allowed;
};
typedef struct device *nvmlDevice_t;

#define NOT_AVAILABLE 0xffffffffu

/* state.c: the mapping, the handles, the faults. */
nvmlReturn_t state_attach(void);
void state_detach(void);
bool state_attached(void);
bool state_writable(void); /* a sandbox may have it read-only */
struct lab_machine *state(void);
unsigned device_count(void);
nvmlDevice_t device_at(unsigned index);
nvmlDevice_t mig_device(int gpu, int mig);
nvmlReturn_t device_reach(nvmlDevice_t device); /* valid, not hanging, not lost */
nvmlReturn_t system_reach(void);
bool device_is_known(nvmlDevice_t device);
bool can(nvmlDevice_t device, uint32_t ability);
const struct lab_fixed *fixed_of(nvmlDevice_t device);
struct lab_settings *settings_of(nvmlDevice_t device);
struct lab_gpu *gpu_of(nvmlDevice_t device);
void now_of(nvmlDevice_t device, struct lab_now *now);
uint64_t monotonic_ns(void);
uint32_t load_word(const uint32_t *word);
void store_word(uint32_t *word, uint32_t value);
nvmlReturn_t write_text(char *out, unsigned length, const char *text);

/* Begins every query of a GPU: answers for a wrong handle, a hanging driver, a lost GPU. */
#define REACH(device)                                                                                                  \
    do {                                                                                                               \
        nvmlReturn_t reached = device_reach(device);                                                                   \
        if (reached != NVML_SUCCESS)                                                                                   \
            return reached;                                                                                            \
    } while (0)
/* ... and of one that a MIG device has no answer to. */
#define REACH_WHOLE(device)                                                                                            \
    do {                                                                                                               \
        REACH(device);                                                                                                 \
        if ((device)->mig >= 0)                                                                                        \
            return NVML_ERROR_NOT_SUPPORTED;                                                                           \
    } while (0)
#define NEED(pointer)                                                                                                  \
    do {                                                                                                               \
        if (!(pointer))                                                                                                \
            return NVML_ERROR_INVALID_ARGUMENT;                                                                        \
    } while (0)
#define NEED_ABILITY(device, ability)                                                                                  \
    do {                                                                                                               \
        if (!can(device, ability))                                                                                     \
            return NVML_ERROR_NOT_SUPPORTED;                                                                           \
    } while (0)
