"""The bundle's OpenPGP key: made once by ``opsctl init``, signs on the operator's machine, checked everywhere else.

Signing needs gpg (and the agent it starts, which is always ended again); checking needs only gpgv and the public
key that lies in ``trust/bundle.asc``. Nothing of the user's own keyring is ever read.
"""

from __future__ import annotations

import base64
import binascii
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from opsctl.agent.durable import write_atomically
from opsctl.bundle.process import last_lines, require_program, run
from opsctl.errors import OpsctlError, RefusedError

USER_ID = "opsctl bundle <opsctl-bundle@localhost>"
PUBLIC_KEY_BEGIN = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
PUBLIC_KEY_END = "-----END PGP PUBLIC KEY BLOCK-----"


def make_bundle_key(home: Path, public_key: Path) -> None:
    """Makes the GNUPGHOME ``home`` (0700) with one ed25519 signing key and writes its armored public half.

    A key that is there already is kept; only a missing ``public_key`` is then written again. The home appears under
    its name only when it is whole, so an interrupted run leaves no half key.

    Raises:
        RefusedError: gpg is not on this machine.
        OpsctlError: gpg could not make the key.
    """
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".making-") as making:
            fresh = Path(making) / "bundle"
            fresh.mkdir(mode=0o700)
            with _agent(fresh) as gpg:
                _run(gpg, ["--pinentry-mode", "loopback", "--passphrase", "", "--quick-gen-key", USER_ID, "ed25519",
                           "sign", "never"], "bundle.key_not_made", f"gpg could not make the bundle's key in {home}")
            fresh.rename(home)
    if not public_key.exists():
        write_atomically(public_key, export_public_key(home))


def export_public_key(home: Path) -> bytes:
    """The armored public half of the key in ``home``."""
    with _agent(home) as gpg:
        exported = _run(gpg, ["--armor", "--export"], "bundle.key_unreadable", f"gpg could not read the key in {home}")
    if PUBLIC_KEY_BEGIN.encode() not in exported:
        raise RefusedError("bundle.no_key", f"{home} holds no key to sign the bundle with.",
                           hint="opsctl init makes one where there is none; or bring keys/ back from your backup")
    return exported


class Signer:
    """Signs with the one key of a GNUPGHOME; made by ``signing``."""

    def __init__(self, gpg: Sequence[str], home: Path) -> None:
        self._gpg = gpg
        self._home = home

    def detached(self, content: bytes) -> bytes:
        """An armored detached signature."""
        return self._sign(["--armor", "--detach-sign"], content)

    def clear(self, content: bytes) -> bytes:
        """``content`` with its signature around it, as InRelease wants it."""
        return self._sign(["--clearsign"], content)

    def _sign(self, how: Sequence[str], content: bytes) -> bytes:
        return _run(self._gpg, [*how, "--digest-algo", "SHA512", "--output", "-"], "bundle.not_signed",
                    f"gpg could not sign with the key in {self._home}", stdin=content)


@contextmanager
def signing(home: Path) -> Iterator[Signer]:
    """A signer for the block.

    Raises:
        RefusedError: there is no key in ``home``, or no gpg on this machine.
    """
    if not home.is_dir():
        raise RefusedError("bundle.no_key", f"there is no key at {home} to sign the bundle with.",
                           hint="opsctl init makes one; or bring keys/ back from your backup")
    with _agent(home) as gpg:
        yield Signer(gpg, home)


def dearmor(text: str) -> bytes:
    """The binary keyring of every armored public key block in ``text``, one after the other.

    Raises:
        ValueError: there is no such block, or it is not base64.
    """
    keyring, body, headers = b"", list[str](), False
    for line in (line.strip() for line in text.splitlines()):
        if line == PUBLIC_KEY_BEGIN:
            body, headers = [], True
        elif line == PUBLIC_KEY_END:
            keyring += base64.b64decode("".join(body), validate=True)
        elif headers:
            headers = line != ""
        elif not line.startswith("="):  # the checksum; signatures inside protect more
            body.append(line)
    if not keyring:
        raise ValueError("no public key block")
    return keyring


