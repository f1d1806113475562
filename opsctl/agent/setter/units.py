"""Stopping and starting instances: only those placed here, never while a cutover works on one, and without waiting."""

from __future__ import annotations

from opsctl.agent import systemd
from opsctl.agent.paths import Paths
from opsctl.agent.setter.protocol import Answer, RefusedRequest
from opsctl.agent.settings import instance_names
from opsctl.errors import OpsctlError

TIMEOUT_S = 2.0  # two of them are less than whoever asks waits


def stop_orders(instance: str, how: str) -> list[list[str]]:
    """``drain``: the engine finishes what it has. ``now``: the stop first, else systemd would start it again."""
    unit = f"inference@{instance}.service"
    stop = ["systemctl", "stop", "--no-block", "--", unit]
    return [stop] if how == "drain" else [stop, ["systemctl", "kill", "--signal=SIGKILL", "--", unit]]


def start_orders(instance: str) -> list[list[str]]:
    return [["systemctl", "start", "--no-block", "--", f"inference@{instance}.service"]]


def stop(paths: Paths, instance: str, how: str, run: systemd.Run = systemd.run) -> Answer:
    _check(paths, instance)
    _order(stop_orders(instance, how), run)
    return {"how": how}


def start(paths: Paths, instance: str, run: systemd.Run = systemd.run) -> Answer:
    _check(paths, instance)
    _order(start_orders(instance), run)
    return {}


def _check(paths: Paths, instance: str) -> None:
    if instance not in instance_names(paths):
        raise RefusedRequest("unknown_instance", f"{instance} is not placed on this host")
    if paths.undo(instance).exists():
        raise RefusedRequest("busy", f"a cutover of {instance} is under way: it stops and starts the unit itself")


def _order(orders: list[list[str]], run: systemd.Run) -> None:
    for order in orders:
        try:
            done = run(order, timeout_s=TIMEOUT_S)
        except OpsctlError as error:
            raise RefusedRequest("failed", error.message) from None
        if done.returncode:
            raise RefusedRequest("failed", f"{' '.join(order)}: {done.stderr.strip()}")
