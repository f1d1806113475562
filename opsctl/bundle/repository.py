"""A Debian repository of the bundle's packages: pool, index, and a Release file signed by the bundle's own key.

Each suite has a pool of its own: vendors give packages of one name and version another content for another release.

No Valid-Until is written: a site without a network rebuilds its bundle when someone carries one in, and an index
that expires by itself would take apt away from every host at once. See docs/bundle.md.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from pathlib import Path

from opsctl.bundle.cache import cache_directory, link_or_copy
from opsctl.bundle.closure import ARCHITECTURE, Closure
from opsctl.bundle.keys import Checker, Signer
from opsctl.bundle.process import last_lines, require_program, run
from opsctl.errors import OpsctlError, RefusedError

COMPONENT = "main"
ORIGIN = "opsctl"
DISTS = "dists"
INDEX = f"{COMPONENT}/binary-{ARCHITECTURE}/Packages"
RELEASE_FILES = ("Release", "Release.gpg", "InRelease")

# apt refuses a Release of the future ("not valid yet"), so a host whose clock runs behind gets a day's grace.
BACKDATED_S = 24 * 3600
BUILD_ANEW = "opsctl bundle build makes the bundle anew"


def pool_of(codename: str) -> str:
    """Where a suite's packages lie, from the repository's root; bundles of before there were several: pool/main."""
    return f"pool/{codename}"


def dist_of(codename: str) -> str:
    """Where a suite's index lies, from the repository's root."""
    return f"{DISTS}/{codename}"


def write_repository(apt: Path, codename: str, closure: Closure, signer: Signer, *, previous: Path,
                     checker: Checker) -> None:
    """Adds a suite to the new folder ``apt``: its pool and its signed index.

    The Release files of the repository in ``previous`` are taken over when they describe the same index and are
    signed by a trusted key, so that the same packages give the same bytes.
    """
    pool, dist = pool_of(codename), dist_of(codename)
    (apt / pool).mkdir(parents=True)
    for deb in closure.debs:
        link_or_copy(closure.archives / deb.name, apt / pool / deb.pool_name)
    packages = sorted_index(_index(apt, codename, {f"{pool}/{deb.pool_name}": deb.digest for deb in closure.debs}))
    indexes = {INDEX: packages, f"{INDEX}.gz": gzip.compress(packages, 9, mtime=0),
               f"{INDEX}.xz": lzma.compress(packages)}
    for name, content in indexes.items():
        path = apt / dist / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if _take_over(previous / dist, apt / dist, codename, indexes, checker):
        return
    release = render_release(indexes, codename=codename, date=formatdate(time.time() - BACKDATED_S)).encode()
    (apt / dist / "Release").write_bytes(release)
    (apt / dist / "Release.gpg").write_bytes(signer.detached(release))
    (apt / dist / "InRelease").write_bytes(signer.clear(release))


def check_repository(bundle: Path, checker: Checker, digests: Mapping[str, str]) -> None:
    """Checks each suite's Release file, and that together they lead to the very files of the bundle, as apt will.

    ``digests`` is the sha256 of every file by its path in the bundle.

    Raises:
        RefusedError: a file is missing, changed after it was signed, or signed by a key that is not trusted; or the
            index describes other files than there are (``bundle.inconsistent``).
    """
    folder = bundle / "apt" / DISTS
    codenames = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not codenames:
        raise RefusedError("bundle.unsigned", f"{folder} holds no suite: apt would refuse the bundle.",
                           hint=BUILD_ANEW)
    described: dict[str, str] = {}
    for codename in codenames:
        described |= _described(bundle, codename, checker)
    there = {path: digest for path, digest in digests.items()
             if path.startswith("apt/") and path.rpartition("/")[2] not in RELEASE_FILES}
    wrong = sorted(path for path in described.keys() | there.keys() if described.get(path) != there.get(path))
    if wrong:
        raise RefusedError("bundle.inconsistent",
                           f"{bundle / wrong[0]} is not the file that the signed index describes; apt would refuse it.",
                           hint=BUILD_ANEW)


def _described(bundle: Path, codename: str, checker: Checker) -> dict[str, str]:
    """The sha256 of each file that a suite's signed index leads to, by its path in the bundle."""
    dist = bundle / "apt" / dist_of(codename)
    for name in (*RELEASE_FILES, INDEX):
        if not (dist / name).is_file():
            raise RefusedError("bundle.unsigned", f"{dist / name} is missing: apt would refuse the bundle.",
                               hint=BUILD_ANEW)
    checker.check(str(dist / "InRelease"), dist / "InRelease")
    checker.check(str(dist / "Release"), dist / "Release.gpg", dist / "Release")
    release = (dist / "Release").read_text(encoding="utf-8")
    if release not in (dist / "InRelease").read_text(encoding="utf-8"):
        raise RefusedError("bundle.inconsistent", f"{dist / 'InRelease'} is not what {dist / 'Release'} says.",
                           hint=BUILD_ANEW)
    described = {f"apt/{dist_of(codename)}/{name}": digest for digest, name in
                 re.findall(r"^ ([0-9a-f]{64}) +\d+ (\S+)$", release, re.MULTILINE)}
    return described | {f"apt/{name}": digest for name, digest in indexed_digests((dist / INDEX).read_bytes()).items()}


