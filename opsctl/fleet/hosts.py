"""One host's variables to ``Host``: where it is, how to log in, what is refused."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from opsctl.errors import ConfigurationError
from opsctl.fleet import gpu_lock, gpus, guard, systems, vendor_packages
from opsctl.fleet.model import Host
from opsctl.fleet.source import at, find_line, inventory_files, text_of

HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:_%-]*")
PASSWORDS = ("ansible_ssh_pass", "ansible_password", "ansible_ssh_password")
# Variables with which Ansible would leave the generated ssh_config, or the strictness that lies in it.
WEAKENING = ("ansible_ssh_args", "ansible_host_key_checking", "ansible_ssh_host_key_checking", "ansible_ssh_executable",
             "ansible_ssh_transfer_method")
# Options that opsctl writes itself; anything else in ansible_ssh_common_args is carried along.
OWN_OPTIONS = frozenset({
    "batchmode", "checkhostip", "controlmaster", "controlpath", "controlpersist", "globalknownhostsfile",
    "hashknownhosts", "host", "hostkeyalias", "hostname", "identityfile", "include", "knownhostscommand", "match",
    "nohostauthenticationforlocalhost", "port", "proxycommand", "stricthostkeychecking", "updatehostkeys", "user",
    "userknownhostsfile", "verifyhostkeydns",
})
# Everything that this file reads, so that a caller with lazy variables can fetch these only.
READ = (
    *PASSWORDS, *WEAKENING, "ansible_connection", "ansible_host", "ansible_ssh_host", "ansible_port",
    "ansible_ssh_port", "ansible_user", "ansible_ssh_user", "ansible_ssh_private_key_file", "ansible_private_key_file",
    "ansible_ssh_common_args", "ansible_ssh_extra_args", "proxy_jump", "service_address", "management_address",
    "gpu_uuids", *gpus.READ, *guard.READ, *systems.READ, *vendor_packages.READ,
)


def make_host(name: str, variables: Mapping[str, Any], groups: Sequence[str], inventory: Path,
              known_gpus: Sequence[gpu_lock.Gpu] | None = None, stack: Mapping[str, Any] | None = None,
              locked_os: str = "") -> Host:
    """The host that an inventory's variables describe.

    ``known_gpus``: those of gpus.yml, None when it is not there; ``stack``: the variables of its entry in stack.lock,
    which stand where the inventory says nothing; ``locked_os``: the release that this entry was made with.

    Raises:
        ConfigurationError: ``inventory.*``; the message names file, line, key and value.
    """
    if not HOST_NAME.fullmatch(name):
        raise ConfigurationError("inventory.bad_host", f"{inventory}: {name!r} cannot be a host's name.",
                                 hint="letters, digits, dots and dashes; a port goes into ansible_port=")
    _refuse_passwords(name, variables, inventory)
    check_host(name, variables, inventory)
    connection = _connection(name, variables, inventory)
    address = _text(name, variables, ("ansible_host", "ansible_ssh_host"), inventory) or name
    default = "127.0.0.1" if connection == "local" else address
    jump, options = _common_arguments(name, variables, inventory)
    identity = _text(name, variables, ("ansible_ssh_private_key_file", "ansible_private_key_file"), inventory)
    own = {
        "ansible_host": address,
        "service_address": _text(name, variables, ("service_address",), inventory) or default,
        "management_address": _text(name, variables, ("management_address",), inventory) or default,
    }
    for key, value in own.items():
        if not ADDRESS.fullmatch(value):
            raise _wrong(name, key, value, inventory, "is neither an address nor a name", "an address without a port")
    return Host(
        name=name, address=address, groups=tuple(groups), connection=connection,
        user=_text(name, variables, ("ansible_user", "ansible_ssh_user"), inventory),
        port=_port(name, variables, inventory),
        identity_file=str(inventory.parent / Path(identity).expanduser()) if identity else "",
        proxy_jump=_text(name, variables, ("proxy_jump",), inventory) or jump, ssh_options=options,
        service_address=own["service_address"], management_address=own["management_address"],
        os_release=systems.os_release_of(variables, locked_os),
        gpus=_gpus(variables, known_gpus), variables={**(stack or {}), **variables},
        locked={key: value for key, value in (stack or {}).items() if key not in variables},
    )


def _gpus(variables: Mapping[str, Any], known: Sequence[gpu_lock.Gpu] | None) -> tuple[str, ...] | None:
    """What the inventory names (a list, or text with commas), else what gpus.yml has."""
    written = gpus.listed(variables.get("gpu_uuids"))
    if written or known is None:
        return written or None
    return tuple(gpu.uuid for gpu in known)


def check_host(name: str, variables: Mapping[str, Any], inventory: Path) -> None:
    """Refuses what cannot be right about a host's release, GPUs, their driver and its companions, whatever it has.

    Raises:
        ConfigurationError: ``inventory.bad_value``.
    """
    wrong = (systems.first_wrong(variables) or gpus.first_wrong(variables) or vendor_packages.first_wrong(variables)
             or guard.first_wrong(variables))
    if wrong:
        raise _wrong(name, wrong.key, wrong.value, inventory, wrong.problem, wrong.hint)


def check_addresses(hosts: Sequence[Host], inventory: Path) -> None:
    """Refuses two hosts that are one machine, and a loopback address that other hosts would have to reach.

    Raises:
        ConfigurationError: ``inventory.same_machine`` or ``inventory.loopback``.
    """
    seen: dict[tuple[str, int], Host] = {}
    for host in hosts:
        if len(hosts) > 1:
            for key in ("service_address", "management_address"):
                if is_loopback(getattr(host, key)):
                    raise _wrong(host.name, key, getattr(host, key), inventory, "cannot be reached by the other hosts",
                                 f"{host.name} {key}=ADDRESS, the one that the others see")
        if host.connection == "local":
            continue
        other = seen.setdefault((host.address, host.port), host)
        if other is not host:
            raise ConfigurationError("inventory.same_machine", f"{inventory}: {other.name} and {host.name} are one "
                                     f"machine: both are {host.address} port {host.port}.",
                                     hint="list it once, in as many groups as you like; or correct ansible_host")
    _check_shared_addresses(hosts, inventory)
    _check_own_addresses(hosts, inventory)
    _check_jumps(hosts, inventory)


def _check_shared_addresses(hosts: Sequence[Host], inventory: Path) -> None:
    """Ansible hands ssh an address and no name: hosts behind one address may differ in Ansible's own settings only."""
    by_address: dict[str, Host] = {}
    for host in hosts:
        other = by_address.setdefault(host.address, host)
        if host.connection == other.connection == "ssh" and (host.proxy_jump, host.ssh_options) != (
                other.proxy_jump, other.ssh_options):
            raise ConfigurationError("inventory.same_address", f"{inventory}: {other.name} and {host.name} have the "
                                     f"same address {host.address} and are reached in different ways.",
                                     hint="give each an address or a DNS name of its own in ansible_host")


