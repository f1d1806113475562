"""Where everything lies on a host. ``root`` is ``/`` but in tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """The host's folders, as the design lists them."""

    root: Path = Path("/")

    @property
    def settings(self) -> Path:
        return self.root / "etc/opsctl/agent.toml"

    @property
    def placements(self) -> Path:
        return self.root / "etc/opsctl/instances"

    @property
    def allowed_signers(self) -> Path:
        return self.root / "etc/opsctl/trust/allowed_signers"

    @property
    def engines(self) -> Path:
        return self.root / "opt/opsctl/engines"

    @property
    def services(self) -> Path:
        return self.root / "srv/opsctl"

    def releases(self, service: str) -> Path:
        return self.services / service / "releases"

    def current(self, service: str, index: int) -> Path:
        """The symlink that says which release an instance serves; the one thing a cutover changes."""
        return self.services / service / f"current.{index}"

    @property
    def state(self) -> Path:
        return self.root / "var/lib/opsctl"

    def undo(self, instance: str) -> Path:
        """Written before a cutover acts, gone when the instance has passed its gate (``unfinished.py``)."""
        return self.undos / f"{instance}.json"

    @property
    def undos(self) -> Path:
        return self.state / "undo"

    @property
    def boot_id(self) -> Path:
        """Our name for this boot (``unfinished.boot``); /run is empty after each."""
        return self.root / "run/opsctl/boot"

    def drains(self, instance: str) -> Path:
        return self.state / "drains" / instance

    @property
    def locks(self) -> Path:
        """Whose run is at work here, and on the gateway at a service (``locks.py``)."""
        return self.state / "locks"

    @property
    def holds(self) -> Path:
        """Hosts that are to be left alone (``holds.py``): on the gateway all, elsewhere a copy of the host's own."""
        return self.state / "holds"

    @property
    def runs(self) -> Path:
        """The gateway's journals, one for each run (``runs.py``)."""
        return self.state / "runs"

    def cache(self, instance: str) -> Path:
        """HOME and compile caches of an instance's engine: its unit's CacheDirectory."""
        return self.root / "var/cache/opsctl" / instance

    @property
    def gates(self) -> Path:
        """What releases showed at the last gate that they passed, a folder for each instance (``passed.py``)."""
        return self.state / "gates"

    @property
    def ledger_copies(self) -> Path:
        """This host's copies of the gateway's ledgers: they count while the gateway is down."""
        return self.state / "ledger"

    @property
    def gpus(self) -> Path:
        """What the agent last saw of this host's GPUs (``gpu/told.py``); the folder is its unit's RuntimeDirectory."""
        return self.root / "run/opsctl/agent/gpus.json"

    @property
    def gpu_reader_lock(self) -> Path:
        """Held by the process that asks NVML, also by one that an agent before this one left behind."""
        return self.root / "run/opsctl/agent/gpu-reader.lock"

    def draining(self, instance: str) -> Path:
        """Written by an engine that got SIGTERM; the folder is the unit's RuntimeDirectory."""
        return self.root / "run/opsctl/instances" / instance / "draining"

    @property
    def balancer_socket(self) -> Path:
        """HAProxy's own, where there is one."""
        return self.root / "run/haproxy/admin.sock"

    @property
    def balancer_master(self) -> Path:
        """The socket of HAProxy's master process, which knows of processes that a reload left behind."""
        return self.root / "run/haproxy-master.sock"

    @property
    def jobs(self) -> Path:
        return self.root / "run/opsctl/jobs"

    def rate_limit(self, job: str) -> Path:
        """Bytes per second that a running job may fetch; no file: as fast as it can."""
        return self.jobs / f"{job}.rate-limit"

    @property
    def gateway_releases(self) -> Path:
        return self.root / "srv/opsctl-gateway/releases"

    @property
    def ledgers(self) -> Path:
        return self.root / "srv/opsctl-gateway/ledger"

    @property
    def guard(self) -> Path:
        """What the guard is at and how it came there, for all to read (``guard/told.py``)."""
        return self.root / "run/opsctl/agent/guard.json"

    @property
    def guard_state(self) -> Path:
        """What the guard remembers over a restart of the agent; the folder is its unit's StateDirectory."""
        return self.state / "guard/state.json"

    @property
    def guard_orders(self) -> Path:
        """What an operator told the guard (``opsctl guard mode``, a latch that is lifted); written by opsctl-host."""
        return self.state / "guard-orders.json"

    @property
    def guard_policy(self) -> Path:
        """Numbers of the guard that differ from its own; Ansible's."""
        return self.root / "etc/opsctl/guard.toml"

    @property
    def setter_socket(self) -> Path:
        """Where the part with root listens that sets clocks, power limits and units."""
        return self.root / "run/opsctl/setter/setter.sock"

    @property
    def setter_state(self) -> Path:
        """What that part has set and not yet restored; fsynced before it sets."""
        return self.state / "setter/set.json"
