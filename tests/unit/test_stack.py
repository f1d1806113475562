"""Which driver fits which GPUs, and what a host has to do for it: tables."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from opsctl.errors import OpsctlError
from opsctl.stack import catalogue as catalogues
from opsctl.stack.__main__ import answer
from opsctl.stack.catalogue import called, catalogue
from opsctl.stack.driver import Course, Desired, Names, Seen, check_idle, course, desired
from opsctl.stack.fit import Wish, check_fit, flavour_of, known_gpus, needs_fabric_manager
from opsctl.stack.index import family, parse_index
from opsctl.stack.versions import driver_in, is_driver_version, nearest

H200, L40S, B200, V100, T4, A100, RTX4090 = "2335", "26b9", "2901", "1db1", "1eb8", "20b2", "2684"
NAMES = Names(("nvidia-driver-cuda", "nvidia-modprobe"), ("nvidia-kernel-open-dkms",), ("nvidia-kernel-dkms",),
              ("nvidia-fabricmanager",))


def vendor(*drivers: str) -> str:
    """An index as the vendor's: exact dependencies, a leaf with a loose one, a pin for each version."""
    stanzas = []
    for driver in drivers:
        version = f"{driver}-1+lab"
        module = f"nvidia-kernel-open-dkms (= {version}) | nvidia-kernel-dkms (= {version})"
        stanzas += [
            f"Package: nvidia-driver-pinning-{driver}\nVersion: {version}",
            f"Package: nvidia-driver-cuda\nVersion: {version}\nDepends: {module}, libcuda1 (= {version}), libc6",
            f"Package: libcuda1\nVersion: {version}\nPre-Depends: libnvidia-ml1 (= {version})",
            *(f"Package: {name}\nVersion: {version}" for name in
              ("libnvidia-ml1", "nvidia-kernel-open-dkms", "nvidia-kernel-dkms", "nvidia-modprobe",
               "nvidia-fabricmanager", "nvidia-settings")),
        ]
    return "\n\n".join(stanzas) + "\n"


INDEX = parse_index(vendor("580.126.09", "580.159.04", "595.71.05"))
FAMILY = ("libcuda1", "libnvidia-ml1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-modprobe")


def wish(version: str = "580.126.09", **others: str) -> Wish:
    return Wish("gpu-1", version, **others)


def want(version: str = "580.126.09", gpus: tuple[str, ...] = (L40S,), **others: str) -> Desired:
    return desired(wish(version, **others), Seen(gpus), NAMES, INDEX)


def has(of: Desired) -> dict[str, str]:
    """The installed packages of a host that was brought there."""
    return {of.pin: f"{of.version}-1+lab", **of.packages}


def settled(of: Desired, **others: Any) -> Seen:
    return Seen((L40S,), installed=has(of), held=frozenset(of.holds), loaded=of.version, **others)


class TestData:
    @pytest.mark.parametrize("name", ["gpus.csv", "architectures.csv", "open_module_ids.csv"])
    def test_every_row_names_its_source(self, name: str) -> None:
        with (Path(catalogues.__file__).parent / name).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert rows
        assert [row for row in rows if not row["source"]] == []

    @pytest.mark.parametrize("model", ["H100", "H200", "B200", "A100", "L40S", "T4", "RTX 4090", "V100",
                                       "NVIDIA GeForce RTX 4090"])
    def test_a_model_is_found_by_its_short_name(self, model: str) -> None:
        assert called(model)

    def test_nothing_is_called_by_half_a_word(self) -> None:
        assert called("H20") != called("H200")
        assert not called("L4x")
        assert not called("")

    def test_every_id_of_the_open_modules_list_takes_the_open_module(self) -> None:
        with (Path(catalogues.__file__).parent / "open_module_ids.csv").open(encoding="utf-8") as file:
            ids = [row["device_id"] for row in csv.DictReader(file)]
        assert [one for one in ids if catalogue()[one].architecture.modules == "proprietary"] == []


@pytest.mark.parametrize(("text", "exact"), [("580.126.09", True), ("595.84", True), ("580", False), ("", False),
                                             ("580.126.09-1", False), ("580.*", False)])
def test_exact_versions(text: str, exact: bool) -> None:
    assert is_driver_version(text) == exact


