"""A lab's fleet directory: read by the product's own reader, and taken away without taking what a person made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from opsctl.errors import RefusedError
from opsctl.fleet.inventory import read_fleet
from opsctl.lab import fleet_files
from opsctl.lab.state import Lab, Machine

MACHINES = (
    Machine("ops-1", "10.91.0.10", ("lb", "gateway", "monitor")),
    Machine("gpu-1", "10.91.0.11", ("gpu",)),
    Machine("gpu-2", "10.91.0.12", ("gpu",), user="operator"),
    Machine("gpu-3", "10.91.0.13", ("gpu",), user="operator", proxy_jump="ops-1"),
)


def a_lab(fleet: Path, *, ours: bool = True) -> Lab:
    return Lab("lab", 1, "bookworm", IPv4Network("10.91.0.0/24"), fleet, fleet_is_ours=ours, machines=MACHINES)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet directory as the lab writes it, once: its keys take seconds."""
    lab = a_lab(tmp_path_factory.mktemp("written") / "fleet")
    fleet_files.write_fleet(lab)
    fleet_files.pin_host_keys(lab, [(machine, f"ssh-ed25519 AAAA{machine.name} root") for machine in MACHINES])
    return lab.fleet


@pytest.fixture
def lab(tmp_path: Path, written: Path) -> Lab:
    shutil.copytree(written, tmp_path / "fleet", symlinks=True)
    return a_lab(tmp_path / "fleet")


def test_the_product_reads_it(lab: Lab) -> None:
    fleet = read_fleet(lab.fleet / "inventory.ini")
    assert {host.name: (host.address, host.user, host.proxy_jump) for host in fleet.hosts} == {
        "ops-1": ("10.91.0.10", "root", ""), "gpu-1": ("10.91.0.11", "root", ""),
        "gpu-2": ("10.91.0.12", "operator", ""), "gpu-3": ("10.91.0.13", "operator", "ops-1")}
    assert all(host.identity_file == str(lab.fleet / "keys/login") for host in fleet.hosts)
    assert [host.name for host in fleet.group("gateway")] == ["ops-1"]
    service = fleet.service("chat")
    assert (service.group, service.port, service.listen, service.gpus_per_instance, service.first_release) == (
        "gpu", 8100, 8000, 0, "v1")
    known = (lab.fleet / "known_hosts").read_text().splitlines()
    assert known[2] == "gpu-2,10.91.0.12 ssh-ed25519 AAAAgpu-2"


@pytest.mark.parametrize(("suite", "os_release"), [("bookworm", "debian12"), ("trixie", "debian13")])
def test_its_inventory_says_what_the_machines_run(lab: Lab, suite: str, os_release: str) -> None:
    (lab.fleet / "inventory.ini").write_text(fleet_files.inventory(replace(lab, suite=suite)))
    fleet = read_fleet(lab.fleet / "inventory.ini")
    assert {host.os_release for host in fleet.hosts} == {os_release}


def test_all_of_it_goes(lab: Lab) -> None:
    (lab.fleet / "bundle").mkdir(exist_ok=True)
    (lab.fleet / "bundle/SHA256SUMS").write_text("made in the course of work")
    model = lab.fleet / "tiny.gguf"
    model.write_bytes(b"GGUF")
    fleet_files.note_written(model)
    assert fleet_files.remove_fleet(lab) == ()
    assert not lab.fleet.exists()


def test_what_a_person_made_or_changed_stays(lab: Lab) -> None:
    (lab.fleet / "notes.txt").write_text("mine")
    with (lab.fleet / "services.yml").open("a") as services:
        services.write("# mine\n")
    assert fleet_files.remove_fleet(lab) == ("notes.txt", "services.yml")
    assert sorted(path.name for path in lab.fleet.iterdir()) == ["notes.txt", "services.yml"]


