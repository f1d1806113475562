"""The fleet directory of a lab: what an operator of these machines would have, and its removal.

``.opsctl/lab.json`` keeps what the lab wrote, so that ``down`` takes that away and nothing a person made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent.durable import write_atomically
from opsctl.errors import RefusedError
from opsctl.fleet import gpu_lock
from opsctl.fleet.project import ANSIBLE_CFG, GITIGNORE, initialise
from opsctl.fleet.ssh_config import private_directory
from opsctl.fleet.systems import DEFAULT, OS_RELEASE
from opsctl.lab.commands import run
from opsctl.lab.inbox import SMTP_PORT, WEBHOOK_PORT
from opsctl.lab.state import Lab, Machine
from opsctl.lab.vendor.repository import Repository, sources_file
from opsctl.stack.knowledge import knowledge

LOGIN_KEY = "keys/login"
RECEIPT = ".opsctl/lab.json"
# Made by opsctl in the course of work; in a directory that the lab created they go with it.
WORK = (".opsctl", "bundle", "keys", "trust", "__pycache__")
VENDOR_SOURCE, VENDOR_KEY = "sources.d/lab.sources", "sources.d/lab.asc"

# Below the hosts of an inventory whose machines have GPUs. The kernel is this computer's: no headers of Debian's fit.
# Somebody waits for the idle alert here, so it comes sooner than a site would want it.
DRIVER = """\
[gpu:vars]
nvidia_driver_version="580.126.09"
# What the bundle holds beside it: the way up, and back.
nvidia_driver_bundle_versions=["580.159.04", "595.71.05"]
nvidia_driver_own=[]

[monitor:vars]
# What opsctl lab inbox shows.
alert_webhook_url=http://{address}:{webhook}/
alert_email_to=oncall@lab.invalid
alert_smtp={address}:{smtp}
alert_smtp_from=opsctl@lab.invalid
alert_smtp_require_tls=false
gpu_idle_alert_s=30
"""

SERVICES = """\
# services.yml of a lab: one service, one instance a host, {where}.
chat:
  group: gpu
  port: 8100
  listen: 8000
  instances_per_host: 1
  gpus_per_instance: {count}
{split}  min_serving: 1
  first_release: v1
"""


# What the keys and what trusts them will be is not known before they are made. keys/bundle is a folder.
UNKNOWN_CONTENT = (LOGIN_KEY, f"{LOGIN_KEY}.pub", "keys/release", "keys/release.pub", "keys/bundle",
                   "trust/allowed_signers", "trust/bundle.asc")


@dataclass(frozen=True)
class Receipt:
    """What a lab wrote into a fleet directory, or is about to write: relative path -> sha256.

    The sha256 is empty of what it is just making. ``created``: the directory itself too.
    """

    lab: str
    created: bool
    files: dict[str, str]


def login_name(index: int) -> str:
    """Who logs in to gpu-INDEX: root, but an operator with sudo on the second and third, as on fleets in the wild."""
    return "operator" if index in (2, 3) else "root"


def jump_of(index: int) -> str:
    """The third is behind ops-1."""
    return "ops-1" if index == 3 else ""


def inventory(lab: Lab) -> str:
    """inventory.ini of the lab's machines."""
    lines = [f"# The machines of the lab {lab.name}; written by opsctl lab up.", ""]
    seen: set[str] = set()
    for group in dict.fromkeys(group for machine in lab.machines for group in machine.groups):
        lines.append(f"[{group}]")
        for machine in lab.machines:
            if group in machine.groups:
                lines.append(machine.name if machine.name in seen else _host_line(lab, machine))
                seen.add(machine.name)
        lines.append("")
    if any(machine.gpus for machine in lab.machines):
        lines.append(DRIVER.format(address=lab.machines[0].address, webhook=WEBHOOK_PORT, smtp=SMTP_PORT))
    release = next(system.key for system in knowledge().systems if system.codename == lab.suite)
    runs = [f"{OS_RELEASE}={release}"] if release != DEFAULT else []
    return "\n".join([*lines, "[all:vars]", *runs, f"ansible_ssh_private_key_file={LOGIN_KEY}",
                      "ansible_python_interpreter=/usr/bin/python3", ""])