@pytest.mark.parametrize(("package", "driver"), [
    ("580.126.09-1+lab", "580.126.09"), ("1:595.84-1~deb12u1", "595.84"), ("535.309.01-1~deb12u1", "535.309.01"),
    ("1.19.0-1", ""), ("4.4.1-1", ""), ("2.36-9+deb12u10", ""), ("6.1.0-56", "")])
def test_the_driver_in_a_package_version(package: str, driver: str) -> None:
    assert driver_in(package) == driver


def test_the_nearest_are_of_the_same_branch_first() -> None:
    there = ("595.71.05", "580.95.05", "580.159.04", "535.309.01", "580.126.09")
    assert nearest("580.127.05", there) == ("580.126.09", "580.95.05", "580.159.04")
    assert nearest("590.1", ("595.71.05",)) == ("595.71.05",)


@pytest.mark.parametrize(("gpus", "written", "flavour"), [
    ((H200,) * 8, "", "open"), ((T4,), "", "open"), ((T4,), "proprietary", "proprietary"), ((V100,), "", "proprietary"),
    ((V100, A100), "", "proprietary"), ((B200,), "open", "open"), (("1e81", "1f07"), "", "open")])
def test_flavours(gpus: tuple[str, ...], written: str, flavour: str) -> None:
    asked = wish(flavour=written)
    assert flavour_of(asked, known_gpus(asked, gpus)) == flavour


@pytest.mark.parametrize(("gpus", "asked", "code", "named"), [
    ((), wish(), "no_gpu", "nvidia_driver_version"),
    (("ffff",), wish(), "unknown_gpu", "10de:ffff"),
    ((B200,), wish(flavour="proprietary"), "wrong_flavour", "nvidia_driver_flavour=proprietary, and B200 SXM"),
    ((V100,), wish(flavour="open"), "wrong_flavour", "proprietary kernel module only"),
    ((T4,), wish(flavour="closed"), "bad_flavour", "closed"),
    ((V100, B200), wish(), "no_common_module", "V100"),
    ((V100,), wish("595.71.05"), "too_new", "580 is the last branch"),
    ((B200,), wish("535.274.02"), "too_old", "needs branch 570"),
    ((T4,), wish("580"), "not_exact", "580"),
    ((L40S,), wish(gpu_model="H200"), "another_gpu", "L40S (10de:26b9)"),
])
def test_what_does_not_fit_is_named(gpus: tuple[str, ...], asked: Wish, code: str, named: str) -> None:
    with pytest.raises(OpsctlError) as caught:
        found = known_gpus(asked, gpus)
        check_fit(asked, found)
        flavour_of(asked, found)
    assert caught.value.code == f"driver.{code}"
    assert named in caught.value.message
    assert caught.value.message.startswith("gpu-1 ")
    assert caught.value.hint


@pytest.mark.parametrize(("gpus", "switches", "said", "needed"), [
    ((H200,) * 8, 0, "auto", True), ((A100,), 6, "auto", True), ((B200,), 0, "auto", True), ((L40S,), 0, "auto", False),
    ((RTX4090,), 0, "auto", False), (("2331",), 4, "auto", True), ((H200,) * 4, 0, "absent", False),
    ((L40S,), 0, "present", True)])
def test_fabric_managers(gpus: tuple[str, ...], switches: int, said: str, needed: bool) -> None:
    asked = wish(fabric_manager=said)
    assert needs_fabric_manager(asked, known_gpus(asked, gpus), switches) is needed


def test_the_family_is_every_exact_dependency_and_one_module() -> None:
    assert tuple(family(INDEX, NAMES.roots("open", fabric_manager=False), "580.126.09")) == FAMILY
    assert set(family(INDEX, NAMES.roots("proprietary", fabric_manager=True), "595.71.05").items()) == {
        (name, "595.71.05-1+lab") for name in ("libcuda1", "libnvidia-ml1", "nvidia-driver-cuda", "nvidia-kernel-dkms",
                                               "nvidia-modprobe", "nvidia-fabricmanager")}


def test_of_two_revisions_the_higher_is_taken() -> None:
    index = parse_index("Package: a\nVersion: 580.1.1-9\n\nPackage: a\nVersion: 580.1.1-10\n")
    assert family(index, ("a",), "580.1.1") == {"a": "580.1.1-10"}


