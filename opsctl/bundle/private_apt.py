"""An apt of opsctl's own, on private directories with an empty dpkg status: nothing is installed.

So what it resolves does not depend on what this machine has; only its sources, keyrings, proxies and credentials are
this machine's own. Downloads stay in the cache, partial ones too, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

from opsctl.bundle.apt_sources import Source, parse_deb822, parse_one_line, render_deb822, signed_as, sources_for
from opsctl.bundle.cache import cache_directory
from opsctl.bundle.debs import Deb, file_is, parse_printed_uris, unknown_packages
from opsctl.bundle.process import last_lines, require_program, run, started
from opsctl.bundle.vendor_sources import VendorSource
from opsctl.engines.events import Emit, Note, Progress
from opsctl.errors import OpsctlError, RefusedError
from opsctl.stack.knowledge import System

ARCHITECTURE = "amd64"
POLL_S = 0.5

APT_CONFIGURATION = """\
// An apt of opsctl's own. Cleared lists are this machine's hooks: they are for packages that get installed.
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
#clear Acquire::IndexTargets;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Default-Release "";
APT::Get::AllowUnauthenticated "false";
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";
APT::Keep-Downloaded-Packages "true";
Acquire::AllowInsecureRepositories "false";
Acquire::AllowWeakRepositories "false";
Acquire::AllowReleaseInfoChange "true"; // stable becomes oldstable; the codename is ours to choose
Acquire::Languages "none";
Acquire::ForceHash "SHA256"; // else --print-uris names MD5
Acquire::Retries "3";
Debug::NoLocking "true";
Dir::State "{root}/state";
Dir::State::lists "{root}/state/lists";
Dir::State::status "{root}/status";
Dir::State::extended_states "{root}/state/extended_states";
Dir::Cache "{root}";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Cache::archives "{archives}";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Log "{root}";
Acquire::IndexTargets::deb::Packages {{
  MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
  flatMetaKey "Packages"; // of a vendor's flat repository, without components
  ShortDescription "Packages";
  Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
  flatDescription "$(RELEASE) Packages";
}};
"""


class PrivateApt:
    """apt-get on directories in the cache, as a host of a release has it; one set of them for each set of sources.

    ``system``: the hosts' release; ``vendors``: sources besides this machine's own, which serve it.
    """

    def __init__(self, system: System, vendors: Sequence[VendorSource] = ()) -> None:
        self._release = f"{system.name} ({system.codename})"
        self._program = require_program("apt-get", "apt", "it downloads the hosts' packages")
        self._whose = "this machine's package sources" + " and those in sources.d" * bool(vendors)
        machine = _machine_sources(system)
        text = render_deb822(machine)
        # With the names too: of a file that was renamed, apt would read the old copy along and refuse both.
        known = text + "".join(vendor.name + vendor.render(Path("/")) + vendor.key.hex() for vendor in vendors)
        self._root = cache_directory("apt", hashlib.sha256(known.encode()).hexdigest()[:12])
        self.archives = cache_directory("debs", system.codename)  # vendors make other files of one name for another
        for directory in (*(self._root / name for name in ("state/lists/partial", "sources", "keys", "none/partial")),
                          self.archives / "partial"):
            directory.mkdir(parents=True, exist_ok=True)
        (self._root / "status").write_bytes(b"")
        for vendor in vendors:
            key = self._root / "keys" / vendor.key_name
            key.write_bytes(vendor.key)
            (self._root / "sources" / f"{vendor.name}.sources").write_text(vendor.render(key), encoding="utf-8")
        machine = signed_as(machine, {place: self._root / "keys" / vendor.key_name for vendor in vendors
                                      for place in product(vendor.addresses, vendor.suites)})
        (self._root / "sources/machine.sources").write_text(render_deb822(machine), encoding="utf-8")
        self._configuration = self._root / "apt.conf"
        self._configuration.write_text(APT_CONFIGURATION.format(root=self._root, archives=self.archives,
                                                                architecture=ARCHITECTURE), encoding="utf-8")

    def _argv(self, *arguments: str) -> list[str]:
        return [self._program, "-c", str(self._configuration), *arguments]

    def update(self, emit: Emit) -> None:
        emit(Note(f"asking {self._whose} for the lists of {self._release}"))
        done = run(self._argv("-q", "update"))
        if done.returncode != 0:
            raise RefusedError("bundle.sources_unreachable",
                               f"{self._whose} did not give the lists of {self._release}.",
                               hint="apt-get update shows whether this machine reaches them; then build again",
                               log_tail=_complaints(done))

    def index(self, names: Callable[[str], bool]) -> str:
        """What the sources have of the packages with such names, in every version, as a ``Packages`` file says it."""
        program = require_program("apt-cache", "apt", "it tells which versions the sources have")
        listed = run([program, *self._argv("pkgnames")[1:]]).stdout.decode("utf-8", "replace").split()
        wanted = sorted(name for name in listed if names(name))
        shown = run([program, *self._argv("show", "--all-versions", "--", *wanted)[1:]]) if wanted else None
        return shown.stdout.decode("utf-8", "replace") if shown else ""

    def resolve(self, packages: Sequence[str]) -> tuple[Deb, ...]:
        # Against an empty folder of archives apt names every file, not only those still missing.
        done = run(self._argv("-o", f"Dir::Cache::archives={self._root / 'none'}", "-q", "-y", "--print-uris",
                              "--download-only", "install", "--", *packages))
        output = done.stdout.decode("utf-8", "replace") + done.stderr.decode("utf-8", "replace")
        if done.returncode == 0:
            return parse_printed_uris(output)
        unknown = unknown_packages(output)
        if unknown:
            raise RefusedError("bundle.unknown_package",
                               f"{self._release} has no package {', '.join(unknown)}, which the roles install.",
                               hint="correct the name in roles/*/defaults/main.yml", log_tail=_complaints(done))
        raise RefusedError("bundle.unmet_dependencies",
                           f"{self._release} cannot install {', '.join(packages)} together.",
                           hint="read apt's own words above", log_tail=last_lines(output.encode()))

    def download(self, packages: Sequence[str], debs: Iterable[Deb], emit: Emit) -> None:
        debs = tuple(debs)
        for deb in debs:  # apt believes a size; the index's digest is believed here
            path = self.archives / deb.name
            if path.exists() and not file_is(path, deb):
                path.unlink()
        if all((self.archives / deb.name).exists() for deb in debs):
            return
        log = self._root / "download.log"
        argv = self._argv("-q", "-y", "--download-only", "install", "--", *packages)
        with log.open("wb") as output, started(argv, stdout=output.fileno()) as process:
            _follow(process, self.archives, debs, emit)
            status = process.wait()
        missing = [deb.name for deb in debs if not file_is(self.archives / deb.name, deb)]
        if status != 0 or missing:
            raise OpsctlError("bundle.download_broke_off",
                              f"{len(missing)} of {len(debs)} packages could not be downloaded.",
                              hint="the same command again goes on where it stopped",
                              log_tail=last_lines(log.read_bytes()))


def _follow(process: subprocess.Popen[bytes], archives: Path, debs: Sequence[Deb], emit: Emit) -> None:
    """Progress of a download, read off the files that grow: the same for a first and for a resumed one."""
    total = sum(deb.size for deb in debs)
    began, at_first = time.monotonic(), _bytes_there(archives, debs)
    while True:
        try:
            process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            there = _bytes_there(archives, debs)
            emit(Progress("Debian packages", there, total, "bytes", (there - at_first) / (time.monotonic() - began)))
        else:
            break
    there = _bytes_there(archives, debs)
    emit(Progress("Debian packages", there, total, "bytes", (there - at_first) / (time.monotonic() - began)))


def _bytes_there(archives: Path, debs: Sequence[Deb]) -> int:
    there = 0
    for deb in debs:
        for path in (archives / deb.name, archives / "partial" / deb.name):
            try:
                there += min(path.stat().st_size, deb.size)
            except FileNotFoundError:  # not begun, or moved out of partial just now
                continue
            break
    return there


def _machine_sources(system: System) -> tuple[Source, ...]:
    """This machine's sources, as those of the hosts' release."""
    apt_config = require_program("apt-config", "apt", "it tells where this machine's package sources are written")
    said = run([apt_config, "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"])
    where = dict(word.split("=", 1) for word in shlex.split(said.stdout.decode()))
    parts = Path(where.get("PARTS", "/etc/apt/sources.list.d"))
    found: list[Source] = []
    for path in [Path(where.get("LIST", "/etc/apt/sources.list")), *sorted(parts.glob("*"))]:
        if path.suffix == ".sources" and path.is_file():
            found += parse_deb822(path.read_text(encoding="utf-8"))
        elif path.suffix == ".list" and path.is_file():
            found += parse_one_line(path.read_text(encoding="utf-8"))
    release = _os_release(Path("/etc/os-release").read_text(encoding="utf-8"))
    usable = sources_for(found, own_codename=release.get("VERSION_CODENAME", ""), codename=system.codename) \
        if release.get("ID") == "debian" else sources_for(found, own_codename=system.codename, codename=system.codename)
    if not usable:
        raise RefusedError("bundle.no_sources",
                           f"no package source of this machine ({release.get('PRETTY_NAME', 'unknown system')}) "
                           f"serves {system.name} ({system.codename}).",
                           hint=f"build on a Debian machine, or add a signed source of {system.codename} main in "
                                f"{parts}")
    return usable


def _os_release(text: str) -> dict[str, str]:
    """The fields of an os-release file."""
    return dict(word.split("=", 1) for word in shlex.split(text, comments=True) if "=" in word)


def _complaints(done: subprocess.CompletedProcess[bytes]) -> tuple[str, ...]:
    """apt's errors and warnings, or its last words when it names none."""
    lines = last_lines(done.stdout + b"\n" + done.stderr, 200)
    return tuple(line for line in lines if line.startswith(("E:", "W:", "Err")))[-8:] or lines[-8:]
