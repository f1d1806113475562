"""Wrong input on a living fleet: its exit code, one sentence, a hint, and nothing changed anywhere."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fingerprint
import pytest
from command import Said, opsctl, refused

pytestmark = pytest.mark.lab

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def before(provisioned) -> dict[str, Any]:
    """When the load balancer sends to everybody: the test before may just have started an engine."""
    until = time.monotonic() + 60
    while {status for _, _, status in fingerprint.of_host(provisioned, "ops-1")["weights"]} != {"UP"}:
        assert time.monotonic() < until, "an instance does not come back"
    return {host: fingerprint.of_host(provisioned, host) for host in provisioned.hosts}


@pytest.fixture
def fleet(provisioned, before, tmp_path: Path) -> Iterator[Path]:
    """A copy of the fleet's folder to do wrong in; afterwards every host must be as it was."""
    copy = tmp_path / "fleet"
    shutil.copytree(provisioned.directory, copy, symlinks=True, copy_function=_link_big_files,
                    ignore=shutil.ignore_patterns(".opsctl"))
    inventory = copy / "inventory.ini"
    inventory.write_text(inventory.read_text().replace(str(provisioned.directory), str(copy)))
    yield copy
    for host, expected in before.items():
        assert fingerprint.differences(expected, fingerprint.of_host(provisioned, host)) == [], host


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


def test_plain_ansible_takes_no_tampered_bundle_either(fleet: Path) -> None:
    (fleet / "bundle" / "wheels" / "opsctl-agent.txt").write_text("opsctl-agent==9 --hash=sha256:" + "0" * 64 + "\n")
    opsctl("status", inventory=fleet / "inventory.ini")  # writes .opsctl, as any verb does
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "inventory.ini", ROOT / "playbooks" / "site.yml"],
        cwd=fleet, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE")}
        | {"LC_ALL": "C.UTF-8", "ANSIBLE_ROLES_PATH": str(ROOT / "roles")})
    assert done.returncode == 2
    assert "is not the file that was signed" in done.stdout


def release_of(fleet: Path) -> Path:
    (directory,) = (fleet / "bundle" / "releases" / "chat").glob("v1-*")
    directory.chmod(0o755)
    return directory


def test_an_unsigned_release(fleet: Path) -> None:
    release = release_of(fleet)
    (release / "manifest.json.sig").unlink()
    sentence = refused(provision(fleet), 5, "release.unsigned")
    assert f"release {release.name} is not signed" in sentence


def test_a_tampered_release(fleet: Path) -> None:
    manifest = release_of(fleet) / "manifest.json"
    content = manifest.read_text()
    manifest.chmod(0o644)
    manifest.write_text(content.replace('"max_model_len":', '"max_model_len": '))
    refused(provision(fleet), 5, "release.tampered")


def test_a_tampered_weight(fleet: Path) -> None:
    (weight,) = (release_of(fleet) / "files").iterdir()
    content = weight.read_bytes()
    weight.parent.chmod(0o755)
    weight.unlink()
    weight.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    sentence = refused(opsctl("model", "verify", "--json", inventory=fleet / "inventory.ini"), 5, "release.tampered")
    assert weight.name in sentence


def test_a_pickle_under_another_name(fleet: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(pickle.dumps({"weights": [0.5] * 8}))
    said = opsctl("model", "import", weights, "--service", "chat", "--version", "v9", "--json",
                  inventory=fleet / "inventory.ini")
    sentence = refused(said, 5, "release.pickle")
    assert "model.safetensors" in sentence
    assert not list((fleet / "bundle" / "releases").rglob("v9*"))


def test_a_release_that_is_nowhere(fleet: Path) -> None:
    services = fleet / "services.yml"
    services.write_text(services.read_text()
                        + "\nembed:\n  group: gpu\n  port: 8200\n  listen: 8001\n  first_release: v7\n")
    sentence = refused(provision(fleet), 5, "release.missing")
    assert "opsctl model import" in sentence


def test_a_host_that_is_down(fleet: Path) -> None:
    inventory = fleet / "inventory.ini"
    text = inventory.read_text()
    address = next(word for word in text.split() if word.startswith("ansible_host=") and word.endswith(".12"))
    inventory.write_text(text.replace(address, "ansible_host=" + address.split("=")[1].rsplit(".", 1)[0] + ".250"))
    sentence = refused(provision(fleet), 5, "host.unreachable")
    assert "gpu-2" in sentence
    assert "--limit" in sentence
    assert "--skip-unreachable" in sentence
