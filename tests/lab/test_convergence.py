"""Bare machines become a serving fleet; again changes nothing; what is broken by hand is named and mended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from command import succeeds

pytestmark = pytest.mark.lab

ROOT = Path(__file__).resolve().parents[2]


def provision(lab) -> list[tuple[str, str]]:
    """Provisions once more; what it says it changed, as (host, task) pairs."""
    document = succeeds("provision", "--json", inventory=lab.inventory).document
    changes = [(change["host"], change["task"]) for change in document["changes"]]
    assert document["changed"] == len(changes), document
    return changes


def test_a_chat_completion_through_the_load_balancer(provisioned) -> None:
    status = succeeds("status", "--json", inventory=provisioned.inventory).document
    serving = [row for row in status["rows"] if row["instance"]]
    assert [(row["release"], row["state"]) for row in serving] == [("v1", "serving")] * len(provisioned.gpu_hosts)
    request = urllib.request.Request(
        status["endpoints"]["chat"][0] + "/chat/completions", headers={"Content-Type": "application/json"},
        data=json.dumps({"model": "chat", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}).encode())
    seen = set()
    for _ in range(20):
        with urllib.request.urlopen(request, timeout=30) as answer:
            completion = json.load(answer)
            seen.add(answer.headers["x-opsctl-instance"])
        assert completion["choices"][0]["message"]["content"]
        assert completion["usage"]["completion_tokens"] <= 8
    assert len(seen) == len(provisioned.gpu_hosts), f"the load balancer asked only {seen}"


# host, how it is broken by hand, the task of the role that must report it. One thing for each role at least.
BROKEN = [
    ("ops-1", ["rm", "/srv/opsctl-gateway/bundle/wheels/opsctl-agent.txt"],
     "gateway : Unpack the files on the gateway."),
    ("ops-1", ["apt-mark", "unhold", "nginx-light"], "gateway : Hold the web server's packages."),
    ("ops-1", ["sh", "-c", "echo '# by hand' >>/etc/haproxy/haproxy.cfg"],
     "load_balancer : Configure the load balancer."),
    ("ops-1", ["apt-mark", "unhold", "haproxy"], "load_balancer : Hold the load balancer's packages."),
    ("gpu-1", ["sh", "-c", "echo x >>/etc/opsctl/trust/allowed_signers"],
     "base : Install the public keys that releases and the bundle are signed with."),
    ("gpu-1", ["systemctl", "stop", "opsctl-agent"], "base : Start and enable opsctl-agent.service."),
    ("gpu-1", ["systemctl", "stop", "inference@chat.0"],
     "inference : Enable the instances, and start those that have a release and keep it."),
    ("gpu-2", ["rm", "/opt/opsctl/agent/bin/opsctl-host"], "agent : Install the agent from the gateway."),
    ("gpu-2", ["rm", "/etc/systemd/system/inference@.service"], "inference : Install the engines' unit."),
    ("gpu-2", ["sed", "-i", "s/^port.*/port = 1/", "/etc/opsctl/instances/chat.0.toml"],
     "inference : Write the placements."),
]
# what a mended file brings with it: the unit that reads the file is restarted or reloaded, and Ansible says so
FOLLOWS = {
    ("ops-1", "base : Let the unit read its new files: haproxy.service."),
    ("gpu-2", "base : Let the unit read its new files: opsctl-agent.service."),
    ("gpu-2", "base : Let the unit read its new files: opsctl-setter.service."),
}


def test_what_was_broken_by_hand_is_named_and_mended(provisioned) -> None:
    for host, damage, _ in BROKEN:
        done = provisioned.run(host, ["sudo", "-n", *damage])
        assert done.returncode == 0, done.stderr
    changes = set(provision(provisioned))
    assert changes - FOLLOWS == {(host, task) for host, _, task in BROKEN}


def test_a_second_provision_changes_nothing(provisioned) -> None:
    said = succeeds("provision", inventory=provisioned.inventory)
    assert "nothing to do: zero changes" in said.stdout
    assert " changed " not in said.stderr


@pytest.mark.slow
def test_plain_ansible_needs_no_opsctl(provisioned) -> None:
    """``ansible-playbook playbooks/site.yml`` from the fleet's folder does what provision does, minus releases."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "inventory.ini", ROOT / "playbooks" / "site.yml"],
        cwd=provisioned.directory, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE")} | {"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stdout + done.stderr
    recap = done.stdout[done.stdout.index("PLAY RECAP"):]
    assert recap.count("changed=0") == len(provisioned.hosts), recap