@pytest.mark.parametrize(("version", "index", "gpus", "code", "named"), [
    ("580.127.05", INDEX, (L40S,), "no_such_version",
     "no nvidia-driver-cuda 580.127.05; the nearest that it has: 580.126.09, 580.159.04, 595.71.05"),
    ("580.126.09", {}, (L40S,), "no_such_version", "no other version"),
    ("580.126.09", {name: found for name, found in INDEX.items() if name != "nvidia-fabricmanager"}, (H200,),
     "no_such_version", "nvidia-fabricmanager"),
    ("580.126.09", {name: found for name, found in INDEX.items() if "pinning" not in name}, (L40S,), "no_pin",
     "nvidia-driver-pinning-580.126.09"),
])
def test_what_the_source_does_not_have(version: str, index: Any, gpus: tuple[str, ...], code: str, named: str) -> None:
    with pytest.raises(OpsctlError) as caught:
        desired(wish(version), Seen(gpus), NAMES, index)
    assert caught.value.code == f"driver.{code}"
    assert named in caught.value.message


class TestHeaders:
    names = dataclasses.replace(NAMES, own=("linux-headers-amd64",))

    def test_those_of_the_running_kernel_come_along(self) -> None:
        index = {**INDEX, **parse_index("Package: linux-headers-6.1.0-30-amd64\nVersion: 6.1.140-1\n")}
        seen = Seen((L40S,), kernel="6.1.0-30-amd64", headers=False)
        assert desired(wish(), seen, self.names, index).own == ("linux-headers-amd64", "linux-headers-6.1.0-30-amd64")
        seen = Seen((L40S,), kernel="6.1.0-30-amd64", headers=True)
        assert desired(wish(), seen, self.names, index).own == ("linux-headers-amd64",)

    def test_a_kernel_without_headers_is_refused(self) -> None:
        with pytest.raises(OpsctlError) as caught:
            desired(wish(), Seen((L40S,), kernel="6.1.0-30-amd64", headers=False), self.names, INDEX)
        assert caught.value.code == "driver.no_headers"

    def test_nobody_asks_for_headers_where_no_module_is_built(self) -> None:
        assert desired(wish(), Seen((L40S,), kernel="x", headers=False), NAMES, INDEX).own == ()


