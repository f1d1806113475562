"""What holds for every host: packages, units, keys, placements, the clock, the way to the gateway."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from opsctl.agent import flat_toml
from opsctl.bundle.keys import checking
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import place, undealt
from opsctl.lab.answer import Response
from opsctl.verifying import (
    TIME_SERVICES,
    Target,
    Wrong,
    check_clock,
    check_hold,
    check_placements,
    properties,
    release_file,
)

PLACEMENTS = "/etc/opsctl/instances"
TRUST = ("allowed_signers", "bundle.asc")


@pytest.mark.of("host", "is provisioned")
def test_provisioned(asked) -> None:
    if not asked.provisioned:
        raise Wrong("opsctl's own programs in /opt/opsctl/agent", "none: the host was never provisioned to the end")
    if asked.state["host"] != asked.host.name:
        raise Wrong(f"a host that was provisioned as {asked.host.name}",
                    f"one that was provisioned as {asked.state['host']}")


@pytest.mark.of("unit", "{what} is active and enabled")
def test_unit(provisioned, target: Target) -> None:
    check_unit(provisioned, target.what)


@pytest.mark.of("package", "the package {what} is installed")
def test_package(provisioned, target: Target) -> None:
    if not provisioned.machine.package(target.what).is_installed:
        raise Wrong(f"the package {target.what}", "it is not installed")


@pytest.mark.of("hold", "the package {what} is held at the bundle's version")
def test_hold(asking, provisioned, target: Target) -> None:
    shown = provisioned.run(["dpkg-query", "--show", "--showformat=${db:Status-Want} ${db:Status-Status} ${Version}",
                             target.what]).stdout.split()
    selection, status, version = (*shown, "", "", "")[:3]
    bundle = asking.bundle_versions(provisioned.codename)
    check_hold(target.what, selection, version if status == "installed" else "", bundle)


@pytest.mark.of("host", "trusts the keys in trust/ and no others")
def test_trust(fleet: Fleet, provisioned) -> None:
    for name in TRUST:
        there = provisioned.machine.file(f"/etc/opsctl/trust/{name}")
        if not there.exists or there.content != (fleet.directory / "trust" / name).read_bytes():
            raise Wrong(f"/etc/opsctl/trust/{name} as it is in {fleet.directory}/trust",
                        "another one" if there.exists else "none")


@pytest.mark.of("host", "its placements are those of the fleet")
def test_placements(fleet: Fleet, provisioned, target: Target) -> None:
    file = provisioned.machine.file
    names = file(PLACEMENTS).listdir() if file(PLACEMENTS).is_directory else []
    found = {name.removesuffix(".toml"): flat_toml.loads(file(f"{PLACEMENTS}/{name}").content_string)
             for name in names if name.endswith(".toml")}
    check_placements([one for one in place(fleet) if one.host == target.host], found,
                     undealt=target.host in [host.name for host in undealt(fleet)])


@pytest.mark.of("host", "gets the bundle's Release file from the gateway, with a good signature")
def test_release_file(fleet: Fleet, provisioned) -> None:
    if fleet.package_source != "gateway":
        pytest.skip("packages do not come from the gateway")
    address, port, path = release_file(fleet, provisioned.codename, provisioned.host)
    request = f"GET {path} HTTP/1.1\r\nHost: {address}:{port}\r\nConnection: close\r\n\r\n".encode()
    answer = Response()
    answer.feed(provisioned.exchange(address, port, request))
    if answer.status != 200:
        raise Wrong(f"http://{address}:{port}{path}", f"HTTP {answer.status}")
    with tempfile.TemporaryDirectory(prefix="opsctl-") as folder:
        signed = Path(folder) / "InRelease"
        signed.write_bytes(bytes(answer.text))
        try:
            with checking(fleet.directory / "trust" / "bundle.asc") as checker:
                checker.check("the gateway's InRelease", signed)
        except OpsctlError as error:
            raise Wrong("a Release file that trust/bundle.asc signed", error.message, error.hint) from None


@pytest.mark.of("host", "no unit has failed")
def test_no_failed_unit(asked, target: Target) -> None:
    listed = asked.run(["systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"])
    if listed.rc:
        raise Wrong("an answer from systemd", (listed.stderr.strip().splitlines() or ["none"])[0],
                    f"ssh -F .opsctl/ssh_config {target.host}")
    failed = [line.split()[0] for line in listed.stdout.splitlines() if line.split()]
    if failed:
        raise Wrong("no failed unit", f"{', '.join(failed)} failed",
                    f"ssh -F .opsctl/ssh_config {target.host} systemctl status {failed[0]}")


@pytest.mark.of("host", "the clock is synchronised")
def test_clock(asked) -> None:
    running = [name for name in TIME_SERVICES
               if asked.run(["systemctl", "is-active", "--quiet", f"{name}.service"]).rc == 0]
    said = asked.run(["timedatectl", "show"]) if running else None
    check_clock(properties(said.stdout) if said else {}, running)


def check_unit(asked, unit: str) -> None:
    shown = properties(asked.run(["systemctl", "show", unit, "--property=ActiveState,UnitFileState,LoadState"]).stdout)
    state, enabled = shown.get("ActiveState", ""), shown.get("UnitFileState", "")
    if shown.get("LoadState") == "not-found":
        raise Wrong(f"{unit} active and enabled", "no such unit")
    if state != "active" or not enabled.startswith("enabled"):
        raise Wrong(f"{unit} active and enabled", f"{state or 'not known'} and {enabled or 'not enabled'}")
