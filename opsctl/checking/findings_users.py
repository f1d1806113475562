"""Who else is at the GPUs, or at the port of our exporter. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opsctl.checking.model import Captured, Judged, Wanted, fix, good, on, skip, some
from opsctl.checking.reading import container_names, container_of
from opsctl.fleet.model import EXPORTER_PORT

# Units that hold GPUs and are meant to: ours, NVIDIA's daemons, and monitors that only look.
OURS = re.compile(r"^(?:inference@.*|opsctl-.*|nvidia-(?:persistenced|fabricmanager|dcgm|imex)|dcgm-exporter)"
                  r"\.service$")
NOT_ROOT = "only root sees other people's processes"


def processes(captured: Captured, wanted: Wanted) -> Judged:
    if not captured.as_root:
        return skip(NOT_ROOT)
    foreign = [one for one in captured.rows("gpu_users") if not OURS.match(one["unit"])
               and not container_of(one["cgroup"])]
    if foreign:
        who = [f"{one['name']} (pid {one['pid']}{', ' + one['unit'] if one['unit'] else ''}) on "
               f"{', '.join(name.removeprefix('/dev/nvidia') for name in one['devices'])}" for one in foreign]
        return fix(f"others have GPUs open: {some(who)}: engines do not get their memory, and no driver is changed "
                   "under them", _end(wanted, foreign[0]))
    return good("nobody else has a GPU open")


def containers(captured: Captured, wanted: Wanted) -> Judged:
    if not captured.as_root:
        return skip(NOT_ROOT)
    names = container_names(captured)
    there = list(dict.fromkeys(container_of(one["cgroup"]) for one in captured.rows("gpu_users")
                               if container_of(one["cgroup"])))
    if there:
        program = "podman" if captured.exit("podman") == 0 and there[0] in captured.out("podman") else "docker"
        return fix(f"containers have GPUs open: {some([names.get(one, one[:12]) for one in there])}", on(
            wanted, program, "stop", names.get(there[0], there[0][:12]).partition(" ")[0]))
    return good("no container has a GPU open")


def _end(wanted: Wanted, one: Mapping[str, Any]) -> str:
    if str(one["unit"]).endswith(".service"):
        return on(wanted, "systemctl", "stop", one["unit"])
    return on(wanted, "kill", str(one["pid"]))


def exporter(captured: Captured, wanted: Wanted) -> Judged:
    """Port 9400 is our exporter's; NVIDIA's own listens there by default too."""
    if not captured.as_root:
        return skip(NOT_ROOT)
    foreign = [one for one in captured.rows("listeners") if one["port"] == EXPORTER_PORT
               and not one["unit"].startswith("opsctl-")]
    if foreign:
        one = foreign[0]
        who = f"{one['name']} (pid {one['pid']}{', ' + one['unit'] if one['unit'] else ''})" if one["pid"] else \
            "something that no process shows"
        return fix(f"{who} listens on 9400, which is our exporter's port", _end(wanted, one) if one["pid"] else
                   on(wanted, "ss", "-tlnp", "sport = :9400"), stops=True)
    return good("port 9400 is ours" if captured.rows("listeners") else "port 9400 is free")