class Checker:
    """Checks signatures against the keys of one public key file; made by ``checking``."""

    def __init__(self, gpgv: str, directory: Path, trusted_key: Path) -> None:
        self._argv = [gpgv, "--homedir", str(directory), "--keyring", str(directory / "trusted.gpg"),
                      "--status-fd", "1"]
        self._trusted_key = trusted_key

    def check(self, name: str, signature: Path, content: Path | None = None) -> str:
        """Checks a detached signature, or with ``content`` None a clearsigned file; returns the key's fingerprint.

        ``name`` is what the errors call the signed file.

        Raises:
            RefusedError: ``bundle.foreign_key``, ``bundle.tampered``, ``bundle.unsigned``.
        """
        files = [str(signature)] + ([str(content)] if content else [])
        done = run([*self._argv, *files])
        status = [line.split()[1:] for line in done.stdout.decode("utf-8", "replace").splitlines()
                  if line.startswith("[GNUPG:] ")]
        words = {line[0]: line[1:] for line in status if line}
        if "BADSIG" in words:
            raise RefusedError("bundle.tampered", f"{name} was changed after it was signed.",
                               hint="opsctl bundle build makes the bundle anew; find out who changed it")
        if "NO_PUBKEY" in words or "ERRSIG" in words:
            key = words.get("NO_PUBKEY", words.get("ERRSIG", ["?"]))[0]
            raise RefusedError("bundle.foreign_key",
                               f"{name} is signed by key {key}, which is not in {self._trusted_key}.",
                               hint="build the bundle with this fleet's own key (keys/bundle), or add the other "
                                    f"operator's public key to {self._trusted_key}")
        if done.returncode != 0 or "VALIDSIG" not in words:
            raise RefusedError("bundle.unsigned", f"{name} carries no valid signature.",
                               hint="opsctl bundle build signs it", log_tail=last_lines(done.stderr))
        return words["VALIDSIG"][0]


@contextmanager
def checking(trusted_key: Path) -> Iterator[Checker]:
    """A checker that trusts the keys in ``trusted_key`` (armored; several blocks may follow each other) and no other.

    Raises:
        RefusedError: the file is missing or no public key, or gpgv is not on this machine.
    """
    gpgv = require_program("gpgv", "gpgv", "it checks the bundle's signature")
    try:
        keyring = dearmor(trusted_key.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise RefusedError("bundle.no_trusted_key", f"there is no public key at {trusted_key} to check the bundle by.",
                           hint="opsctl init writes it beside the inventory; in a clone it comes with git") from None
    except (ValueError, binascii.Error):
        raise RefusedError("bundle.no_trusted_key", f"{trusted_key} is not an armored OpenPGP public key.",
                           hint="gpg --homedir keys/bundle --armor --export > trust/bundle.asc") from None
    with tempfile.TemporaryDirectory(prefix="opsctl-") as directory:
        (Path(directory) / "trusted.gpg").write_bytes(keyring)
        yield Checker(gpgv, Path(directory), trusted_key)


@contextmanager
def _agent(home: Path) -> Iterator[list[str]]:
    """The start of a gpg command line on ``home``; the agent that gpg starts for it is ended with the block.

    gpg-agent's socket lies in the home, and a socket's path may have 107 bytes only, so gpg gets a short link to it.
    """
    gpg = require_program("gpg", "gpg gpg-agent", "it signs the bundle")
    gpgconf = require_program("gpgconf", "gpgconf", "it ends the agent that gpg starts")
    short = Path(tempfile.mkdtemp(prefix="opsctl-"))
    link = short / "g"
    link.symlink_to(home.resolve(), target_is_directory=True)
    try:
        yield [gpg, "--homedir", str(link), "--batch", "--no-tty", "--quiet", "--no-options", "--trust-model", "always",
               "--no-auto-check-trustdb"]
    finally:
        run([gpgconf, "--homedir", str(link), "--kill", "all"])
        run([gpgconf, "--homedir", str(link), "--remove-socketdir"])
        shutil.rmtree(short)


def _run(gpg: Sequence[str], arguments: Sequence[str], code: str, what: str, *, stdin: bytes = b"") -> bytes:
    done = run([*gpg, *arguments], stdin=stdin)
    if done.returncode != 0:
        raise OpsctlError(code, f"{what}.", hint="read gpg's own words above", log_tail=last_lines(done.stderr))
    return done.stdout
