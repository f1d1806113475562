"""Apt sources of vendors: ``sources.d/*.sources`` beside the inventory, each with the key that signs it.

No address stands in opsctl: where a site gets its drivers from, it writes there. A source without a key is refused,
because hosts install what comes from it as root. A vendor makes packages for one release of a distribution: which one
a source serves is told by ``VendorSource.serving``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from opsctl.bundle.apt_sources import REMOTE_OR_FILE, stanzas
from opsctl.bundle.keys import PUBLIC_KEY_BEGIN, dearmor
from opsctl.errors import ConfigurationError
from opsctl.stack.knowledge import System, knowledge

FOLDER = "sources.d"
# Each of them lets apt take what nobody signed, or what was signed with a broken algorithm.
TRUSTING = ("trusted", "allow-insecure", "allow-weak", "allow-downgrade-to-insecure")
SERVES = "x-os-release"  # deb822 leaves names with X- to others than apt
OFF = ("no", "false", "without", "off", "disable", "0")


@dataclass(frozen=True)
class VendorSource:
    """One stanza. ``name``: its file's and its number, no other's; ``file``: the name that the operator wrote.

    ``components``: none for a flat repository (``Suites: /``); ``releases``: ``X-OS-Release: debian13``, if it says so.
    """

    name: str
    file: str
    addresses: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    key: bytes
    releases: tuple[str, ...] = ()

    @property
    def key_name(self) -> str:
        """apt tells an armored key from a binary one by the ending."""
        return f"{self.name}.{'asc' if PUBLIC_KEY_BEGIN.encode() in self.key else 'gpg'}"

    def serving(self, system: System) -> VendorSource | None:
        """What of it is for hosts of a release; None: nothing.

        That is what ``X-OS-Release`` says. Without it, a suite that begins with another release's codename is for
        that one, and so is an address with another release in its path (``.../repos/debian12/x86_64/``).
        Whatever says nothing is for all.
        """
        if self.releases and system.key not in self.releases:
            return None
        suites = tuple(suite for suite in self.suites if _is_for(system, [re.split("[-/]", suite)[0]]))
        addresses = tuple(address for address in self.addresses
                          if self.releases or _is_for(system, address.split("/")))
        return replace(self, suites=suites, addresses=addresses) if suites and addresses else None

    def render(self, key: Path) -> str:
        lines = ["Types: deb", f"URIs: {' '.join(self.addresses)}", f"Suites: {' '.join(self.suites)}"]
        lines += [f"Components: {' '.join(self.components)}"] if self.components else []
        return "\n".join([*lines, f"Signed-By: {key}", ""])


def read_vendor_sources(fleet_directory: Path) -> tuple[VendorSource, ...]:
    """The enabled binary sources of the fleet's folder, in the order of their files; empty when there are none.

    Raises:
        ConfigurationError: one is unsigned, trusts blindly, or is no source; the message names file, key and value.
    """
    found: list[VendorSource] = []
    folder = fleet_directory / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix == ".list":
            raise _wrong(path, "is of the old format, which has no place for a key's text",
                         f"write it as {path.stem}.sources: Types, URIs, Suites, Signed-By")
        if path.suffix != ".sources":
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise _wrong(path, "is not UTF-8", "save it as UTF-8") from None
        for number, fields in enumerate(stanzas(text)):
            if fields.get("enabled", "yes").lower() in OFF or "deb" not in fields.get("types", "").split():
                continue
            found.append(_source(f"{_plain(path.stem)}-{number}", fields, path, fleet_directory))
    return tuple(found)


def serving(sources: Iterable[VendorSource], system: System) -> tuple[VendorSource, ...]:
    """What of the sources is for hosts of a release."""
    return tuple(found for source in sources if (found := source.serving(system)))


def _is_for(system: System, words: Iterable[str]) -> bool:
    """Whether words that may name releases name this one, or none."""
    known = {name: one for one in knowledge().systems for name in (one.codename, one.key, one.key.replace(".", ""))}
    named = [known[word] for word in words if word in known]
    return system in named or not named


def _source(name: str, fields: Mapping[str, str], path: Path, fleet_directory: Path) -> VendorSource:
    for key in TRUSTING:
        if fields.get(key, "no").lower() not in OFF:
            raise _wrong(path, f"has {key.title()}: {fields[key]}, and hosts install nothing that nobody signed",
                         "remove that line; Signed-By: names the vendor's key")
    addresses = tuple(re.sub("^file:", "copy:", address) for address in fields.get("uris", "").split())
    strange = [_without_user(address) for address in addresses if not REMOTE_OR_FILE.match(address)]
    if strange or not addresses:
        has = f"URIs: {' '.join(strange)}, which is no address that apt can ask" if strange else \
            "no URIs, which name where apt is to ask"
        raise _wrong(path, f"has {has}", "URIs: https://...")
    suites, components = fields.get("suites", "").split(), fields.get("components", "").split()
    if not suites or any(suite.endswith("/") == bool(components) for suite in suites):
        raise _wrong(path, f"has Suites: {' '.join(suites)} and Components: {' '.join(components)}",
                     "Suites: / and no Components for a flat repository; else a suite and its components")
    releases = tuple(fields.get(SERVES, "").split())
    known = [system.key for system in knowledge().systems]
    for release in releases:
        if release not in known:
            raise _wrong(path, f"has X-OS-Release: {release}, which is no release that hosts may run",
                         f"one or more of {', '.join(known)}, as os_release of the inventory")
    return VendorSource(name, path.name, addresses, tuple(suites), tuple(components),
                        _key(fields.get("signed-by", ""), path, fleet_directory), releases)


def _key(value: str, path: Path, fleet_directory: Path) -> bytes:
    """The key that ``Signed-By`` means: its own text, or a file of the fleet's folder."""
    if not value.strip():
        raise _wrong(path, "has no Signed-By: anybody between here and there could put a package in",
                     f"put the vendor's key beside it and write Signed-By: {FOLDER}/{path.stem}.asc")
    if PUBLIC_KEY_BEGIN in value:
        # deb822: continuation lines are indented by one blank, and a dot stands for an empty one.
        lines = (line.strip() for line in value.strip().splitlines())
        content = "".join(f"{'' if line == '.' else line}\n" for line in lines).encode()
    else:
        file = fleet_directory / value.strip()
        inside = not Path(value.strip()).is_absolute() and ".." not in Path(value.strip()).parts
        if not inside or not file.is_file():
            raise _wrong(path, f"has Signed-By: {value.strip()}, which is no file in {fleet_directory}",
                         f"copy the key there and name it from there: Signed-By: {FOLDER}/{path.stem}.asc")
        content = file.read_bytes()
    try:
        if PUBLIC_KEY_BEGIN.encode() in content:
            dearmor(content.decode("ascii"))
        elif content[:1] < b"\x80":  # every OpenPGP packet begins with a byte that high
            raise ValueError("no packet")
    except ValueError:
        raise _wrong(path, "has a Signed-By that is no OpenPGP public key",
                     "take the key anew from the vendor") from None
    return content


def _plain(stem: str) -> str:
    """The stem as apt takes it for a file's name; a digest tells apart what would come to the same."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", stem)
    return plain if plain == stem else f"{plain}-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"


def _without_user(address: str) -> str:
    """The address without user and password, which are nobody's business in a log."""
    scheme, slashes, rest = address.partition("//")
    return f"{scheme}//{rest.rpartition('@')[2]}" if slashes else address.rpartition("@")[2]


def _wrong(path: Path, problem: str, hint: str) -> ConfigurationError:
    return ConfigurationError("bundle.bad_source", f"{path} {problem}.", hint=hint)


def described(sources: Iterable[VendorSource]) -> str:
    """``vendor.sources, dcgm.sources``: the files, for a sentence."""
    return ", ".join(dict.fromkeys(source.file for source in sources))
