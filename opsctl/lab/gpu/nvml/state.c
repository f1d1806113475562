/* The shared state of the machine's GPUs, as one process sees it: mapping, handles, device nodes, faults. */
#define _GNU_SOURCE
#include "lab.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define STATE "/proc/driver/nvidia/lab-state"
/* The same file where a unit's ProtectKernelTunables= or ProtectProc= has mounted a fresh /proc over the bound tree;
 * the real driver's folder is there in a fresh /proc too. */
#define STATE_TOO "/run/opsctl-lab/proc/nvidia/lab-state"
#define DEVICES "/dev"
#define STATE_OVERRIDE "OPSCTL_LAB_GPU_STATE"     /* for tests; both count only where there is neither */
#define DEVICES_OVERRIDE "OPSCTL_LAB_GPU_DEVICES" /* the folder of nvidiactl and nvidia<n> */
#define SPINS 500 /* a tick is written in microseconds ... */
#define NAPS 500  /* ... unless the silicon is held up in the middle, or has died there: then what there is must do */
#define NAP_NS 1000000
#define POLL_NS 20000000

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static unsigned users;
/* Never unmapped: a call of another thread may be in it. It serves the next init too, while the file is the same. */
static struct lab_machine *mapped;
static struct stat mapped_file;
static bool mapped_writable;
static struct device devices[LAB_GPUS];
static struct device mig_devices[LAB_GPUS][LAB_MIG_DEVICES];
static unsigned visible;

