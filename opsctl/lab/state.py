"""What a lab is, on disk: the next command, in another process, finds everything here.

Directories are the locks (flock on a directory), so that nothing is left when a lab has gone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Literal

from opsctl.agent.durable import write_atomically
from opsctl.errors import UsageError
from opsctl.lab.gpu.profiles import Gpus
from opsctl.lab.processes import Process

STATE_ROOT = Path("/var/lib/opsctl-lab")
CACHE_ROOT = Path("/var/cache/opsctl-lab")
SCHEMA = "opsctl.lab-state/v1"
NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
DEFAULT_NAME = "lab"

Condition = Literal["running", "off", "unprepared"]


@dataclass(frozen=True)
class Machine:
    """One machine of a lab. ``user`` is who logs in; ``proxy_jump`` the machine that leads there, or empty.

    ``gpus`` are its simulated GPUs; None: it has none.
    """

    name: str
    address: str
    groups: tuple[str, ...]
    user: str = "root"
    proxy_jump: str = ""
    gpus: Gpus | None = None
    prepared: bool = False  # its disk is made and its files are written
    keeper: Process | None = None  # keep-booted.sh, which lives as long as the machine has power
    init: Process | None = None

    @property
    def condition(self) -> Condition:
        if not self.prepared:
            return "unprepared"
        return "running" if self.keeper and self.keeper.alive else "off"


@dataclass(frozen=True)
class Lab:
    """``number`` is unique among the labs of this computer and names what the kernel limits to 15 characters."""

    name: str
    number: int
    suite: str
    subnet: IPv4Network
    fleet: Path
    fleet_is_ours: bool = False  # its directory was not there before the lab
    base: Path | None = None
    machines: tuple[Machine, ...] = ()
    snapshots: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> the machines that ran then

    @property
    def directory(self) -> Path:
        return STATE_ROOT / self.name

    @property
    def bridge(self) -> str:
        return f"opslab{self.number}"

    @property
    def host_address(self) -> str:
        """This computer's address on the lab's bridge."""
        return str(self.subnet[1])

    def machine(self, name: str) -> Machine:
        """Raises:
            UsageError: there is none of that name.
        """
        for machine in self.machines:
            if machine.name == name:
                return machine
        raise UsageError("lab.no_such_machine", f"the lab {self.name} has no machine {name}.",
                         hint="machines: " + ", ".join(machine.name for machine in self.machines))

    @property
    def places(self) -> Path:
        return self.directory / "machines"

    def place(self, machine: Machine) -> Path:
        """The machine's folder: disk image, mounts, console log."""
        return self.places / machine.name

    def with_machine(self, changed: Machine) -> Lab:
        return dataclasses.replace(self, machines=tuple(
            changed if machine.name == changed.name else machine for machine in self.machines))


def check_name(name: str) -> str:
    """Raises:
        UsageError: not a name for a lab.
    """
    if not NAME.fullmatch(name):
        raise UsageError("lab.bad_name", f"{name!r} is no name for a lab.",
                         hint="lower-case letters, digits and dashes, a letter first, at most 31")
    return name


def encode(lab: Lab) -> dict[str, Any]:
    """The lab as plain data."""
    document = dataclasses.asdict(lab)
    return {"schema": SCHEMA, **document, "subnet": str(lab.subnet), "fleet": str(lab.fleet),
            "base": str(lab.base) if lab.base else None}


def decode(document: dict[str, Any]) -> Lab:
    """The other way."""
    values = {key: value for key, value in document.items() if key != "schema"}
    machines = tuple(
        Machine(**{**_known(entry), "groups": tuple(entry["groups"]),
                   "gpus": Gpus(**entry["gpus"]) if entry.get("gpus") else None,
                   "keeper": Process(**entry["keeper"]) if entry["keeper"] else None,
                   "init": Process(**entry["init"]) if entry["init"] else None})
        for entry in values.pop("machines"))
    return Lab(**{**values, "subnet": IPv4Network(values["subnet"]), "fleet": Path(values["fleet"]),
                  "base": Path(values["base"]) if values["base"] else None, "machines": machines,
                  "snapshots": {name: tuple(ran) for name, ran in values["snapshots"].items()}})


def _known(entry: dict[str, Any]) -> dict[str, Any]:
    """Without what a later opsctl wrote into it: its labs are seen, and taken down, by this one too."""
    return {key: value for key, value in entry.items() if key in {field.name for field in fields(Machine)}}


def save(lab: Lab) -> Lab:
    write_atomically(lab.directory / "state.json", json.dumps(encode(lab), indent=2) + "\n")
    return lab


def load(name: str) -> Lab | None:
    """The lab of that name; None when there is none."""
    try:
        text = (STATE_ROOT / check_name(name) / "state.json").read_text()
    except FileNotFoundError:
        return None
    return decode(json.loads(text))


def load_all() -> tuple[Lab, ...]:
    """Every lab of this computer, by name."""
    if not STATE_ROOT.is_dir():
        return ()
    names = sorted(entry.name for entry in STATE_ROOT.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name))
    return tuple(lab for lab in map(load, names) if lab)


def exists(name: str) -> bool:
    """Whether anything of a lab is there, even half of one."""
    return (STATE_ROOT / check_name(name)).is_dir()


def meant(name: str | None) -> str:
    """The name of the lab meant: the one named; the one whose fleet is worked on; the only one; else ``lab``.

    Raises:
        UsageError: there are several, none was named, and none is called ``lab``.
    """
    if name is not None:
        return check_name(name)
    labs = load_all()
    here = {Path.cwd(), Path(os.environ.get("OPSCTL_INVENTORY") or "inventory.ini").absolute().parent}
    at_hand = [lab.name for lab in labs if lab.fleet in here]
    if len(at_hand) == 1:
        return at_hand[0]
    names = [lab.name for lab in labs]
    if len(names) > 1 and DEFAULT_NAME not in names:
        raise UsageError("lab.which", "there are several labs, and none was named.",
                         hint=f"add --name; labs: {', '.join(names)}")
    return names[0] if len(names) == 1 else DEFAULT_NAME


def find(name: str | None) -> Lab:
    """The lab meant.

    Raises:
        UsageError: there is none of that name.
    """
    wanted = meant(name)
    lab = load(wanted)
    if lab is None:
        names = [known.name for known in load_all()]
        raise UsageError("lab.unknown", f"there is no lab {wanted} on this computer.",
                         hint="labs: " + ", ".join(names) if names else "opsctl lab up makes one")
    return lab


@contextmanager
def locked(directory: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a directory for this process, making it if need be; calls ``waiting`` once when another holds it.

    An empty one is removed at the end. The holder may remove a full one too: whoever waited then sees that the inode is
    no longer the path's, and starts over.
    """
    told = False
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o755)
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    told = True
                    waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_still(handle, directory):
                try:
                    yield
                finally:
                    _remove_if_empty(directory)
                return
        finally:
            os.close(handle)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _is_still(handle: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino)