def _host_line(lab: Lab, machine: Machine) -> str:
    words = [machine.name, f"ansible_host={machine.address}", f"ansible_user={machine.user}"]
    if machine.proxy_jump:
        words.append(f"proxy_jump={machine.proxy_jump}")
    if machine.gpus:
        words.append(f"gpu_model={json.dumps(machine.gpus.model)}")
    return " ".join(words)


def services(lab: Lab) -> str:
    """services.yml: an instance has all GPUs of its host, as many as the host with the fewest."""
    count = min((machine.gpus.count if machine.gpus else 0 for machine in lab.machines if "gpu" in machine.groups),
                default=0)
    return SERVICES.format(where="on all its GPUs" if count else "on the CPU", count=count,
                           split=f"  tensor_parallel: {count}\n" if count else "")


def known_hosts(keys: Iterable[tuple[Machine, str]]) -> str:
    """known_hosts lines from (machine, public host key line)."""
    return "".join(f"{machine.name},{machine.address} {' '.join(key.split()[:2])}\n" for machine, key in keys)


def read_receipt(fleet: Path) -> Receipt | None:
    try:
        document = json.loads((fleet / RECEIPT).read_text())
    except FileNotFoundError:
        return None
    return Receipt(**document)


def check_free(fleet: Path, lab: str, others: Iterable[Lab]) -> None:
    """Raises:
        RefusedError: the directory is a fleet that is not this lab's.
    """
    for other in others:
        if other.name != lab and other.fleet == fleet:
            raise RefusedError("lab.fleet_taken", f"{fleet} is the fleet directory of the lab {other.name}.",
                               hint="choose another one with --fleet")
    if read_receipt(fleet) is None and (fleet / "inventory.ini").exists():
        raise RefusedError("lab.fleet_taken", f"{fleet} holds an inventory.ini that no lab wrote.",
                           hint="choose another directory with --fleet, or work in an empty one")


def vendor_files(vendor: Repository | None) -> dict[str, str]:
    """Where the fleet's bundle finds drivers: the lab's vendor, and its key; nothing without GPUs."""
    if vendor is None:
        return {}
    return {VENDOR_SOURCE: sources_file(f"file:{vendor.path}", VENDOR_KEY), VENDOR_KEY: vendor.key.read_text()}


def write_fleet(lab: Lab, vendor: Repository | None = None) -> str:
    """Writes inventory, services, keys and trust of a lab; returns the public key that logs in.

    ``vendor``: where the machines' GPU drivers come from.

    What a person changed in an earlier lab's directory is kept, but for the inventory: its addresses are gone. That one
    is kept as ``inventory.ini.old``.
    """
    fleet = lab.fleet
    receipt = read_receipt(fleet) or Receipt(lab.name, created=lab.fleet_is_ours, files={})
    fleet.mkdir(parents=True, exist_ok=True)
    own = fleet / "inventory.ini"
    text = inventory(lab)
    if own.exists() and own.read_text() != text:
        if _unchanged(fleet, "inventory.ini", receipt):
            own.unlink()
        else:
            own.rename(own.with_name("inventory.ini.old"))
    drivers = vendor_files(vendor)
    old = [path for path in drivers if _unchanged(fleet, path, receipt)]  # of another vendor repository
    receipt = _promise(lab, receipt, text, drivers)  # first of all: whoever dies here is still cleaned up after
    initialise(fleet, inventory_text=text, services_text=services(lab))
    for path, content in drivers.items():
        if path in old or not (fleet / path).exists():
            write_atomically(fleet / path, content)
    key = fleet / LOGIN_KEY
    if not key.exists():
        key.parent.mkdir(mode=0o700, exist_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"opsctl-lab-{lab.name}", "-f", key])
    _write_receipt(lab, receipt, [*old, *(path for path, digest in receipt.files.items() if not digest)])
    return key.with_name(key.name + ".pub").read_text()


def _promise(lab: Lab, receipt: Receipt, inventory_text: str, drivers: Mapping[str, str]) -> Receipt:
    """The receipt, on disk, with everything that is about to be written."""
    texts = {"inventory.ini": inventory_text, "services.yml": services(lab), ".gitignore": GITIGNORE,
             "ansible.cfg": ANSIBLE_CFG, "known_hosts": "", **drivers}
    coming = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    coming |= dict.fromkeys(UNKNOWN_CONTENT, "")
    files = {**receipt.files, **{path: digest for path, digest in coming.items() if not (lab.fleet / path).exists()}}
    promised = Receipt(lab.name, receipt.created, files)
    _save_receipt(lab.fleet, promised)
    return promised


