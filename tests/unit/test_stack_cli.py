"""``opsctl stack resolve``: without any host, and with an inventory whose hosts are played."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from opsctl import resolving
from opsctl.cli.main import app
from opsctl.engines.session import Completed
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.releases.listing import Listed
from opsctl.resolving import Overrides, answers, engine_in, look, request_of, system_in
from opsctl.stack.knowledge import knowledge
from opsctl.stack.lock import HostFacts, read

H200S, L40S = ("2335",) * 8, ("26b9",) * 2
KEYS = {"schema", "verdict", "driver", "cuda", "packages", "engine", "reasons"}


def opsctl(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["stack", "resolve", *arguments], env={"COLUMNS": "200"})


def document(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def without_hosts(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = opsctl(*arguments, "--json")
    return result.exit_code, document(result)


class TestWithoutHosts:
    def test_a_stack(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # where there is no inventory
        code, got = without_hosts("--gpu", "8xH200", "--os", "debian12", "--engine", "vllm==0.33.0")
        assert code == 0
        assert set(got) >= KEYS
        assert (got["schema"], got["verdict"]) == ("opsctl.stack/v1", "ok")
        assert got["driver"] == {"branch": 580, "version": "580.178.04", "module": "open"}
        assert (got["fabric_manager"], got["cuda"], got["engine"]["name"]) == ("580.178.04", "13.0", "vllm")

    def test_a_clash_is_the_same_document_and_exit_5(self) -> None:
        code, got = without_hosts("--gpu", "V100", "--gpu", "B200", "--os", "debian12")
        assert code == 5
        assert set(got) >= KEYS
        assert (got["schema"], got["verdict"], len(got["clash"])) == ("opsctl.stack/v1", "refused", 2)
        assert got["nearest"]

    @pytest.mark.parametrize(("arguments", "code", "says"), [
        (["--gpu", "8xH2000", "--os", "debian12"], "stack.unknown_gpu", "H200"),
        (["--gpu", "L40", "--gpu", "RTX4091", "--os", "debian12"], "stack.unknown_gpu", "RTX 4090"),
        (["--gpu", "H200", "--os", "rocky9"], "stack.unknown_os", "Debian 13, Ubuntu 22.04 and Ubuntu 24.04"),
        (["--gpu", "H200", "--os", "debian12", "--engine", "vllm==0.5.0"], "stack.unknown_version", "0.8.0"),
        (["--gpu", "H200", "--os", "debian12", "--engine", "vllm==new"], "stack.unknown_version", "0.33.0"),
        (["--gpu", "H200", "--os", "debian12", "--engine", "tgi"], "stack.unknown_engine", "sglang"),
        (["--gpu", "8xA100", "--os", "debian12"], "stack.unsure_gpu", "without the fabric manager"),
    ])
    def test_a_name_that_is_wrong_or_unsure(self, arguments: list[str], code: str, says: str) -> None:
        exit_code, got = without_hosts(*arguments)
        assert (exit_code, got["verdict"], got["code"]) == (5, "refused", code)
        assert says in " ".join(got["reasons"])

    @pytest.mark.parametrize("name", ["2xA100", "8xA100 SXM4", "8xA100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "4xV100",
                                      "RTX4090", "1 x T4"])
    def test_an_unsure_name_that_makes_no_difference(self, name: str) -> None:
        assert without_hosts("--gpu", name, "--os", "debian12")[0] == 0

    @pytest.mark.parametrize(("arguments", "code"), [
        (["--gpu", "H200"], "stack.no_os"),
        (["--os", "debian12"], "stack.no_gpu"),
        (["--gpu", " ", "--os", "debian12"], "stack.bad_gpu"),
        (["--gpu", "H200", "--os", "debian12", "--policy", "old"], "stack.bad_policy"),
        (["--gpu", "H200", "--os", "debian12", "--driver", "newest"], "stack.bad_version"),
        (["--gpu", "H200", "--os", "debian12", "--write"], "stack.one_or_the_other"),
    ])
    def test_usage(self, arguments: list[str], code: str) -> None:
        exit_code, got = without_hosts(*arguments)
        assert (exit_code, got["error"]["code"]) == (2, code)

    def test_what_a_person_reads(self) -> None:
        said = opsctl("--gpu", "8xB200", "--os", "debian12").stdout
        assert "driver  580.178.04 (open kernel module), fabric manager 580.178.04" in said
        assert "because B200 SXM wants nvlsm" in said
        refused = opsctl("--gpu", "V100", "--os", "debian12", "--cuda", "13").stdout
        assert "there is no such stack:" in refused
        assert "nearest: driver 580.178.04 (proprietary), CUDA 12.9" in refused


HOSTS = (Host("gpu-1", "10.0.0.11", ("gpu",)), Host("gpu-2", "10.0.0.12", ("gpu",)),
         Host("ops-1", "10.0.0.2", ("gateway",)))


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A fleet whose hosts answer with ``facts``."""
    (tmp_path / "inventory.ini").write_text("")
    chat = Service("chat", "gpu", 8100, 8000, gpus_per_instance=1)
    made = Fleet(tmp_path, tmp_path / "inventory.ini", HOSTS, (chat,))
    monkeypatch.setattr("opsctl.fleet.inventory.read_fleet", lambda path: made)
    monkeypatch.setattr("opsctl.fleet.ssh_config.write_ssh_config", lambda fleet: None)
    play(monkeypatch, {"gpu-1": HostFacts(H200S, "debian12", ()), "gpu-2": HostFacts(L40S, "debian12", ())})
    pinned(monkeypatch, "vllm==0.33.0")
    return made


