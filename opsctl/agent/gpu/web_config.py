"""``/etc/opsctl/web.toml``: TLS and passwords for the metrics. No file: both off, as exporters are out of the box.

The keys are those of Prometheus's exporter-toolkit, flat and in TOML, since the agent reads no YAML:

    cert_file = "/etc/opsctl/tls/host.crt"      # with key_file: TLS. Relative paths: beside this file
    key_file = "/etc/opsctl/tls/host.key"
    client_ca_file = "/etc/opsctl/tls/ca.crt"   # only clients with a certificate of this authority
    min_version = "TLS12"                       # or TLS13
    basic_auth_users = ["prometheus:$scrypt$ln=13,r=8,p=10$..."]

``python -m opsctl.agent.gpu.web_config hash NAME`` asks for a password and prints such an entry. It and the files that
it names are read anew when they change. A wrong file serves nobody, rather than everybody; so do one that guards
nothing, and one that was there since the agent began and is gone: ``rm`` and ``cp`` shall open no page between them.
"""

from __future__ import annotations

import getpass
import os
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsctl.agent import flat_toml
from opsctl.agent.gpu import passwords
from opsctl.agent.gpu.passwords import Passwords
from opsctl.errors import ConfigurationError

FILES = ("cert_file", "key_file", "client_ca_file")
KEYS = (*FILES, "min_version", "client_auth_type", "basic_auth_users")
VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
MUST = "RequireAndVerifyClientCert"  # of exporter-toolkit's words for client_auth_type the one that means something
HINT = "docs/exporter.md lists its keys; without the file the metrics are open to whoever reaches the port"
OPEN = "put it back; to serve without it: systemctl restart opsctl-agent"
MAKE = "/opt/opsctl/agent/bin/python3 -m opsctl.agent.gpu.web_config hash NAME"


@dataclass(frozen=True)
class WebConfig:
    """What guards the page. ``seen`` changes when a file of it does; ``there``: web.toml itself is."""

    there: bool = False
    tls: ssl.SSLContext | None = None
    passwords: Passwords | None = None
    files: tuple[Path, ...] = ()
    seen: tuple[Any, ...] = field(default=())


def read(path: Path, *, was_there: bool = False) -> WebConfig:
    """What stands there; nothing guarded when there is no file, and never was.

    Raises:
        ConfigurationError: it or a file that it names cannot be used; names file, key and value. Or it is gone.
    """
    seen = look((path,))
    try:
        table = flat_toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if was_there:
            raise wrong(f"{path} was there and is gone.", OPEN) from None
        if path.is_symlink():
            raise wrong(f"{path} leads to a file that is not there.") from None
        return WebConfig(files=(path,), seen=seen)
    except (OSError, ValueError) as error:
        raise wrong(f"{path} cannot be read: {error}.") from None
    for key, value in table.items():
        if key not in KEYS:
            raise wrong(f"{path}: there is no key {key}; keys are {', '.join(KEYS)}.")
        if not isinstance(value, list if key == "basic_auth_users" else str):
            raise wrong(f"{path}: {key} is {value!r}, expected {'a list' if key == 'basic_auth_users' else 'text'}.")
    if table.get("basic_auth_users") == []:
        raise wrong(f"{path}: basic_auth_users is empty; leave it out, or add an entry made with {MAKE}.")
    if not table:
        raise wrong(f"{path} guards nothing: there is neither cert_file nor basic_auth_users.")
    files = (path, *(path.parent / table[key] for key in FILES if key in table))
    return WebConfig(True, _tls(path, table), _passwords(path, table.get("basic_auth_users", [])), files, look(files))


def look(files: tuple[Path, ...]) -> tuple[Any, ...]:
    """What tells whether a file was changed or replaced since."""
    found: list[Any] = []
    for path in files:
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode, status.st_uid))
        except OSError as error:
            found.append(error.errno)
    return tuple(found)


def wrong(words: str, hint: str = HINT) -> ConfigurationError:
    return ConfigurationError("host.bad_web_config", words, hint=hint)


def _tls(path: Path, table: Mapping[str, Any]) -> ssl.SSLContext | None:
    for key, other in (("cert_file", "key_file"), ("key_file", "cert_file"), ("client_ca_file", "cert_file"),
                       ("client_auth_type", "client_ca_file"), ("min_version", "cert_file")):
        if key in table and other not in table:
            raise wrong(f"{path}: {key} is there, and {other} is not.")
    if "cert_file" not in table:
        return None
    kind, version = table.get("client_auth_type", MUST), table.get("min_version", "TLS12")
    if kind != MUST:
        raise wrong(f"{path}: client_auth_type is {kind}, expected {MUST}; leave client_ca_file out for none.")
    if version not in VERSIONS:
        raise wrong(f"{path}: min_version is {version}, expected {' or '.join(VERSIONS)}.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[version]
    names = {key: path.parent / table[key] for key in FILES if key in table}
    try:
        context.load_cert_chain(names["cert_file"], names["key_file"], password=lambda: "")
    except (OSError, ValueError) as error:
        raise wrong(f"{path}: cert_file {names['cert_file']} and key_file {names['key_file']} cannot be used: {error}."
                    ) from None
    if "client_ca_file" in names:
        try:
            context.load_verify_locations(names["client_ca_file"])
        except (OSError, ValueError) as error:
            raise wrong(f"{path}: client_ca_file {names['client_ca_file']} cannot be used: {error}.") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _passwords(path: Path, entries: list[Any]) -> Passwords | None:
    users: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        name, colon, text = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        if not name or not colon or name in users:
            raise wrong(f"{path}: entry {number} of basic_auth_users is not NAME:HASH, or its name is there twice.",
                        f"make one with {MAKE}")
        try:
            passwords.checker(text)
        except ValueError as error:
            raise wrong(f"{path}: the hash of {name} in basic_auth_users {error}.", f"make one with {MAKE}") from None
        users[name] = text
    return Passwords(users) if users else None


def main(argv: list[str] | None = None) -> int:
    """Prints an entry of basic_auth_users; the password comes from the terminal, or a pipe's first line."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 2 or words[0] != "hash" or not words[1] or ":" in words[1]:
        sys.stderr.write(f"usage: {MAKE}\n")
        return 2
    password = getpass.getpass() if os.isatty(0) else sys.stdin.readline().rstrip("\n")
    if not password:
        sys.stderr.write("no password\n")
        return 2
    sys.stdout.write(f"{words[1]}:{passwords.make(password)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
