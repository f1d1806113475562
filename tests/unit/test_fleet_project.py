"""A fleet's folder: what ``opsctl init`` makes, what it leaves alone, and that plain Ansible and ssh-keygen take it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opsctl.cli.init import WHAT
from opsctl.cli.main import app
from opsctl.engines.ansible_programs import ansible_program
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.project import NAMESPACE, PRINCIPAL, initialise, lacking
from opsctl.resources import resource

if shutil.which("gpg") is None:
    pytest.skip("gpg makes the bundle's key and is not on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("project") / "fleet"
    assert set(initialise(directory)) == set(WHAT)
    return directory


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "fleet", symlinks=True)
    return tmp_path / "fleet"


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and ".opsctl" not in path.parts}


def test_new_fleet_is_complete_and_private_where_it_must_be(made: Path) -> None:
    assert len(read_fleet(made / "inventory.ini").hosts) == 4
    modes = {name: stat.S_IMODE((made / name).stat().st_mode) for name in ("keys", ".opsctl", "keys/release",
                                                                           "keys/bundle")}
    assert modes == {"keys": 0o700, ".opsctl": 0o700, "keys/release": 0o600, "keys/bundle": 0o700}
    assert "BEGIN PGP PUBLIC KEY" in (made / "trust" / "bundle.asc").read_text(encoding="ascii")


def test_release_key_signs_what_the_trusted_signers_allow(made: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest").write_text("v1", encoding="ascii")
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(made / "keys" / "release"),
                    str(tmp_path / "manifest")], check=True, capture_output=True)

    def verify(namespace: str) -> int:
        return subprocess.run(
            ["ssh-keygen", "-q", "-Y", "verify", "-n", namespace, "-I", PRINCIPAL, "-s", str(tmp_path / "manifest.sig"),
             "-f", str(made / "trust" / "allowed_signers")], input=b"v1", check=False, capture_output=True).returncode

    assert verify(NAMESPACE) == 0
    assert verify("file") != 0


def test_second_run_changes_nothing(copy: Path) -> None:
    before = snapshot(copy)
    assert initialise(copy) == ()
    assert snapshot(copy) == before


def test_what_is_there_stays_and_what_is_missing_comes(copy: Path) -> None:
    (copy / "inventory.ini").write_text("[gpu]\nmine\n", encoding="utf-8")
    (copy / "ansible.cfg").unlink()
    (copy / "trust" / "allowed_signers").unlink()
    (copy / "keys" / "release.pub").unlink()
    before = snapshot(copy)
    assert initialise(copy) == ("ansible.cfg", "keys/release.pub", "trust/allowed_signers")
    assert (copy / "inventory.ini").read_text(encoding="utf-8") == "[gpu]\nmine\n"
    assert before.items() <= snapshot(copy).items()


def test_clone_without_private_keys_gets_no_new_ones(copy: Path) -> None:
    shutil.rmtree(copy / "keys")
    shutil.rmtree(copy / ".opsctl")
    before = snapshot(copy)
    done = CliRunner().invoke(app, ["init", str(copy), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["lacking"] == ["keys/release", "keys/bundle"]
    assert "copy it from the operator" in done.stderr
    assert snapshot(copy) == before
    assert lacking(copy) == ("keys/release", "keys/bundle")
    assert (copy / ".opsctl" / "ssh_config").is_file()


def test_texts_of_the_caller_are_taken(tmp_path: Path) -> None:
    initialise(tmp_path / "lab", inventory_text="[gpu]\nx\n", services_text="chat:\n")
    assert (tmp_path / "lab" / "inventory.ini").read_text(encoding="utf-8") == "[gpu]\nx\n"
    assert (tmp_path / "lab" / "services.yml").read_text(encoding="utf-8") == "chat:\n"


def test_init_says_what_it_made_and_what_comes_next(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    assert done.exit_code == 0, done.stderr
    for name in WHAT:
        assert name in done.stdout
    assert "opsctl trust" in done.stdout
    again = CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    assert "nothing was changed" in again.stdout


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    assert CliRunner().invoke(app, ["init", str(tmp_path / "taken")]).exit_code == 5


@pytest.fixture
def workstation(copy: Path) -> Path:
    """A fleet of this one machine, with a playbook that shows what the filter says, and one thing of each kind."""
    (copy / "inventory.ini").write_text(
        "[gpu]\nthis ansible_connection=local cuda_version='\"12.10\"'\n[lb]\nthis\n[gateway]\nthis\n",
        encoding="utf-8")
    (copy / "show.yml").write_text("""\