class TestCourse:
    def test_a_bare_host_gets_the_pin_first_and_alone(self) -> None:
        target = want()
        found = course(target, Seen((L40S,)), INDEX)
        assert [(one.what, one.install, one.remove) for one in found.transactions] == [
            ("pin", ("nvidia-driver-pinning-580.126.09",), ()),
            ("driver", tuple(f"{name}=580.126.09-1+lab" for name in FAMILY), ())]
        assert found.hold == ("nvidia-driver-pinning-580.126.09", *FAMILY)
        assert (found.change, found.load) == ("install", True)

    def test_a_host_that_has_it_all_is_left_alone(self) -> None:
        target = want()
        assert course(target, settled(target), INDEX) == Course("none", (), (), False)

    @pytest.mark.parametrize(("before", "after", "change"), [
        ("580.126.09", "595.71.05", "up"), ("595.71.05", "580.126.09", "down"), ("580.126.09", "580.159.04", "up")])
    def test_up_and_down_name_every_held_package(self, before: str, after: str, change: str) -> None:
        target = want(after)
        found = course(target, settled(want(before)), INDEX)
        assert found.change == change
        assert found.load
        pin, driver = found.transactions
        assert (pin.install, pin.remove) == ((f"nvidia-driver-pinning-{after}",), (f"nvidia-driver-pinning-{before}",))
        assert driver.install == tuple(f"{name}={after}-1+lab" for name in FAMILY)
        assert found.hold == (f"nvidia-driver-pinning-{after}", *FAMILY)  # apt takes them off as it changes them

    def test_a_run_that_died_between_pin_and_driver_goes_on(self) -> None:
        target = want("595.71.05")
        seen = dataclasses.replace(settled(want()), installed={**want().packages, target.pin: "595.71.05-1+lab"})
        assert [one.what for one in course(target, seen, INDEX).transactions] == ["driver"]

    def test_the_other_module_goes(self) -> None:
        target = want(flavour="proprietary")
        found = course(target, settled(want()), INDEX)
        assert found.change == "flavour"
        assert found.transactions[0].remove == ("nvidia-kernel-open-dkms",)
        assert "nvidia-kernel-dkms=580.126.09-1+lab" in found.transactions[0].install

    def test_a_fabric_manager_that_is_not_needed_goes(self) -> None:
        target = want()
        seen = dataclasses.replace(settled(target), installed={**has(target), "nvidia-fabricmanager": "580.126.09-1"})
        assert course(target, seen, INDEX).transactions[0].remove == ("nvidia-fabricmanager",)

    def test_what_an_operator_added_moves_along_or_goes(self) -> None:
        target = want("595.71.05")
        before = {**has(want()), "nvidia-settings": "580.126.09-1+lab", "libnvidia-old1": "580.126.09-1+lab",
                  "nvidia-container-toolkit": "1.19.0-1"}
        driver = course(target, dataclasses.replace(settled(want()), installed=before), INDEX).transactions[1]
        assert "nvidia-settings=595.71.05-1+lab" in driver.install
        assert driver.remove == ("libnvidia-old1",)

    def test_the_other_module_goes_also_when_it_is_installed_by_half(self) -> None:
        target = want(flavour="proprietary")
        seen = dataclasses.replace(settled(want()), states={"nvidia-kernel-open-dkms": "half-configured"})
        assert course(target, seen, INDEX).transactions[0].remove == ("nvidia-kernel-open-dkms",)

    @pytest.mark.parametrize(("name", "what"), [
        ("nvidia-modprobe", "driver"), ("nvidia-driver-pinning-580.126.09", "pin"), ("linux-headers-amd64", "driver")])
    def test_what_is_installed_by_half_goes_in_again(self, name: str, what: str) -> None:
        target = dataclasses.replace(want(), own=("linux-headers-amd64",))
        seen = dataclasses.replace(settled(target), installed={**has(target), "linux-headers-amd64": "6.1.140-1"})
        assert course(target, seen, INDEX).transactions == ()
        found = course(target, dataclasses.replace(seen, states={name: "half-installed"}), INDEX)
        assert [one.what for one in found.transactions] == [what]
        assert name in {word.partition("=")[0] for word in found.transactions[0].install}
        assert found.change == "mend"

    def test_what_has_the_drivers_version_already_is_not_removed(self) -> None:
        """The index may lack it: a source that was switched off, or a name that nobody foresaw."""
        target = want()
        seen = dataclasses.replace(settled(target), installed={**has(target), "libnvsdm": "580.126.09-1+lab"})
        assert course(target, seen, INDEX) == Course("none", (), (), False)
        seen = dataclasses.replace(seen, installed={**has(target), "libnvsdm": "580.105.08-1+lab"})
        assert course(target, seen, INDEX).transactions[0].remove == ("libnvsdm",)

    def test_what_has_a_version_of_its_own_is_not_taken_for_a_driver(self) -> None:
        """The subnet manager of NVLink5 boards is numbered by the year, which looks like a driver's version."""
        target = dataclasses.replace(want(), own=("nvlsm",))
        missing = course(target, settled(target), INDEX)
        assert [(one.what, one.install[-1], one.remove) for one in missing.transactions] == [("driver", "nvlsm", ())]
        there = dataclasses.replace(settled(target), installed={**has(target), "nvlsm": "2025.03.1-1"})
        assert course(target, there, INDEX) == Course("none", (), (), False)

    def test_more_of_the_fabric_manager_stays_where_there_is_a_fabric(self) -> None:
        index = {**INDEX, **parse_index("".join(f"Package: nvidia-fabricmanager-dev\nVersion: {version}-1+lab\n\n"
                                                for version in ("580.126.09", "595.71.05")))}
        before = want(gpus=(H200,))
        installed = {**has(before), "nvidia-fabricmanager-dev": "580.126.09-1+lab"}
        seen = dataclasses.replace(settled(before), installed=installed,
                                   held=frozenset((*before.holds, "nvidia-fabricmanager-dev")))
        assert course(before, seen, index) == Course("none", (), (), False)
        driver = course(want("595.71.05", gpus=(H200,)), seen, index).transactions[1]
        assert ("nvidia-fabricmanager-dev=595.71.05-1+lab" in driver.install, driver.remove) == (True, ())
        assert course(want(), seen, index).transactions[0].remove == ("nvidia-fabricmanager",
                                                                      "nvidia-fabricmanager-dev")

    def test_a_leaf_that_drifted_and_a_lost_hold_are_mended(self) -> None:
        target = want()
        drifted = {**has(target), "nvidia-modprobe": "580.126.09-1"}
        assert [one.what for one in course(target, dataclasses.replace(settled(target), installed=drifted),
                                           INDEX).transactions] == ["driver"]
        lost = course(target, dataclasses.replace(settled(target), held=frozenset(target.holds[1:])), INDEX)
        assert (lost.change, lost.transactions, lost.hold) == ("mend", (), (target.pin,))