def _check_own_addresses(hosts: Sequence[Host], inventory: Path) -> None:
    """Engines and agents listen on the same ports everywhere, so each host needs addresses of its own for them."""
    for key in ("service_address", "management_address"):
        seen: dict[str, Host] = {}
        for host in hosts:
            address = getattr(host, key)
            other = seen.setdefault(address, host)
            if other is not host:
                raise ConfigurationError("inventory.same_address", f"{inventory}: {other.name} and {host.name} have "
                                         f"the same {key} {address}, and would be taken for one another there.",
                                         hint=f"write {key}= for each: the address that the other hosts reach it by")


def _check_jumps(hosts: Sequence[Host], inventory: Path) -> None:
    """Refuses a jump over a local host, over itself, in a circle, or to a known host by another user or port."""
    by_name = {host.name: host for host in hosts}

    def follow(host: Host, above: tuple[str, ...]) -> None:
        for hop in (hop.strip() for hop in host.proxy_jump.split(",")):
            if hop in above:
                raise ConfigurationError("inventory.jump_circle", f"{inventory}: proxy_jump goes in a circle: "
                                         f"{' -> '.join((*above, hop))}.", hint="one of them must be reached directly")
            place = hop.rpartition("@")[2].partition(":")[0]
            if place in by_name and hop != place:
                raise _wrong(host.name, "proxy_jump", hop, inventory,
                             "names a host of this inventory, which has its user and port there",
                             f"proxy_jump={place}")
            if hop in by_name:
                if by_name[hop].connection == "local":
                    raise _wrong(host.name, "proxy_jump", hop, inventory, "is this machine itself", "no proxy_jump")
                follow(by_name[hop], (*above, hop))

    for host in hosts:
        follow(host, (host.name,))


