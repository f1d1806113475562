"""opsctl check: what captured texts mean. Each case is a file; see fixtures/check/hosts/README."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from check_kit import FIXTURES, cases, host, load, overlaid, read

from opsctl.checking.model import Captured, Finding, Wanted, on
from opsctl.checking.reading import container_of, lost, module
from opsctl.checking.table import CHECKS, REACHABLE, as_document, counts, findings_for, unreachable
from opsctl.errors import RefusedError


@pytest.mark.parametrize("path", cases(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_case(path: Path) -> None:
    case = load(path)
    found = case.finding()
    assert (found.verdict, found.stops_provision) == (case.verdict, case.stops), found.what
    assert case.says in found.what
    assert case.types in found.fix
    assert bool(found.fix) is (found.verdict in ("warn", "fix")), "who is told of a fault is told what to type"
    assert found.fix.isprintable()


def test_every_check_has_a_case_that_passes_and_one_that_does_not() -> None:
    verdicts: dict[str, set[str]] = {}
    for path in cases():
        verdicts.setdefault(path.parent.name, set()).add(path.name.partition("-")[0])
    assert set(verdicts) == {check.id for check in CHECKS}
    for check, said in verdicts.items():
        assert "pass" in said, check
        assert said & {"warn", "fix"}, check


def test_ids_are_stable_and_each_is_there_once() -> None:
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids)) >= 20
    assert REACHABLE not in ids
    page = (Path(__file__).resolve().parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    for one in [*ids, REACHABLE]:
        assert f"`{one}`" in page, f"docs/check.md does not tell of {one}"


def test_a_host_that_is_well_has_nothing_to_mend() -> None:
    captured, wanted = read(host("gpu-host"))
    findings = findings_for("gpu-1", captured, wanted)
    assert [one.id for one in findings] == [check.id for check in CHECKS]
    assert {one.verdict for one in findings} == {"pass"}


def test_without_a_driver_nothing_is_guessed() -> None:
    captured, wanted = read(host("bare"))
    findings = findings_for("gpu-1", captured, wanted)
    asked_of_driver = {check.id for check in CHECKS if check.scope == "driver"}
    said = {one.id: one for one in findings}
    assert {said[name].verdict for name in asked_of_driver} == {"skip"}
    assert {said[name].what for name in asked_of_driver} == {"no driver is loaded yet"}
    assert not [one for one in findings if one.verdict in ("warn", "fix")], "a bare host is no broken one"


def test_a_gateway_is_not_asked_about_gpus() -> None:
    captured, wanted = read(host("gateway"))
    findings = findings_for("gpu-1", captured, wanted)
    assert [one.id for one in findings] == [check.id for check in CHECKS if check.scope == "host"]
    assert not [one for one in findings if one.verdict in ("warn", "fix")]


def test_a_driver_whose_own_file_does_not_answer_hangs() -> None:
    document = overlaid(host("gpu-host"), {"commands": {name: {"exit": None, "out": ""} for name in (
        "driver", "nvidia-smi", "nvidia-smi-csv")}})
    said = {one.id: one for one in findings_for("gpu-1", *read(document))}
    assert said["driver-answers"].verdict == "fix"
    assert "hangs" in said["driver-answers"].what
    assert said["ecc"].what == "the driver's own files did not answer: it hangs"


def test_a_host_that_said_nothing_is_never_told_to_be_well() -> None:
    findings = findings_for("gpu-1", Captured({}, (0.1,)), Wanted("gpu-1", driver="580.105.08", gpu_uuids=("GPU-1",)))
    passed = {one.id for one in findings if one.verdict == "pass"}
    assert passed == {"ssh-latency", "gpu-model"}, "measured here, and not named in the inventory"


def test_the_same_captures_give_the_same_document() -> None:
    document = overlaid(host("gpu-host"), {"commands": {"owner:/usr/bin/nvidia-uninstall": {"exit": 1, "out": ""},
                                                        "owner:/usr/bin/nvidia-installer": {"exit": 1, "out": ""}}})
    turned = {**document, "commands": dict(reversed(document["commands"].items())),
              "files": dict(reversed(document["files"].items()))}
    one, other = (json.dumps(as_document({"gpu-1": findings_for("gpu-1", *read(each))})) for each in (document, turned))
    assert one == other


def test_the_document() -> None:
    silent = unreachable(RefusedError("host.unreachable", "gpu-2: it does not answer.",
                                      hint="ssh -F .opsctl/ssh_config gpu-2"), "gpu-2")
    captured, wanted = read(host("gpu-host"))
    document = as_document({"gpu-1": findings_for("gpu-1", captured, wanted), "gpu-2": (silent,)})
    assert document["counts"] == {"fix": 1, "warn": 0, "skip": 0, "pass": len(CHECKS)}
    assert document["hosts"][1] == {
        "host": "gpu-2", "counts": {"fix": 1, "warn": 0, "skip": 0, "pass": 0}, "findings": [{
            "id": "reachable", "title": "the way to the host", "verdict": "fix", "what": "it does not answer.",
            "fix": "ssh -F .opsctl/ssh_config gpu-2", "stops_provision": True}]}


def test_a_host_whose_sudo_asks_may_still_be_provisioned() -> None:
    asks = unreachable(RefusedError("host.no_sudo", "gpu-2: ann cannot become root."), "gpu-2")
    assert (asks.verdict, asks.stops_provision) == ("fix", False)


def test_captures_of_another_host_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="gpu-2"):
        findings_for("gpu-2", Captured(), Wanted("gpu-1"))


def test_what_stops_a_provision_is_a_short_list() -> None:
    stopping = {path.parent.name for path in cases() if load(path).stops}
    assert stopping == {"apt-sources", "disk-system", "disk-weights", "dpkg-state", "driver-dependents",
                        "driver-flavour", "driver-run-file", "driver-version", "exporter-port", "gpu-count",
                        "gpu-model", "mok"}


def test_commands_can_be_typed_as_they_stand() -> None:
    line = on(Wanted("gpu-1"), "sh", "-c", "echo 'a b' && reboot")
    assert shlex.split(line) == ["opsctl", "exec", "--limit", "gpu-1", "--", "sh", "-c", "echo 'a b' && reboot"]


def test_readings() -> None:
    digits = "0123456789abcdef" * 4
    for group in (f"0::/system.slice/docker-{digits}.scope", f"9:devices:/docker/{digits}",
                  f"0::/machine.slice/libpod-{digits}.scope/container",
                  f"0::/kubepods.slice/kubepods-burstable.slice/cri-containerd-{digits}.scope"):
        assert container_of(group) == digits, group
    assert container_of("0::/system.slice/ollama.service") == ""
    assert lost(Captured({"commands": {"nvidia-smi-csv": {"exit": 15, "out": (
        "Unable to determine the device handle for GPU0: GPU is lost\n")}}})) == {"GPU0": "GPU is lost"}
    assert module(Captured(), "modinfo") == {}


def test_counts() -> None:
    assert counts([Finding("a", "b", "fix", "c"), Finding("a", "b", "pass", "c")]) == {
        "fix": 1, "warn": 0, "skip": 0, "pass": 1}


def test_fixtures_say_where_they_come_from() -> None:
    assert "63018b8685d66f61d96a44b449cef8d329cd6080" in (FIXTURES / "hosts" / "README").read_text(encoding="utf-8")
