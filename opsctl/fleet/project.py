"""A fleet's directory: what ``opsctl init`` makes. Nothing is ever overwritten; a second run completes what is missing.

::

    inventory.ini services.yml   the fleet                     ansible.cfg .gitignore
    known_hosts                  pinned host keys              trust/  public keys (in git)
    keys/                        private keys (not in git)     .opsctl/  generated (not in git)
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from opsctl.agent.durable import write_atomically
from opsctl.bundle.keys import make_bundle_key
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.ssh_config import private_directory, write_ssh_config
from opsctl.resources import resource

PRINCIPAL = "opsctl-release"
NAMESPACE = "opsctl-release"
SHIPPED = ("playbooks", "roles")  # .opsctl/ gets a link to each

GITIGNORE = """\
# Private keys, and what opsctl generates or downloads.
/keys/
/bundle/
/.opsctl/
"""

# Relative paths, so that the folder can be cloned and moved: Ansible reads this file in the folder it runs in only.
ANSIBLE_CFG = """\
# So that plain Ansible works here as opsctl does: ansible-playbook .opsctl/playbooks/site.yml
[defaults]
inventory = inventory.ini
roles_path = .opsctl/roles
forks = 32
host_key_checking = True
interpreter_python = /usr/bin/python3
retry_files_enabled = False
nocows = True

[inventory]
any_unparsed_is_failed = True

[ssh_connection]
pipelining = True
# The one configuration of ssh, with strict host keys. ControlPersist stands here too, so that Ansible knows to
# renew a shared connection after a reboot.
ssh_args = -F .opsctl/ssh_config -o ControlPersist=60s
"""


def initialise(directory: Path, *, inventory_text: str | None = None, services_text: str | None = None
               ) -> tuple[str, ...]:
    """Makes what is missing of a fleet's directory and returns the names of what it made, in order.

    Without texts, inventory.ini and services.yml are copies of the examples. In a clone, which has the public keys and
    not the private ones, no new private keys are made: see ``lacking``.

    Raises:
        RefusedError: a program that makes keys is missing.
        OpsctlError: a key could not be made.
    """
    directory = directory.absolute()
    if directory.exists() and not directory.is_dir():
        raise RefusedError("init.not_a_folder", f"{directory} is a file.", hint="opsctl init DIR makes a folder")
    directory.mkdir(parents=True, exist_ok=True)
    if inventory_text is None:
        inventory_text = resource("inventory.example").read_text(encoding="utf-8")
    if services_text is None:
        services_text = resource("services.example").read_text(encoding="utf-8")
    release, bundle, trust = directory / "keys" / "release", directory / "keys" / "bundle", directory / "trust"
    steps: dict[str, Callable[[Path], None]] = {
        "inventory.ini": _text(inventory_text),
        "services.yml": _text(services_text),
        ".gitignore": _text(GITIGNORE),
        "ansible.cfg": _text(ANSIBLE_CFG),
        "known_hosts": _text(""),
        "keys/release": make_release_key,
        "keys/release.pub": write_public_key,
        "trust/allowed_signers": lambda path: write_allowed_signers(path, release.with_suffix(".pub")),
        "keys/bundle": lambda path: make_bundle_key(path, trust / "bundle.asc"),
        "trust/bundle.asc": lambda path: make_bundle_key(bundle, path),
    }
    for name in lacking(directory):
        del steps[name]
        steps.pop(f"{name}.pub", None)
    made = tuple(name for name in steps if not (directory / name).exists())
    private_directory(directory / ".opsctl")
    private_directory(directory / "keys")
    for name in made:
        if not (directory / name).exists():  # a key's two halves come together
            steps[name](directory / name)
    refresh(directory)
    return made


def lacking(directory: Path) -> tuple[str, ...]:
    """Private keys whose public halves are trusted and which are not here: a person has to bring them."""
    halves = {"keys/release": "trust/allowed_signers", "keys/bundle": "trust/bundle.asc"}
    return tuple(private for private, public in halves.items()
                 if (directory / public).exists() and not (directory / private).exists())


def refresh(directory: Path) -> None:
    """Brings ``.opsctl/`` up to date: links to the shipped playbooks and roles, and the ssh_config.

    An inventory that cannot be read yet leaves the ssh_config as it was: the operator is about to edit it.
    """
    generated = directory / ".opsctl"
    private_directory(generated)
    for name in SHIPPED:
        link, target = generated / name, resource(name)
        if not link.is_symlink() or link.readlink() != target:
            beside = generated / f".{name}.{os.getpid()}"
            beside.unlink(missing_ok=True)
            beside.symlink_to(target)
            beside.rename(link)
    try:
        write_ssh_config(read_fleet(directory / "inventory.ini"))
    except ConfigurationError:
        return


def make_release_key(path: Path) -> None:
    """The ed25519 key that signs releases, without a passphrase, 0600."""
    _ssh_keygen(["-q", "-t", "ed25519", "-N", "", "-C", PRINCIPAL, "-f", str(path)])


def write_public_key(path: Path) -> None:
    """``release.pub`` from ``release``, where only the private half was kept."""
    text = _ssh_keygen(["-y", "-f", str(path.with_suffix(""))]).split()
    write_atomically(path, f"{text[0]} {text[1]} {PRINCIPAL}\n")


def write_allowed_signers(path: Path, public_key: Path) -> None:
    """The file that ``ssh-keygen -Y verify`` takes: our public key for our one namespace, and no other use."""
    kind, key = public_key.read_text(encoding="ascii").split()[:2]
    write_atomically(path, f'{PRINCIPAL} namespaces="{NAMESPACE}" {kind} {key}\n')


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: write_atomically(path, text)


def _ssh_keygen(arguments: list[str]) -> str:
    try:
        done = subprocess.run(["ssh-keygen", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              check=False, timeout=60)
    except FileNotFoundError:
        raise RefusedError("init.no_ssh_keygen", "ssh-keygen is not on this machine; it makes the key that signs "
                           "releases.", hint="apt-get install openssh-client") from None
    if done.returncode:
        raise OpsctlError("init.key_not_made", f"ssh-keygen {' '.join(arguments[:3])} failed with exit code "
                          f"{done.returncode}.", log_tail=done.stderr.splitlines()[-5:])
    return done.stdout
