"""The container toolkit's and CUDA's packages: the inventory, the bundle, a host's apt. Real apt on both sides.

Transactions that are really done need root and a base root of the lab, as in test_lab_vendor_install.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rendering import render
from test_bundle_drivers import Site, deb, publish
from test_lab_vendor_install import BASES, Throwaway
from vendor_kit import OLD, Host, build, needs_tools, of

from opsctl.bundle.keys import dearmor, make_bundle_key
from opsctl.bundle.vendor_packages import DRIVERS
from opsctl.engines.events import Event, Note
from opsctl.errors import ConfigurationError, RefusedError
from opsctl.fleet.hosts import make_host
from opsctl.fleet.inventory import is_read
from opsctl.fleet.vendor_packages import READ, first_wrong, versions_of, wanted_versions
from opsctl.lab.vendor.repository import Repository, sources_file
from opsctl.resources import resource
from opsctl.role_tasks import defaults_of
from opsctl.stack.ask_pinned import answer
from opsctl.stack.pinned import upstream_of, wishes

FOUR = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools",
        "libnvidia-container1")
CUDA = {"cuda_toolkit_version": "13.0.2", "cudnn_version": "9.20.0.48", "nccl_version": "2.28.9"}
CUDA_PACKAGES = {
    "cuda-toolkit-13-0": "13.0.2-1+lab", "libcudnn9-cuda-13": "9.20.0.48-1+lab",
    "libcudnn9-dev-cuda-13": "9.20.0.48-1+lab", "libcudnn9-headers-cuda-13": "9.20.0.48-1+lab",
    "libnccl2": "2.28.9-1+cuda13.0+lab", "libnccl-dev": "2.28.9-1+cuda13.0+lab"}
NOTHING: dict[str, Any] = {"installed": {}, "states": {}, "held": [], "recorded": []}


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, resource("roles") / f"base/files/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(version: str) -> dict[str, str]:
    return dict.fromkeys(FOUR, f"{version}-1+lab")


def has(packages: Mapping[str, str]) -> dict[str, Any]:
    return {"installed": dict(packages), "states": {}, "held": sorted(packages), "recorded": sorted(packages)}


@pytest.mark.parametrize("variables", [
    {}, {"nvidia_container_toolkit_version": "1.19.0"}, CUDA, {**CUDA, "nccl_version": "2.28.9+cuda12.9"},
    {"nvidia_container_toolkit_bundle_versions": ["1.18.2", "1.19.0"]}, {"cuda_toolkit_bundle_versions": "12.9.1"}])
def test_what_is_right(variables: dict[str, Any]) -> None:
    assert first_wrong(variables) is None


@pytest.mark.parametrize(("variables", "key", "told"), [
    ({"nvidia_container_toolkit_version": "1.19"}, "nvidia_container_toolkit_version", "no exact version"),
    ({"nvidia_container_toolkit_version": "1.19.0-1"}, "nvidia_container_toolkit_version", "no exact version"),
    ({"nvidia_container_toolkit_version": ["1.19.0", "1.18.2"]}, "nvidia_container_toolkit_version", "more than one"),
    ({"nvidia_container_toolkit_bundle_versions": ["latest"]}, "nvidia_container_toolkit_bundle_versions", "no exact"),
    ({"cuda_toolkit_version": "13.0"}, "cuda_toolkit_version", "no exact version"),
    ({"cudnn_version": "9.20.0.48"}, "cudnn_version", "none is named"),
    ({"cuda_toolkit_version": "13.0.2", "nccl_version": "2.28.9-1"}, "nccl_version", "no exact version")])
def test_what_is_wrong_is_named(variables: dict[str, Any], key: str, told: str) -> None:
    wrong = first_wrong(variables)
    assert wrong is not None
    assert wrong.key == key
    assert told in wrong.problem


def test_the_hosts_line_is_named(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.ini"
    inventory.write_text("[gpu]\ngpu-1 nvidia_container_toolkit_version=1.19\n")
    with pytest.raises(ConfigurationError) as caught:
        make_host("gpu-1", {"nvidia_container_toolkit_version": "1.19"}, ["gpu"], inventory)
    assert caught.value.message.startswith(f"{inventory}:2: nvidia_container_toolkit_version=1.19 of gpu-1 is no exact")
    assert [name for name in READ if not is_read(name)] == []


def test_who_names_nothing_gets_nothing() -> None:
    assert versions_of("cuda", {"cudnn_version": "9.20.0.48"}) == {}
    assert wanted_versions("container_toolkit", {"gpu-1": {}, "ops-1": {"gpu_model": "H200"}}) == ()


def test_the_way_back_takes_cudnn_and_nccl_along() -> None:
    hosts = {"gpu-1": {**CUDA, "cuda_toolkit_bundle_versions": ["12.9.1"]}, "gpu-2": CUDA}
    assert wanted_versions("cuda", hosts) == (
        (CUDA, ("gpu-1", "gpu-2")), ({**CUDA, "cuda_toolkit_version": "12.9.1"}, ("gpu-1",)))


def test_names_and_builds_follow_the_versions() -> None:
    found = wishes({**CUDA, "nccl_version": "2.28.9+cuda12.9"}, defaults_of("cuda")["cuda_names"])
    assert [wish.names for wish in wishes(CUDA, defaults_of("cuda")["cuda_names"])] == [
        ("cuda-toolkit-13-0",), ("libcudnn9-cuda-13", "libcudnn9-dev-cuda-13", "libcudnn9-headers-cuda-13"),
        ("libnccl2", "libnccl-dev")]
    assert found[2].build == "+cuda12.9"
    assert upstream_of("1:2.28.9-1+cuda13.0+lab") == ("2.28.9", "+cuda13.0")
    assert upstream_of("13.0.2-1") == ("13.0.2", "")


def test_both_gates_know_the_same_drivers() -> None:
    gate = program("pinned_transaction")
    assert gate.DRIVERS.pattern == DRIVERS.pattern
    driver = ("cuda", "cuda-13-0", "cuda-13", "cuda-drivers", "cuda-drivers-580", "cuda-runtime-13-0",
              "cuda-compat-13-0", "libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "libnvidia-ml1",
              "nvidia-fs", "nvidia-open")
    others = (*FOUR, *CUDA_PACKAGES, "cuda-nvcc-13-0", "cuda-cudart-13-0", "libcublas-13-0", "libnvjitlink-13-0",
              "gds-tools-13-0", "libnvvm-13-0", "nsight-compute-2025.3.1")
    assert [name for name in driver if not DRIVERS.match(name)] == []
    assert [name for name in others if DRIVERS.match(name)] == []


# ---- what a host's apt answers, simulated ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return build(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, repository: Repository) -> Host:
    found = Host(tmp_path_factory.mktemp("host") / "root", repository)
    assert found.update().status == 0
    return found


def asked(repository: Repository, role: str, versions: Mapping[str, str], seen: Mapping[str, Any]) -> dict[str, Any]:
    return answer({"host": "gpu-1", "versions": versions, "names": defaults_of(role)[f"{role}_names"], "seen": seen,
                   "index": str(repository.path / "dists/bookworm/main/binary-amd64/Packages")})


def simulated(host: Host, course: Mapping[str, Any]) -> tuple[dict[str, str], set[str], str]:
    """What apt would install and remove, and why it is refused."""
    gate = program("pinned_transaction")
    said = host.apt(*gate.APT[1:], "install", "--", *gate.packages_of(course))
    assert said.status == 0, said.output
    return said.installs, said.removes, gate.refusal(course, said.output)


@needs_tools
@pytest.mark.parametrize(("before", "after"), [("", "1.18.2"), ("1.18.2", "1.19.0"), ("1.19.0", "1.18.2")])
def test_the_four_go_up_and_down_together(repository: Repository, host: Host, before: str, after: str) -> None:
    seen = has(toolkit(before)) if before else NOTHING
    host.have(*(f"{name}={version}" for name, version in seen["installed"].items()), held=FOUR if before else ())
    found = asked(repository, "container_toolkit", {"nvidia_container_toolkit_version": after}, seen)
    assert simulated(host, found["course"]) == (dict.fromkeys(FOUR, after), set(), "")
    assert found["course"]["hold"] == FOUR
    again = asked(repository, "container_toolkit", {"nvidia_container_toolkit_version": after}, has(toolkit(after)))
    assert (again["pending"], again["course"]) == (False, {"install": (), "remove": (), "hold": ()})


@needs_tools
def test_what_somebody_changed_by_hand_is_mended(repository: Repository) -> None:
    wish = {"nvidia_container_toolkit_version": "1.19.0"}
    loose = {**has(toolkit("1.19.0")), "held": list(FOUR[:3])}
    assert asked(repository, "container_toolkit", wish, loose)["course"] == {
        "install": (), "remove": (), "hold": (FOUR[3],)}
    half = {**has(toolkit("1.19.0")), "states": {FOUR[0]: "half-configured"}}
    assert len(asked(repository, "container_toolkit", wish, half)["course"]["install"]) == 4


@needs_tools
def test_cuda_comes_without_a_driver_and_another_one_takes_its_place(repository: Repository, host: Host) -> None:
    host.have(*of(OLD))
    found = asked(repository, "cuda", CUDA, NOTHING)
    assert found["packages"] == CUDA_PACKAGES
    installs, removes, refusal = simulated(host, found["course"])
    assert set(installs) == {*CUDA_PACKAGES, "cuda-nvcc-13-0"}
    assert (removes, refusal) == (set(), "")
    host.have(*of(OLD), *(f"{name}={version}" for name, version in CUDA_PACKAGES.items()),
              "cuda-nvcc-13-0=13.0.2-1+lab", held=tuple(CUDA_PACKAGES))
    other = asked(repository, "cuda", {**CUDA, "cuda_toolkit_version": "12.9.1"}, has(CUDA_PACKAGES))
    installs, removes, refusal = simulated(host, other["course"])
    assert removes == {name for name in CUDA_PACKAGES if "13" in name}
    assert installs["libnccl2"] == "2.28.9"
    assert refusal == ""


@needs_tools
@pytest.mark.parametrize("trap", ["cuda", "cuda-13-0", "cuda-drivers"])
def test_a_metapackage_that_pulls_a_driver_is_refused(host: Host, trap: str) -> None:
    host.have()
    installs, _, refusal = simulated(host, {"install": [trap], "remove": []})
    assert "nvidia-kernel-dkms" in installs
    assert refusal.startswith("apt would touch the driver: cuda")
    host.have(*of(OLD))
    assert "nvidia-driver-cuda" in simulated(host, {"install": [trap], "remove": []})[2]


@needs_tools
def test_nothing_else_is_removed(host: Host) -> None:
    host.have(*(f"{name}={version}" for name, version in toolkit("1.19.0").items()))
    assert simulated(host, {"install": [], "remove": [FOUR[1]]})[2] == (
        "apt would remove nvidia-container-toolkit, which nobody asked for.")
    gate = program("pinned_transaction")
    for name in ("linux-image-6.1.0-30-amd64", "firmware-misc-nonfree", "grub-pc"):
        assert "boots with" in gate.refusal({"remove": []}, f"Inst {name} (1 x [amd64])\n")


@needs_tools
@pytest.mark.parametrize(("role", "versions", "told"), [
    ("container_toolkit", {"nvidia_container_toolkit_version": "1.19.1"},
     "gpu-1 names nvidia_container_toolkit_version=1.19.1, and the package source has no nvidia-container-toolkit "
     "1.19.1; the nearest that it has: 1.19.0, 1.18.2"),
    ("cuda", {"cuda_toolkit_version": "13.1.0"},
     "no cuda-toolkit-13-1 13.1.0; the nearest that it has: 13.0.1, 13.0.2"),
    ("cuda", {**CUDA, "cudnn_version": "9.19.0.1"}, "the nearest that it has: 9.20.0.48, 9.13.0.50"),
    ("cuda", {**CUDA, "nccl_version": "2.28.3+cuda12.9"},
     "no libnccl2 2.28.3+cuda12.9; the nearest that it has: 2.28.3+cuda13.0, 2.28.9+cuda12.9")])
def test_a_version_that_is_not_there_names_the_nearest(repository: Repository, role: str, versions: dict[str, str],
                                                       told: str) -> None:
    found = asked(repository, role, versions, NOTHING)
    assert found["code"] == "packages.no_such_version"
    assert told in found["error"]
    assert "opsctl bundle build" in found["error"]


# ---- the bundle ------------------------------------------------------------------------------------------------------

@pytest.fixture
def site(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """An operator's machine with a Debian mirror of its own, and the lab's vendor."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    publish(tmp_path, "mirror", [deb(tmp_path, name, "1", "") for name in ("tiny", "python3")]
            + [deb(tmp_path, "libc6", "2.36", "")])
    (tmp_path / "mirror.gpg").write_bytes(dearmor((tmp_path / "mirror.asc").read_text()))
    (tmp_path / "machine.list").write_text(
        f"deb [signed-by={tmp_path / 'mirror.gpg'}] file:{tmp_path / 'mirror'} bookworm main\n")
    (tmp_path / "apt.conf").write_text(f'Dir::Etc::sourcelist "{tmp_path / "machine.list"}";\n'
                                       f'Dir::Etc::sourceparts "{tmp_path / "nothing"}";\n')
    make_bundle_key(tmp_path / "fleet/keys/bundle", tmp_path / "fleet/trust/bundle.asc")
    (tmp_path / "fleet/sources.d").mkdir()
    shutil.copy(repository.key, tmp_path / "fleet/sources.d/nvidia.asc")
    (tmp_path / "fleet/sources.d/nvidia.sources").write_text(
        sources_file(f"file:{repository.path}", "sources.d/nvidia.asc"))
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return Site(tmp_path)


