"""Several suites in one bundle: which ones, from whom, and that each has files of its own. A real apt."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bundle_build import MISSING, Site, host_apt, model, site
from test_bundle_drivers import deb, publish

from opsctl.bundle.build import Built, build_bundle
from opsctl.bundle.drivers import drivers_wanted
from opsctl.bundle.keys import checking
from opsctl.bundle.repository import check_repository
from opsctl.bundle.suites import wanted
from opsctl.bundle.sums import digest
from opsctl.bundle.vendor_packages import sets_wanted
from opsctl.bundle.vendor_sources import VendorSource, read_vendor_sources, serving
from opsctl.bundle.verify import verify_bundle
from opsctl.engines.events import discard
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet.model import Host
from opsctl.fleet.systems import python_of, system_of
from opsctl.stack.knowledge import System

__all__ = ["model", "site"]  # fixtures

needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
UPSTREAM = {"package_source": "upstream"}


def release(key: str) -> System:
    system = system_of(key)
    assert system is not None
    return system


@pytest.mark.parametrize(("hostvars", "locked", "suites", "pythons"), [
    ({}, {}, ["bookworm"], ["3.11"]),
    ({"gpu-1": {}}, {}, ["bookworm"], ["3.11"]),
    ({"ops-1": {}, "gpu-1": {"os_release": "debian13"}}, {}, ["bookworm", "trixie"], ["3.11", "3.13"]),
    ({"gpu-1": {"os_release": "debian13"}}, {}, ["trixie"], ["3.13"]),
    ({"gpu-1": {}}, {"gpu-1": "debian13"}, ["trixie"], ["3.13"]),
    ({"gpu-1": {"os_release": "debian12"}}, {"gpu-1": "debian13"}, ["bookworm"], ["3.11"]),
    ({"gpu-1": {}}, {"gone": "debian13"}, ["bookworm"], ["3.11"]),
    ({"gpu-1": {"os_release": "ubuntu24.04", **UPSTREAM}, "ops-1": UPSTREAM}, {}, ["bookworm"], ["3.11", "3.12"]),
    ({"gpu-1": {"os_release": "ubuntu24.04", **UPSTREAM}}, {}, ["bookworm"], ["3.12"]),
])
def test_a_bundle_serves_the_releases_that_hosts_run(hostvars: Mapping[str, Mapping[str, Any]], suites: list[str],
                                                     locked: Mapping[str, str], pythons: list[str]) -> None:
    found = wanted(hostvars, locked, "stack.lock")
    assert [suite.system.codename for suite in found.suites] == suites
    assert [system.python for system in found.systems] == pythons


@pytest.mark.parametrize(("hostvars", "locked", "code", "told"), [
    ({"gpu-1": {"os_release": "ubuntu24.04"}}, {}, "bundle.no_suite", "gpu-1 runs Ubuntu 24.04"),
    ({"gpu-1": {}}, {"gpu-1": "ubuntu22.04"}, "bundle.no_suite", "gpu-1 runs Ubuntu 22.04"),
    ({"gpu-1": {}}, {"gpu-1": "debian11"}, "stack_lock.bad_value", "stack.lock: os debian11 of gpu-1")])
def test_a_release_that_a_bundle_cannot_have(hostvars: Mapping[str, Mapping[str, Any]], locked: Mapping[str, str],
                                             code: str, told: str) -> None:
    with pytest.raises(OpsctlError) as caught:
        wanted(hostvars, locked, "stack.lock")
    assert caught.value.code == code
    assert told in caught.value.message
    assert caught.value.hint


def test_what_is_kept_for_the_way_back_is_kept_for_the_release_that_has_it() -> None:
    """In [all:vars] it reaches ops-1 too, whose release has no driver of the vendor's, and needs no source of it."""
    back = {"nvidia_driver_bundle_versions": ["580.126.09"], "nvidia_container_toolkit_bundle_versions": ["1.18.2"]}
    gpu = {"os_release": "debian13", "nvidia_driver_version": "595.71.05", "nvidia_container_toolkit_version": "1.19.0"}
    found = wanted({"ops-1": back, "gpu-1": {**gpu, **back}}, {}, "stack.lock")
    said = {suite.system.codename: ([one.version for one in drivers_wanted(suite, found, ())],
                                    [one.wishes[0].version for one in sets_wanted(suite, found)])
            for suite in found.suites}
    assert said == {"bookworm": ([], []), "trixie": (["580.126.09", "595.71.05"], ["1.19.0", "1.18.2"])}


SOURCE = VendorSource("x-0", "x.sources", ("https://vendor.example/x",), ("/",), (), b"")


