"""Drivers in the bundle: a tiny vendor's repository, signed with its own key, and a real apt on both sides."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType

import pytest
from rendering import render

from opsctl.bundle.build import Built, build_bundle
from opsctl.bundle.closure import Closure, Deb, download_closure
from opsctl.bundle.drivers import download_drivers, driver_names
from opsctl.bundle.keys import checking, dearmor, make_bundle_key, signing
from opsctl.bundle.process import run
from opsctl.bundle.repository import write_repository
from opsctl.bundle.sums import digest
from opsctl.bundle.vendor_sources import described, read_vendor_sources
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import ConfigurationError, RefusedError
from opsctl.fleet.gpus import WantedDriver
from opsctl.fleet.systems import default_system
from opsctl.resources import resource
from opsctl.stack.driver import Course, Seen, Transaction, course, desired
from opsctl.stack.fit import Wish
from opsctl.stack.index import parse_index

MISSING = [name for name in ("apt-get", "apt-ftparchive", "dpkg-deb", "gpg", "gpgv") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
ALL_NAMES = driver_names(resource("roles"))
NAMES = ALL_NAMES["vendor"]
VERSIONS = ("580.126.09", "595.71.05")
DEBIANS = ("535.309.01-0+deb12u1", "535.261.03-1")
HOLDABLE = {"libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-modprobe", "nvidia-persistenced"}


def vendor_packages() -> list[tuple[str, str, str]]:
    """(name, version, more fields) with the relations of NVIDIA's packages."""
    found = []
    for driver in VERSIONS:
        version = f"{driver}-1+test"
        other = {"nvidia-kernel-open-dkms": "nvidia-kernel-dkms", "nvidia-kernel-dkms": "nvidia-kernel-open-dkms"}
        found += [
            (f"nvidia-driver-pinning-{driver}", version, "Provides: pin\nConflicts: pin\n"),
            ("nvidia-driver-cuda", version,
             f"Depends: libcuda1 (= {version}), nvidia-persistenced (>= {driver}), "
             f"nvidia-kernel-open-dkms (= {version}) | nvidia-kernel-dkms (= {version})\n"),
            *((name, version, f"Conflicts: {without}\nDepends: nvidia-modprobe (>= 352), build-tool\n")
              for name, without in other.items()),
            *((name, version, "") for name in ("libcuda1", "nvidia-modprobe", "nvidia-persistenced")),
            ("libnvsdm", version, ""),
            ("nvidia-fabricmanager", version, f"Depends: nvidia-driver-cuda (= {version}), libnvsdm (= {version})\n"),
        ]
    return found


def debian_packages() -> list[tuple[str, str, str]]:
    """The same of Debian's own driver: no pin, a virtual name in between, and two packages released apart from it."""
    found = [("nvidia-persistenced", "535.171.04-1~deb12u1", "Depends: libnvidia-cfg1\n"),
             ("nvidia-modprobe", "535.309.01-0+deb12u1", ""), ("nvidia-modprobe", "535.161.07-1~deb12u1", "")]
    for version in DEBIANS:
        exact = f"nvidia-alternative (= {version})"
        found += [
            ("nvidia-alternative", version, ""), ("libnvidia-cfg1", version, f"Depends: {exact}\n"),
            ("libcuda1", version, f"Depends: {exact}\n"), ("nvidia-smi", version, f"Depends: {exact}\n"),
            ("nvidia-kernel-support", version, f"Provides: nvidia-kernel-support--v1\nDepends: {exact}, "
             "nvidia-modprobe (>= 535)\n"),
            ("nvidia-kernel-dkms", version, "Depends: nvidia-kernel-support--v1, build-tool\n"),
        ]
    return found


