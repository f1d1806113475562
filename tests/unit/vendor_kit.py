"""A vendor repository with placeholders for the simulator, and an apt on private directories that asks it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from opsctl.bundle.private_apt import APT_CONFIGURATION, ARCHITECTURE
from opsctl.bundle.process import run
from opsctl.engines.events import Emit, discard
from opsctl.lab.vendor.repository import Makers, Repository, ensure_repository, sources_file

NEEDED = ("apt-get", "apt-ftparchive", "dpkg-deb", "gpg", "gpgv", "cc")
MISSING = [name for name in NEEDED if shutil.which(name) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")

OLD, NEWER, NEWEST = "580.126.09", "580.159.04", "595.71.05"
OPEN, PROPRIETARY = "nvidia-kernel-open-dkms", "nvidia-kernel-dkms"
LEAVES = ("nvidia-modprobe", "nvidia-persistenced")
STACK = ("nvidia-driver-cuda", "libnvidia-ml1", "libnvidia-cfg1", "libcuda1", OPEN, *LEAVES)
# A library that only knows its version, and a program that does nothing: what the simulator puts in their place.
LIBRARY = 'const char *lab_version(void) {{ return "{version}"; }}\n'
PROGRAM = "int main(void) { return 0; }\n"


def of(version: str, names: Iterable[str] = STACK) -> tuple[str, ...]:
    """``name=version`` for apt."""
    return tuple(f"{name}={version}-1+lab" for name in names)


def compiled(text: str, out: Path, *options: str) -> Path:
    subprocess.run(["cc", *options, "-x", "c", "-", "-o", out], input=text.encode(), check=True)
    return out


MAKERS = Makers(library=lambda version, out: compiled(LIBRARY.format(version=version), out, "-shared", "-fPIC"),
                modprobe=lambda out: compiled(PROGRAM, out))


def build(root: Path, emit: Emit = discard, makers: Makers = MAKERS) -> Repository:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        return ensure_repository(emit, root=root / "vendor", makers=makers)


@dataclass
class Answer:
    """What apt said to a transaction: what it would do, by package."""

    status: int
    output: str

    @property
    def installs(self) -> dict[str, str]:
        """Version without epoch and revision, for each package that is installed or changed."""
        return dict(re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((?:\d+:)?([^- ]+)", self.output, re.MULTILINE))

    @property
    def removes(self) -> set[str]:
        return set(re.findall(r"^Remv (\S+)", self.output, re.MULTILINE))


class Host:
    """A host as apt knows it: what is installed, held and preferred. Nothing is ever installed for real."""

    def __init__(self, root: Path, repository: Repository) -> None:
        self.root = root
        self.repository = repository
        for directory in ("state/lists/partial", "archives/partial", "sources", "preferences"):
            (root / directory).mkdir(parents=True)
        self.stanzas = (repository.path / "dists/bookworm/main/binary-amd64/Packages").read_text().split("\n\n")
        text = APT_CONFIGURATION.format(root=root, archives=root / "archives", architecture=ARCHITECTURE)
        (root / "apt.conf").write_text(
            text.replace('preferencesparts "/dev/null"', f'preferencesparts "{root}/preferences"'))
        (root / "sources/vendor.sources").write_text(
            sources_file(f"file:{repository.path}", str(repository.key), ["bookworm"]))
        self.have()

    def have(self, *wanted: str, held: Sequence[str] = ()) -> None:
        """Makes these ``name=version`` what is installed; an installed pin's file is in place."""
        base = [("libc6", "2.36-9"), ("python3", "3.11.2-1")]
        status = [f"Package: {name}\nStatus: install ok installed\nPriority: optional\nSection: libs\nMaintainer: x\n"
                  f"Architecture: amd64\nVersion: {version}\nDescription: x\n" for name, version in base]
        for file in (self.root / "preferences").iterdir():
            file.unlink()
        for name, _, version in (entry.partition("=") for entry in wanted):
            stanza = next(text for text in self.stanzas if text.startswith(f"Package: {name}\n")
                          and f"\nVersion: {version}\n" in text)
            want = "hold" if name in held else "install"
            status.append(f"Status: {want} ok installed\n{stanza.strip()}\n")
            if name.startswith("nvidia-driver-pinning"):
                self.prefer(name, version)
        (self.root / "status").write_text("\n".join(status))
        for cache in self.root.glob("*pkgcache.bin"):  # apt takes a status of the same second and size for the same
            cache.unlink()

    def prefer(self, name: str, version: str) -> None:
        """Takes the preferences file out of a pin package."""
        tree = self.root / "unpacked"
        subprocess.run(["dpkg-deb", "-x", self.repository.path / f"pool/bookworm/{name}_{version}_amd64.deb", tree],
                       check=True)
        shutil.copy(tree / "etc/apt/preferences.d/nvidia-driver-pin", self.root / "preferences/nvidia-driver-pin")
        shutil.rmtree(tree)

    def update(self) -> Answer:
        return self._apt("update")

    def apt(self, *arguments: str) -> Answer:
        """Simulates a transaction with ``-y``, as a role runs it."""
        return self._apt("-s", "-y", "-o", "APT::Get::Show-User-Simulation-Note=false", *arguments)

    def _apt(self, *arguments: str) -> Answer:
        done = run(["apt-get", "-c", str(self.root / "apt.conf"), "-q", *arguments])
        return Answer(done.returncode, (done.stdout + done.stderr).decode())
