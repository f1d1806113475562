"""What holds for the container toolkit and CUDA: exact versions, on hold, and a CDI specification of this driver."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opsctl.fleet.vendor_packages import versions_of
from opsctl.resources import resource
from opsctl.verifying import Wrong

PROGRAM = "roles/container_toolkit/files/cdi_specification.py"
FORMAT = "${Package} ${db:Status-Want} ${db:Status-Status} ${Version}\n"


@pytest.mark.of("host", "holds its container toolkit, all four packages, at the version of the inventory")
def test_container_toolkit(provisioned) -> None:
    _check_packages(provisioned, "container_toolkit")


@pytest.mark.of("host", "holds its CUDA, cuDNN and NCCL at the versions of the inventory")
def test_cuda(provisioned) -> None:
    _check_packages(provisioned, "cuda")


@pytest.mark.of("host", "has a CDI specification of the driver that runs, and of the GPUs that are there")
def test_cdi(provisioned) -> None:
    wanted = _versions(provisioned, "container_toolkit")
    folder, _, path = PROGRAM.partition("/")
    text = (resource(folder) / path).read_text(encoding="utf-8")
    asked = {"driver": "", "toolkit": wanted["nvidia_container_toolkit_version"]}
    done = provisioned.run(["/usr/bin/python3", "-c", text, "look", json.dumps(asked)])
    if done.rc:
        raise Wrong("an answer about the CDI specification", (done.stderr.strip().splitlines() or ["none"])[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    if found["stale"] or not found["loaded"]:
        raise Wrong(f"a CDI specification of driver {found['loaded'] or 'that is loaded'}",
                    found["stale"] or "no driver in the kernel")


def _versions(asked, role: str) -> dict[str, str]:
    """What the inventory names; skips hosts that opsctl leaves alone."""
    versions = versions_of(role, asked.host.variables)
    if not versions:
        pytest.skip(f"the inventory names no {role.replace('_', ' ')} for it")
    return versions


def _check_packages(asked, role: str) -> None:
    versions = _versions(asked, role)
    said = ", ".join(f"{key}={version}" for key, version in versions.items())
    file = asked.machine.file(f"/etc/opsctl/{role}.json")
    if not file.exists:
        raise Wrong(said, "none: the host was never given it")
    record: dict[str, Any] = json.loads(file.content_string)
    brought = {key: version for key, version in record["versions"].items() if version}
    if brought != versions:
        raise Wrong(said, ", ".join(f"{key}={version}" for key, version in brought.items()) + ", of the last provision")
    names = list(record["packages"])
    listed = asked.run(["dpkg-query", "--show", f"--showformat={FORMAT}", *names]).stdout
    found = {name: (want, status, version) for name, want, status, version in
             (line.split(" ", 3) for line in listed.splitlines())}
    loose = [name for name in names if found.get(name, ("", "", ""))[:2] != ("hold", "installed")]
    if loose:
        raise Wrong("each of its packages installed and on hold", f"not so: {', '.join(loose)}")
    other = {name: found[name][2] for name, version in record["packages"].items() if found[name][2] != version}
    if other:
        raise Wrong(f"packages of {said}", ", ".join(f"{name} {version}" for name, version in other.items()))
