"""Reading a fleet: a folder a case under fixtures/fleet. Adding a case is adding a folder.

``bad/<case>`` holds what differs from the common inventory.ini and services.yml, and ``expected.txt``: code, message
and hint as the operator sees them. ``good/<case>`` has ``expected.json``: the hosts and instances that must come out.
``FLEET_FIXTURES=write pytest tests/unit/test_fleet.py`` asks ansible-inventory anew and writes what came out: read the
difference before you believe it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opsctl.errors import ConfigurationError, ExitCode
from opsctl.fleet.ansible_inventory import read_raw
from opsctl.fleet.inventory import fleet_from_ansible, read_fleet
from opsctl.fleet.model import Fleet, Service
from opsctl.fleet.placements import backends, gateway_url, place
from opsctl.fleet.services import REQUIRED, read_services, schema
from opsctl.fleet.ssh_config import render
from opsctl.resources import resource

FIXTURES = Path(__file__).parent / "fixtures" / "fleet"
CAPTURED = FIXTURES / "captured.json"  # answers of ansible-inventory by the digest of what it read
WRITE = os.environ.get("FLEET_FIXTURES") == "write"
BAD = sorted(path.name for path in (FIXTURES / "bad").iterdir())
GOOD = sorted(path.name for path in (FIXTURES / "good").iterdir())


def text_of_inventory(folder: Path) -> str:
    """A digest of all that ansible-inventory reads of a case."""
    files = [folder / "inventory.ini", *sorted(folder.glob("group_vars/*"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def read(folder: Path, captured: dict[str, Any]) -> Fleet | ConfigurationError:
    """The fleet of a case, from what ansible-inventory was seen to answer; where it has not been seen, it is asked."""
    inventory = folder / "inventory.ini"
    try:
        key = text_of_inventory(folder)
        if key not in captured:
            raw = read_raw(inventory)
            captured[key] = {"hostvars": raw.hostvars, "groups": raw.groups}
        text = (folder / "services.yml").read_text(encoding="utf-8")
        return fleet_from_ansible(captured[key]["hostvars"], captured[key]["groups"], text, folder, inventory)
    except ConfigurationError as error:
        return error


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fleet | ConfigurationError]:
    """Every case read, several at a time: those whose inventory is broken wait for ansible-inventory."""
    root = tmp_path_factory.mktemp("fleet")
    captured = {} if WRITE else json.loads(CAPTURED.read_text(encoding="utf-8"))
    folders = {}
    for name in [f"bad/{case}" for case in BAD] + [f"good/{case}" for case in GOOD]:
        folders[name] = root / name
        folders[name].mkdir(parents=True)
        for file in ("inventory.ini", "services.yml"):
            shutil.copy(FIXTURES / file, folders[name])
        shutil.copytree(FIXTURES / name, folders[name], dirs_exist_ok=True)
    with ThreadPoolExecutor(max_workers=4) as pool:
        fleets = dict(zip(folders, pool.map(lambda folder: read(folder, captured), folders.values()), strict=True))
    if WRITE:
        CAPTURED.write_text(json.dumps(captured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return fleets


def said(text: str, folder: str) -> str:
    """A message without the folder that this run's files happen to lie in."""
    return " ".join(word[word.rindex(f"/{folder}/") + len(folder) + 2:] if f"/{folder}/" in word else word
                    for word in text.split(" "))


@pytest.mark.parametrize("case", BAD)
def test_wrong_fleet_is_refused_with_one_sentence_and_a_hint(case: str, cases: dict[str, Any]) -> None:
    error = cases[f"bad/{case}"]
    assert isinstance(error, ConfigurationError), f"read as {error}"
    shown = "\n".join([error.code, said(error.message, case), said(error.hint, case)]) + "\n"
    expected = FIXTURES / "bad" / case / "expected.txt"
    if WRITE:
        expected.write_text(shown, encoding="utf-8")
    assert shown == expected.read_text(encoding="utf-8")
    assert error.exit_code is ExitCode.CONFIGURATION
    assert error.hint


@pytest.mark.parametrize("case", GOOD)
def test_good_fleet_is_read(case: str, cases: dict[str, Any]) -> None:
    fleet = cases[f"good/{case}"]
    assert isinstance(fleet, Fleet), fleet.message
    document = {
        "package_source": fleet.package_source,
        "load_balancer": fleet.load_balancer,
        "gateway_url": gateway_url(fleet),
        "hosts": [{key: value for key, value in dataclasses.asdict(host).items() if key != "variables"}
                  for host in fleet.hosts],
        "placements": [dataclasses.asdict(placement) for placement in place(fleet)],
        "ssh_config": render(fleet, Path("/control")).split("Host *")[0].splitlines()[2:],
    }
    shown = json.dumps(document, indent=1).replace(f"{fleet.directory}/", "") + "\n"
    expected = FIXTURES / "good" / case / "expected.json"
    if WRITE:
        expected.write_text(shown, encoding="utf-8")
    assert json.loads(shown) == json.loads(expected.read_text(encoding="utf-8"))