INVENTORY = """\
[gpu]
gpu-1 nvidia_container_toolkit_version=1.19.0 cuda_toolkit_version=13.0.2 cudnn_version=9.20.0.48 nccl_version=2.28.3
[all:vars]
nvidia_container_toolkit_bundle_versions=["1.18.2"]
cuda_toolkit_bundle_versions=["12.9.1"]
"""


@needs_tools
def test_exactly_the_versions_that_are_named_lie_in_the_bundle(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Event] = []
    monkeypatch.setattr("test_bundle_drivers.discard", said.append)
    site.build(INVENTORY)
    cudnn = [f"libcudnn9-{part}cuda-{major}_9.20.0.48-1+lab" for part in ("", "dev-", "headers-") for major in (12, 13)]
    assert site.pool() == {f"{name}_amd64.deb" for name in (
        "tiny_1", "python3_1", *(f"{name}_{version}-1+lab" for name in FOUR for version in ("1.18.2", "1.19.0")),
        *cudnn, "libnccl2_2.28.3-1+cuda13.0+lab", "libnccl-dev_2.28.3-1+cuda13.0+lab",
        *(f"cuda-{part}-13-0_13.0.2-1+lab" for part in ("toolkit", "nvcc")),
        *(f"cuda-{part}-12-9_12.9.1-1+lab" for part in ("toolkit", "nvcc")))}
    notes = [event.message for event in said if isinstance(event, Note) and "way back" in event.message]
    assert len(notes) == 1
    assert "has no libnccl2 2.28.3+cuda12.9; the nearest that it has: 2.28.3+cuda13.0" in notes[0]
    assert not site.build(INVENTORY).changed


