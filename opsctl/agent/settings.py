"""``/etc/opsctl/agent.toml`` and the placements: what Ansible wrote for this host, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opsctl.agent import flat_toml
from opsctl.agent.paths import Paths
from opsctl.errors import ConfigurationError

T = TypeVar("T")
PROVISION = "opsctl provision writes this file"


@dataclass(frozen=True)
class Settings:
    """This host. ``gateway_url`` is ``http://ADDRESS:8480``; ``listen`` an address for the agent, ports in TCP.

    ``exporter_port`` 0: no metrics. ``gpus`` are UUIDs that must be there beside those that placements name.
    """

    host: str
    listen: str
    agent_check_port: int
    gateway_url: str
    exporter_port: int = 0
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """One instance on this host: TCP address and port of its engine, UUIDs of its GPUs.

    ``statistics``: the read-only pages of the load balancers that send it requests, as URLs of CSV; ``min_serving``
    others must serve before the guard may stop it.
    """

    instance: str
    service: str
    index: int
    address: str
    port: int
    gpus: tuple[str, ...] = ()
    tensor_parallel: int = 1
    min_serving: int = 1
    statistics: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        return f"inference@{self.instance}.service"


def read_settings(paths: Paths) -> Settings:
    """Raises ConfigurationError naming file and key."""
    table = _read(paths.settings)
    return Settings(
        host=_take(table, "host", str, paths.settings),
        listen=_take(table, "listen", str, paths.settings),
        agent_check_port=_take(table, "agent_check_port", int, paths.settings),
        gateway_url=_take(table, "gateway_url", str, paths.settings).rstrip("/"),
        exporter_port=_take(table, "exporter_port", int, paths.settings, 0),
        gpus=tuple(str(gpu) for gpu in _take(table, "gpus", list, paths.settings, [])),
    )


def read_placement(paths: Paths, instance: str) -> Placement:
    """Raises ConfigurationError: no such instance here, or a wrong file."""
    path = paths.placements / f"{instance}.toml"
    if "/" in instance or not path.is_file():
        raise ConfigurationError("instance.unknown", f"there is no instance {instance} on this host ({path}).",
                                 hint="instances here: " + (", ".join(instance_names(paths)) or "none"))
    table = _read(path)
    gpus = _take(table, "gpus", list, path, [])
    placement = Placement(
        instance=_take(table, "instance", str, path),
        service=_take(table, "service", str, path),
        index=_take(table, "index", int, path),
        address=_take(table, "address", str, path),
        port=_take(table, "port", int, path),
        gpus=tuple(str(gpu) for gpu in gpus),
        tensor_parallel=_take(table, "tensor_parallel", int, path, 1),
        min_serving=_take(table, "min_serving", int, path, 1),
        statistics=tuple(str(url) for url in _take(table, "statistics", list, path, [])),
    )
    if placement.instance != instance or instance != f"{placement.service}.{placement.index}":
        raise ConfigurationError("instance.wrong_placement", f"{path}: instance = {placement.instance}, but the file, "
                                 f"service and index say {placement.service}.{placement.index}.", hint=PROVISION)
    return placement


def instance_names(paths: Paths) -> list[str]:
    """The instances that are placed on this host, sorted; files that Ansible is just writing are left out."""
    if not paths.placements.is_dir():
        return []
    return sorted(path.stem for path in paths.placements.glob("*.toml") if not path.name.startswith("."))


def read_placements(paths: Paths) -> list[Placement]:
    return [read_placement(paths, instance) for instance in instance_names(paths)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return flat_toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError("host.not_provisioned", f"there is no {path}.", hint=PROVISION) from None
    except (ValueError, OSError) as error:
        raise ConfigurationError("host.bad_file", f"{path} cannot be read: {error}.", hint=PROVISION) from None


def _take(table: Mapping[str, Any], key: str, kind: type[T], path: Path, default: T | None = None) -> T:
    value = table.get(key, default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    was = "missing" if value is None else f"{value!r}"
    raise ConfigurationError("host.bad_file", f"{path}: {key} is {was}, expected {kind.__name__}.", hint=PROVISION)
