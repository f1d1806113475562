#!/bin/sh
# keep-booted.sh CGROUP... -- COMMAND...: runs a machine in its cgroups, and once more each time that it reboots.
set -u
groups=
while [ "$1" != -- ]; do
    groups="$groups $1"
    shift
done
shift
while :; do
    (
        for group in $groups; do
            echo 0 >"$group/cgroup.procs" || exit 1 # 0: the process that writes
        done
        exec "$@"
    )
    status=$?
    # with --keep-unit systemd-nspawn leaves the reboot to a service manager and says so by 133
    [ "$status" -eq 133 ] || exit "$status"
done