@needs_tools
@pytest.mark.parametrize(("line", "code", "told"), [
    ("nvidia_container_toolkit_version=1.17.8", "bundle.no_such_version", "container-toolkit 1.17.8; the nearest"),
    ("cuda_toolkit_version=13.0.2 nccl_version=2.28.3+cuda12.9", "bundle.no_such_version", "2.28.9+cuda12.9")])
def test_a_build_without_the_version_says_what_is_near(site: Site, line: str, code: str, told: str) -> None:
    with pytest.raises(RefusedError) as caught:
        site.build(f"[gpu]\ngpu-1 {line}\n")
    assert caught.value.code == code
    assert told in caught.value.message
    assert "sources.d (nvidia.sources)" in caught.value.message


@needs_tools
def test_a_fleet_without_a_vendors_source(site: Site) -> None:
    shutil.rmtree(site.fleet / "sources.d")
    with pytest.raises(RefusedError) as caught:
        site.build("[gpu]\ngpu-1 nvidia_container_toolkit_version=1.19.0\n")
    assert caught.value.code == "bundle.no_vendor_source"
    assert "nvidia_container_toolkit_version=1.19.0" in caught.value.message


@needs_tools
def test_a_set_that_would_bring_a_driver_is_not_built(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsctl.bundle.vendor_packages.defaults_of",
                        lambda role: {f"{role}_names": {"cuda_toolkit_version": ["cuda-{major}-{minor}"]}})
    with pytest.raises(RefusedError) as caught:
        site.build("[gpu]\ngpu-1 cuda_toolkit_version=13.0.2\n")
    assert caught.value.code == "bundle.pulls_driver"
    assert "cuda-drivers" in caught.value.message


