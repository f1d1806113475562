"""What holds for the driver of a host's GPUs: one version in every layer, on hold, and every GPU there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opsctl.fleet.model import Host
from opsctl.resources import resource
from opsctl.verifying import Doubtful, Wrong

RECORD = "/etc/opsctl/driver.json"
PROGRAM = "roles/nvidia_driver/files/driver_layers.py"
FORMAT = "${Package} ${db:Status-Want} ${db:Status-Status} ${Version}\n"


@pytest.fixture
def driven(asked):
    """Also a host whose provision ended with its driver, before the agent came: no GPU answered, and that is said."""
    if not (asked.provisioned or asked.machine.file(RECORD).exists):
        pytest.skip("the host is not provisioned")
    return asked


@pytest.mark.of("host", "has the driver of the inventory in kernel, module file, library and fabric manager")
def test_layers(driven) -> None:
    wrong = _layers(driven, [])["wrong"]
    if wrong:
        raise Wrong(f"driver {_version(driven.host)} in every layer", "; ".join(wrong))


@pytest.mark.of("host", "holds every package of its driver at that version")
def test_holds(driven) -> None:
    record = _record(driven)
    names = [*filter(None, [record["pin"]]), *record["packages"]]
    listed = driven.run(["dpkg-query", "--show", f"--showformat={FORMAT}", *names]).stdout
    found = {name: (want, status, version) for name, want, status, version in
             (line.split(" ", 3) for line in listed.splitlines())}
    loose = [name for name in names if found.get(name, ("", "", ""))[:2] != ("hold", "installed")]
    if loose:
        raise Wrong("every package of the driver installed and on hold", f"not so: {', '.join(loose)}")
    other = {name: found[name][2] for name, version in record["packages"].items() if found[name][2] != version}
    if other:
        raise Wrong(f"packages of {record['version']}", ", ".join(f"{name} {other[name]}" for name in other))


@pytest.mark.of("host", "has the GPUs of gpus.yml, in PCI order")
def test_gpus(driven) -> None:
    wanted = list(driven.host.gpus or ())
    if not _version(driven.host):
        pytest.skip("the inventory names no nvidia_driver_version for it")
    if not wanted:
        pytest.skip("neither gpus.yml nor gpu_uuids names any")
    found = _layers(driven, wanted)["gpus"]
    missing = [uuid for uuid in wanted if uuid not in found]
    if missing:
        raise Wrong(f"{len(wanted)} GPUs", f"{len(found)}; missing: {', '.join(missing)}",
                    f"opsctl status --gpus; after a repair: opsctl gpus accept {driven.host.name}")
    if [uuid for uuid in found if uuid in wanted] != wanted:
        raise Wrong(f"GPUs in PCI order: {', '.join(uuid for uuid in found if uuid in wanted)}", ", ".join(wanted),
                    f"opsctl gpus accept {driven.host.name}, or correct gpu_uuids of the inventory")
    new = [uuid for uuid in found if uuid not in wanted]
    if new:
        raise Doubtful(f"{len(new)} more than gpus.yml has, dealt to nobody ({', '.join(new)}): opsctl gpus accept "
                       f"{driven.host.name}")


def _version(host: Host) -> str:
    return str(host.variables.get("nvidia_driver_version", "") or "")


def _record(asked) -> dict[str, Any]:
    """What the role wrote down; skips hosts whose driver is not opsctl's."""
    version = _version(asked.host)
    if not version:
        pytest.skip("the inventory names no nvidia_driver_version for it")
    file = asked.machine.file(RECORD)
    if not file.exists:
        raise Wrong(f"driver {version}", f"no {RECORD}: the host was never given a driver")
    record: dict[str, Any] = json.loads(file.content_string)
    if record["version"] != version:
        raise Wrong(f"driver {version}", f"{record['version']}, of the last provision")
    return record


def _layers(asked, uuids: list[str]) -> dict[str, Any]:
    record = _record(asked)
    wanted = {"version": record["version"], "fabric_manager": record["fabric_manager"], "gpu_uuids": uuids}
    folder, _, path = PROGRAM.partition("/")
    text = (resource(folder) / path).read_text(encoding="utf-8")
    done = asked.run(["/usr/bin/python3", "-c", text, json.dumps(wanted)])
    if done.rc:
        raise Wrong("an answer about the driver", (done.stderr.strip().splitlines() or ["none"])[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found
