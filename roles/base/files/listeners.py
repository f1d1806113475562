"""Prints who else listens on TCP ports of ours: PORT=UNIT... gives
``[{"port": 8480, "unit": "x.service", "sentence": "8480 is held by python3 (pid 17, x.service)"}]``.

A listener of the unit itself is none of them; a template's instances may trade ports, so they count as one unit.
Reads /proc alone, as root: no tool for it is on every host.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

LISTEN = "0A"  # include/net/tcp_states.h


def listening_sockets(table: str, ports: set[int]) -> dict[str, int]:
    """The text of /proc/net/tcp or tcp6 -> ``{"socket:[inode]": port}`` of the ports that somebody listens on."""
    sockets = {}
    for line in table.splitlines()[1:]:
        fields = line.split()
        port = int(fields[1].rsplit(":", 1)[1], 16)
        if fields[3] == LISTEN and port in ports:
            sockets[f"socket:[{fields[9]}]"] = port
    return sockets


def unit_of(cgroup: str) -> str:
    """The text of /proc/PID/cgroup -> the unit that the process belongs to."""
    for line in cgroup.splitlines():
        for part in reversed(line.split("/")):
            if part.endswith((".service", ".scope")):
                return part
    return "no unit"


def is_ours(unit: str, ours: str) -> bool:
    return unit.partition("@")[0] == ours.partition("@")[0]


def holders(sockets: dict[str, int]) -> Iterator[tuple[int, str, str]]:
    """(port, unit, who in words) of each process that holds one of the sockets, and of sockets that nobody shows."""
    hidden = set(sockets)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            links = {str(descriptor.readlink()) for descriptor in (process / "fd").iterdir()}
            for socket in links & sockets.keys():
                hidden.discard(socket)
                program = (process / "comm").read_text(encoding="utf-8").strip()
                unit = unit_of((process / "cgroup").read_text(encoding="utf-8"))
                yield sockets[socket], unit, f"{program} (pid {process.name}, {unit})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is not ours to look at
    for socket in hidden:
        yield sockets[socket], "", "something that no process shows"


def main() -> None:
    wanted = {int(port): unit for port, _, unit in (argument.partition("=") for argument in sys.argv[1:])}
    sockets: dict[str, int] = {}
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if path.exists():
            sockets |= listening_sockets(path.read_text(encoding="ascii"), set(wanted))
    foreign = {(port, unit): who for port, unit, who in holders(sockets) if not is_ours(unit, wanted[port])}
    sys.stdout.write(json.dumps([{"port": port, "unit": unit, "sentence": f"{port} is held by {who}"}
                                 for (port, unit), who in sorted(foreign.items())]))


if __name__ == "__main__":
    main()