# ---- done for real, in a throw-away root -----------------------------------------------------------------------------

@pytest.fixture
def machine(tmp_path: Path, repository: Repository) -> Throwaway:
    if os.geteuid() != 0 or not BASES or shutil.which("unshare") is None:
        pytest.skip("needs root and a base root: opsctl lab up makes one")
    made = Throwaway(tmp_path, repository)
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    made.write("etc/apt/sources.list.d/vendor.sources", sources_file("file:/srv/vendor/apt", "/srv/vendor/key.asc",
                                                                          ["bookworm"]))
    made.write("etc/opsctl-lab")
    for name in ("pinned_transaction", "pinned_facts"):
        made.write(f"{name}.py", (resource("roles") / f"base/files/{name}.py").read_text())
    probe = made.run("true")
    if probe.returncode:
        pytest.skip(f"no overlay here: {probe.stderr.strip()}")
    made.does("apt-get", "-q", "update")
    return made


def seen_on(machine: Throwaway) -> Any:
    return json.loads(machine.does("python3", "/pinned_facts.py", "gateway", "/etc/opsctl/container_toolkit.json",
                                   *FOUR))["seen"]


@needs_tools
def test_installed_up_down_and_held_for_real(repository: Repository, machine: Throwaway) -> None:
    for version in ("1.18.2", "1.19.0", "1.18.2"):
        wish = {"nvidia_container_toolkit_version": version}
        course = asked(repository, "container_toolkit", wish, seen_on(machine))["course"]
        machine.does("python3", "/pinned_transaction.py", json.dumps(course))
        seen = seen_on(machine)
        assert (seen["installed"], sorted(seen["held"])) == (toolkit(version), sorted(FOUR))
        assert not asked(repository, "container_toolkit", wish, seen)["pending"]
        assert version in machine.does("nvidia-ctk", "--version")
    machine.does("apt-get", "-qy", "upgrade")
    assert seen_on(machine)["installed"] == toolkit("1.18.2")
    trap = {"install": ["cuda"], "remove": [], "hold": []}
    refused = machine.run("python3", "/pinned_transaction.py", json.dumps(trap))
    assert refused.returncode == 1
    assert "apt would touch the driver: cuda" in refused.stdout
    assert set(machine.packages()) == set(FOUR)