uint64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint32_t load_word(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

void store_word(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static const char *usual_state(void) { return access(STATE, F_OK) == 0 ? STATE : STATE_TOO; }

static const char *override(const char *variable, const char *usual) {
    const char *other = access(usual_state(), F_OK) == 0 ? NULL : getenv(variable);
    return other ? other : usual;
}

/* A device node of the driver, opened as the real library does: a sandbox that hides it is found out here. */
static int open_node(const char *name) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", override(DEVICES_OVERRIDE, DEVICES), name);
    int handle = open(path, O_RDWR | O_CLOEXEC);
    if (handle < 0)
        return errno;
    close(handle);
    return 0;
}

static nvmlReturn_t map_state(void) {
    const char *path = override(STATE_OVERRIDE, usual_state());
    bool writable = true;
    int handle = open(path, O_RDWR | O_CLOEXEC);
    if (handle < 0) {
        writable = false;
        handle = open(path, O_RDONLY | O_CLOEXEC);
    }
    if (handle < 0)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    struct stat about;
    void *found = MAP_FAILED;
    bool is_file = fstat(handle, &about) == 0 && (size_t)about.st_size == sizeof *mapped;
    if (is_file && mapped && writable == mapped_writable && about.st_dev == mapped_file.st_dev &&
        about.st_ino == mapped_file.st_ino)
        found = mapped;
    else if (is_file)
        found = mmap(NULL, sizeof *mapped, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, handle, 0);
    close(handle);
    if (found == MAP_FAILED)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    mapped = found;
    mapped_file = about;
    mapped_writable = writable;
    if (mapped->magic != LAB_MAGIC || mapped->version != LAB_VERSION || !mapped->module_version[0])
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (strncmp(mapped->module_version, DRIVER_VERSION, LAB_TEXT) != 0)
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    return NVML_SUCCESS;
}

/* GPUs without a node are not there for this process, those it may not open refuse. */
static nvmlReturn_t open_nodes(void) {
    int error = open_node("nvidiactl");
    if (error)
        return error == EACCES || error == EPERM ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
    visible = 0;
    for (unsigned gpu = 0; gpu < mapped->gpu_count && gpu < LAB_GPUS; gpu++) {
        char name[32];
        snprintf(name, sizeof name, "nvidia%u", mapped->gpus[gpu].fixed.minor);
        error = open_node(name);
        if (error == ENOENT)
            continue;
        devices[visible] = (struct device){.gpu = (int)gpu, .index = (int)visible, .mig = -1, .allowed = error == 0};
        for (int mig = 0; mig < LAB_MIG_DEVICES; mig++)
            mig_devices[gpu][mig] = (struct device){.gpu = (int)gpu, .index = (int)visible, .mig = mig,
                                                    .allowed = error == 0};
        visible++;
    }
    return NVML_SUCCESS;
}

nvmlReturn_t state_attach(void) {
    pthread_mutex_lock(&guard);
    nvmlReturn_t result = NVML_SUCCESS;
    if (!users) {
        result = map_state();
        if (result == NVML_SUCCESS)
            result = open_nodes();
    }
    if (result == NVML_SUCCESS)
        __atomic_add_fetch(&users, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&guard);
    return result;
}

void state_detach(void) {
    pthread_mutex_lock(&guard);
    if (users)
        __atomic_sub_fetch(&users, 1, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&guard);
}

bool state_attached(void) { return __atomic_load_n(&users, __ATOMIC_ACQUIRE) > 0; }

bool state_writable(void) { return mapped_writable; }

struct lab_machine *state(void) { return mapped; }

unsigned device_count(void) { return visible; }

nvmlDevice_t device_at(unsigned index) { return index < visible ? &devices[index] : NULL; }

nvmlDevice_t mig_device(int gpu, int mig) { return &mig_devices[gpu][mig]; }

bool device_is_known(nvmlDevice_t device) {
    bool whole = device >= devices && device < devices + visible;
    bool part = device >= &mig_devices[0][0] && device <= &mig_devices[LAB_GPUS - 1][LAB_MIG_DEVICES - 1];
    return whole || part;
}

struct lab_gpu *gpu_of(nvmlDevice_t device) { return &mapped->gpus[device->gpu]; }

const struct lab_fixed *fixed_of(nvmlDevice_t device) { return &gpu_of(device)->fixed; }

struct lab_settings *settings_of(nvmlDevice_t device) { return &gpu_of(device)->settings; }

bool can(nvmlDevice_t device, uint32_t ability) { return (fixed_of(device)->abilities & ability) != 0; }

/* Blocks while the driver hangs. Like a process in D state it hears no signal; only SIGKILL ends it. */
static void wait_out(const uint64_t *until_ns) {
    if (__atomic_load_n(until_ns, __ATOMIC_ACQUIRE) <= monotonic_ns())
        return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (__atomic_load_n(until_ns, __ATOMIC_ACQUIRE) > monotonic_ns())
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

nvmlReturn_t system_reach(void) {
    if (!state_attached())
        return NVML_ERROR_UNINITIALIZED;
    wait_out(&mapped->hang_until_ns);
    return NVML_SUCCESS;
}

nvmlReturn_t device_reach(nvmlDevice_t device) {
    nvmlReturn_t reached = system_reach();
    if (reached != NVML_SUCCESS)
        return reached;
    if (!device_is_known(device))
        return NVML_ERROR_INVALID_ARGUMENT;
    if (!device->allowed)
        return NVML_ERROR_NO_PERMISSION;
    wait_out(&gpu_of(device)->hang_until_ns);
    return load_word(&gpu_of(device)->lost) ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
}

/* One consistent tick of a GPU: read again when the silicon wrote meanwhile. */
void now_of(nvmlDevice_t device, struct lab_now *now) {
    const struct lab_gpu *gpu = gpu_of(device);
    for (int attempt = 0; attempt < SPINS + NAPS; attempt++) {
        uint32_t before = load_word(&gpu->sequence);
        memcpy(now, &gpu->now, sizeof *now);
        atomic_thread_fence(memory_order_acquire);
        if (!(before & 1) && before == load_word(&gpu->sequence))
            return;
        if (attempt >= SPINS)
            nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
    }
}

nvmlReturn_t write_text(char *out, unsigned length, const char *text) {
    NEED(out);
    if (strlen(text) + 1 > length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    memcpy(out, text, strlen(text) + 1);
    return NVML_SUCCESS;
}
