"""A bundle that was tampered with is refused, whatever was done to it. Keys are real, bundles are tiny."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opsctl.bundle import sums
from opsctl.bundle.keys import Signer, dearmor, export_public_key, make_bundle_key, signing
from opsctl.bundle.repository import INDEX, dist_of, render_release
from opsctl.bundle.verify import FOLDERS, verify_bundle
from opsctl.cli.bundle import app
from opsctl.errors import ExitCode, RefusedError

pytestmark = pytest.mark.skipif(shutil.which("gpg") is None or shutil.which("gpgv") is None,
                                reason="gpg and gpgv are not on this machine")
DEB = "apt/pool/main/a_1_all.deb"  # as bundles of one suite had it; those of several: pool/CODENAME
DIST = dist_of("bookworm")


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """keys of this fleet (``ours``) and of somebody else (``theirs``), with their public halves as ``*.asc``."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        make_bundle_key(directory / name, directory / f"{name}.asc")
    return directory


def sign_repository(bundle: Path, signer: Signer) -> None:
    packages = f"Package: a\nFilename: {DEB.removeprefix('apt/')}\nSHA256: {sums.digest(bundle / DEB)}\n".encode()
    release = render_release({INDEX: packages}, codename="bookworm", date="Sat, 21 Nov 2026 00:00:00 -0000")
    dist = bundle / "apt" / DIST
    (dist / INDEX).parent.mkdir(parents=True, exist_ok=True)
    (dist / INDEX).write_bytes(packages)
    (dist / "Release").write_text(release, encoding="utf-8")
    (dist / "Release.gpg").write_bytes(signer.detached(release.encode()))
    (dist / "InRelease").write_bytes(signer.clear(release.encode()))


def sign_sums(bundle: Path, signer: Signer) -> None:
    text = sums.render(sums.digests(bundle, [path for path, _ in sums.regular_files(bundle, FOLDERS)],
                                    lambda _: None))
    (bundle / "SHA256SUMS").write_text(text, encoding="utf-8")
    (bundle / "SHA256SUMS.asc").write_bytes(signer.detached(text.encode()))


