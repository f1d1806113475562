"""What an inventory may say of GPUs and their driver, and which drivers that brings into the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsctl.errors import ConfigurationError
from opsctl.fleet.gpus import first_wrong, wanted_drivers
from opsctl.fleet.hosts import make_host
from opsctl.fleet.inventory import is_read

OWN = ("linux-headers-amd64",)


@pytest.mark.parametrize("variables", [
    {}, {"nvidia_driver_version": "580.126.09"}, {"nvidia_driver_version": "595.84", "nvidia_driver_flavour": "open"},
    {"gpu_model": "H200"}, {"nvidia_driver_bundle_versions": ["580.126.09", "595.71.05"]},
    {"nvidia_driver_bundle_versions": "580.126.09, 595.71.05"}, {"nvidia_driver_fabric_manager": "absent"}])
def test_what_is_right(variables: dict[str, Any]) -> None:
    assert first_wrong(variables) is None


@pytest.mark.parametrize(("variables", "key", "hint"), [
    ({"nvidia_driver_version": "580"}, "nvidia_driver_version", "580.126.09"),
    ({"nvidia_driver_version": "580.126.09-1"}, "nvidia_driver_version", "the whole version"),
    ({"nvidia_driver_version": ["580.126.09", "595.84"]}, "nvidia_driver_version", "nvidia_driver_bundle_versions"),
    ({"nvidia_driver_bundle_versions": ["595"]}, "nvidia_driver_bundle_versions", "text"),
    ({"nvidia_driver_flavour": "closed"}, "nvidia_driver_flavour", "open, proprietary"),
    ({"nvidia_driver_fabric_manager": "yes"}, "nvidia_driver_fabric_manager", "auto, present, absent"),
    ({"gpu_model": "H2000"}, "gpu_model", "one of them")])
def test_what_is_wrong_is_named(variables: dict[str, Any], key: str, hint: str) -> None:
    wrong = first_wrong(variables)
    assert wrong is not None
    assert wrong.key == key
    assert hint in wrong.hint


def test_the_hosts_line_is_named(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.ini"
    inventory.write_text("[gpu]\ngpu-1 nvidia_driver_version=580\n")
    with pytest.raises(ConfigurationError) as caught:
        make_host("gpu-1", {"nvidia_driver_version": "580"}, ["gpu"], inventory)
    assert caught.value.message.startswith(f"{inventory}:2: nvidia_driver_version=580 of gpu-1 ")


def test_a_caller_with_lazy_variables_fetches_them() -> None:
    assert [name for name in ("nvidia_driver_version", "nvidia_driver_flavour", "nvidia_driver_own", "gpu_model",
                              "nvidia_driver_bundle_versions", "gpu_uuids") if not is_read(name)] == []


def test_a_fleet_that_names_no_driver_wants_none() -> None:
    assert wanted_drivers({"gpu-1": {"gpu_model": "H200"}, "ops-1": {}}, OWN) == ()


@pytest.mark.parametrize(("variables", "flavours"), [
    ({}, ("open", "proprietary")), ({"gpu_model": "H200"}, ("open",)), ({"gpu_model": "V100"}, ("proprietary",)),
    ({"gpu_model": "T4", "nvidia_driver_flavour": "proprietary"}, ("proprietary",))])
def test_flavours_as_far_as_the_inventory_tells(variables: dict[str, Any], flavours: tuple[str, ...]) -> None:
    wanted = wanted_drivers({"gpu-1": {"nvidia_driver_version": "580.126.09", **variables}}, OWN)
    assert [one.flavours for one in wanted] == [flavours]


def test_the_way_back_is_brought_for_those_who_have_a_driver() -> None:
    back = {"nvidia_driver_bundle_versions": ["580.126.09"]}
    hosts = {"ops-1": back, "gpu-1": {**back, "nvidia_driver_version": "595.71.05", "gpu_model": "H200"},
             "gpu-2": {**back, "nvidia_driver_version": "580.126.09", "gpu_model": "V100", "nvidia_driver_own": []}}
    assert [(one.version, one.flavours, one.hosts, one.own) for one in wanted_drivers(hosts, OWN)] == [
        ("580.126.09", ("open", "proprietary"), ("gpu-1", "gpu-2"), OWN),
        ("595.71.05", ("open",), ("gpu-1",), OWN)]
