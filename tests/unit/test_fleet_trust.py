"""Pinning host keys: what is decided of a key, what is written, and the verb against servers on the loopback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from session_server import Server, make_key, serving
from typer.testing import CliRunner, Result

from opsctl.cli.main import app
from opsctl.engines.session import Session
from opsctl.errors import ConfigurationError
from opsctl.fleet.inventory import read_fleet
from opsctl.fleet.known_hosts import HostKey, load, parse, pinned_text
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.trust import (
    Target,
    Verdict,
    compare,
    jump_command,
    read_fingerprints,
    split_hop,
    targets,
)

OLD = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIGfEoSyv1gn3WZ2l8eX9Jr1FrwFf9hGHoWqDJEVTMbwf")
NEW = HostKey("ssh-ed25519", "AAAAC3NzaC1lZDI1NTE5AAAAIHu8EnhcqQVU0fGRRVuEzlKmN1lCA9ec5kQkKm6M7ggL")
TARGET = Target("gpu-1", "192.0.2.11", 22)
KNOWN = Path("known_hosts")


def pins(*keys: HostKey) -> str:
    return "".join(f"192.0.2.11 {key.type} {key.text}\n" for key in keys)


@pytest.mark.parametrize(("pinned", "shown", "replace", "listed", "expected"), [
    ((), [NEW], False, None, Verdict.NEW),
    ([NEW], [NEW], False, None, Verdict.PINNED),
    ([OLD], [NEW, OLD], False, None, Verdict.PINNED),
    ([OLD], [NEW], False, None, Verdict.CHANGED),
    ([OLD], [NEW], True, None, Verdict.REPLACED),
    ([NEW], [NEW], True, None, Verdict.PINNED),
    ((), [NEW], False, {"gpu-1": {NEW.fingerprint}}, Verdict.NEW),
    ((), [OLD, NEW], False, {"192.0.2.11": {NEW.fingerprint}}, Verdict.NEW),
    ((), [NEW], False, {"gpu-1": {OLD.fingerprint}}, Verdict.MISMATCH),
    ((), [NEW], False, {"gpu-2": {NEW.fingerprint}}, Verdict.UNLISTED),
    ([NEW], [NEW], False, {"gpu-1": {NEW.fingerprint}}, Verdict.PINNED),
    ([NEW], [NEW], False, {"gpu-1": {OLD.fingerprint}}, Verdict.MISMATCH),
    ([OLD], [NEW], False, {"gpu-1": {NEW.fingerprint}}, Verdict.CHANGED),
    ([OLD], [NEW], True, {"gpu-1": {NEW.fingerprint}}, Verdict.REPLACED),
    ([OLD], [NEW], True, {"gpu-1": {OLD.fingerprint}}, Verdict.MISMATCH),
])
def test_verdict_on_a_key(pinned: list[HostKey], shown: list[HostKey], replace: bool,
                          listed: dict[str, set[str]] | None, expected: Verdict) -> None:
    finding = compare(TARGET, shown, parse(pins(*pinned), KNOWN), replace=replace, fingerprints=listed)
    assert finding.verdict is expected
    if listed and expected is Verdict.NEW:
        assert finding.key == NEW  # the one that the operator knows, not the one that came first


def test_fingerprint_is_what_ssh_keygen_prints(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key").with_suffix(".pub")
    kind, text = public.read_text(encoding="ascii").split()[:2]
    printed = subprocess.run(["ssh-keygen", "-l", "-f", str(public)], capture_output=True, text=True, check=True).stdout
    assert HostKey(kind, text).fingerprint == printed.split()[1]


def test_pinning_changes_one_host_only() -> None:
    before = f"# ours\nother {OLD.type} {OLD.text}\n192.0.2.11,old-name {OLD.type} {OLD.text} note\n"
    after = pinned_text(before, "192.0.2.11", NEW, "gpu-1")
    assert after == (f"# ours\nother {OLD.type} {OLD.text}\nold-name {OLD.type} {OLD.text} note\n"
                     f"192.0.2.11 {NEW.type} {NEW.text} gpu-1\n")
    assert pinned_text(after, "192.0.2.11", NEW, "gpu-1") == after


@pytest.mark.parametrize("line", [
    f"@cert-authority * {OLD.type} {OLD.text}", f"@revoked * {OLD.type} {OLD.text}", "|1|abc=|def= " + OLD.text,
    "gpu-1 ssh-ed25519", f"gpu-1 ssh-ed25519 {OLD.text[:-3]}", f"gpu-1 ssh-rsa {OLD.text}", "gpu-1 ssh-dss AAAA",
])
def test_line_that_engines_would_read_differently_is_refused(line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"known_hosts:2: ") as caught:
        parse(f"{pins(OLD)}{line}\n", KNOWN)
    assert "2d" in caught.value.hint


def test_fingerprints_file() -> None:
    old, new = OLD.fingerprint, NEW.fingerprint
    text = f"# from the installer\ngpu-1 {old}\n\ngpu-1 {new}  # rsa\ngpu-2 {new}=\n"
    assert read_fingerprints(text, Path("f")) == {"gpu-1": {old, new}, "gpu-2": {new}}
    for bad in (f"256 {OLD.fingerprint} root@gpu-1 (ED25519)", "gpu-1 MD5:aa:bb", "gpu-1 SHA256:short", "gpu-1"):
        with pytest.raises(ConfigurationError, match="f:1: ") as caught:
            read_fingerprints(bad, Path("f"))
        assert "ssh-keygen -l" in caught.value.hint


def test_hosts_behind_jumps_are_asked_after_the_jumps() -> None:
    hosts = (Host("ops-1", "192.0.2.10", ()), Host("gpu-1", "10.0.0.1", (), proxy_jump="ops-1"),
             Host("gpu-2", "10.0.0.2", (), proxy_jump="ann@bastion:2222,ops-1"), Host("this", "this", (), "local"),
             Host("gpu-3", "10.0.0.3", (), proxy_jump="gpu-1"))
    fleet = Fleet(Path("/f"), Path("/f/inventory.ini"), hosts, ())

    def rounds(wanted: Sequence[Host]) -> list[list[str]]:
        return [[target.name for target in found] for found in targets(fleet, wanted)]

    assert rounds(hosts) == [["ops-1", "ann@bastion:2222"], ["gpu-1", "gpu-2"], ["gpu-3"]]
    assert rounds(hosts[4:]) == [["ops-1"], ["gpu-1"], ["gpu-3"]]
    assert rounds(hosts[3:4]) == []


def test_jump_command_goes_through_all_jumps() -> None:
    argv = jump_command(Path("/f/c"), Target("gpu-2", "fd00::2", 22, ("ann@bastion:2222", "ops-1")))
    assert argv[:3] == ["ssh", "-F", "/f/c"]
    assert argv[-5:] == ["-J", "ann@bastion:2222", "-W", "[fd00::2]:22", "ops-1"]
    assert split_hop("ann@bastion:2222") == ("bastion", 2222)
    assert split_hop("[fd00::1]:22") == ("fd00::1", 22)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    login = make_key(tmp_path / "login")
    with serving(tmp_path / "a", login) as first, serving(tmp_path / "b", login) as second:
        yield first, second


@pytest.fixture
def inventory(tmp_path: Path, servers: tuple[Server, Server]) -> Path:
    """gpu-1, and gpu-2 behind it."""
    first, second = servers
    (tmp_path / "inventory.ini").write_text(
        f"[gpu]\ngpu-1 ansible_host=127.0.0.1 ansible_port={first.port} service_address=10.0.0.1 "
        f"management_address=10.0.0.1\n"
        f"gpu-2 ansible_host=localhost ansible_port={second.port} service_address=10.0.0.2 "
        f"management_address=10.0.0.2 proxy_jump=gpu-1\n"
        "[lb]\ngpu-1\n[gateway]\ngpu-1\n[all:vars]\nansible_user=ann\nansible_ssh_private_key_file=login\n",
        encoding="utf-8")
    (tmp_path / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n", encoding="utf-8")
    return tmp_path / "inventory.ini"


def trust(inventory: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["trust", str(inventory), *options])


def test_keys_are_shown_pinned_and_believed_also_behind_a_jump(inventory: Path, servers: tuple[Server, Server]) -> None:
    refused = trust(inventory)
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert servers[0].key.fingerprint in refused.stderr
    assert not (inventory.parent / "known_hosts").exists()
    done = trust(inventory, "--yes", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["pinned"]) == ("opsctl.trust/v1", 2)
    assert [host["fingerprint"] for host in document["hosts"]] == [server.key.fingerprint for server in servers]
    with Session(read_fleet(inventory), "gpu-2") as session:
        assert session.run(["echo", "believed"], sudo=False).stdout == "believed\n"
    before = (inventory.parent / "known_hosts").read_text(encoding="utf-8")
    again = trust(inventory)  # nothing new: nothing to ask
    assert again.exit_code == 0
    assert "nothing new" in again.stdout
    assert (inventory.parent / "known_hosts").read_text(encoding="utf-8") == before


def test_changed_key_is_refused_unless_its_host_is_named(inventory: Path, servers: tuple[Server, Server]) -> None:
    known_hosts = inventory.parent / "known_hosts"
    wrong = servers[0].pin.replace(servers[0].key.text, NEW.text)
    known_hosts.write_text(wrong, encoding="utf-8")
    refused = trust(inventory, "--limit", "gpu-1", "--yes")
    assert refused.exit_code == 5
    assert f"{known_hosts}:1" in refused.stderr
    assert "opsctl trust --replace gpu-1" in refused.stderr
    assert known_hosts.read_text(encoding="utf-8") == wrong
    assert trust(inventory, "--limit", "gpu-1", "--replace", "gpu-9", "--yes").exit_code == 2
    assert trust(inventory, "--limit", "gpu-1", "--replace", "gpu-1", "--yes").exit_code == 0
    assert [pin.key for pin in load(known_hosts)] == [servers[0].key]


def test_fingerprints_from_a_file_answer_for_the_operator(inventory: Path, servers: tuple[Server, Server]) -> None:
    listed = inventory.parent / "fingerprints"
    listed.write_text(f"gpu-1 {servers[0].key.fingerprint}\ngpu-2 {NEW.fingerprint}\n", encoding="utf-8")
    refused = trust(inventory, "--fingerprints", str(listed))
    assert refused.exit_code == 5
    assert "gpu-2 shows" in refused.stderr
    listed.write_text("".join(f"{name} {server.key.fingerprint}\n" for name, server in
                              zip(("gpu-1", "gpu-2"), servers, strict=True)), encoding="utf-8")
    done = trust(inventory, "--fingerprints", str(listed))
    assert done.exit_code == 0, done.stderr
    assert len(load(inventory.parent / "known_hosts")) == 2


def test_silent_host_is_named_and_the_others_are_pinned(inventory: Path, servers: tuple[Server, Server]) -> None:
    servers[1].close()
    done = trust(inventory, "--yes")
    assert done.exit_code == 8
    assert "gpu-2 did not answer" in done.stdout
    assert "through gpu-1" in done.stderr
    assert [pin.key for pin in load(inventory.parent / "known_hosts")] == [servers[0].key]
