"""Debian's own driver, of non-free: relations as apt-cache showed them on Debian 12 (fixtures/driver), and real apt."""

from __future__ import annotations

import re
import shutil
from datetime import date
from pathlib import Path

import pytest

from opsctl.bundle.drivers import _arguments, download_drivers, driver_names
from opsctl.bundle.private_apt import PrivateApt, _machine_sources
from opsctl.bundle.vendor_sources import VendorSource
from opsctl.engines.events import Event, Note, discard
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.gpus import WantedDriver, first_wrong, wanted_drivers
from opsctl.fleet.model import Host
from opsctl.fleet.systems import default_system, system_of
from opsctl.resolving import warn_of_ended
from opsctl.resources import resource
from opsctl.stack.driver import Desired, Seen, Transaction, course, desired
from opsctl.stack.fit import Wish
from opsctl.stack.index import Index, parse_index

TEXT = (Path(__file__).parent / "fixtures/driver/debian12-packages.txt").read_text(encoding="utf-8")
INDEX = parse_index(TEXT)
NAMES = driver_names(resource("roles"))
H200, V100, T4 = "2335", "1db1", "1eb8"
SECURITY, POINT = "535.309.01", "535.261.03"  # of bookworm-security, and of bookworm
LIBRARIES = ("firmware-nvidia-gsp", "libcuda1", "libnvidia-cfg1", "libnvidia-ml1", "libnvidia-pkcs11-openssl3",
             "libnvidia-ptxjitcompiler1", "nvidia-alternative", "nvidia-legacy-check", "nvidia-smi")
MODULE = ("nvidia-kernel-dkms", "nvidia-kernel-support")


def want(version: str = SECURITY, gpu: str = V100, *, index: Index = INDEX, **others: str) -> Desired:
    return desired(Wish("gpu-1", version, source="debian", **others), Seen((gpu,)),  # type: ignore[arg-type]
                   NAMES["debian"], index)


def test_the_family_and_its_companions_have_exact_versions() -> None:
    assert want().packages == {
        **dict.fromkeys((*LIBRARIES, *MODULE, "nvidia-modprobe"), f"{SECURITY}-0+deb12u1"),
        "nvidia-persistenced": "535.171.04-1~deb12u1"}
    assert want(POINT).packages == {
        **dict.fromkeys((*LIBRARIES, *MODULE), f"{POINT}-1"),
        "nvidia-modprobe": "535.161.07-1~deb12u1", "nvidia-persistenced": "535.171.04-1~deb12u1"}
    assert set(want(POINT, T4).packages) - set(want(POINT).packages) == {
        "nvidia-open-kernel-dkms", "nvidia-open-kernel-support"}


def test_preferences_take_the_place_of_a_pinning_package() -> None:
    there = want(POINT)
    assert there.pin == ""
    assert there.holds == tuple(there.packages)
    stanzas = there.preferences.split("\n\n")
    assert [line for stanza in stanzas for line in stanza.splitlines() if line.startswith("Pin:")] == [
        f"Pin: version {POINT}-1", "Pin: version 535.161.07-1~deb12u1", "Pin: version 535.171.04-1~deb12u1"]
    assert there.preferences.count("Pin-Priority: 1001\n") == len(stanzas)
    assert set(re.findall(r"[a-z0-9+.-]+", " ".join(re.findall("^Package: (.*)$", there.preferences, re.MULTILINE)))
               ) == set(there.packages)


def test_another_sources_companions_are_not_taken() -> None:
    mixed = parse_index(f"{TEXT}\n\nPackage: nvidia-modprobe\nVersion: 580.126.09-1\n")
    assert want(index=mixed).packages["nvidia-modprobe"] == f"{SECURITY}-0+deb12u1"


@pytest.mark.parametrize(("gpu", "others", "named", "hint"), [
    (T4, {}, f"no nvidia-open-kernel-dkms {SECURITY}; the nearest that it has: {POINT}",
     "nvidia_driver_flavour=proprietary"),
    (H200, {"flavour": "proprietary"}, f"no nvidia-fabricmanager {SECURITY}; and no other", "opsctl bundle build")])
def test_what_debian_does_not_have_is_refused(gpu: str, others: dict[str, str], named: str, hint: str) -> None:
    with pytest.raises(RefusedError) as caught:
        want(SECURITY, gpu, **others)
    assert caught.value.code == "driver.no_such_version"
    assert named in caught.value.message
    assert hint in caught.value.hint


def test_a_newer_version_moves_everything_and_leaves_what_is_apart() -> None:
    before, after = want(POINT), want(SECURITY)
    installed = {**before.packages, "nvidia-settings": "535.247.01-1~deb12u1", "libxnvctrl0": "525.85.05-3~deb12u1",
                 "linux-headers-amd64": "6.1.176-1"}
    what = course(after, Seen((V100,), installed=installed, held=frozenset(before.packages), loaded=POINT), INDEX)
    moved = tuple(f"{name}={version}" for name, version in after.packages.items())
    assert (what.change, what.transactions) == ("up", (Transaction("driver", moved),))
    assert what.hold == tuple(after.packages)
    there = course(after, Seen((V100,), installed={**installed, **after.packages}, held=frozenset(after.packages),
                               loaded=SECURITY), INDEX)
    assert (there.change, there.transactions, there.hold, there.load) == ("none", (), (), False)


