"""Who may release: ``ssh-keygen -Y verify`` over a manifest, with the public keys that Ansible brought."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from opsctl.agent import manifest as manifests
from opsctl.errors import ConfigurationError, RefusedError

PRINCIPAL = "opsctl-release"
NAMESPACE = "opsctl-release"
TIMEOUT_S = 30


@dataclass(frozen=True)
class Signed:
    """A manifest whose signature holds."""

    release: manifests.Release
    manifest: bytes
    signature: bytes

    @property
    def digest(self) -> str:
        return manifests.digest(self.manifest)

    @property
    def directory_name(self) -> str:
        return manifests.directory_name(self.release.version, self.digest)


def verify(manifest: bytes, signature: bytes, allowed_signers: Path, what: str) -> Signed:
    """The release, if somebody we trust signed exactly these bytes. ``what`` names it in sentences.

    Raises:
        RefusedError: unsigned, foreign signature, tampered manifest, or a wrong manifest.
        ConfigurationError: the public keys are missing.
    """
    if not allowed_signers.is_file():
        raise ConfigurationError("trust.missing", f"there are no release keys at {allowed_signers}.",
                                 hint="opsctl init makes them, opsctl provision brings them to hosts")
    if not signature.strip():
        raise unsigned(what)
    if _ssh_keygen(["verify", "-f", str(allowed_signers), "-I", PRINCIPAL], manifest, signature):
        return Signed(manifests.parse(manifest), manifest, signature)
    if _ssh_keygen(["check-novalidate"], manifest, signature):
        raise RefusedError("release.foreign_signature", f"{what} is signed by a key that is not in {allowed_signers}.",
                           hint="import it with this fleet's keys/release, or add the key to trust/allowed_signers")
    raise RefusedError("release.tampered", f"{what}: the signature does not fit the manifest.",
                       hint="somebody or something changed it after signing: import the model again")


def unsigned(what: str) -> RefusedError:
    return RefusedError("release.unsigned", f"{what} is not signed.",
                        hint="opsctl model import makes and signs a release")


def read_signed(directory: Path, allowed_signers: Path) -> Signed:
    """The release in ``directory``: manifest, signature and the folder's own name fit together. Not its files.

    Raises:
        RefusedError: as ``verify``; also when it is no release or lies under another's name.
    """
    what = f"release {directory.name}"
    try:
        manifest = (directory / manifests.MANIFEST).read_bytes()
    except OSError:
        raise RefusedError("release.no_manifest", f"{directory} has no {manifests.MANIFEST}.",
                           hint="it is no release, or only part of one: import or stage it again") from None
    signature_path = directory / manifests.SIGNATURE
    signature = signature_path.read_bytes() if signature_path.is_file() else b""
    signed = verify(manifest, signature, allowed_signers, what)
    if directory.name != signed.directory_name:
        raise RefusedError("release.tampered", f"{what} holds the manifest of {signed.directory_name}.",
                           hint="import or stage it again")
    return signed


def _ssh_keygen(arguments: list[str], manifest: bytes, signature: bytes) -> bool:
    with tempfile.NamedTemporaryFile(prefix="opsctl-", suffix=".sig") as file:
        file.write(signature)
        file.flush()
        try:
            done = subprocess.run(["ssh-keygen", "-Y", *arguments, "-n", NAMESPACE, "-s", file.name], input=manifest,
                                  capture_output=True, timeout=TIMEOUT_S, check=False)
        except FileNotFoundError:
            raise ConfigurationError("trust.no_ssh_keygen", "there is no ssh-keygen on this machine.",
                                     hint="apt-get install openssh-client") from None
    return done.returncode == 0
