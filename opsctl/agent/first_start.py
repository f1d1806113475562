"""The first start of an instance that has never served: point it at a staged release, start it, wait until it is well.

The undo is written down before the first act. A first start that was cut off is undone: after a power cut by
``recover``, at boot, before any instance starts; after a killed job by the next one, before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opsctl.agent import environment, probes, systemd, trust, unfinished
from opsctl.agent.durable import point_symlink, remove_durably
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, read_placement
from opsctl.agent.state import current_release
from opsctl.agent.store import Stored
from opsctl.agent.systemd import Run
from opsctl.errors import OpsctlError, RefusedError, RolledBackError
from opsctl.serving import adapter
from opsctl.serving.adapter import Adapter, served_names

POLL_S = 0.2
START_TIMEOUT_S = 600  # of an engine whose releases do not say
STOP_TIMEOUT_S = 700.0
LOG_LINES = 20


def job_name(instance: str) -> str:
    return f"opsctl-first-start-{instance}"


def first_start(paths: Paths, instance: str, release: str, *, run: Run = systemd.run,
                doing: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic,
                pause: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Starts ``instance`` on the staged release in folder ``release``; an instance that has served is left alone.

    Returns ``{"changed", "instance", "release"}``; ``release`` is what it serves now.

    Raises:
        RefusedError: the release is not staged here, or not signed by whom we trust.
        RolledBackError: it did not come up; it is as it was before.
    """
    placement = read_placement(paths, instance)
    with unfinished.held(paths, instance):
        if paths.undo(instance).exists():
            _undo(paths, instance, run)
        serving = current_release(paths, placement)
        if serving:
            return {"changed": False, "instance": instance, "release": serving}
        engine, timeout_s = _staged(paths, placement, release)
        unfinished.write(paths, instance)
        try:
            point_symlink(paths.current(placement.service, placement.index), f"releases/{release}")
            doing("start")
            _start_and_wait(placement, engine, release, timeout_s, run, clock, pause)
        except (OpsctlError, OSError) as error:
            log = _last_words(placement.unit, run)
            _undo(paths, instance, run)
            raise RolledBackError("instance.did_not_start", f"{instance} did not start on {release}: {error}",
                                  hint=f"journalctl -u {placement.unit} on the host says more; it has no release again",
                                  log_tail=log) from error
        remove_durably(paths.undo(instance))
    return {"changed": True, "instance": instance, "release": release}


def recover(paths: Paths, *, run: Run = systemd.run) -> dict[str, Any]:
    """Undoes every first start that ended with an earlier boot; ``{"changed", "undone"}``. Runs before instances do.

    Raises:
        OpsctlError: a unit that runs would not stop; all other instances were looked after.
    """
    undone: list[str] = []
    failed: list[OpsctlError] = []
    for instance in unfinished.instances(paths):
        with unfinished.held(paths, instance, wait=False) as mine:
            if not mine or not unfinished.of_earlier_boot(paths, instance):
                continue
            try:
                _undo(paths, instance, run)
                undone.append(instance)
            except OpsctlError as error:
                failed.append(error)
    if failed:
        raise failed[0]
    return {"changed": bool(undone), "undone": undone}


def _staged(paths: Paths, placement: Placement, release: str) -> tuple[Adapter, float]:
    directory = paths.releases(placement.service) / release
    if not directory.is_dir():
        raise RefusedError("release.not_staged", f"{release} is not staged on this host ({directory}).",
                           hint=f"opsctl-host stage --service {placement.service} --release {release}")
    signed = trust.read_signed(directory, paths.allowed_signers)
    whole = Stored(directory, signed.release, signed.digest).complete()
    if not whole or not environment.is_complete(paths, signed.release.engine):
        raise RefusedError("release.not_staged", f"{release} or its engine is only partly on this host.",
                           hint=f"opsctl-host stage --service {placement.service} --release {release}")
    return adapter(signed.release.engine.name), float(signed.release.arguments.get("start_timeout_s", START_TIMEOUT_S))


def _start_and_wait(placement: Placement, engine: Adapter, release: str, timeout_s: float, run: Run,
                    clock: Callable[[], float], pause: Callable[[float], None]) -> None:
    deadline = clock() + timeout_s
    done = run(["systemctl", "start", "--", placement.unit], timeout_s=timeout_s)
    if done.returncode:
        raise OpsctlError("instance.start", f"systemctl start failed: {done.stderr.strip()}")
    _, name = served_names(placement.service, release)
    while True:
        unit = systemd.show([placement.unit], run)[placement.unit]
        if unit.restarts or unit.active in ("failed", "inactive"):
            raise OpsctlError("instance.died", f"{placement.unit} ended ({unit.active}, {unit.sub}).")
        if unit.active == "active" and probes.is_healthy(placement, engine):
            names = probes.served_names(placement)
            if name in names:
                return
            raise OpsctlError("instance.identity", f"{placement.address}:{placement.port} serves "
                              f"{', '.join(sorted(names)) or 'nothing'}, not {name}.")
        if clock() >= deadline:
            raise OpsctlError("instance.not_healthy", f"not healthy after {timeout_s:.0f} s.")
        pause(POLL_S)


def _last_words(unit: str, run: Run) -> tuple[str, ...]:
    """What the unit wrote, if the journal can be read: the undo must not wait for a journal that cannot."""
    try:
        return systemd.log_tail(unit, LOG_LINES, run)
    except OpsctlError as error:
        return (error.message,)


def _undo(paths: Paths, instance: str, run: Run) -> None:
    """Stops the unit and takes the release away again; the record goes last. Needs no placement: it may have left."""
    unit = f"inference@{instance}.service"
    # At boot it waits for us in systemd's queue: nothing is to be stopped, and without a release it will not start.
    if systemd.show([unit], run)[unit].active != "inactive":
        done = run(["systemctl", "stop", "--", unit], timeout_s=STOP_TIMEOUT_S)
        if done.returncode:
            raise OpsctlError("instance.not_stopped", f"systemctl stop {unit} failed: {done.stderr.strip()}.",
                              hint=f"systemctl status {unit} on the host; its first start is still to be undone")
        run(["systemctl", "reset-failed", "--", unit])
    service, _, index = instance.rpartition(".")
    remove_durably(paths.current(service, int(index)))
    remove_durably(paths.undo(instance))