def test_from_the_vendors_packages_the_pin_goes_and_what_debian_does_not_have() -> None:
    vendor = dict.fromkeys(("nvidia-driver-pinning-580.126.09", "nvidia-driver-cuda", "libcuda1", "nvidia-modprobe",
                            "nvidia-persistenced", "nvidia-kernel-dkms"), "580.126.09-1")
    what = course(want(), Seen((V100,), installed=vendor, held=frozenset(vendor), loaded="580.126.09"), INDEX)
    assert what.change == "down"
    assert what.transactions[0] == Transaction("pin", (), ("nvidia-driver-pinning-580.126.09",))
    assert what.transactions[1].remove == ("nvidia-driver-cuda",)
    assert f"nvidia-modprobe={SECURITY}-0+deb12u1" in what.transactions[1].install


def test_an_inventory_says_whose_packages() -> None:
    wrong = first_wrong({"nvidia_driver_source": "ubuntu"})
    assert wrong is not None
    assert wrong.hint == "nvidia_driver_source is one of vendor, debian"
    hosts = {"gpu-1": {"nvidia_driver_version": POINT, "nvidia_driver_source": "debian", "gpu_model": "V100"},
             "gpu-2": {"nvidia_driver_version": "580.126.09", "nvidia_driver_bundle_versions": [POINT]}}
    assert [(one.version, one.source, one.hosts) for one in wanted_drivers(hosts, ())] == [
        (POINT, "vendor", ("gpu-2",)), (POINT, "debian", ("gpu-1",)), ("580.126.09", "vendor", ("gpu-2",))]


def test_one_version_of_two_sources_is_refused(tmp_path: Path) -> None:
    wanted = (WantedDriver(POINT, ("open",), ("gpu-2",), ()),
              WantedDriver(POINT, ("proprietary",), ("gpu-1",), (), "debian"))
    with pytest.raises(RefusedError) as caught:
        download_drivers(wanted, default_system(), NAMES, tmp_path, discard)
    assert caught.value.code == "bundle.two_sources"
    assert "gpu-2 and gpu-1" in caught.value.message


def test_a_vendors_repository_alone_is_no_source_of_debians(tmp_path: Path) -> None:
    """Debian's keyring here is only any key: the source is not asked."""
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if not keyring.exists():
        pytest.skip(f"no {keyring} here")
    (tmp_path / "sources.d").mkdir()
    shutil.copy(keyring, tmp_path / "sources.d/any.gpg")
    (tmp_path / "sources.d/nvidia.sources").write_text(
        "Types: deb\nURIs: https://vendor.example/x\nSuites: /\nSigned-By: sources.d/any.gpg\n")
    with pytest.raises(RefusedError) as caught:
        download_drivers((WantedDriver(POINT, ("proprietary",), ("gpu-1",), (), "debian"),), default_system(), NAMES,
                         tmp_path, discard)
    assert caught.value.code == "bundle.no_vendor_source"
    assert "sources.d/debian.sources" in caught.value.hint


def test_provision_warns_of_a_branch_that_has_ended() -> None:
    said: list[Event] = []
    hosts = [Host(name, "192.0.2.1", ("gpu",), variables={"nvidia_driver_version": SECURITY, **others})
             for name, others in (("gpu-1", {"nvidia_driver_source": "debian"}), ("gpu-2", {}))]
    warn_of_ended(hosts, said.append, date(2026, 6, 1))
    assert said == []
    warn_of_ended(hosts, said.append, date(2026, 11, 22))
    assert [(event.host, event.level) for event in said if isinstance(event, Note)] == [("gpu-1", "warning")]
    assert "driver branch 535 gets no fixes any more: it ended with 2026-06" in str(said[0])


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="not a Debian")
@pytest.mark.parametrize("os_release", ["debian12", "debian13"])
def test_debians_real_packages_go_together(os_release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own mirror, with non-free written beside it as an operator does; it downloads lists alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    system = system_of(os_release)
    assert system is not None
    try:
        PrivateApt(system).update(discard)
        key = keyring.read_bytes()
    except (OpsctlError, FileNotFoundError) as error:
        pytest.skip(f"no Debian mirror from here: {error}")
    apt = PrivateApt(system, [VendorSource(f"debian-{number}", "debian.sources", source.addresses, source.suites,
                                           ("contrib", "non-free", "non-free-firmware"), key)
                              for number, source in enumerate(_machine_sources(system))])
    apt.update(discard)  # apt refuses two keys for one Release file
    index = parse_index(apt.index(NAMES["debian"].may_belong))
    versions = {version.partition("-")[0] for version in index.get("nvidia-smi", {})}
    if not versions:
        pytest.skip("the mirror has no non-free")
    for version in sorted(versions):
        driver = WantedDriver(version, ("proprietary",), ("gpu-1",), ("linux-headers-amd64",), "debian")
        asked = _arguments(driver, "proprietary", NAMES["debian"], index)
        files = {deb.name.split("_")[0]: deb for deb in apt.resolve(asked)}
        assert {"nvidia-kernel-dkms", "dkms", "glx-alternative-nvidia", "linux-headers-amd64"} <= set(files)
        assert {name for name in files if version in files[name].name} >= {*LIBRARIES, *MODULE}
