"""Who may read the metrics: HTTP basic auth against hashes. Times do not tell a wrong name from a wrong password.

A hash is ``$scrypt$ln=13,r=8,p=10$SALT$HASH`` (ours) or ``$pbkdf2-sha256$i=600000$SALT$HASH``, salt and hash as base64
without padding. Not bcrypt, which exporter-toolkit has: Python's standard library cannot check it. Strength as OWASP's
password storage cheat sheet has it; scrypt with 8 MiB, so that checking one fits into the agent's memory.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

SCRYPT = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
PBKDF2 = re.compile(r"\$pbkdf2-sha256\$i=(\d{4,8})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")
LOG_COST, BLOCK, PARALLEL = 13, 8, 10  # what new hashes have
LARGEST_MEMORY = 64 << 20  # bytes that checking one hash may take
REMEMBERED = 16  # headers that were found good: each takes a fifth of a second to check


class Passwords:
    """Names and their hashes. A header that was once found good is known again by a keyed digest of it."""

    def __init__(self, users: Mapping[str, str]) -> None:
        """Raises ValueError: a hash that cannot be checked."""
        self._users = {name: checker(text) for name, text in users.items()}
        self._key = os.urandom(32)
        self._good: list[bytes] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="password")  # one at a time: who guesses takes one core

    async def admit(self, header: str) -> bool:
        """Whether an Authorization header is that of one of them."""
        digest = hmac.digest(self._key, header.encode(), "sha256")
        if any([hmac.compare_digest(digest, one) for one in self._good]):  # noqa: C419 - all, so that it takes as long
            return True
        credentials = parse(header)
        if credentials is None:
            return False
        if not await asyncio.get_running_loop().run_in_executor(self._pool, self._check, *credentials):
            return False
        self._good = [*self._good[-REMEMBERED + 1:], digest]
        return True

    def _check(self, name: str, password: str) -> bool:
        there = self._users.get(name)
        right = (there or next(iter(self._users.values())))(password)  # also for a name that is not there
        return right and there is not None


def parse(header: str) -> tuple[str, str] | None:
    """Name and password of ``Basic dXNlcjpwYXNz``; None: it is none."""
    kind, _, word = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(word.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (name, password) if colon else None


def make(password: str) -> str:
    """A new hash."""
    salt = os.urandom(16)
    found = hashlib.scrypt(password.encode(), salt=salt, n=2**LOG_COST, r=BLOCK, p=PARALLEL, maxmem=LARGEST_MEMORY)
    return f"$scrypt$ln={LOG_COST},r={BLOCK},p={PARALLEL}${_packed(salt)}${_packed(found)}"


def checker(text: str) -> Callable[[str], bool]:
    """What checks a password against this hash.

    Raises:
        ValueError: nobody here can check it.
    """
    if text.startswith("$2"):
        raise ValueError("is bcrypt, which Python's standard library cannot check")
    if found := SCRYPT.fullmatch(text):
        cost, block, parallel = (int(found[part]) for part in (1, 2, 3))
        salt, right = _unpacked(found[4]), _unpacked(found[5])
        if not cost or not block or not parallel or 128 * block * 2**cost > LARGEST_MEMORY // 2:
            raise ValueError(f"takes more than {LARGEST_MEMORY >> 21} MiB to check, or nothing")
        return lambda password: hmac.compare_digest(right, hashlib.scrypt(
            password.encode(), salt=salt, n=2**cost, r=block, p=parallel, maxmem=LARGEST_MEMORY, dklen=len(right)))
    if found := PBKDF2.fullmatch(text):
        rounds, salt, right = int(found[1]), _unpacked(found[2]), _unpacked(found[3])
        return lambda password: hmac.compare_digest(right, hashlib.pbkdf2_hmac(
            "sha256", password.encode(), salt, rounds, dklen=len(right)))
    raise ValueError("is no hash: expected $scrypt$ln=...,r=...,p=...$SALT$HASH or $pbkdf2-sha256$i=...$SALT$HASH")


def _packed(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unpacked(text: str) -> bytes:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"has broken base64 ({error})") from None
    if len(data) < 8:
        raise ValueError("has less than 8 bytes of salt or hash")
    return data
