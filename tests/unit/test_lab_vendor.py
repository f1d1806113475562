"""What apt answers to the vendor repository: the traps that NVIDIA's packages set, and the signature.

Real apt and apt-ftparchive on private directories; transactions are simulated (test_lab_vendor_install.py does them).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
from vendor_kit import (
    LEAVES,
    MAKERS,
    NEWER,
    NEWEST,
    OLD,
    OPEN,
    PROPRIETARY,
    STACK,
    Host,
    build,
    compiled,
    needs_tools,
    of,
)

from opsctl.bundle.keys import make_bundle_key
from opsctl.engines.events import Event, Progress
from opsctl.errors import ConfigurationError, OpsctlError
from opsctl.lab.vendor.catalogue import packages
from opsctl.lab.vendor.debs import GLIBC, check_glibc
from opsctl.lab.vendor.repository import PACKAGES, Makers, Repository

pytestmark = needs_tools

DRIVER = ("nvidia-driver-cuda", OPEN)
FABRIC = "nvidia-fabricmanager"
BRANCH_580, BRANCH_595 = "nvidia-driver-pinning-580=580-1+lab", "nvidia-driver-pinning-595=595-1+lab"
EXACT_OLD = f"nvidia-driver-pinning-{OLD}={OLD}-1+lab"


@dataclass(frozen=True)
class Transaction:
    """``want`` None: apt refuses; ``says`` is then part of why. Else the versions it would install."""

    name: str
    have: Sequence[str]
    apt: Sequence[str]
    want: dict[str, str] | None
    says: str = ""
    removes: tuple[str, ...] = ()
    held: Sequence[str] = ()


def all_at(version: str, names: Sequence[str] = STACK) -> dict[str, str]:
    return dict.fromkeys(names, version)


TRANSACTIONS = (
    Transaction("no pin: the newest", (), ("install", *DRIVER), all_at(NEWEST)),
    Transaction("an exact version of the top alone drags the newest of the rest", (),
                ("install", f"nvidia-driver-cuda={OLD}-1+lab"), None, "held broken packages"),
    Transaction("every exact dependency named, the leaves drift", (),
                ("install", *of(OLD, [name for name in STACK if name not in LEAVES])),
                all_at(OLD) | all_at(NEWEST, LEAVES)),
    Transaction("all named", (), ("install", *of(OLD)), all_at(OLD)),
    Transaction("pin and driver in one transaction: the pin is not read yet", (),
                ("install", BRANCH_580, *DRIVER), all_at(NEWEST) | {"nvidia-driver-pinning-580": "580"}),
    Transaction("branch pin first", (BRANCH_580,), ("install", *DRIVER), all_at(NEWER)),
    Transaction("exact pin first", (EXACT_OLD,), ("install", *DRIVER), all_at(OLD)),
    Transaction("an exact pin has the fabric manager too", (EXACT_OLD,), ("install", FABRIC, *DRIVER),
                all_at(OLD, [*STACK, FABRIC])),
    Transaction("a branch pin moves within its branch", (BRANCH_580, *of(OLD)), ("upgrade",), all_at(NEWER)),
    Transaction("an exact pin does not move", (EXACT_OLD, *of(OLD)), ("upgrade",), {}),
    Transaction("a pin removes the other", (BRANCH_580, *of(OLD)), ("install", "nvidia-driver-pinning-595"),
                {"nvidia-driver-pinning-595": "595"}, removes=("nvidia-driver-pinning-580",)),
    Transaction("an exact pin removes the branch's", (BRANCH_580,), ("install", f"nvidia-driver-pinning-{OLD}"),
                {f"nvidia-driver-pinning-{OLD}": OLD}, removes=("nvidia-driver-pinning-580",)),
    Transaction("a held pin blocks", (BRANCH_580, *of(OLD)), ("install", "nvidia-driver-pinning-595"), None,
                "held packages", held=("nvidia-driver-pinning-580",)),
    Transaction("the fabric manager follows the driver", (BRANCH_595, *of(OLD, [*STACK, FABRIC])),
                ("install", *DRIVER, "nvidia-modprobe"), all_at(NEWEST, [*STACK, FABRIC])),
    Transaction("the fabric manager does not go alone", of(OLD, [*STACK, FABRIC]),
                ("install", f"{FABRIC}={NEWER}-1+lab"), None, "held broken packages"),
    Transaction("a kernel module alone throws the driver out", of(OLD), ("install", f"{OPEN}={NEWER}-1+lab"),
                {OPEN: NEWER} | all_at(NEWEST, ["libnvidia-ml1", "libnvidia-cfg1", "libcuda1"]),
                removes=("nvidia-driver-cuda",)),
    Transaction("another flavour replaces the one that is there", of(OLD), ("install", *of(OLD, [PROPRIETARY])),
                {PROPRIETARY: OLD}, removes=(OPEN,)),
    Transaction("both flavours exclude each other", (), ("install", *of(OLD, [*STACK, PROPRIETARY])), None,
                "Conflicts"),
    Transaction("back to an older branch", (BRANCH_580, *of(NEWEST)), ("upgrade",), None, "--allow-downgrades"),
    Transaction("back, allowed", (BRANCH_580, *of(NEWEST)), ("upgrade", "--allow-downgrades"), all_at(NEWER)),
    Transaction("held packages stay", of(OLD), ("install", *of(NEWEST)), None, "Held packages", held=STACK),
    Transaction("held packages, every one named", of(OLD), ("install", "--allow-change-held-packages", *of(NEWEST)),
                all_at(NEWEST), held=STACK),
    Transaction("held packages, not all named", of(OLD),
                ("install", "--allow-change-held-packages", *of(NEWEST, DRIVER)), None, "held broken", held=STACK),
    Transaction("DCGM", (), ("install", "datacenter-gpu-manager-4-cuda13"),
                all_at("4.6.1", ["datacenter-gpu-manager-4-cuda13", "datacenter-gpu-manager-4-core"])),
    Transaction("an older container toolkit by its top alone", (), ("install", "nvidia-container-toolkit=1.18.2-1+lab"),
                None, "held broken packages"),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return build(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, repository: Repository) -> Host:
    found = Host(tmp_path_factory.mktemp("host") / "root", repository)
    updated = found.update()
    assert updated.status == 0, updated.output
    return found


@pytest.mark.parametrize("case", TRANSACTIONS, ids=lambda case: case.name)
def test_transactions(host: Host, case: Transaction) -> None:
    host.have(*case.have, held=case.held)
    answer = host.apt(*case.apt)
    if case.want is None:
        assert answer.status == 100, answer.output
        assert case.says in answer.output
    else:
        assert answer.status == 0, answer.output
        assert answer.installs == case.want
        assert answer.removes == set(case.removes)


def _rewrite(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def _unsigned(repository: Repository) -> None:
    for name in ("InRelease", "Release.gpg"):
        (repository.path / "dists/bookworm" / name).unlink()


def _changed_release(repository: Repository) -> None:
    _rewrite(repository.path / "dists/bookworm/InRelease", b"Label: opsctl", b"Label: opsctI")


def _changed_index(repository: Repository) -> None:
    for path in (repository.path / "dists/bookworm/main/binary-amd64").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def _foreign_key(repository: Repository) -> None:
    repository.key.unlink()
    make_bundle_key(repository.path.parent / "foreign", repository.key)


@pytest.mark.parametrize(("spoil", "says"), [
    (_unsigned, "is not signed"), (_changed_release, "invalid"), (_changed_index, "unexpected size|Hash Sum"),
    (_foreign_key, "NO_PUBKEY")])
def test_what_is_not_what_was_signed_is_refused(repository: Repository, tmp_path: Path,
                                                spoil: Callable[[Repository], None], says: str) -> None:
    shutil.copytree(repository.path.parent, tmp_path / "copy")
    copy = Repository(tmp_path / "copy/apt", tmp_path / "copy/key.asc")
    assert Host(tmp_path / "before", copy).update().status == 0
    spoil(copy)
    answer = Host(tmp_path / "after", copy).update()
    assert answer.status == 100
    assert any(word in answer.output for word in says.split("|")), answer.output


def test_a_repository_is_built_once_and_again_with_the_same_bytes(repository: Repository, tmp_path: Path) -> None:
    events: list[Event] = []
    built = build(tmp_path, events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    assert (steps[0].done, steps[-1].done) == (1, steps[-1].total)
    index = "dists/bookworm/main/binary-amd64/Packages"
    assert (built.path / index).read_bytes() == (repository.path / index).read_bytes()
    events.clear()
    assert build(tmp_path, events.append) == built
    assert not events
    assert not list((tmp_path / "vendor").glob(".building-*"))


def test_each_suite_has_the_same_packages_and_other_files(repository: Repository) -> None:
    """As NVIDIA's: who mixes them up in one pool or cache takes one for the other."""
    indexes = {suite: (repository.path / f"dists/{suite}/main/binary-amd64/Packages").read_text()
               for suite in ("bookworm", "trixie")}
    named = {suite: set(re.findall(r"^Filename: .*/(\S+)$", text, re.MULTILINE)) for suite, text in indexes.items()}
    sums = {suite: set(re.findall(r"^SHA256: (\S+)$", text, re.MULTILINE)) for suite, text in indexes.items()}
    assert named["bookworm"] == named["trixie"] != set()
    assert not sums["bookworm"] & sums["trixie"]


