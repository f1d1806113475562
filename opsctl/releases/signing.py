"""Signs a manifest with the fleet's release key: an OpenSSH signature, which any host checks without us."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from opsctl.agent.trust import NAMESPACE
from opsctl.errors import OpsctlError, RefusedError

TIMEOUT_S = 120  # a key may lie on a token that wants to be touched


def sign(manifest: bytes, key: Path) -> bytes:
    """The armored signature over ``manifest``.

    Raises:
        RefusedError: the key is not there.
        OpsctlError: ssh-keygen would not sign.
    """
    if not key.is_file():
        raise RefusedError("release.no_key", f"there is no release key at {key}.",
                           hint="opsctl init makes one; in a clone, bring keys/release from who has it")
    with tempfile.TemporaryDirectory(prefix="opsctl-") as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(manifest)
        done = subprocess.run(["ssh-keygen", "-Y", "sign", "-n", NAMESPACE, "-f", str(key), str(path)],
                              capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise OpsctlError("release.not_signed", f"ssh-keygen could not sign with {key}.",
                              hint="a key with a passphrase: ssh-add it first; keys must be mode 0600",
                              log_tail=done.stderr.splitlines()[-5:])
        return path.with_name("manifest.json.sig").read_bytes()