def killed_at(fleet: Path, folder: Path, call: int, *, ours: bool = True) -> None:
    """A ``lab up`` that loses its life (kill -9) when it calls ssh-keygen for the so-manieth time.

    Call 0: when its first file is written, but not yet in its place.
    """
    folder.mkdir()
    keygen = folder / "ssh-keygen"
    keygen.write_text(f"#!/bin/sh\necho >>{folder}/calls\n"
                      f"[ $(wc -l <{folder}/calls) -lt {call} ] || {{ kill -9 $PPID; exit; }}\n"
                      f'exec {shutil.which("ssh-keygen")} "$@"\n')
    keygen.chmod(0o755)
    script = ("import sys, pathlib; sys.path.insert(0, sys.argv[1]); import test_lab_fleet_files as t\n"
              f"if {call} == 0: pathlib.Path.replace = lambda *_: t.os.kill(t.os.getpid(), 9)\n"
              f"t.fleet_files.write_fleet(t.a_lab(pathlib.Path(sys.argv[2]), ours={ours}))")
    done = subprocess.run([sys.executable, "-c", script, Path(__file__).parent, fleet], check=False,
                          env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"})
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("was_there", [False, True])
def test_all_of_a_half_written_one_goes(tmp_path: Path, call: int, was_there: bool) -> None:
    fleet = tmp_path / "fleet"
    if was_there:
        fleet.mkdir()
        (fleet / "notes.txt").write_text("mine")
    killed_at(fleet, tmp_path / "bin", call, ours=not was_there)
    assert any(fleet.rglob("*.ini" if call else ".lab.json.*"))
    assert fleet_files.remove_fleet(a_lab(fleet, ours=not was_there)) == ()
    assert [path.name for path in tmp_path.rglob("fleet/*")] == ["notes.txt"] * was_there
    assert fleet.exists() == was_there


def test_a_half_written_one_is_completed_and_then_goes(tmp_path: Path) -> None:
    killed_at(tmp_path / "fleet", tmp_path / "bin", 2)
    half = a_lab(tmp_path / "fleet")
    fleet_files.check_free(half.fleet, "lab", ())
    fleet_files.write_fleet(half)
    receipt = fleet_files.read_receipt(half.fleet)
    assert receipt is not None
    assert all(receipt.files.values())
    assert fleet_files.remove_fleet(half) == ()
    assert not half.fleet.exists()


def test_the_receipt_names_all_that_is_written(lab: Lab) -> None:
    receipt = fleet_files.read_receipt(lab.fleet)
    assert receipt is not None
    made = {str(path.relative_to(lab.fleet)) for path in lab.fleet.rglob("*") if path.is_file()}
    assert {path for path in made if not path.startswith(".opsctl/")} == set(receipt.files)


def test_a_directory_that_was_there_stays_with_its_own(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine.deb").write_text("mine")
    lab = a_lab(tmp_path, ours=False)
    fleet_files.write_fleet(lab)
    fleet_files.remove_fleet(lab)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "mine.deb"]


def test_another_labs_directory_is_not_removed(lab: Lab) -> None:
    assert fleet_files.remove_fleet(replace(lab, name="other")) == ()
    assert (lab.fleet / "inventory.ini").exists()


def test_a_kept_directory_gets_the_new_labs_addresses(lab: Lab) -> None:
    services = lab.fleet / "services.yml"
    services.write_text(services.read_text().replace("first_release: v1", "first_release: v7"))
    moved = tuple(replace(machine, address=machine.address.replace("10.91.0", "10.91.5")) for machine in MACHINES)
    fleet_files.check_free(lab.fleet, "lab", ())
    fleet_files.write_fleet(replace(lab, subnet=IPv4Network("10.91.5.0/24"), machines=moved))
    fleet = read_fleet(lab.fleet / "inventory.ini")
    assert fleet.host("gpu-1").address == "10.91.5.11"
    assert fleet.service("chat").first_release == "v7"


def test_somebody_elses_fleet_is_refused(tmp_path: Path, lab: Lab) -> None:
    (tmp_path / "inventory.ini").write_text("[gpu]\n")
    for directory, others in ((tmp_path, ()), (lab.fleet, (replace(lab, name="other"),))):
        with pytest.raises(RefusedError) as caught:
            fleet_files.check_free(directory, "lab", others)
        assert caught.value.code == "lab.fleet_taken"