@needs_tools
def test_a_change_that_dpkg_ends_leaves_holds_and_the_next_run_mends_it(repository: Repository, machine: Throwaway
                                                                        ) -> None:
    def bring(version: str) -> Any:
        course = asked(repository, "container_toolkit", {"nvidia_container_toolkit_version": version}, seen_on(machine))
        return machine.run("python3", "/pinned_transaction.py", json.dumps(course["course"]))

    assert bring("1.18.2").returncode == 0
    machine.does("rm", "/etc/opsctl-lab")  # every preinst refuses now
    failed = bring("1.19.0")
    assert failed.returncode == 1, failed.stdout
    assert "apt-get failed with exit status 100" in failed.stdout
    assert sorted(seen_on(machine)["held"]) == sorted(FOUR)
    machine.does("touch", "/etc/opsctl-lab")
    assert bring("1.19.0").returncode == 0
    seen = seen_on(machine)
    assert (seen["installed"], seen["states"], sorted(seen["held"])) == (toolkit("1.19.0"), {}, sorted(FOUR))


@needs_tools
def test_a_preference_keeps_them_where_no_hold_does(machine: Throwaway) -> None:
    machine.does("apt-get", "-qy", "install", *(f"{name}={version}" for name, version in toolkit("1.18.2").items()))
    given: dict[str, Any] = {"base_pinned": "container_toolkit", "base_pinned_verdict": {"packages": toolkit("1.18.2")}}
    for template, place in (("pinned.pref.j2", "preferences.d/opsctl-container-toolkit"),
                            ("51opsctl-pinned.j2", "apt.conf.d/51opsctl-container-toolkit")):
        machine.write(f"etc/apt/{place}", render(f"roles/base/templates/{template}", **given))
    assert '"libnvidia-container1$";' in machine.does("apt-config", "dump", "Unattended-Upgrade::Package-Blacklist")
    machine.does("apt-get", "-qy", "upgrade")
    assert seen_on(machine)["installed"] == toolkit("1.18.2")
