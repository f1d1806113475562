"""A machine's own apt sources, read and turned into the sources of the hosts' release. Pure: text in, text out.

opsctl knows no mirror. Where packages come from is what the operator's machine is configured to use; only the
release's codename changes when that machine runs another Debian than the hosts do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Names under which a Debian machine may follow its own release instead of the codename.
ALIASES = frozenset({"stable", "oldstable", "oldoldstable", "testing"})
POCKETS = ("", "-updates", "-security")  # backports and proposed updates are not what a host should get by itself
COMPONENT = "main"
REMOTE_OR_FILE = re.compile(r"^(https?|mirror(\+\w+)?|file|copy|ftp|tor\+https?|ar\+https?):")
# Options that may follow the source into the closure. ``Trusted`` and its like never do.
KEPT_OPTIONS = {"signed-by": "Signed-By", "check-valid-until": "Check-Valid-Until"}
DISTRIBUTION_KEYRING = "debian-archive"


@dataclass(frozen=True)
class Source:
    """One ``deb`` source: addresses, suites, components, and options by their deb822 names in lower case."""

    addresses: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: Mapping[str, str]


def parse_deb822(text: str) -> tuple[Source, ...]:
    """The enabled binary sources of a ``.sources`` file; stanzas that are no such thing are passed over."""
    sources = []
    for fields in stanzas(text):
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "without", "off", "disable", "0")
        if not enabled or "deb" not in fields.get("types", "").split():
            continue
        options = {key: value for key, value in fields.items() if key in KEPT_OPTIONS}
        sources.append(Source(tuple(fields.get("uris", "").split()), tuple(fields.get("suites", "").split()),
                              tuple(fields.get("components", "").split()), options))
    return tuple(sources)


def parse_one_line(text: str) -> tuple[Source, ...]:
    """The binary sources of a ``.list`` file: ``deb [option=value ...] address suite component ...``."""
    sources = []
    for line in text.splitlines():
        match = re.match(r"^\s*deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]+)", line)
        words = match["rest"].split() if match else []
        if match is None or len(words) < 2:
            continue
        pairs = (option.partition("=") for option in (match["options"] or "").split())
        options = {key.lower(): value for key, _, value in pairs if key.lower() in KEPT_OPTIONS}
        sources.append(Source((words[0],), (words[1],), tuple(words[2:]), options))
    return tuple(sources)


def sources_for(sources: Iterable[Source], *, own_codename: str, codename: str) -> tuple[Source, ...]:
    """What of ``sources`` can serve the release ``codename``, rewritten to it; empty when nothing can.

    A source counts when it has the component main and follows this machine's release (by codename, or by an alias
    such as ``stable`` when it is signed by the distribution) or follows ``codename`` already. Backports, other
    components and vendors' own suites do not count.
    """
    kept = []
    for source in sources:
        # apt installs from a file: mirror in place and downloads nothing; from copy: it does.
        addresses = tuple(re.sub("^file:", "copy:", address) for address in source.addresses
                          if REMOTE_OR_FILE.match(address))
        suites = []
        for suite in source.suites:
            base, dash, rest = suite.partition("-")
            pocket = dash + rest
            signed_by = source.options.get("signed-by", DISTRIBUTION_KEYRING)
            follows = base in (own_codename, codename) or (base in ALIASES and DISTRIBUTION_KEYRING in signed_by)
            if follows and pocket in POCKETS and codename + pocket not in suites:
                suites.append(codename + pocket)
        if addresses and suites and COMPONENT in source.components:
            kept.append(Source(addresses, tuple(suites), (COMPONENT,), source.options))
    return tuple(kept)


def signed_as(sources: Iterable[Source], keys: Mapping[tuple[str, str], Path]) -> tuple[Source, ...]:
    """Each source with the key that is named for its address and suite, where one is.

    A mirror whose ``main`` is this machine's own source and whose ``non-free`` the operator wrote down has one Release
    file for both, and apt refuses to read it under two keys.
    """
    known = {(address.rstrip("/"), suite): key for (address, suite), key in keys.items()}
    found = []
    for source in sources:
        for address in source.addresses:
            for suite in source.suites:
                key = known.get((address.rstrip("/"), suite))
                options = {**source.options, "signed-by": str(key)} if key else source.options
                found.append(Source((address,), (suite,), source.components, options))
    return tuple(found)


def render_deb822(sources: Iterable[Source]) -> str:
    """The text of a ``.sources`` file."""
    stanzas = []
    for source in sources:
        lines = ["Types: deb", f"URIs: {' '.join(source.addresses)}", f"Suites: {' '.join(source.suites)}",
                 f"Components: {' '.join(source.components)}"]
        lines += [f"{KEPT_OPTIONS[key]}: {value}" for key, value in sorted(source.options.items())]
        stanzas.append("\n".join(lines) + "\n")
    return "\n".join(stanzas)


def stanzas(text: str) -> Iterable[dict[str, str]]:
    """Fields of each deb822 stanza by lower-case name; continuation lines keep their line breaks (inline keys)."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t" and name:
            fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip().lower()
            fields[name] = value.strip()
