"""A login whose sudo wants a password: it is asked for once, for the provision that makes it needless."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command import opsctl, refused, succeeds

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PASSWORD = "correct horse"


def test_a_sudo_password_is_wanted_once(own_lab) -> None:
    # every host, the gateway among them, is logged in to by ann, whose sudo asks
    for host in own_lab.hosts:
        for command, stdin in (
            (["useradd", "--create-home", "--shell", "/bin/bash", "--groups", "sudo", "ann"], ""),
            (["chpasswd"], f"ann:{PASSWORD}\n"),
            (["cp", "-r", "/root/.ssh", "/home/ann/.ssh"], ""),
            (["chown", "-R", "ann:", "/home/ann/.ssh"], ""),
        ):
            done = own_lab.run(host, command, stdin=stdin)
            assert done.returncode == 0, done.stderr
    inventory = own_lab.inventory
    inventory.write_text(inventory.read_text().replace("ansible_user=root", "ansible_user=ann"))
    services = own_lab.directory / "services.yml"
    services.write_text(services.read_text().replace("  first_release: v1\n", ""))
    succeeds("bundle", "build", inventory=inventory)

    sentence = refused(opsctl("provision", "--json", inventory=inventory), 5, "host.no_sudo")
    assert "--ask-become-pass" in sentence

    done = subprocess.run(
        [sys.executable, "-m", "opsctl", "provision", str(inventory), "--ask-become-pass"], input=PASSWORD + "\n",
        capture_output=True, text=True, check=False, start_new_session=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has no release yet" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    for file in (own_lab.directory / ".opsctl").rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes(), file

    again = succeeds("provision", "--json", inventory=inventory).document
    assert again["changed"] == 0
    state = succeeds("status", "--json", inventory=inventory).document
    assert {row["state"] for row in state["rows"]} == {"up", "no release"}