@pytest.fixture(scope="session")
def pristine(homes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("pristine") / "bundle"
    (bundle / DEB).parent.mkdir(parents=True)
    (bundle / DEB).write_bytes(b"a debian package")
    (bundle / "wheels").mkdir()
    (bundle / "wheels/opsctl-agent.txt").write_text("opsctl-agent==1 --hash=sha256:00\n", encoding="utf-8")
    (bundle / "releases/chat/v1-0123456789ab").mkdir(parents=True)  # not the bundle's to sign
    (bundle / "releases/chat/v1-0123456789ab/manifest.json").write_text("{}", encoding="utf-8")
    with signing(homes / "ours") as signer:
        sign_repository(bundle, signer)
        sign_sums(bundle, signer)
    return bundle


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def refusal(bundle: Path, trusted_key: Path) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        verify_bundle(bundle, trusted_key)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert caught.value.hint
    return caught.value


def test_a_whole_bundle_is_verified(bundle: Path, homes: Path) -> None:
    verified = verify_bundle(bundle, homes / "ours.asc")
    assert verified.files == 6
    assert len(verified.signed_by) == 40


def test_sums_are_what_sha256sum_checks(bundle: Path) -> None:
    from opsctl.bundle.process import run

    done = run(["sha256sum", "--strict", "--check", "SHA256SUMS"], cwd=bundle)
    assert done.returncode == 0, done.stderr.decode()


def change_a_package(bundle: Path) -> None:
    (bundle / DEB).write_bytes(b"A debian package")


def remove_a_package(bundle: Path) -> None:
    (bundle / DEB).unlink()


def add_a_package(bundle: Path) -> None:
    (bundle / "apt/pool/main/evil_1_all.deb").write_bytes(b"evil")


def add_a_wheel(bundle: Path) -> None:
    (bundle / "wheels/.hidden.whl").write_bytes(b"evil")


def link_a_package(bundle: Path) -> None:
    (bundle / DEB).rename(bundle / "moved")
    (bundle / DEB).symlink_to(bundle / "moved")


def add_a_linked_folder(bundle: Path) -> None:
    (bundle / "apt/more").symlink_to("/tmp")


def change_the_sums(bundle: Path) -> None:
    text = (bundle / "SHA256SUMS").read_text(encoding="utf-8")
    (bundle / "SHA256SUMS").write_text("".join(line for line in text.splitlines(True) if DEB not in line),
                                       encoding="utf-8")
    (bundle / DEB).unlink()


def take_the_signature(bundle: Path) -> None:
    (bundle / "SHA256SUMS.asc").unlink()


def garble_the_signature(bundle: Path) -> None:
    (bundle / "SHA256SUMS.asc").write_text("trust me\n", encoding="utf-8")


def take_the_sums(bundle: Path) -> None:
    (bundle / "SHA256SUMS").unlink()


def interrupt_the_switch(bundle: Path) -> None:
    (bundle / ".switching").touch()


def take_everything(bundle: Path) -> None:
    shutil.rmtree(bundle)


@pytest.mark.parametrize(("tamper", "code", "named"), [
    (change_a_package, "bundle.tampered", DEB),
    (remove_a_package, "bundle.incomplete", DEB),
    (add_a_package, "bundle.tampered", "evil_1_all.deb"),
    (add_a_wheel, "bundle.tampered", ".hidden.whl"),
    (link_a_package, "bundle.tampered", DEB),
    (add_a_linked_folder, "bundle.tampered", "apt/more"),
    (change_the_sums, "bundle.tampered", "SHA256SUMS"),
    (take_the_signature, "bundle.unsigned", "SHA256SUMS.asc"),
    (garble_the_signature, "bundle.unsigned", "SHA256SUMS"),
    (take_the_sums, "bundle.incomplete", "SHA256SUMS"),
    (interrupt_the_switch, "bundle.incomplete", "interrupted"),
    (take_everything, "bundle.missing", "SHA256SUMS"),
])
def test_tampering_is_refused_and_named(bundle: Path, homes: Path, tamper: Callable[[Path], None], code: str,
                                        named: str) -> None:
    tamper(bundle)
    error = refusal(bundle, homes / "ours.asc")
    assert error.code == code
    assert named in error.message


def test_a_bundle_signed_by_somebody_else_is_refused(bundle: Path, homes: Path) -> None:
    with signing(homes / "theirs") as signer:
        sign_sums(bundle, signer)
    assert refusal(bundle, homes / "ours.asc").code == "bundle.foreign_key"


def test_an_index_signed_by_somebody_else_is_refused_though_the_sums_are_ours(bundle: Path, homes: Path) -> None:
    with signing(homes / "theirs") as signer:
        sign_repository(bundle, signer)
    with signing(homes / "ours") as signer:
        sign_sums(bundle, signer)
    error = refusal(bundle, homes / "ours.asc")
    assert (error.code, "InRelease" in error.message) == ("bundle.foreign_key", True)


def another_package(bundle: Path) -> None:
    (bundle / DEB).write_bytes(b"another package")


def one_more_package(bundle: Path) -> None:
    (bundle / "apt/pool/main/b_1_all.deb").write_bytes(b"one more")


def another_index(bundle: Path) -> None:
    with (bundle / "apt" / DIST / INDEX).open("a", encoding="utf-8") as file:
        file.write("\nPackage: b\n")


@pytest.mark.parametrize(("spoil", "named"), [(another_package, DEB), (one_more_package, "b_1_all.deb"),
                                              (another_index, "Packages")])
def test_a_bundle_that_apt_would_refuse_is_refused_though_it_is_signed(bundle: Path, homes: Path, named: str,
                                                                       spoil: Callable[[Path], None]) -> None:
    spoil(bundle)
    with signing(homes / "ours") as signer:
        sign_sums(bundle, signer)
    error = refusal(bundle, homes / "ours.asc")
    assert error.code == "bundle.inconsistent"
    assert named in error.message


def test_sums_that_lead_out_of_the_bundle_are_refused(bundle: Path, homes: Path) -> None:
    text = f"{'0' * 64}  apt/../../etc/passwd\n"
    (bundle / "SHA256SUMS").write_text(text, encoding="utf-8")
    with signing(homes / "ours") as signer:
        (bundle / "SHA256SUMS.asc").write_bytes(signer.detached(text.encode()))
    assert refusal(bundle, homes / "ours.asc").code == "bundle.tampered"


@pytest.mark.parametrize("content", [None, "", "ssh-ed25519 AAAA", "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!\n"
                                     "-----END PGP PUBLIC KEY BLOCK-----\n"])
def test_without_a_public_key_nothing_is_trusted(bundle: Path, tmp_path: Path, content: str | None) -> None:
    key = tmp_path / "bundle.asc"
    if content is not None:
        key.write_text(content, encoding="utf-8")
    assert refusal(bundle, key).code == "bundle.no_trusted_key"


def test_several_keys_may_be_trusted(bundle: Path, homes: Path, tmp_path: Path) -> None:
    both = tmp_path / "bundle.asc"
    both.write_text((homes / "theirs.asc").read_text() + (homes / "ours.asc").read_text(), encoding="utf-8")
    verify_bundle(bundle, both)


def test_a_key_is_kept_and_its_public_half_written_again(homes: Path, tmp_path: Path) -> None:
    public = tmp_path / "bundle.asc"
    make_bundle_key(homes / "ours", public)
    assert dearmor(public.read_text()) == dearmor((homes / "ours.asc").read_text())
    assert (homes / "ours").stat().st_mode & 0o777 == 0o700


def test_no_agent_outlives_a_signature_even_when_it_failed(homes: Path) -> None:
    with pytest.raises(ZeroDivisionError), signing(homes / "ours") as signer:
        signer.detached(b"x")
        raise ZeroDivisionError
    assert not [path for path in (homes / "ours").iterdir() if path.is_socket()]


def test_a_home_without_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(RefusedError) as caught:
        export_public_key(tmp_path / "empty")
    assert caught.value.code == "bundle.no_key"


def test_the_verb_speaks_one_document_and_exits_5_on_a_tampered_bundle(bundle: Path, homes: Path,
                                                                       tmp_path: Path) -> None:
    (tmp_path / "inventory.ini").touch()
    (tmp_path / "trust").mkdir()
    shutil.copy(homes / "ours.asc", tmp_path / "trust/bundle.asc")
    shutil.rmtree(bundle / "releases")
    runner = CliRunner()
    whole = runner.invoke(app, ["verify", str(tmp_path / "inventory.ini"), "--json"])
    assert (whole.exit_code, json.loads(whole.stdout)["schema"]) == (0, "opsctl.bundle-verify/v1")
    change_a_package(bundle)
    tampered = runner.invoke(app, ["verify", str(tmp_path / "inventory.ini"), "--json"])
    assert (tampered.exit_code, json.loads(tampered.stdout)["error"]["code"]) == (5, "bundle.tampered")
    assert DEB in tampered.stderr