@dataclass
class Site:
    """An operator's machine with a Debian mirror, a vendor's repository, and a fleet that names both versions."""

    root: Path

    @property
    def fleet(self) -> Path:
        return self.root / "fleet"

    def inventory(self, text: str) -> Path:
        (self.fleet / "inventory.ini").write_text(text, encoding="utf-8")
        return self.fleet / "inventory.ini"

    def build(self, inventory: str) -> Built:
        return build_bundle(self.fleet, self.fleet / "bundle", discard, inventory=self.inventory(inventory),
                            packages=("tiny",), locks=())

    def pool(self) -> set[str]:
        return {path.name for path in (self.fleet / "bundle/apt/pool").rglob("*.deb")}

    def index(self) -> str:
        return (self.fleet / "bundle/apt/dists/bookworm/main/binary-amd64/Packages").read_text()


def deb(root: Path, name: str, version: str, fields: str) -> Path:
    tree = root / "trees" / f"{name}-{version}"
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\n"
        f"{fields}Description: a tiny package\n", encoding="utf-8")
    path = root / "debs" / f"{name}_{version}_amd64.deb"
    path.parent.mkdir(exist_ok=True)
    done = run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(path)])
    assert done.returncode == 0, done.stderr.decode()
    return path


def publish(root: Path, name: str, debs: list[Path], codename: str = "bookworm") -> None:
    make_bundle_key(root / f"{name}-key", root / f"{name}.asc")
    files = tuple(Deb(path.name, path.stat().st_size, "sha256", digest(path)) for path in debs)
    closure = Closure(files, root / "debs")
    with signing(root / f"{name}-key") as signer, checking(root / f"{name}.asc") as checker:
        write_repository(root / name, codename, closure, signer, previous=root / "none", checker=checker)


def publish_beside_main(root: Path, debs: list[Path]) -> None:
    """non-free of the mirror, under the Release file that main is under, as Debian has it."""
    pool, dist = root / "mirror/pool/non-free", root / "mirror/dists/bookworm"
    pool.mkdir(parents=True)
    for path in debs:
        shutil.copy(path, pool)
    (dist / "non-free/binary-amd64").mkdir(parents=True)
    packages = run(["apt-ftparchive", "packages", "pool/non-free"], cwd=root / "mirror").stdout
    (dist / "non-free/binary-amd64/Packages").write_bytes(packages)
    for name in ("Release", "Release.gpg", "InRelease"):
        (dist / name).unlink()
    release = run(["apt-ftparchive", *(word for key, value in (("Codename", "bookworm"), ("Suite", "bookworm"),
                                                               ("Components", "main non-free"))
                                       for word in ("-o", f"APT::FTPArchive::Release::{key}={value}")),
                   "release", "."], cwd=dist).stdout
    with signing(root / "mirror-key") as signer:
        (dist / "InRelease").write_bytes(signer.clear(release))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drivers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "index"))
        publish(root, "mirror", [deb(root, "tiny", "1", ""), deb(root, "build-tool", "12", ""),
                                 deb(root, "linux-headers-amd64", "6.1", "")])
        publish_beside_main(root, [deb(root, *package) for package in debian_packages()])
        publish(root, "vendor", [deb(root, *package) for package in vendor_packages()])
    make_bundle_key(root / "fleet/keys/bundle", root / "fleet/trust/bundle.asc")
    return root


