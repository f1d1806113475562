/* Event sets: each tells each XID once that happened after its GPU was registered, repeats too. */
#define _GNU_SOURCE
#include "lab.h"
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#define EVENT_XID 0x8ull
#define EVENT_TYPES 0x1full /* ECC, P-state, XID, clock: registered without complaint, only XIDs happen here */
#define POLL_NS 100000000

struct event_set {
    pthread_mutex_t guard;
    uint64_t seen; /* number of the last event told or passed over */
    uint64_t since[LAB_GPUS];
    bool registered[LAB_GPUS];
};
struct event_data {
    nvmlDevice_t device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
};

static uint64_t happened(void) { return __atomic_load_n(&state()->event_count, __ATOMIC_ACQUIRE); }

nvmlReturn_t nvmlEventSetCreate(struct event_set **set) {
    NEED(set);
    nvmlReturn_t reached = system_reach();
    if (reached != NVML_SUCCESS)
        return reached;
    *set = calloc(1, sizeof **set);
    if (!*set)
        return NVML_ERROR_MEMORY;
    pthread_mutex_init(&(*set)->guard, NULL);
    (*set)->seen = happened();
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlEventSetFree(struct event_set *set) {
    NEED(set);
    pthread_mutex_destroy(&set->guard);
    free(set);
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types) {
    REACH_WHOLE(device);
    NEED(types);
    *types = EVENT_TYPES;
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, struct event_set *set) {
    REACH_WHOLE(device);
    NEED(set);
    if (types & ~EVENT_TYPES)
        return NVML_ERROR_NOT_SUPPORTED;
    if (types & EVENT_XID) {
        pthread_mutex_lock(&set->guard);
        set->registered[device->gpu] = true;
        set->since[device->gpu] = happened();
        pthread_mutex_unlock(&set->guard);
    }
    return NVML_SUCCESS;
}

/* The next event of the set, if there is one. What fell out of the ring was missed, as in any queue. */
static bool next(struct event_set *set, struct event_data *data) {
    uint64_t last = happened();
    if (last - set->seen > LAB_EVENTS)
        set->seen = last - LAB_EVENTS;
    while (set->seen < last) {
        const struct lab_event *event = &state()->events[set->seen++ % LAB_EVENTS];
        if (event->gpu >= LAB_GPUS || !set->registered[event->gpu] || event->number <= set->since[event->gpu])
            continue;
        for (unsigned index = 0; index < device_count(); index++)
            if (device_at(index)->gpu == (int)event->gpu) {
                *data = (struct event_data){.device = device_at(index), .type = EVENT_XID, .data = event->xid,
                                            .gpu_instance = NOT_AVAILABLE, .compute_instance = NOT_AVAILABLE};
                return true;
            }
    }
    return false;
}

nvmlReturn_t nvmlEventSetWait_v2(struct event_set *set, struct event_data *data, unsigned timeout_ms) {
    NEED(set);
    NEED(data);
    uint64_t deadline = monotonic_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        nvmlReturn_t reached = system_reach();
        if (reached != NVML_SUCCESS)
            return reached;
        pthread_mutex_lock(&set->guard);
        bool found = next(set, data);
        pthread_mutex_unlock(&set->guard);
        if (found)
            return NVML_SUCCESS;
        if (monotonic_ns() >= deadline)
            return NVML_ERROR_TIMEOUT;
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
}

nvmlReturn_t nvmlEventSetWait(struct event_set *set, struct event_data *data, unsigned timeout_ms) {
    return nvmlEventSetWait_v2(set, data, timeout_ms);
}
