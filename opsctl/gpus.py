"""What a host's GPUs are now, against gpus.yml: ``opsctl gpus accept`` takes the one for the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsctl.agent.durable import write_atomically
from opsctl.engines.session import Session
from opsctl.errors import RefusedError
from opsctl.fleet import gpu_lock, gpus
from opsctl.fleet.gpu_lock import Gpu
from opsctl.fleet.model import Fleet, Host

ASK_TIMEOUT_S = 120.0  # without the persistence daemon each GPU takes seconds


@dataclass(frozen=True)
class Change:
    """What gpus.yml has of a host, and what the host has; each in PCI order."""

    host: str
    before: tuple[Gpu, ...]
    now: tuple[Gpu, ...]

    @property
    def gone(self) -> tuple[Gpu, ...]:
        there = {gpu.uuid for gpu in self.now}
        return tuple(gpu for gpu in self.before if gpu.uuid not in there)

    @property
    def new(self) -> tuple[Gpu, ...]:
        known = {gpu.uuid for gpu in self.before}
        return tuple(gpu for gpu in self.now if gpu.uuid not in known)


def look(fleet: Fleet, host: Host) -> Change:
    """Asks the host which GPUs it has.

    Raises:
        RefusedError: ``gpus.in_inventory``: not written in gpus.yml; ``gpus.none``; the host does not answer.
    """
    if gpus.listed(host.variables.get("gpu_uuids")):
        raise RefusedError("gpus.in_inventory", f"{host.name} has gpu_uuids in {fleet.inventory}, which stands above "
                           f"{gpu_lock.NAME}.", hint="correct gpu_uuids there, or remove it and accept again")
    with Session(fleet, host) as session:
        done = session.run(gpu_lock.QUERY, timeout_s=ASK_TIMEOUT_S)
    now = gpu_lock.settle(host.name, (), (), done.stdout + done.stderr)
    return Change(host.name, _locked(fleet).get(host.name, ()), now)


def accept(fleet: Fleet, change: Change) -> None:
    """Writes what the host has into gpus.yml; the entries of other hosts stay."""
    write_atomically(fleet.gpus_file, gpu_lock.render({**_locked(fleet), change.host: change.now}))


def words(change: Change) -> Sequence[str]:
    """A line for each GPU that went or came."""
    return [*(f"- {gpu.words}" for gpu in change.gone), *(f"+ {gpu.words}" for gpu in change.new)]


def _locked(fleet: Fleet) -> dict[str, tuple[Gpu, ...]]:
    text = fleet.gpus_file.read_text(encoding="utf-8") if fleet.gpus_file.exists() else ""
    return gpu_lock.read(text, fleet.gpus_file)