@pytest.mark.parametrize(("source", "debian12", "debian13"), [
    (SOURCE, "/", "/"),
    (replace(SOURCE, suites=("stable",)), "stable", "stable"),
    (replace(SOURCE, suites=("bookworm", "bookworm-updates", "trixie")), "bookworm bookworm-updates", "trixie"),
    (replace(SOURCE, suites=("bookworm-security",)), "bookworm-security", ""),
    (replace(SOURCE, suites=("noble",)), "", ""),
    (replace(SOURCE, addresses=("https://vendor.example/repos/debian13/x86_64/",)), "", "/"),
    (replace(SOURCE, addresses=("https://vendor.example/repos/ubuntu2404/x86_64/",)), "", ""),
    (replace(SOURCE, releases=("debian13",)), "", "/"),
    (replace(SOURCE, releases=("debian12", "debian13")), "/", "/"),
    (replace(SOURCE, addresses=("https://vendor.example/debian12/",), releases=("debian13",)), "", "/"),
])
def test_which_hosts_a_vendors_source_is_for(source: VendorSource, debian12: str, debian13: str) -> None:
    for key, suites in (("debian12", debian12), ("debian13", debian13)):
        assert " ".join(suite for one in serving([source], release(key)) for suite in one.suites) == suites


def test_a_source_for_a_release_that_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "sources.d").mkdir()
    (tmp_path / "sources.d/a.sources").write_text(
        "Types: deb\nURIs: https://vendor.example/x\nSuites: /\nX-OS-Release: trixie\nSigned-By: x\n")
    with pytest.raises(ConfigurationError) as caught:
        read_vendor_sources(tmp_path)
    assert "a.sources has X-OS-Release: trixie" in caught.value.message
    assert "debian13" in caught.value.hint


MIXED = """\
[gateway]
ops-1
[gpu]
gpu-1 os_release=debian13 {}
"""


def build(site: Site, inventory: str, *packages: str) -> Built:
    (site.fleet / "inventory.ini").write_text(inventory, encoding="utf-8")
    return build_bundle(site.fleet, site.bundle, discard, inventory=site.fleet / "inventory.ini",
                        packages=packages or ("tiny-a",), locks=())


@pytest.fixture
def two(site: Site) -> Site:
    """The machine follows bookworm; its mirror has trixie too, whose tiny-b is another file of the same name."""
    site.publish(site.deb("tiny-a", "1:1.3-1", "tiny-b, only-trixie"), site.deb("only-trixie", "1"),
                 site.deb("tiny-b", "3.0", "only-trixie"), codename="trixie")
    return site


@needs_tools
def test_each_suite_has_files_of_its_own_and_one_signature_covers_both(two: Site) -> None:
    built = build(two, MIXED.format(""))
    assert built.suites == ("bookworm", "trixie")
    pool = two.bundle / "apt/pool"
    assert {str(path.relative_to(pool)) for path in pool.rglob("*.deb")} == {
        "bookworm/tiny-a_1.0-1_all.deb", "bookworm/tiny-b_3.0_all.deb",
        "trixie/tiny-a_1.3-1_all.deb", "trixie/tiny-b_3.0_all.deb", "trixie/only-trixie_1_all.deb"}
    assert digest(pool / "bookworm/tiny-b_3.0_all.deb") != digest(pool / "trixie/tiny-b_3.0_all.deb")
    two.verify()
    assert not build(two, MIXED.format("")).changed


@needs_tools
@pytest.mark.parametrize(("suite", "version"), [("bookworm", "1:1.0-1"), ("trixie", "1:1.3-1")])
def test_a_hosts_apt_sees_its_own_suite_alone(two: Site, suite: str, version: str) -> None:
    build(two, MIXED.format(""))
    assert host_apt(two, "update", suite=suite).endswith("rc=0\n")
    assert f"Inst tiny-a ({version} opsctl:{suite} [all])" in host_apt(two, "-s", "install", "tiny-a", suite=suite)


@needs_tools
def test_a_suite_that_no_host_runs_any_more_leaves_the_bundle(two: Site) -> None:
    build(two, MIXED.format(""))
    assert build(two, MIXED.format("").replace("gpu-1 os_release=debian13", "gpu-1")).changed
    assert [path.name for path in (two.bundle / "apt/dists").iterdir()] == ["bookworm"]
    assert [path.name for path in (two.bundle / "apt/pool").iterdir()] == ["bookworm"]
    two.verify()


@needs_tools
def test_a_suite_that_the_machines_mirror_does_not_have_is_named(site: Site) -> None:
    with pytest.raises(RefusedError) as caught:
        build(site, MIXED.format(""))
    assert caught.value.code == "bundle.sources_unreachable"
    assert "Debian 13 (trixie)" in caught.value.message


@needs_tools
def test_a_package_that_one_release_lacks_is_named_with_that_release(two: Site) -> None:
    with pytest.raises(RefusedError) as caught:
        build(two, MIXED.format(""), "tiny-a", "unasked")
    assert caught.value.code == "bundle.unknown_package"
    assert "Debian 13 (trixie) has no package unasked" in caught.value.message


