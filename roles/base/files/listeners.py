"""Prints who listens on the TCP ports given: ``[{"port": 8480, "pid": 17, "program": "nginx", "unit": "nginx.service"}]``.

Reads /proc alone, as root: no tool for it is on every host. A process outside of any unit has its session's scope.
"""

import json
import os
import sys

LISTEN = "0A"  # include/net/tcp_states.h


def listening_sockets(ports):
    """``{socket inode: port}`` of the ports that somebody listens on."""
    sockets = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        with open(table, encoding="ascii") as lines:
            next(lines)
            for line in lines:
                fields = line.split()
                port = int(fields[1].rsplit(":", 1)[1], 16)
                if fields[3] == LISTEN and port in ports:
                    sockets[f"socket:[{fields[9]}]"] = port
    return sockets


def unit_of(pid):
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as lines:
        for line in lines:
            for part in reversed(line.strip().split("/")):
                if part.endswith((".service", ".scope")):
                    return part
    return "no unit"


def holders(sockets):
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                port = sockets.get(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
                if port is None:
                    continue
                with open(f"/proc/{pid}/comm", encoding="utf-8") as name:
                    found[(port, unit_of(pid))] = {"port": port, "pid": int(pid), "program": name.read().strip(),
                                                   "unit": unit_of(pid)}
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return [found[key] for key in sorted(found)]


print(json.dumps(holders(listening_sockets({int(port) for port in sys.argv[1:]}))))
