"""From the inventory to the role under real Ansible: receivers, a password from Ansible Vault, set times."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from opsctl.engines.ansible_programs import ansible_program
from opsctl.resources import resource

INVENTORY = """\
[gpu]
this ansible_connection=local
[lb]
this
[monitor]
this
[gateway]
this
[all:vars]
alert_email_to=ann@example.org,bob@example.org
alert_smtp=mail.example.org:587
alert_smtp_from=opsctl@example.org
alert_smtp_user=opsctl
gpu_idle_alert_s=120
{more}
"""
# The role's own check looks who listens on its ports: here on some that nobody uses.
PORTS = {"monitoring_ports": {"prometheus": 19090, "alertmanager": 19093, "cluster": 19094}}
PLAYBOOK = """\
- name: Show what the role gets
  hosts: all
  gather_facts: true
  gather_subset: [min]
  vars_files: ["{vars}"]
  tasks:
    - name: Read the fleet
      ansible.builtin.set_fact:
        opsctl_fleet: >-
          {{{{ groups | opsctl_fleet(hostvars, lookup('file', inventory_dir ~ '/services.yml'), inventory_dir) }}}}
    - name: Ask the role
      ansible.builtin.include_role: {{name: monitoring, tasks_from: preflight}}
    - name: Write it down
      ansible.builtin.copy:
        content: >-
          {{{{ {{'receivers': monitoring_receivers, 'password': monitoring_smtp_password, 'jobs': monitoring_jobs,
               'idle': monitoring_gpu_idle_alert_s, 'monitored': opsctl_is_monitored}} | to_json }}}}
        dest: "{{{{ inventory_dir }}}}/said.json"
        mode: "0600"
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "services.yml").write_text("chat: {group: gpu, port: 8100, listen: 8000}\n")
    (tmp_path / "inventory.ini").write_text(INVENTORY.format(more=""))
    (tmp_path / "show.yml").write_text(PLAYBOOK.format(vars=resource("playbooks") / "vars" / "fleet.yml"))
    (tmp_path / "vault-password").write_text("open sesame\n")
    sealed = subprocess.run(
        [ansible_program("ansible-vault"), "encrypt_string", "--name", "alert_smtp_password", "s3cret"],
        capture_output=True, text=True, check=True, env=environment(tmp_path), timeout=60)
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "monitor.yml").write_text(sealed.stdout)
    return tmp_path


def environment(fleet: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    return kept | {"ANSIBLE_FILTER_PLUGINS": str(resource("playbooks") / "filter_plugins"), "LC_ALL": "C.UTF-8",
                   "ANSIBLE_ROLES_PATH": str(resource("roles")), "ANSIBLE_HOME": str(fleet / ".ansible"),
                   "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3",
                   "ANSIBLE_VAULT_PASSWORD_FILE": str(fleet / "vault-password")}


def play(fleet: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ansible_program("ansible-playbook"), "-i", "inventory.ini", "--extra-vars", json.dumps(PORTS), "show.yml"],
        cwd=fleet, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
        env=environment(fleet))


def test_the_role_gets_what_the_inventory_says(fleet: Path) -> None:
    done = play(fleet)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((fleet / "said.json").read_text())
    assert said["receivers"]["emails"] == ["ann@example.org", "bob@example.org"]
    assert (said["receivers"]["smarthost"], said["receivers"]["user"]) == ("mail.example.org:587", "opsctl")
    assert said["password"] == "s3cret"
    assert (said["idle"], said["monitored"]) == (120, True)
    assert [job["job"] for job in said["jobs"]] == [
        "node", "gpu", "inference", "load_balancer", "prometheus", "alertmanager"]
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize(("more", "sentence"), [
    ("alert_smtp=mail", "alert_smtp=mail is not host:port"),
    ("gpu_idle_alert_s=5", "gpu_idle_alert_s (5) must be at least"),
    ("alert_smtp_user=", "alert_smtp_user and alert_smtp_password belong together"),
])
def test_what_is_wrong_ends_before_anything_is_touched(fleet: Path, more: str, sentence: str) -> None:
    (fleet / "inventory.ini").write_text(INVENTORY.format(more=more))
    done = play(fleet)
    assert done.returncode != 0
    assert sentence in " ".join((done.stdout + done.stderr).split())