@needs_tools
def test_an_index_of_one_suite_that_leads_elsewhere_is_refused(two: Site) -> None:
    """The sums are taken anew after it, as by who signs without looking: the index itself tells."""
    build(two, MIXED.format(""))
    path = two.bundle / "apt/pool/trixie/tiny-b_3.0_all.deb"
    path.unlink()
    shutil.copy(two.bundle / "apt/pool/bookworm/tiny-b_3.0_all.deb", path)
    names = {str(one.relative_to(two.bundle)) for one in (two.bundle / "apt").rglob("*") if one.is_file()}
    with checking(two.trusted_key()) as checker, pytest.raises(RefusedError) as caught:
        check_repository(two.bundle, checker, {name: digest(two.bundle / name) for name in names})
    assert caught.value.code == "bundle.inconsistent"
    assert "pool/trixie/tiny-b" in caught.value.message


@needs_tools
def test_a_bundle_of_one_suite_with_the_pool_as_it_was_is_still_read(two: Site) -> None:
    """pool/main: its own build signed it, and what reads it goes by the index."""
    build(two, "[gpu]\ngpu-1\n")
    source = Path(__file__).parents[2] / "opsctl/bundle/repository.py"
    assert re.search(r"pool/main", source.read_text()), "where the old layout is told of"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsctl.bundle.repository.pool_of", lambda _: "pool/main")
        shutil.rmtree(two.bundle)
        build(two, "[gpu]\ngpu-1\n")
    assert (two.bundle / "apt/pool/main").is_dir()
    verify_bundle(two.bundle, two.trusted_key())
    assert build(two, "[gpu]\ngpu-1\n").changed
    assert not (two.bundle / "apt/pool/main").exists()


DRIVER = "nvidia_driver_version=580.126.09 nvidia_driver_flavour=open nvidia_driver_own='[]'"


@needs_tools
def test_a_driver_comes_from_the_source_for_the_hosts_release(two: Site) -> None:
    exact = "580.126.09-1"
    family = {"nvidia-driver-cuda": f"Depends: nvidia-kernel-open-dkms (= {exact})\n", **dict.fromkeys((
        "nvidia-driver-pinning-580.126.09", "nvidia-kernel-open-dkms", "nvidia-modprobe", "nvidia-persistenced",
        "nvidia-fabricmanager"), "")}
    for suite in ("bookworm", "trixie"):
        root = two.root / f"vendor-{suite}"
        root.mkdir()
        publish(root, "repo", [deb(root, name, exact, f"{fields}Section: {suite}\n")
                               for name, fields in family.items()], suite)
    sources = two.fleet / "sources.d"
    sources.mkdir()
    text = "Types: deb\nURIs: file:{}/repo\nSuites: {}\nComponents: main\nSigned-By: sources.d/{}.asc\n"
    for suite in ("bookworm", "trixie"):
        (sources / f"{suite}.sources").write_text(text.format(two.root / f"vendor-{suite}", suite, suite))
        shutil.copy(two.root / f"vendor-{suite}/repo.asc", sources / f"{suite}.asc")
    build(two, MIXED.format(DRIVER))
    name = "nvidia-modprobe_580.126.09-1_amd64.deb"
    assert digest(two.bundle / "apt/pool/trixie" / name) == digest(two.root / "vendor-trixie/debs" / name)
    assert not (two.bundle / "apt/pool/bookworm" / name).exists()
    (sources / "trixie.sources").unlink()
    with pytest.raises(RefusedError) as caught:
        build(two, MIXED.format(DRIVER))
    assert caught.value.code == "bundle.no_vendor_source"
    assert "for Debian 13" in caught.value.message


OLD, NEW = Host("gpu-1", "192.0.2.11", ("gpu",)), Host("gpu-2", "192.0.2.12", ("gpu",), os_release="debian13")


@pytest.mark.parametrize(("hosts", "typed", "python"), [
    ([OLD], "", "3.11"), ([NEW], "", "3.13"), ([NEW], "3.13", "3.13"), ([], "3.12", "3.12"), ([], "", "3.11")])
def test_a_lock_is_for_the_hosts_python(hosts: list[Host], typed: str, python: str) -> None:
    assert python_of("chat", hosts, typed) == python


@pytest.mark.parametrize(("hosts", "typed", "told"), [
    ([NEW], "3.11", "gpu-2, which serves chat, runs debian13 and has 3.13"),
    ([OLD, NEW], "3.11", "gpu-2, which serves chat"), ([OLD, NEW], "", "3.11 (gpu-1) and 3.13 (gpu-2)")])
def test_a_lock_for_a_python_that_a_host_has_not_is_refused(hosts: list[Host], typed: str, told: str) -> None:
    with pytest.raises(RefusedError) as caught:
        python_of("chat", hosts, typed)
    assert caught.value.code == "engine.python"
    assert told in caught.value.message