def sorted_index(packages: bytes) -> bytes:
    """The stanzas of a Packages file in the order of their text, whatever order the file system gave them."""
    stanzas = (stanza.strip(b"\n") for stanza in re.split(rb"\n\s*\n", packages))
    return b"".join(stanza + b"\n\n" for stanza in sorted(filter(None, stanzas)))


def render_release(indexes: Mapping[str, bytes], *, codename: str, date: str) -> str:
    """The Release file for index files given by name below the dist; ``date`` is RFC 2822 in UTC."""
    lines = [f"Origin: {ORIGIN}", f"Label: {ORIGIN}", f"Suite: {codename}", f"Codename: {codename}",
             f"Date: {date.replace('-0000', '+0000')}", f"Architectures: {ARCHITECTURE}", f"Components: {COMPONENT}",
             "Description: packages mirrored for this fleet by opsctl bundle build", "SHA256:"]
    lines += [f" {hashlib.sha256(content).hexdigest()} {len(content)} {name}"
              for name, content in sorted(indexes.items())]
    return "\n".join(lines) + "\n"


def release_body(release: str) -> str:
    """A Release file without its date: equal bodies describe the same packages."""
    return "".join(line for line in release.splitlines(keepends=True) if not line.startswith("Date:"))


def indexed_digests(packages: bytes) -> dict[str, str]:
    """``{Filename: SHA256}`` of a Packages file."""
    text = packages.decode("utf-8", "replace")
    names = re.findall(r"^Filename: (\S+)$", text, re.MULTILINE)
    return dict(zip(names, re.findall(r"^SHA256: (\S+)$", text, re.MULTILINE), strict=True))


def _take_over(previous: Path, dist: Path, codename: str, indexes: Mapping[str, bytes], checker: Checker) -> bool:
    try:
        release = (previous / "Release").read_text(encoding="utf-8")
        if release_body(release) != release_body(render_release(indexes, codename=codename, date="")):
            return False
        checker.check("InRelease", previous / "InRelease")
        checker.check("Release", previous / "Release.gpg", previous / "Release")
        for name in RELEASE_FILES:
            shutil.copyfile(previous / name, dist / name)
    except (FileNotFoundError, RefusedError):  # nothing to take over, or nothing that may be
        return False
    return True


def _index(apt: Path, codename: str, expected: Mapping[str, str]) -> bytes:
    """What apt-ftparchive makes of a suite's pool. Its database goes by name and time, so it is not believed."""
    pool = pool_of(codename)
    program = require_program("apt-ftparchive", "apt-utils", "it indexes the bundle's packages")
    database = cache_directory("index") / f"{codename}.db"
    arguments: Iterable[list[str]] = (["--db", str(database)], [])
    for database_arguments in arguments:
        done = run([program, "-q", *database_arguments, "packages", pool], cwd=apt)
        if done.returncode == 0 and indexed_digests(done.stdout) == expected:
            return done.stdout
        database.unlink(missing_ok=True)
    raise OpsctlError("bundle.not_indexed", f"apt-ftparchive could not index the packages in {apt / pool}.",
                      hint="the same command again starts from a fresh index", log_tail=last_lines(done.stderr))