- name: Show what the filter says
  hosts: all
  gather_facts: true
  gather_subset: [min]
  vars:
    fleet: "{{ groups | opsctl_fleet(hostvars, lookup('file', inventory_dir ~ '/services.yml'), inventory_dir) }}"
  tasks:
    - name: Write it down
      ansible.builtin.copy:
        content: "{{ fleet | to_json }}"
        dest: "{{ inventory_dir }}/said.json"
        mode: "0600"
""", encoding="utf-8")
    return copy


def play(directory: Path) -> subprocess.CompletedProcess[str]:
    """``ansible-playbook`` as an operator would type it in the fleet's folder, with our filters."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment |= {"ANSIBLE_FILTER_PLUGINS": str(resource("playbooks") / "filter_plugins"), "LC_ALL": "C.UTF-8"}
    return subprocess.run([ansible_program("ansible-playbook"), "show.yml"], cwd=directory, capture_output=True,
                          text=True, check=False, timeout=120, stdin=subprocess.DEVNULL, env=environment)


def test_filter_gives_playbooks_plain_data_under_real_ansible(workstation: Path) -> None:
    done = play(workstation)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((workstation / "said.json").read_text(encoding="utf-8"))
    assert said == {
        "placements": {"this": [{"instance": "chat.0", "service": "chat", "index": 0, "host": "this",
                                 "address": "127.0.0.1", "port": 8100, "gpus": [], "tensor_parallel": 1,
                                 "min_serving": 1, "statistics": ["http://127.0.0.1:8404/;csv"]}]},
        "backends": [{"name": "chat", "listen": 8000, "min_serving": 1, "servers": [
            {"name": "this.chat.0", "address": "127.0.0.1", "port": 8100, "agent_address": "127.0.0.1",
             "agent_port": 9777, "instance": "chat.0"}]}],
        "gpus": {"this": []}, "drivers": {"this": {
            "nvidia_driver_version": "", "nvidia_driver_source": "vendor", "nvidia_driver_flavour": "",
            "nvidia_driver_fabric_manager": "auto",
            "nvidia_driver_own": ["linux-headers-amd64"]}}, "guard_policies": {"this": {}},
        "with_gpus": [], "undealt": [],
        "gateway_url": "http://127.0.0.1:8480", "gateway_host": "this", "bundle_port": 8480, "agent_check_port": 9777,
        "package_source": "gateway", "load_balancer": "haproxy",
        "host_addresses": {"this": {"service_address": "127.0.0.1", "management_address": "127.0.0.1"}},
        "monitoring": {"jobs": [], "alertmanagers": [], "cluster_peers": [], "node_exporter_port": 9100,
                       "ports": {"prometheus": 9090, "alertmanager": 9093, "cluster": 9094}},
    }


def test_filter_says_what_is_wrong_in_a_sentence(workstation: Path) -> None:
    inventory = workstation / "inventory.ini"
    inventory.write_text(inventory.read_text(encoding="utf-8").replace("'\"12.10\"'", "12.10"), encoding="utf-8")
    done = play(workstation)
    assert done.returncode == 2
    assert "cuda_version of this is a version and must be text" in done.stdout + done.stderr
    assert not (workstation / "said.json").exists()
