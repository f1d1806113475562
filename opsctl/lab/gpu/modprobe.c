/* The lab's nvidia-modprobe: loads "the module", makes the device nodes; -r unloads it and takes them away.
 *
 * The module is what the package nvidia-kernel-*-dkms built: /lib/modules/lab/nvidia.version holds its version. Loading
 * is asked of the silicon, outside the machine, through the shared state. Exit status: 0 done, 1 refused, 2 usage.
 * Options of the real one that a lab needs no more than this for are taken and do nothing: -m -u -s, -c MINOR.
 */
#define _GNU_SOURCE
#include "layout.h"
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define MARK "/etc/opsctl-lab"
#define MODULE "/lib/modules/lab/nvidia.version"
#define STATE "/proc/driver/nvidia/lab-state"
#define WAIT_MS 10000
#define POLL_MS 20
#define NULL_MAJOR 1 /* /dev/null: a container may make no other node, and the library only opens it */
#define NULL_MINOR 3

static int refuse(const char *sentence) {
    fprintf(stderr, "nvidia-modprobe (lab): %s\n", sentence);
    return 1;
}

static void pause_ms(unsigned ms) { nanosleep(&(struct timespec){.tv_nsec = ms * 1000000L}, NULL); }

/* The first line: a version, and perhaps the module's flavour after it. */
static bool read_module(char *line) {
    FILE *stream = fopen(MODULE, "r");
    if (!stream)
        return false;
    bool read = fgets(line, LAB_TEXT, stream) != NULL;
    fclose(stream);
    line[strcspn(line, "\r\n")] = 0;
    return read && line[0];
}

/* The silicon binds the state into the machine within a moment of its boot. */
static struct lab_machine *map_state(void) {
    for (int waited = 0; waited <= WAIT_MS; waited += POLL_MS, pause_ms(POLL_MS)) {
        int handle = open(STATE, O_RDWR | O_CLOEXEC);
        if (handle < 0)
            continue;
        struct lab_machine *found = mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
        close(handle);
        if (found != MAP_FAILED && found->magic == LAB_MAGIC && found->version == LAB_VERSION)
            return found;
    }
    return NULL;
}

static bool is_loaded(const struct lab_machine *machine, const char *line) {
    size_t length = strcspn(line, " ");
    return strncmp(machine->module_version, line, length) == 0 && machine->module_version[length] == 0;
}

/* An empty line asks to unload. */
static bool ask(struct lab_machine *machine, const char *line) {
    if (is_loaded(machine, line))
        return true;
    memcpy(machine->requested_version, line, LAB_TEXT);
    uint32_t number = __atomic_add_fetch(&machine->request, 1, __ATOMIC_ACQ_REL);
    for (int waited = 0; waited <= WAIT_MS; waited += POLL_MS, pause_ms(POLL_MS))
        if (__atomic_load_n(&machine->answered, __ATOMIC_ACQUIRE) == number)
            return is_loaded(machine, line);
    return false;
}

static bool node(const char *path, bool wanted) {
    if (!wanted)
        return unlink(path) == 0 || errno == ENOENT;
    mode_t before = umask(0);
    bool made = mknod(path, S_IFCHR | 0666, makedev(NULL_MAJOR, NULL_MINOR)) == 0 || errno == EEXIST;
    umask(before);
    return made;
}

static bool nodes(const struct lab_machine *machine, bool wanted) {
    bool done = node("/dev/nvidiactl", wanted) && node("/dev/nvidia-uvm", wanted);
    for (unsigned gpu = 0; gpu < machine->gpu_count; gpu++) {
        char path[64];
        snprintf(path, sizeof path, "/dev/nvidia%u", machine->gpus[gpu].fixed.minor);
        done = node(path, wanted) && done;
    }
    return done;
}

int main(int count, char **words) {
    bool unload = false;
    for (int option; (option = getopt(count, words, "rmusc:f:")) != -1;) {
        if (option == 'r')
            unload = true;
        if (option == '?')
            return 2;
    }
    if (access(MARK, F_OK) != 0)
        return refuse("this is no machine of an opsctl lab, and this is no driver.");
    if (geteuid() != 0)
        return refuse("only root may load the module.");
    char line[LAB_TEXT] = "";
    if (!unload && !read_module(line))
        return refuse("there is no module: " MODULE " is missing; nvidia-kernel-*-dkms builds it.");
    struct lab_machine *machine = map_state();
    if (!machine)
        return refuse("there is no GPU: " STATE " is missing; was the lab brought up with --gpus?");
    if (unload)
        return nodes(machine, false) && ask(machine, line) ? 0 : refuse("the module could not be unloaded.");
    if (machine->module_version[0] && !is_loaded(machine, line))
        fprintf(stderr, "nvidia-modprobe (lab): %s is loaded; %s comes with the next boot.\n", machine->module_version,
                line);
    else if (!ask(machine, line))
        return refuse("the module was not loaded: the lab's silicon process does not answer.");
    return nodes(machine, true) ? 0 : refuse("the device nodes could not be made in /dev.");
}