def pin_host_keys(lab: Lab, keys: Iterable[tuple[Machine, str]]) -> None:
    """Writes known_hosts: the lab made the keys, so there is nothing to ask the network."""
    receipt = read_receipt(lab.fleet)
    assert receipt is not None  # noqa: S101 - write_fleet came before
    text = known_hosts(keys)
    _save_receipt(lab.fleet, Receipt(lab.name, receipt.created, {**receipt.files, "known_hosts": ""}))
    write_atomically(lab.fleet / "known_hosts", text)
    _write_receipt(lab, receipt, ["known_hosts"])
    _give_to_caller(lab.fleet)


def note_written(path: Path) -> None:
    """Adds a file to the receipt of the lab's fleet directory that it lies in, if it lies in one."""
    receipt = read_receipt(path.parent)
    if receipt is not None:
        files = {**receipt.files, path.name: _digest(path)}
        _save_receipt(path.parent, Receipt(receipt.lab, receipt.created, files))


def remove_fleet(lab: Lab) -> tuple[str, ...]:
    """Takes away what the lab wrote; returns the relative paths that stay because a person made or changed them."""
    fleet = lab.fleet
    receipt = read_receipt(fleet)
    if receipt is None:  # killed before its first file was whole
        _remove_halves(fleet, RECEIPT)
        _remove_empty(fleet, itself=lab.fleet_is_ours)
        return ()
    if receipt.lab != lab.name:
        return ()
    for path in receipt.files:
        _remove_halves(fleet, path)
        if _unchanged(fleet, path, receipt):
            (fleet / path).unlink()
        elif not receipt.files[path] and (fleet / path).is_dir():
            shutil.rmtree(fleet / path)
    (fleet / gpu_lock.NAME).unlink(missing_ok=True)  # provision wrote it, of GPUs that go with the machines
    (fleet / RECEIPT).unlink()
    for name in WORK if receipt.created else (".opsctl",):
        if (fleet / name).is_dir():
            shutil.rmtree(fleet / name)
    _remove_empty(fleet, itself=receipt.created)
    return tuple(sorted(_files(fleet))) if receipt.created else ()


def _remove_halves(fleet: Path, path: str) -> None:
    """What ``write_atomically`` leaves when it is killed: the file beside its place."""
    for half in (fleet / path).parent.glob(f".{Path(path).name}.????????"):
        half.unlink()


def _remove_empty(fleet: Path, *, itself: bool) -> None:
    for directory, _, _ in os.walk(fleet, topdown=False):
        if not any(Path(directory).iterdir()) and (itself or Path(directory) != fleet):
            Path(directory).rmdir()


def _unchanged(fleet: Path, path: str, receipt: Receipt) -> bool:
    return (fleet / path).is_file() and receipt.files.get(path) in ("", _digest(fleet / path))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(fleet: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(fleet)) for path in fleet.rglob("*")
                     if path.is_file() and not path.is_symlink() and path != fleet / RECEIPT)


def _write_receipt(lab: Lab, receipt: Receipt, written: Collection[str]) -> None:
    found = _files(lab.fleet)
    made = {path: _digest(lab.fleet / path) for path in found
            if any(path == name or path.startswith(f"{name}/") for name in written)}
    files = {path: digest for path, digest in receipt.files.items() if path not in written} | made
    _save_receipt(lab.fleet, Receipt(lab.name, receipt.created, files))


def _save_receipt(fleet: Path, receipt: Receipt) -> None:
    private_directory((fleet / RECEIPT).parent)
    document = dataclasses.asdict(receipt)
    write_atomically(fleet / RECEIPT, json.dumps(document, indent=2) + "\n")


def _give_to_caller(fleet: Path) -> None:
    """Under sudo the directory belongs to the caller: they run the other verbs, and ssh wants its key to be theirs."""
    user, group = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if os.geteuid() != 0 or not user or not group:
        return
    for path in (fleet, *fleet.rglob("*")):
        os.chown(path, int(user), int(group), follow_symlinks=False)
