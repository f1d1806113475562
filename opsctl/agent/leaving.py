"""An instance that left services.yml: drained, stopped, and forgotten. Its releases stay until ``opsctl gc``.

Ansible disables the unit and takes the placement away afterwards; until then the same again goes on where it stopped.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from opsctl.agent import drains, systemd, unfinished
from opsctl.agent.durable import remove_durably, remove_tree, sync_directory
from opsctl.agent.idle import wait_until_idle
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, read_placement
from opsctl.agent.systemd import Run
from opsctl.agent.verbs import AddVerb, Arguments
from opsctl.errors import LockedError, OpsctlError

OWNER = "run:leaving"
DRAIN_S = 600.0  # as long as any release may give its engine to drain; stopping drains once more
LOOK_S = 2.0
STOP_TIMEOUT_S = 700.0  # longer than TimeoutStopSec of the engines' unit


def register(verb: AddVerb) -> None:
    verb("leave", _leave, "drain, stop and forget an instance that left services.yml; its releases stay"
         ).add_argument("instance")


def _leave(paths: Paths, arguments: Arguments) -> dict[str, Any]:
    return leave(paths, read_placement(paths, arguments.instance))


def leave(paths: Paths, placement: Placement, run: Run = systemd.run, drain_s: float = DRAIN_S) -> dict[str, Any]:
    """``{"changed", "instance", "stopped", "removed": [paths]}``.

    An engine that does not say what it has in flight is stopped at once: it drains by itself, for as long as it may.

    Raises:
        LockedError: a cutover works on it.
        OpsctlError: systemd would not stop it.
    """
    with unfinished.held(paths, placement.instance, wait=False) as mine:
        if not mine:
            raise LockedError("cutover.busy", f"a cutover works on {placement.instance}, which left services.yml.",
                              hint=f"when opsctl-cutover@{placement.instance} has ended, the same again")
        unit = systemd.show([placement.unit], run)[placement.unit]
        if unit.busy:
            drains.put(paths, placement.instance, OWNER, 0, "left services.yml", "opsctl provision")
            _wait(paths, placement, run, drain_s)
            _stop(placement, run)
        removed = _forget(paths, placement)
    return {"changed": unit.busy or bool(removed), "instance": placement.instance, "stopped": unit.busy,
            "removed": [str(path) for path in removed]}


def _wait(paths: Paths, placement: Placement, run: Run, drain_s: float) -> None:
    for _ in range(int(drain_s / LOOK_S)):
        seen = wait_until_idle(paths, placement, LOOK_S, run)
        if seen["idle"] or seen["running"] is None:
            return


def _stop(placement: Placement, run: Run) -> None:
    done: subprocess.CompletedProcess[str] = run(["systemctl", "stop", "--", placement.unit], timeout_s=STOP_TIMEOUT_S)
    if done.returncode:
        raise OpsctlError("instance.not_stopped", f"systemd could not stop {placement.unit}: {done.stderr.strip()}.",
                          hint=f"journalctl -u {placement.unit}",
                          log_tail=systemd.log_tail(placement.unit, run=run))


def _forget(paths: Paths, placement: Placement) -> list[Path]:
    """What only this instance needed. Should it come back, it has never served, and provision starts it first."""
    link, undo = paths.current(placement.service, placement.index), paths.undo(placement.instance)
    removed = []
    for path in (link, undo):
        if path.is_symlink() or path.exists():
            remove_durably(path)
            removed.append(path)
    for folder in (paths.drains(placement.instance), paths.gates / placement.instance, paths.cache(placement.instance)):
        if folder.is_dir():
            remove_tree(folder)
            sync_directory(folder.parent)
            removed.append(folder)
    return removed
