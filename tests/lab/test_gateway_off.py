"""A rollback while the gateway has no power: a host of its own here, so that nothing but the gateway is away."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from command import opsctl, refused, succeeds
from conftest import NAME, LabFleet, lab_of_a_module, unwatched

from opsctl.fleet.inventory import read_fleet
from opsctl.lab.load import Load, target
from opsctl.lab.model import write_model
from opsctl.releases.remote import HOST_PROGRAM

pytestmark = [pytest.mark.lab, pytest.mark.slow]

GATEWAY = "gpu-3"


@pytest.fixture(scope="module")
def apart(computer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabFleet]:
    """ops-1 balances, gpu-3 is the gateway, gpu-1 and gpu-2 serve v2 and have v1."""
    name = f"{NAME}-gw"
    directory = tmp_path_factory.mktemp("apart") / "fleet"
    with lab_of_a_module(name, 3, directory) as fleet:
        unwatched(fleet.directory)
        text = fleet.inventory.read_text()
        (line,) = [line for line in text.splitlines() if line.startswith(f"{GATEWAY} ")]
        fleet.inventory.write_text(text.replace(f"{line}\n", "").replace("[gateway]\nops-1\n", f"[gateway]\n{line}\n"))
        succeeds("bundle", "build", inventory=fleet.inventory)
        write_model(directory / "small.gguf", "small")
        for version, slots in (("v1", 4), ("v2", 5)):
            succeeds("model", "import", directory / "small.gguf", "--service", "chat", "--version", version, "--set",
                     f"parallel={slots}", inventory=fleet.inventory)
        succeeds("provision", inventory=fleet.inventory)
        succeeds("update-model", "--version", "v2", "--yes", "--min-speed", "0", inventory=fleet.inventory)
        yield fleet


def releases(lab: LabFleet) -> list[str]:
    answers = [lab.run(host, ["sudo", HOST_PROGRAM, "state", "--json"]) for host in ("gpu-1", "gpu-2")]
    return [json.loads(answer.stdout)["instances"][0]["release"] for answer in answers]


def test_a_rollback_needs_no_gateway(apart: LabFleet) -> None:
    succeeds("lab", "power-cut", GATEWAY, "--name", apart.name)
    with Load(target(read_fleet(apart.inventory), "chat"), clients=4, tokens=40) as load:
        back = opsctl("rollback", "--yes", "--json", inventory=apart.inventory)
    assert back.returncode == 0, back.stdout + back.stderr
    assert (back.document["from"], back.document["to"], back.document["bad"]) == ("v2", "v1", ["v2"])
    assert releases(apart) == ["v1", "v1"]
    assert load.records
    assert not [record for record in load.records if not record.whole]


def test_nothing_else_goes_on_without_it(apart: LabFleet) -> None:
    again = opsctl("update-model", "--version", "v2", "--yes", "--allow-bad", "--json", inventory=apart.inventory)
    assert GATEWAY in refused(again, 5, "host.unreachable")
    assert releases(apart) == ["v1", "v1"]


def test_it_learns_of_it_when_it_is_back(apart: LabFleet) -> None:
    succeeds("lab", "power-on", GATEWAY, "--name", apart.name)
    again = opsctl("update-model", "--version", "v2", "--yes", "--json", inventory=apart.inventory)
    assert "v2" in refused(again, 5, "release.bad")
    lines = succeeds("history", "--json", inventory=apart.inventory).document["lines"]
    assert [(line["action"], line["version"]) for line in lines][-2:] == [("bad", "v2"), ("serve", "v1")]
    runs = succeeds("runs", "--json", inventory=apart.inventory).document["runs"]
    assert "rollback" in {run["verb"] for run in runs}
    assert not [run for run in runs if run["state"] == "unfinished"], runs