@pytest.fixture
def site(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    root = Path(shutil.copytree(model, tmp_path / "site"))
    (root / "mirror.gpg").write_bytes(dearmor((root / "mirror.asc").read_text()))
    (root / "machine.list").write_text(f"deb [signed-by={root / 'mirror.gpg'}] file:{root / 'mirror'} bookworm main\n")
    (root / "apt.conf").write_text(f'Dir::Etc::sourcelist "{root / "machine.list"}";\n'
                                   f'Dir::Etc::sourceparts "{root / "nothing"}";\n')
    (root / "fleet/sources.d").mkdir()
    shutil.copy(root / "vendor.asc", root / "fleet/sources.d/nvidia.asc")
    (root / "fleet/sources.d/nvidia.sources").write_text(
        f"Types: deb\nURIs: file:{root / 'vendor'}\nSuites: bookworm\nComponents: main\n"
        "Signed-By: sources.d/nvidia.asc\n")
    monkeypatch.setenv("APT_CONFIG", str(root / "apt.conf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    return Site(root)


BOTH = """\
[gpu]
gpu-1 nvidia_driver_version=595.71.05 gpu_model=H200
[all:vars]
nvidia_driver_bundle_versions=["580.126.09"]
"""


def test_a_fleet_without_drivers_gets_what_it_always_got(site: Site) -> None:
    site.build("[gpu]\ngpu-1\n")
    assert site.pool() == {"tiny_1_amd64.deb"}


def test_both_versions_lie_side_by_side_with_what_they_need(site: Site) -> None:
    site.build(BOTH)
    family = {"nvidia-fabricmanager", "libnvsdm", *HOLDABLE}
    assert site.pool() == {
        "tiny_1_amd64.deb", "build-tool_12_amd64.deb", "linux-headers-amd64_6.1_amd64.deb",
        *(f"nvidia-driver-pinning-{version}_{version}-1+test_amd64.deb" for version in VERSIONS),
        *(f"{name}_{version}-1+test_amd64.deb" for name in family for version in VERSIONS)}
    assert not site.build(BOTH).changed


def test_both_modules_where_nobody_knows_the_gpus(site: Site) -> None:
    site.build("[gpu]\ngpu-1 nvidia_driver_version=580.126.09 nvidia_driver_own='[]'\n")
    assert {"nvidia-kernel-open-dkms_580.126.09-1+test_amd64.deb",
            "nvidia-kernel-dkms_580.126.09-1+test_amd64.deb"} <= site.pool()
    assert not [name for name in site.pool() if "595" in name or "headers" in name]


def test_a_version_that_the_vendor_does_not_have(site: Site) -> None:
    with pytest.raises(RefusedError) as caught:
        site.build("[gpu]\ngpu-1 nvidia_driver_version=580.127.05\n")
    assert caught.value.code == "bundle.no_such_driver"
    assert "nvidia_driver_version=580.127.05 of gpu-1; the nearest that they have: 580.126.09" in caught.value.message


def test_a_fleet_without_a_vendors_source(site: Site) -> None:
    shutil.rmtree(site.fleet / "sources.d")
    with pytest.raises(RefusedError) as caught:
        site.build(BOTH)
    assert caught.value.code == "bundle.no_vendor_source"


@pytest.fixture
def debians(site: Site) -> Site:
    """The operator wrote non-free of the machine's own mirror beside the vendor's source, with the mirror's key."""
    shutil.copy(site.root / "mirror.asc", site.fleet / "sources.d/debian.asc")
    (site.fleet / "sources.d/debian.sources").write_text(
        f"Types: deb\nURIs: file:{site.root / 'mirror'}/\nSuites: bookworm\nComponents: non-free\n"
        "Signed-By: sources.d/debian.asc\n")
    return site


DEBIAN = """\
[gpu]
gpu-1 nvidia_driver_version=535.309.01 nvidia_driver_source=debian gpu_model=V100
gpu-2 nvidia_driver_version=580.126.09 gpu_model=V100
[gpu:vars]
nvidia_driver_own=[]
"""


def test_debians_own_driver_lies_beside_the_vendors(debians: Site) -> None:
    debians.build(DEBIAN)
    family = ("libcuda1", "libnvidia-cfg1", "nvidia-alternative", "nvidia-kernel-dkms", "nvidia-kernel-support",
              "nvidia-modprobe", "nvidia-smi")
    assert {name for name in debians.pool() if "_535." in name} == {
        *(f"{name}_{DEBIANS[0]}_amd64.deb" for name in family), "nvidia-persistenced_535.171.04-1~deb12u1_amd64.deb"}
    assert {"libcuda1_580.126.09-1+test_amd64.deb", "nvidia-driver-pinning-580.126.09_580.126.09-1+test_amd64.deb"
            } <= debians.pool()


def test_debians_own_driver_without_its_source(site: Site) -> None:
    with pytest.raises(RefusedError) as caught:
        site.build(DEBIAN)
    assert caught.value.code == "bundle.no_vendor_source"
    assert "sources.d/debian.sources" in caught.value.hint


@pytest.mark.parametrize(("before", "after"), [("535.261.03", "535.309.01"), ("535.309.01", "535.261.03")])
def test_preferences_take_a_host_up_and_down_where_there_is_no_pin(debians: Site, before: str, after: str) -> None:
    """A real apt: what opsctl prefers is the candidate, older or newer, and the transaction removes nothing."""
    debians.build(DEBIAN.replace("535.309.01", f"{after} nvidia_driver_bundle_versions={before}"))
    machine, index = Machine(debians), parse_index(debians.index())
    names = dataclasses.replace(ALL_NAMES["debian"], own=())
    want = {version: desired(Wish("gpu-1", version, source="debian"), Seen(("1db1",)), names, index)
            for version in (before, after)}
    installed = {**want[before].packages, "build-tool": "12"}
    machine.has(installed)
    machine.prefers(want[after].preferences)
    seen = Seen(("1db1",), installed=installed, held=frozenset(want[before].packages), loaded=before)
    (one,) = course(want[after], seen, index).transactions
    changed = {name for name, version in want[after].packages.items() if installed[name] != version}
    (installs, removes), refusal = simulate(machine, one)
    assert (installs, removes, refusal) == (changed, set(), "")
    assert "libcuda1" in changed
    machine.has({**want[after].packages, "build-tool": "12"})
    assert "\nInst" not in machine.apt("-s", "--ignore-hold", "upgrade"), "the newest of the bundle is nobody's wish"


def test_another_key_is_not_believed(site: Site) -> None:
    shutil.copy(site.root / "mirror.asc", site.fleet / "sources.d/nvidia.asc")
    with pytest.raises(RefusedError) as caught:
        site.build(BOTH)
    assert caught.value.code == "bundle.sources_unreachable"


def test_a_flat_repository_and_a_key_in_the_file(site: Site) -> None:
    flat = site.root / "flat"
    flat.mkdir()
    for path in (site.root / "vendor").rglob("*.deb"):
        shutil.copy(path, flat)
    packages = run(["apt-ftparchive", "packages", "."], cwd=flat).stdout
    (flat / "Packages").write_bytes(packages)
    release = run(["apt-ftparchive", "release", "."], cwd=flat).stdout
    with signing(site.root / "vendor-key") as signer:
        (flat / "InRelease").write_bytes(signer.clear(release))
    key = "\n".join(f" {line or '.'}" for line in (site.root / "vendor.asc").read_text().splitlines())
    (site.fleet / "sources.d/nvidia.sources").write_text(
        f"Types: deb\nURIs: file:{flat}\nSuites: ./\nSigned-By:\n{key}\n")
    wanted = WantedDriver("580.126.09", ("open",), ("gpu-1",), ())
    closure = download_drivers((wanted,), default_system(), ALL_NAMES, site.fleet, discard)[0]
    assert "libcuda1_580.126.09-1+test_amd64.deb" in {one.name for one in closure.debs}


GOOD = "Types: deb\nURIs: https://vendor.example/x\nSuites: /\n"


@pytest.mark.parametrize(("name", "text", "named"), [
    ("a.sources", GOOD, "no Signed-By"),
    ("a.sources", f"{GOOD}Signed-By: sources.d/a.asc\nTrusted: yes\n", "Trusted: yes"),
    ("a.sources", f"{GOOD}Signed-By: sources.d/a.asc\nAllow-Insecure: yes\n", "Allow-Insecure: yes"),
    ("a.sources", f"{GOOD}Signed-By: /usr/share/keyrings/a.gpg\n", "Signed-By: /usr/share/keyrings/a.gpg"),
    ("a.sources", f"{GOOD}Signed-By: ../a.asc\n", "Signed-By: ../a.asc"),
    ("a.sources", f"{GOOD}Signed-By: sources.d/text.asc\n", "no OpenPGP public key"),
    ("a.sources", "Types: deb\nURIs: https://vendor.example\nSuites: stable\nSigned-By: x\n", "Suites: stable"),
    ("a.sources", "Types: deb\nURIs: vendor\nSuites: /\nSigned-By: x\n", "URIs: vendor"),
    ("a.list", "deb [trusted=yes] https://vendor.example /\n", "old format")])
def test_a_source_that_hosts_must_not_trust(tmp_path: Path, name: str, text: str, named: str) -> None:
    (tmp_path / "sources.d").mkdir()
    (tmp_path / "sources.d/text.asc").write_text("no key\n")
    (tmp_path / "sources.d" / name).write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_vendor_sources(tmp_path)
    assert caught.value.code == "bundle.bad_source"
    assert caught.value.message.startswith(f"{tmp_path}/sources.d/{name} ")
    assert named in caught.value.message


def test_what_is_switched_off_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "sources.d").mkdir()
    (tmp_path / "sources.d/a.sources").write_text(f"Enabled: no\n{GOOD}\n\nTypes: deb-src\nURIs: x\n")
    (tmp_path / "sources.d/README").write_text("words\n")
    assert read_vendor_sources(tmp_path) == ()


class Machine:
    """A host's apt that only simulates: the bundle as its one source, and a dpkg status that the test writes."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._root = site.root / "host"
        for directory in ("lists/partial", "cache/archives/partial", "sources", "preferences"):
            (self._root / directory).mkdir(parents=True)
        (self._root / "status").touch()
        (self._root / "sources/opsctl.sources").write_text(
            f"Types: deb\nURIs: file:{site.fleet / 'bundle/apt'}\nSuites: bookworm\nComponents: main\n"
            f"Signed-By: {site.fleet / 'trust/bundle.asc'}\n")
        self.configuration.write_text("".join(f'{key} "{value}";\n' for key, value in self._options().items()))
        assert self.apt("update").endswith("rc=0\n")

    @property
    def configuration(self) -> Path:
        return self._root / "apt.conf"

    def _options(self) -> dict[str, object]:
        return {"Dir::State": self._root, "Dir::State::lists": self._root / "lists",
                "Dir::State::status": self._root / "status",
                "Dir::State::extended_states": self._root / "extended", "Dir::Cache": self._root / "cache",
                "Dir::Etc::sourcelist": os.devnull, "Dir::Etc::sourceparts": self._root / "sources",
                "Dir::Etc::preferencesparts": self._root / "preferences", "APT::Architecture": "amd64",
                "APT::Sandbox::User": "root", "Debug::NoLocking": "1"}

    def apt(self, *arguments: str) -> str:
        options = (word for key, value in self._options().items() for word in ("-o", f"{key}={value}"))
        done = run(["apt-get", *options, *arguments])
        return (done.stdout + done.stderr).decode() + f"\nrc={done.returncode}\n"

    def prefers(self, preferences: str) -> None:
        (self._root / "preferences/opsctl-nvidia").write_text(
            render("roles/nvidia_driver/templates/opsctl-nvidia.j2", nvidia_driver_version="1",
                   nvidia_driver_verdict={"preferences": preferences}))

    def has(self, packages: dict[str, str], states: Mapping[str, str] = MappingProxyType({})) -> None:
        """These are installed, some of them by half, and on hold."""
        index = {tuple(re.findall("^(?:Package|Version): (.+)$", stanza, re.MULTILINE)): stanza
                 for stanza in self._site.index().strip().split("\n\n")}
        state = {name: f"\nStatus: hold ok {states.get(name, 'installed')}\nVersion" for name in packages}
        stanzas = [index[name, version].replace("\nVersion", state[name], 1) for name, version in packages.items()]
        (self._root / "status").write_text("\n\n".join(stanzas) + "\n")


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, resource("roles") / f"nvidia_driver/files/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def simulate(machine: Machine, transaction: Transaction) -> tuple[tuple[set[str], set[str]], str]:
    """What apt would install and remove, and why it is refused, as driver_transaction sees it."""
    transactions = program("driver_transaction")
    asked = {"what": transaction.what, "install": transaction.install, "remove": transaction.remove}
    output = machine.apt("-s", *transactions.APT[1:], "install", "--", *transactions.packages_of(asked))
    assert output.endswith("rc=0\n"), output
    return transactions.simulated(output), transactions.refusal(asked, output)


@pytest.mark.parametrize(("before", "after"), [("580.126.09", "595.71.05"), ("595.71.05", "580.126.09")])
def test_a_hosts_apt_goes_up_and_down_with_everything_held(site: Site, before: str, after: str) -> None:
    """Both transactions as the role runs them: apt, the host's packages and holds are real, the installing is not."""
    site.build(BOTH)
    machine, index = Machine(site), parse_index(site.index())

    def bring(version: str, seen: Seen) -> tuple[dict[str, str], Course]:
        names = NAMES
        want = desired(Wish("gpu-1", version), seen, names, index)
        return {want.pin: f"{version}-1+test", **want.packages, "build-tool": "12", "linux-headers-amd64": "6.1"}, \
            course(want, seen, index)

    installed, _ = bring(before, Seen(("2335",)))
    machine.has(installed)
    wanted, change = bring(after, Seen(("2335",), installed=installed, held=frozenset(installed), loaded=before))
    simulated = {}
    for one in change.transactions:
        simulated[one.what], refusal = simulate(machine, one)
        assert refusal == ""
        if one.what == "pin":
            machine.has({**{name: version for name, version in installed.items() if "pinning" not in name},
                         f"nvidia-driver-pinning-{after}": f"{after}-1+test"})
    assert simulated["pin"] == ({f"nvidia-driver-pinning-{after}"}, {f"nvidia-driver-pinning-{before}"})
    assert simulated["driver"] == ({"nvidia-fabricmanager", "libnvsdm", *HOLDABLE}, set())
    machine.has(wanted)
    assert bring(after, Seen(("2335",), installed=wanted, held=frozenset(wanted), loaded=after))[1].transactions == ()


def test_a_host_that_purges_what_it_removes(site: Site) -> None:
    """apt -s says Purg then, and the gate has to see it; the program itself leaves a package's settings alone."""
    site.build(BOTH)
    machine, gate = Machine(site), program("driver_transaction")
    machine.has({"tiny": "1", "build-tool": "12"})
    with machine.configuration.open("a") as file:
        file.write('APT::Get::Purge "true";\n')
    argv = ["apt-get", "-c", str(machine.configuration), "-s"]
    refused = gate.refusal({"what": "driver", "install": [], "remove": []},
                           run([*argv, "-y", "--allow-change-held-packages", "install", "tiny-"]).stdout.decode())
    assert refused == "apt would remove tiny, which is none of the driver's."
    assert "\nRemv tiny " in run([*argv, *gate.APT[1:], "install", "tiny-"]).stdout.decode()


def test_the_other_module_goes_though_it_did_not_build(site: Site) -> None:
    """dpkg left it half-configured: its version tells that it is the driver's, and apt may remove it."""
    site.build("[gpu]\ngpu-1 nvidia_driver_version=580.126.09\n")
    machine, index = Machine(site), parse_index(site.index())
    installed = {**dict.fromkeys(("nvidia-driver-pinning-580.126.09", "nvidia-fabricmanager", "libnvsdm", *HOLDABLE),
                                 "580.126.09-1+test"), "build-tool": "12", "linux-headers-amd64": "6.1"}
    states = {"nvidia-kernel-open-dkms": "half-configured"}
    machine.has(installed, states)
    seen = Seen(("2335",), installed=installed, states=states, held=frozenset(installed))
    (one,) = course(desired(Wish("gpu-1", "580.126.09", flavour="proprietary"), seen, NAMES, index), seen,
                    index).transactions
    assert simulate(machine, one) == (({"nvidia-kernel-dkms"}, {"nvidia-kernel-open-dkms"}), "")


def test_a_host_with_sources_of_its_own_keeps_what_is_right(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """package_source=upstream: the host's own apt is asked, also for what is not called nvidia."""
    site.build(BOTH)
    monkeypatch.setenv("APT_CONFIG", str(Machine(site).configuration))
    index = parse_index(program("driver_facts").sources_have("6.1.0-30-amd64", NAMES.patterns))
    assert set(index["libnvsdm"]) == {f"{version}-1+test" for version in VERSIONS}
    assert not {"tiny", "build-tool", "linux-headers-amd64"} & set(index)
    want = desired(Wish("gpu-1", "580.126.09"), Seen(("2335",)), NAMES, index)
    installed = {want.pin: "580.126.09-1+test", **want.packages, "linux-headers-amd64": "6.1"}
    assert "libnvsdm" in installed
    assert course(want, Seen(("2335",), installed=installed, held=frozenset(want.holds), loaded="580.126.09"),
                  index) == Course("none", (), (), False)


def test_a_source_without_the_fabric_manager_is_told(site: Site) -> None:
    names = dataclasses.replace(NAMES, fabric=("nvidia-fabricmanager", "nvidia-imex"))
    wanted = WantedDriver("580.126.09", ("open",), ("gpu-1",), ())
    said: list[Event] = []
    (closure,) = download_drivers((wanted,), default_system(), {"vendor": names}, site.fleet, said.append)
    assert not [deb for deb in closure.debs if "fabricmanager" in deb.name]
    assert [event.message for event in said if isinstance(event, Note) and "580.126.09" in event.message] == [
        "the sources in sources.d have no nvidia-imex 580.126.09: no bundled fabric manager for boards with NVSwitches"]


def test_files_whose_names_differ_by_a_character_are_two_sources(site: Site) -> None:
    """Nothing of one takes the place of the other, and what is told is the name that the operator wrote."""
    folder, text = site.fleet / "sources.d", (site.fleet / "sources.d/nvidia.sources").read_text()
    stems = ("nvidia.cuda", "nvidia-cuda", "nvidia cuda", "nvidia+cuda")
    for stem in stems:
        (folder / f"{stem}.sources").write_text(text.replace("nvidia.asc", f"{stem}.asc"))
        shutil.copy(folder / "nvidia.asc", folder / f"{stem}.asc")
    (folder / "nvidia.sources").unlink()
    sources = read_vendor_sources(site.fleet)
    assert len({source.name for source in sources}) == len(stems)
    assert len({source.key_name for source in sources}) == len(stems)
    assert set(described(sources).split(", ")) == {f"{stem}.sources" for stem in stems}


def test_a_source_whose_file_is_renamed_leaves_nothing_behind(site: Site) -> None:
    wanted = WantedDriver("580.126.09", ("open",), ("gpu-1",), ())
    assert download_drivers((wanted,), default_system(), ALL_NAMES, site.fleet, discard)
    (site.fleet / "sources.d/nvidia.sources").rename(site.fleet / "sources.d/vendor.sources")
    assert download_drivers((wanted,), default_system(), ALL_NAMES, site.fleet, discard)


@pytest.mark.parametrize(("uris", "told"), [
    ("https://me:secret@good.example/x htps://me:secret@bad.example/y", "URIs: htps://bad.example/y"),
    ("me:secret@bad.example/y", "URIs: bad.example/y"),
    ("htps://me:se/cret@bad.example/y", "URIs: htps://bad.example/y"),
    ("", "no URIs")])
def test_a_wrong_address_is_told_without_its_password(tmp_path: Path, uris: str, told: str) -> None:
    (tmp_path / "sources.d").mkdir()
    (tmp_path / "sources.d/a.sources").write_text(f"Types: deb\nURIs: {uris}\nSuites: /\nSigned-By: x\n")
    with pytest.raises(ConfigurationError) as caught:
        read_vendor_sources(tmp_path)
    assert f"a.sources has {told}, which" in caught.value.message
    assert not re.search("secret|good|cret", caught.value.message)


def test_a_bundle_without_drivers_does_not_ask_the_vendor(site: Site) -> None:
    shutil.rmtree(site.root / "vendor")
    site.build("[gpu]\ngpu-1\n")
    assert download_closure(("tiny",), default_system(), discard).debs