def play(monkeypatch: pytest.MonkeyPatch, facts: dict[str, HostFacts | OpsctlError]) -> None:
    monkeypatch.setattr(resolving, "ask_hosts", lambda fleet, hosts: {host.name: facts[host.name] for host in hosts})


def pinned(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr(resolving, "engines_of", lambda fleet, hosts: ({host.name: (engine,) for host in hosts}, ""))


def resolve(fleet: Fleet, *arguments: str) -> tuple[int, dict[str, Any]]:
    result = opsctl(str(fleet.inventory), *arguments, "--json")
    return result.exit_code, document(result)


class TestWithHosts:
    def test_nothing_is_written_unless_asked(self, fleet: Fleet) -> None:
        code, got = resolve(fleet)
        assert (code, got["written"], len(got["changes"])) == (0, False, 2)
        assert got["hosts"]["gpu-1"]["fabric_manager"] == "580.178.04"
        assert not (fleet.directory / "stack.lock").exists()

    def test_the_lock_is_written_and_the_same_again_is_nothing(self, fleet: Fleet) -> None:
        assert resolve(fleet, "--write")[1]["written"] is True
        lock = read((fleet.directory / "stack.lock").read_text(), "stack.lock")
        assert {name: entry.engines for name, entry in lock.hosts.items()} == {
            "gpu-1": ("vllm==0.33.0",), "gpu-2": ("vllm==0.33.0",)}
        code, got = resolve(fleet, "--write")
        assert (code, got["written"], got["changes"]) == (0, False, [])

    def test_a_limited_one_keeps_the_other_hosts(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve(fleet, "--write")
        _, got = resolve(fleet, "--write", "--limit", "gpu-2", "--policy", "new")
        assert [line[:8] for line in got["changes"]] == ["~ gpu-2:"]
        lock = read((fleet.directory / "stack.lock").read_text(), "stack.lock")
        assert {name: entry.branch for name, entry in lock.hosts.items()} == {"gpu-1": 580, "gpu-2": 595}

    def test_a_host_without_a_stack_writes_nothing(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        play(monkeypatch, {"gpu-1": HostFacts(H200S, "debian12", ()), "gpu-2": HostFacts(("1db1",), "debian12", ())})
        code, got = resolve(fleet, "--write")
        assert (code, got["written"], got["hosts"]["gpu-2"]["verdict"]) == (5, False, "refused")
        assert not (fleet.directory / "stack.lock").exists()

    def test_a_gpu_that_nobody_knows(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        play(monkeypatch, {"gpu-1": HostFacts(("ffff",), "debian12", ()), "gpu-2": HostFacts((), "debian12", ())})
        code, got = resolve(fleet)
        assert (code, got["hosts"]["gpu-1"]["code"], got["without_gpu"]) == (5, "stack.unknown_gpu", ["gpu-2"])

    def test_a_host_that_lost_its_gpus_leaves_the_lock(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve(fleet, "--write")
        play(monkeypatch, {"gpu-1": HostFacts(H200S, "debian12", ()), "gpu-2": HostFacts((), "debian12", ())})
        code, got = resolve(fleet, "--write")
        assert (code, got["written"], [line[:8] for line in got["changes"]]) == (0, True, ["- gpu-2:"])

    def test_a_fleet_without_gpus_gets_no_lock(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        play(monkeypatch, {name: HostFacts((), "debian12", ()) for name in ("gpu-1", "gpu-2")})
        assert resolve(fleet, "--write")[1]["written"] is False
        assert not (fleet.directory / "stack.lock").exists()

    def test_a_host_that_does_not_answer(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        silent = RefusedError("host.unreachable", "gpu-2: 10.0.0.12 does not answer.", hint="--limit '!gpu-2'")
        play(monkeypatch, {"gpu-1": HostFacts(H200S, "debian12", ()), "gpu-2": silent})
        code, got = resolve(fleet, "--write")
        assert (code, got["error"]["code"]) == (5, "host.unreachable")

    def test_a_lock_that_is_wrong(self, fleet: Fleet) -> None:
        (fleet.directory / "stack.lock").write_text("schema: other\nhosts: {}\n")
        code, got = resolve(fleet)
        assert (code, got["error"]["code"]) == (3, "stack_lock.bad_value")

    def test_what_a_person_reads(self, fleet: Fleet) -> None:
        said = opsctl(str(fleet.inventory)).stdout
        assert "+ gpu-2: driver 580.178.04 (open), CUDA 13.0, for 2 x L40S" in said
        assert "not written; --write does" in said


class Played:
    """A session whose host says this."""

    def __init__(self, facts: Completed, release: str = "") -> None:
        self.host = HOSTS[0]
        self._answers = {"python3": facts, "cat": Completed(0, release, "")}

    def run(self, argv: Sequence[str], **_: Any) -> Completed:
        return self._answers[argv[0]]


def test_what_a_host_is_asked() -> None:
    seen = json.dumps({"seen": {"gpus": ["2335", "2335"], "switches": 4, "serving": []}})
    got = look(Played(Completed(0, seen, ""), 'ID=ubuntu\nVERSION_ID="24.04"\n'))  # type: ignore[arg-type]
    assert got == HostFacts(("2335", "2335"), "ubuntu24.04", (), 4)
    with pytest.raises(RefusedError, match="cannot say"):
        look(Played(Completed(127, "", "python3: not found\n")))  # type: ignore[arg-type]


def test_the_distribution() -> None:
    assert system_in('PRETTY_NAME="x"\nID=debian\nVERSION_ID="13"\n') == "debian13"
    assert system_in("ID=arch\n") == "arch"


@pytest.mark.parametrize(("now", "first_release", "expected"), [
    ("v2", "v1", "vllm==0.33.0"), ("", "v1", "llamacpp==2026.10.11549"), ("", "", ""), ("", "v9", "")])
def test_the_engine_of_a_service(now: str, first_release: str, expected: str) -> None:
    """The ledger's word counts, then first_release."""
    rows = [{"service": "chat", "version": version, "engine": engine, "now": version == now}
            for version, engine in (("v1", "llamacpp-2026.10.11549-1a2b3c4d"), ("v2", "vllm-0.33.0-0123abcd"))]
    service = Service("chat", "gpu", 8100, 8000, gpus_per_instance=1, first_release=first_release)
    assert engine_in(Listed([{**rows[0], "service": "other", "now": True}, *rows], ""), service) == expected


def test_the_inventory_wishes() -> None:
    host = Host("gpu-1", "10.0.0.11", ("gpu",), variables={
        "nvidia_driver_version": "595.84", "nvidia_driver_flavour": "open", "nvidia_driver_fabric_manager": "absent"})
    facts = HostFacts(H200S, "debian12", ("vllm==0.33.0",))
    asked = request_of(host, facts, Overrides())
    assert (asked.driver, asked.flavour, asked.fabric_manager, asked.engines) == (
        "595.84", "open", "absent", ("vllm==0.33.0",))
    assert request_of(host, facts, Overrides(driver="580")).driver == "580"
    got = answers([host], {"gpu-1": facts}, Overrides(), knowledge(), date(2026, 11, 22))["gpu-1"].answer.stack
    assert got is not None
    assert (got.version, got.fabric_manager) == ("595.84", False)