def test_a_build_that_fails_leaves_nothing_that_looks_built(tmp_path: Path) -> None:
    def fails(version: str, _: Path) -> Path:
        raise OpsctlError("lab.vendor_failed", f"no library for {version}.")

    with pytest.raises(OpsctlError):
        build(tmp_path, makers=Makers(fails, MAKERS.modprobe))
    assert not list(tmp_path.glob("vendor/*"))


def test_a_library_for_a_newer_glibc_is_refused(tmp_path: Path) -> None:
    check_glibc(compiled("int works;", tmp_path / "old.so", "-shared", "-fPIC"))
    newer = f'const char *wants = "GLIBC_{GLIBC[0]}.{GLIBC[1] + 1}";'
    with pytest.raises(OpsctlError, match="wants glibc 2"):
        check_glibc(compiled(newer, tmp_path / "new.so", "-shared", "-fPIC"))


def test_packages_refuse_a_machine_that_is_no_lab(repository: Repository, tmp_path: Path) -> None:
    assert not Path("/etc/opsctl-lab").exists(), "this test is for a computer that is no machine of a lab"
    for deb in (repository.path / "pool/bookworm").glob("*.deb"):
        subprocess.run(["dpkg-deb", "--control", deb, tmp_path / deb.name], check=True)
        done = subprocess.run([tmp_path / deb.name / "preinst", "install"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert deb.name.partition("_")[0] in done.stderr


def test_the_maintainer_scripts_are_sound(repository: Repository, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("not on this machine: shellcheck")
    for deb in (repository.path / "pool/bookworm").glob(f"*_{OLD}-1+lab_amd64.deb"):
        subprocess.run(["dpkg-deb", "--control", deb, tmp_path / deb.name], check=True)
    scripts = [path for path in tmp_path.glob("*/*") if path.name in ("preinst", "postinst", "prerm", "postrm")]
    assert len({path.name for path in scripts}) == 4
    # A part is filled in with words, so that it may compare what never changes: `if true && ...`.
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_relation_says_where_it_is_known_from() -> None:
    document = tomllib.loads(PACKAGES.read_text())
    assert {package.name for package in packages(document)} >= {*STACK, FABRIC, PROPRIETARY}
    document["packages"][0]["relations"][0]["source"] = ""
    with pytest.raises(ConfigurationError, match="says no source"):
        packages(document)