def is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _refuse_passwords(name: str, variables: Mapping[str, Any], inventory: Path) -> None:
    for key in PASSWORDS:
        if key in variables:
            user = variables.get("ansible_user", "")
            target = f"{user}@" * bool(user) + str(variables.get("ansible_host", name))
            port = f"-p {variables['ansible_port']} " if "ansible_port" in variables else ""
            raise ConfigurationError("inventory.password", f"{place_of(inventory, name, key)}: {key} is set for "
                                     f"{name}; opsctl logs in by key or agent only.",
                                     hint=f"ssh-copy-id {port}{target}   and remove {key}")
    for key in WEAKENING:
        if key in variables:
            raise ConfigurationError("inventory.ssh_setting", f"{place_of(inventory, name, key)}: {key} of {name} "
                                     "would leave the one SSH configuration that all of opsctl uses.",
                                     hint="remove it; options of ssh go into ansible_ssh_common_args, jumps into "
                                     "proxy_jump")


def _connection(name: str, variables: Mapping[str, Any], inventory: Path) -> Literal["ssh", "local"]:
    value = str(variables.get("ansible_connection", "ssh"))
    if value in ("ssh", "smart", "ansible.builtin.ssh"):
        return "ssh"
    if value in ("local", "ansible.builtin.local"):
        return "local"
    raise _wrong(name, "ansible_connection", value, inventory, "is no way that opsctl knows", "ssh or local")


def _port(name: str, variables: Mapping[str, Any], inventory: Path) -> int:
    text = _text(name, variables, ("ansible_port", "ansible_ssh_port"), inventory) or "22"
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise _wrong(name, "ansible_port", text, inventory, "is no port", "a number from 1 to 65535")
    return int(text)


def _text(name: str, variables: Mapping[str, Any], keys: Sequence[str], inventory: Path) -> str:
    """The first of ``keys`` that is set, as text; the one common template, the host's own name, is filled in."""
    for key in keys:
        if variables.get(key) not in (None, ""):
            text = re.sub(r"\{\{\s*inventory_hostname\s*\}\}", name, str(variables[key]))
            if "{{" in text or isinstance(variables[key], Mapping):
                raise _wrong(name, key, text, inventory, "is computed, and is needed before anything can be computed",
                             f"{key}= with the value itself; only {{{{ inventory_hostname }}}} is filled in")
            if any(character in text for character in '"\n\r\\'):
                raise _wrong(name, key, repr(text), inventory, "has a quote or a line break in it", "leave it out")
            return text
    return ""


def _common_arguments(name: str, variables: Mapping[str, Any], inventory: Path
                      ) -> tuple[str, tuple[tuple[str, str], ...]]:
    """ProxyJump and the other ``-o`` options of ``ansible_ssh_common_args`` and ``ansible_ssh_extra_args``."""
    jump, options = "", []
    for key in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
        text = _text(name, {key: str(variables.get(key) or "").replace('"', "'")}, (key,), inventory)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise _wrong(name, key, text, inventory, f"is no list of words: {error}", "close the quote") from None
        while words:
            word = words.pop(0)
            flag, rest = word[:2], word[2:] or (words.pop(0) if words else "")
            option, _, value = rest.replace("=", " ", 1).partition(" ")
            if flag == "-J":
                jump = rest
            elif flag == "-o" and option.lower() == "proxyjump":
                jump = value.strip()
            elif flag == "-o" and value and option.lower() not in OWN_OPTIONS:
                options.append((option, value.strip()))
            elif flag == "-C" and not word[2:]:
                options.append(("Compression", "yes"))
                words[:0] = [rest] if rest else []
            else:
                hint = "proxy_jump=HOST does what most ProxyCommands do" if option.lower() == "proxycommand" else \
                    f"remove {word} {rest if rest != word[2:] else ''}".strip()
                raise _wrong(name, key, text, inventory, "sets what opsctl sets itself, or cannot carry along", hint)
    return jump, tuple(options)


def _wrong(name: str, key: str, value: str, inventory: Path, problem: str, hint: str) -> ConfigurationError:
    code = "inventory.loopback" if "reached" in problem else "inventory.bad_value"
    return ConfigurationError(code, f"{place_of(inventory, name, key)}: {key}={value} of {name} {problem}.", hint=hint)


def place_of(inventory: Path, name: str, key: str) -> str:
    """``inventory.ini:4``: the host's own line, or the only place where the key is written; else the file's name."""
    own = find_line(inventory, rf"^\s*{re.escape(name)}\s[^#;\n]*\b{re.escape(key)}=")
    if own:
        return at(inventory, own)
    pattern = re.compile(rf"^[^#;\n]*\b{re.escape(key)}\s*[=:]", re.MULTILINE)
    found = [(path, text_of(path).count("\n", 0, match.start()) + 1)
             for path in inventory_files(inventory) for match in pattern.finditer(text_of(path))]
    return at(*found[0]) if len(found) == 1 else str(inventory)
