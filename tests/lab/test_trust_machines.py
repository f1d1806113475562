"""Trust with real machines: nothing believed, then looked at and pinned, then a machine that was installed anew."""

from __future__ import annotations

from typing import Any

import pytest
from command import opsctl, refused, succeeds

from opsctl.engines.session import Session
from opsctl.errors import RefusedError
from opsctl.fleet.inventory import read_fleet

pytestmark = [pytest.mark.lab, pytest.mark.parametrize("own_lab", [3], indirect=True)]


def fingerprints(fleet: Any) -> dict[str, str]:
    """What each machine itself says of its host key."""
    return {host: fleet.run(host, ["ssh-keygen", "-l", "-f", "/etc/ssh/ssh_host_ed25519_key.pub"]).stdout.split()[1]
            for host in fleet.hosts}


def test_machines_are_believed_only_once_their_keys_were_looked_at(own_lab: Any) -> None:
    known_hosts = own_lab.directory / "known_hosts"
    true = fingerprints(own_lab)
    assert succeeds("trust", inventory=own_lab.inventory).stdout.startswith("nothing new"), "the lab has pinned them"

    known_hosts.write_text("", encoding="utf-8")
    for host in own_lab.hosts:
        with pytest.raises(RefusedError) as caught, Session(read_fleet(own_lab.inventory), host) as session:
            session.run(["true"])
        assert caught.value.code == "host.not_trusted"
    asked = opsctl("trust", inventory=own_lab.inventory)
    assert asked.returncode == 2
    assert known_hosts.read_text(encoding="utf-8") == ""

    listed = own_lab.directory / "fingerprints"
    listed.write_text("".join(f"{host} {key}\n" for host, key in true.items()), encoding="utf-8")
    pinned = succeeds("trust", "--fingerprints", listed, "--json", inventory=own_lab.inventory).document
    assert {host["host"]: host["fingerprint"] for host in pinned["hosts"]} == true
    assert pinned["pinned"] == len(own_lab.hosts)
    for host in own_lab.hosts:
        with Session(read_fleet(own_lab.inventory), host) as session:
            assert session.run(["hostname"]).stdout.strip() == host


@pytest.mark.parametrize("host", ["gpu-1", "gpu-3"])  # reached directly, and behind the jump
def test_machine_with_another_key_is_foreign_until_it_is_replaced(own_lab: Any, host: str) -> None:
    fleet = read_fleet(own_lab.inventory)
    with Session(fleet, host) as session:
        session.run(["sh", "-c", "rm /etc/ssh/ssh_host_*; ssh-keygen -A; systemctl restart ssh"])
    before = fleet.known_hosts.read_text(encoding="utf-8")
    with pytest.raises(RefusedError) as caught, Session(fleet, host) as session:
        session.run(["true"])
    assert caught.value.code == "host.foreign_key"
    sentence = refused(opsctl("trust", "--yes", "--json", inventory=own_lab.inventory), 5, "trust.changed_key")
    assert host in sentence
    assert fleet.known_hosts.read_text(encoding="utf-8") == before
    succeeds("trust", "--replace", host, "--yes", inventory=own_lab.inventory)
    with Session(fleet, host) as session:
        assert session.run(["hostname"]).stdout.strip() == host
