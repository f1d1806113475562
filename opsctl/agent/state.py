"""``opsctl-host state --json``: everything another machine may want to know of this host, read and never changed."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from opsctl.agent import environment, guard_view, holds, locks, passed, probes, systemd
from opsctl.agent import manifest as manifests
from opsctl.agent.drains import boot_clock, least_weight, read_drains
from opsctl.agent.gpu import told
from opsctl.agent.paths import Paths
from opsctl.agent.settings import Placement, Settings, read_placements, read_settings
from opsctl.agent.stage import existing, free_bytes_of
from opsctl.agent.store import Stored, stored_releases
from opsctl.agent.systemd import Run, Unit
from opsctl.errors import OpsctlError
from opsctl.serving import adapter

SCHEMA = "opsctl.host-state/v1"
VOICE_TIMEOUT_S = 1.0
VOICE_LIMIT = 1024  # bytes


def agent_version() -> str:
    try:
        return metadata.version("opsctl-agent")
    except metadata.PackageNotFoundError:  # in a checkout
        from opsctl import __version__  # noqa: PLC0415

        return __version__


def current_release(paths: Paths, placement: Placement) -> str:
    """The folder name of the release an instance serves, ``v1-0123456789ab``; empty when it never served."""
    try:
        return paths.current(placement.service, placement.index).readlink().name
    except OSError:
        return ""


def state(paths: Paths, run: Run = systemd.run) -> dict[str, Any]:
    """The document ``opsctl.host-state/v1``.

    Raises:
        ConfigurationError: the host is not provisioned, or a file of Ansible's is wrong.
        OpsctlError: systemd does not answer.
    """
    settings = read_settings(paths)
    placements = read_placements(paths)
    units = systemd.show([placement.unit for placement in placements], run)
    releases = {service: stored_releases(paths.releases(service)) for service in _services(paths, placements)}
    expected = tuple(dict.fromkeys([*settings.gpus, *(uuid for placement in placements for uuid in placement.gpus)]))
    gpus = told.read(paths.gpus, expected, boot_clock())
    guard = guard_view.look(paths, boot_clock())
    voices = _voices(settings, [placement.instance for placement in placements])
    return {
        "schema": SCHEMA,
        "host": settings.host,
        "agent": agent_version(),
        "instances": [{**_instance(paths, placement, units[placement.unit], releases[placement.service]),
                       "voice": voices[placement.instance]} for placement in placements],
        "releases": [{**stored.as_document(), "engine_built": environment.is_complete(paths, stored.release.engine)}
                     for service in sorted(releases) for stored in releases[service]],
        "free_bytes": free_bytes_of(existing(paths.services)),
        "lock": locks.told(paths),
        "holds": holds.all_holds(paths),
        "drains": [drain for placement in placements for drain in read_drains(paths, placement.instance)],
        **({"gpus": gpus} if gpus is not None else {}),
        **({"guard": guard} if guard is not None and guard["age_s"] is not None else {}),
    }


def _services(paths: Paths, placements: list[Placement]) -> set[str]:
    on_disk = {path.parent.name for path in paths.services.glob("*/releases")}
    return on_disk | {placement.service for placement in placements}


def _instance(paths: Paths, placement: Placement, unit: Unit, releases: list[Stored]) -> dict[str, Any]:
    name = current_release(paths, placement)
    version, _ = manifests.split_directory_name(name)
    stored = next((release for release in releases if release.name == name), None)
    health, running, waiting = _engine(placement, unit, stored)
    return {
        "instance": placement.instance, "service": placement.service, "index": placement.index,
        "port": placement.port, "unit": unit.active, "sub": unit.sub,
        "release": version if name else "", "digest": stored.digest if stored else "",
        "health": health, "running": running, "waiting": waiting, "since": unit.since,
        "unfinished": paths.undo(placement.instance).exists(),
        "weight": least_weight(read_drains(paths, placement.instance)),
        "gate": passed.read(paths, placement.instance, name) if name else None,
    }


def _voices(settings: Settings, instances: list[str]) -> dict[str, str]:
    """What the agent answers for each instance; all asked at once, because one that hangs costs its whole timeout."""
    if not instances:
        return {}
    with ThreadPoolExecutor(len(instances)) as pool:
        answers = pool.map(lambda instance: ask_voice(settings.listen, settings.agent_check_port, instance), instances)
        return dict(zip(instances, answers, strict=True))


def ask_voice(address: str, port: int, instance: str, timeout_s: float = VOICE_TIMEOUT_S) -> str:
    """The agent's word for an instance, as load balancers get it (``up 100%``); empty when there is none in time."""
    try:
        with socket.create_connection((address, port), timeout=timeout_s) as connection:
            connection.sendall(f"{instance}\n".encode())
            with connection.makefile("rb") as answer:
                return answer.readline(VOICE_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def _engine(placement: Placement, unit: Unit, stored: Stored | None) -> tuple[str, int | None, int | None]:
    if stored is None or not unit.busy:
        return "unknown", None, None
    try:
        engine = adapter(stored.release.engine.name)
    except OpsctlError:
        return "unknown", None, None
    if not probes.is_healthy(placement, engine):
        return "unhealthy", None, None
    return "healthy", *probes.in_flight(placement, engine)