class TestIdle:
    @pytest.mark.parametrize("seen", [
        dataclasses.replace(settled(want()), serving=("inference@chat.0.service",)),
        dataclasses.replace(settled(want("595.71.05")), serving=("inference@chat.0.service",), loaded="580.126.09"),
        # Of an installer that is no package: its libraries are in use, whichever version it is.
        Seen((L40S,), serving=("inference@chat.0.service",), loaded="580.126.09"),
        Seen((L40S,), serving=("inference@chat.0.service",), loaded="595.71.05")])
    def test_no_change_under_running_instances(self, seen: Seen) -> None:
        with pytest.raises(OpsctlError) as caught:
            check_idle("gpu-1", course(want("595.71.05"), seen, INDEX), seen)
        assert caught.value.code == "driver.serving"
        assert caught.value.exit_code == 5
        assert "opsctl drain gpu-1" in caught.value.hint
        assert "systemctl stop inference@chat.0.service" in caught.value.hint

    @pytest.mark.parametrize("seen", [
        Seen((L40S,), serving=("inference@chat.0.service",)),
        dataclasses.replace(settled(want()), serving=("inference@chat.0.service",)),
        dataclasses.replace(settled(want()), serving=("inference@chat.0.service",), held=frozenset()),
        dataclasses.replace(settled(want()), dpkg="apt-get (pid 7)")])
    def test_a_first_driver_and_small_repairs_disturb_nobody(self, seen: Seen) -> None:
        check_idle("gpu-1", course(want(), seen, INDEX), seen)

    def test_somebody_else_is_at_dpkg(self) -> None:
        seen = Seen((L40S,), dpkg="apt-get (pid 7)")
        with pytest.raises(OpsctlError) as caught:
            check_idle("gpu-1", course(want(), seen, INDEX), seen)
        assert caught.value.code == "driver.dpkg_busy"


class TestProgram:
    asked: ClassVar[dict[str, Any]] = {
        "wish": {"host": "gpu-1", "version": "580.126.09", "flavour": "", "fabric_manager": "auto", "gpu_model": ""},
        "names": {"exact": NAMES.exact, "open": NAMES.open, "proprietary": NAMES.proprietary, "fabric": NAMES.fabric,
                  "own": []},
        "seen": {"gpus": [H200], "switches": 0, "installed": {}, "states": {}, "held": [], "loaded": "",
                 "serving": [], "dpkg": "", "kernel": "", "headers": True}}

    def test_a_question_on_stdin(self, tmp_path: Path) -> None:
        (tmp_path / "Packages").write_text(vendor("580.126.09"))
        done = subprocess.run([sys.executable, "-m", "opsctl.stack"], text=True, capture_output=True, check=True,
                              input=json.dumps({**self.asked, "index": str(tmp_path / "Packages")}))
        found = json.loads(done.stdout)
        assert found["error"] == ""
        assert found["desired"]["fabric_manager"] is True
        assert [one["what"] for one in found["course"]["transactions"]] == ["pin", "driver"]

    def test_an_error_is_one_sentence(self) -> None:
        found = answer({**self.asked, "index": "/nowhere/Packages"})
        assert found == {"error": "/nowhere/Packages is missing: opsctl bundle build makes it.",
                         "code": "driver.no_index"}