def test_whole_number_version_becomes_text_and_other_numbers_stay(cases: dict[str, Any]) -> None:
    variables = cases["good/racks_ranges_and_children"].host("gpu-1").variables
    assert variables["driver_branch"] == "570"
    assert variables["cuda_version"] == "12.10"
    assert variables["memory_share"] == 0.9


def test_vaulted_value_stays_closed(cases: dict[str, Any]) -> None:
    assert "__ansible_vault" in cases["good/vaulted_value"].host("gpu-1").variables["token"]


def test_examples_are_read_by_the_reader_of_users_files(tmp_path: Path) -> None:
    shutil.copy(resource("inventory.example"), tmp_path / "inventory.ini")
    shutil.copy(resource("services.example"), tmp_path / "services.yml")
    fleet = read_fleet(tmp_path / "inventory.ini")
    assert [host.name for host in fleet.group("gpu")] == ["gpu-1", "gpu-2", "gpu-3"]
    assert [backend["name"] for backend in backends(fleet)] == ["chat"]
    assert len(backends(fleet)[0]["servers"]) == 3


def test_lines_that_the_example_suggests_are_right(tmp_path: Path) -> None:
    """Versions as the comments say, and the workstation at the end, with the comment signs taken away."""
    text = resource("inventory.example").read_text(encoding="utf-8")
    head, _, workstation = text.partition("# One workstation")
    shutil.copy(resource("services.example"), tmp_path / "services.yml")
    uncommented = head.replace('# cuda_version="12.10"', 'cuda_version="12.10"') \
        .replace("gpu-2 ansible_host=192.0.2.12", "gpu-2 ansible_host=192.0.2.12 driver_version='\"570.10\"'")
    (tmp_path / "inventory.ini").write_text(uncommented, encoding="utf-8")
    variables = read_fleet(tmp_path / "inventory.ini").host("gpu-2").variables
    assert (variables["cuda_version"], variables["driver_version"]) == ("12.10", "570.10")
    lines = [line.removeprefix("#").strip() for line in workstation.splitlines()[1:]]
    (tmp_path / "inventory.ini").write_text("\n".join(lines), encoding="utf-8")
    fleet = read_fleet(tmp_path / "inventory.ini")
    assert [(host.connection, host.service_address) for host in fleet.hosts] == [("local", "127.0.0.1")]


def test_example_names_every_key_of_a_service_with_its_type() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Service) if field.name != "name"}
    assert {key.name: key.kind.__name__ for key in schema().values()} == fields
    assert set(REQUIRED) <= set(fields)


def test_commented_second_service_of_the_example_is_right() -> None:
    text = resource("services.example").read_text(encoding="utf-8")
    head, _, second = text.partition("# embed:")
    uncommented = head + "embed:" + "\n".join(line.removeprefix("# ") for line in second.splitlines())
    assert [service.name for service in read_services(uncommented, Path("services.yml"))] == ["chat", "embed"]


def test_users_own_ansible_settings_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("inventory.ini", "services.yml"):
        shutil.copy(FIXTURES / file, tmp_path)
    (tmp_path / "foreign.cfg").write_text("[inventory]\nenable_plugins = yaml\n", encoding="utf-8")
    monkeypatch.setenv("ANSIBLE_CONFIG", str(tmp_path / "foreign.cfg"))
    monkeypatch.setenv("ANSIBLE_INVENTORY_ENABLED", "yaml")
    monkeypatch.setenv("LC_ALL", "C")
    assert len(read_fleet(tmp_path / "inventory.ini").hosts) == 3


@pytest.mark.parametrize("file", ["services.yml", "inventory.ini"])
def test_missing_file_is_named(file: str, tmp_path: Path) -> None:
    for name in {"inventory.ini", "services.yml"} - {file}:
        shutil.copy(FIXTURES / name, tmp_path)
    with pytest.raises(ConfigurationError, match=file) as caught:
        read_fleet(tmp_path / "inventory.ini")
    assert "opsctl init" in caught.value.hint


def test_the_gpus_file_beside_the_inventory_is_read(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "inventory.ini", tmp_path)
    text = (FIXTURES / "services.yml").read_text(encoding="utf-8")
    (tmp_path / "services.yml").write_text(text + "  gpus_per_instance: 1\n", encoding="utf-8")
    (tmp_path / "gpus.yml").write_text('gpu-1:\n  GPU-a: "00000000:17:00.0 NVIDIA H200"\n', encoding="utf-8")
    fleet = read_fleet(tmp_path / "inventory.ini")
    assert fleet.host("gpu-1").gpus == ("GPU-a",)
    assert fleet.host("gpu-2").gpus is None
    assert place(fleet)[0].gpus == ("GPU-a",)
    (tmp_path / "gpus.yml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError) as caught:
        read_fleet(tmp_path / "inventory.ini")
    assert caught.value.code == "gpus.not_yaml"
