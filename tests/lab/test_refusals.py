"""Wrong input on a living fleet: its exit code, one sentence, a hint, and nothing changed anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fingerprint
import pytest
from command import Said, opsctl, refused

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def before(provisioned) -> dict[str, str]:
    return fingerprint.of_fleet(provisioned)


@pytest.fixture
def fleet(provisioned, before, tmp_path: Path) -> Iterator[Path]:
    """A copy of the fleet's folder to do wrong in; afterwards every host must be as it was."""
    copy = tmp_path / "fleet"
    shutil.copytree(provisioned.directory, copy, symlinks=True, copy_function=_link_big_files,
                    ignore=shutil.ignore_patterns(".opsctl"))
    inventory = copy / "inventory.ini"
    inventory.write_text(inventory.read_text().replace(str(provisioned.directory), str(copy)))
    yield copy
    assert fingerprint.of_fleet(provisioned) == before


def _link_big_files(source: str, target: str) -> str:
    """Copies what a test may edit, links packages and weights."""
    if Path(source).suffix in (".deb", ".whl", ".gguf"):
        Path(target).hardlink_to(source)
        return target
    return shutil.copy2(source, target)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}:\n{text}"
    path.write_text(text.replace(old, new))


def provision(fleet: Path, *arguments: str) -> Said:
    return opsctl("provision", "--json", *arguments, inventory=fleet / "inventory.ini")


def test_an_unknown_group(fleet: Path) -> None:
    replaced(fleet / "services.yml", "group: gpu", "group: gpus")
    sentence = refused(provision(fleet), 3, "services.unknown_group")
    assert "services.yml" in sentence
    assert "gpus" in sentence


def test_a_version_that_became_a_float(fleet: Path) -> None:
    inventory = fleet / "inventory.ini"
    inventory.write_text(inventory.read_text() + "\n[gpu:vars]\ncuda_version=12.10\n")
    sentence = refused(provision(fleet), 3, "inventory.float_version")
    assert "cuda_version" in sentence
    assert "12.10" in sentence


def test_two_services_on_one_port(fleet: Path) -> None:
    services = fleet / "services.yml"
    services.write_text(services.read_text() + "\nembed:\n  group: gpu\n  port: 8100\n  listen: 8001\n")
    sentence = refused(provision(fleet), 3, "services.port_clash")
    assert "8100" in sentence


def test_a_missing_key_in_services(fleet: Path) -> None:
    services = fleet / "services.yml"
    services.write_text("\n".join(line for line in services.read_text().splitlines() if "listen:" not in line) + "\n")
    sentence = refused(provision(fleet), 3, "services.missing_key")
    assert "listen" in sentence


def test_a_foreign_host_key(fleet: Path) -> None:
    known = fleet / "known_hosts"
    lines = known.read_text().splitlines()
    keys = [line.split()[1:] for line in lines]
    rotated = [" ".join([line.split()[0], *key]) for line, key in zip(lines, keys[1:] + keys[:1], strict=True)]
    known.write_text("\n".join(rotated) + "\n")
    sentence = refused(provision(fleet), 5, "host.foreign_key")
    assert "opsctl trust" in sentence


def test_a_tampered_package(fleet: Path) -> None:
    package = next((fleet / "bundle" / "apt" / "pool").rglob("*.deb"))
    content = package.read_bytes()
    package.unlink()
    package.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    sentence = refused(provision(fleet), 5, "bundle.tampered")
    assert package.name in sentence


def test_an_unsigned_bundle(fleet: Path) -> None:
    (fleet / "bundle" / "SHA256SUMS.asc").unlink()
    sentence = refused(provision(fleet), 5, "bundle.unsigned")
    assert "SHA256SUMS.asc" in sentence


def test_a_host_that_is_down(fleet: Path) -> None:
    inventory = fleet / "inventory.ini"
    text = inventory.read_text()
    address = next(word for word in text.split() if word.startswith("ansible_host=") and word.endswith(".12"))
    inventory.write_text(text.replace(address, "ansible_host=" + address.split("=")[1].rsplit(".", 1)[0] + ".250"))
    sentence = refused(provision(fleet), 5, "host.unreachable")
    assert "gpu-2" in sentence
    assert "--limit" in sentence
    assert "--skip-unreachable" in sentence
