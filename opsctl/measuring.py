"""Measures what ``doctor.py`` judges: this computer, and the way to each host. Changes nothing anywhere."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from opsctl.bundle.verify import verify_bundle
from opsctl.doctor import MOUNTS, Here, There, clock_offset, parse_disks, parse_ssh_version, parse_sshd
from opsctl.engines.ansible_programs import ansible_program
from opsctl.engines.session import Session, on_each
from opsctl.errors import OpsctlError
from opsctl.fleet.known_hosts import load, pin_name, pins_of
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.project import NAMESPACE, PRINCIPAL, lacking, make_release_key, write_allowed_signers
from opsctl.releases.remote import ask, has_agent

SAMPLES = 5
TIMEOUT_S = 20.0
LOGIN_SHELL = ["sh", "-c", 'exec "${SHELL:-/bin/sh}" -lc true']  # sets the profile off; the shell's own text, no data
NO_SHELL = ["sh", "-c", "exec true"]
TRUST = ("trust/allowed_signers", "trust/bundle.asc")


def measure_here(fleet: Fleet, hosts: Sequence[Host]) -> Here:
    """This computer and the fleet's folder. Reads the whole bundle."""
    folder = fleet.directory
    pins = load(fleet.known_hosts)
    newest = max((path.stat().st_mtime for path in (fleet.inventory, fleet.services_file, fleet.known_hosts)
                  if path.exists()), default=0.0)
    return Here(
        python=sys.version_info[:2],
        ansible=_ansible(),
        pyinfra=_version("pyinfra"),
        ssh=parse_ssh_version(_said(["ssh", "-V"])),
        signs=_signs(),
        missing_programs=tuple(name for name in ("gpg", "gpgv") if shutil.which(name) is None),
        free_bytes=shutil.disk_usage(folder).free,
        clock_behind_s=max(0.0, newest - time.time()),
        open_keys=tuple(open_keys(folder)),
        missing_keys=lacking(folder),
        keys_in_git=tuple(_keys_in_git(folder)),
        missing_trust=tuple(name for name in TRUST if not (folder / name).is_file()),
        bundle=_bundle(folder),
        not_pinned=tuple(host.name for host in hosts if host.connection == "ssh"
                         and not pins_of(pins, pin_name(host.address, host.port))),
    )


def measure_hosts(fleet: Fleet, hosts: Sequence[Host]) -> dict[str, There]:
    """All hosts at once; one that does not answer is a fact too."""
    return {name: There(error=_words(answer)) if isinstance(answer, OpsctlError) else answer
            for name, answer in on_each(fleet, hosts, measure_host).items()}


def measure_host(session: Session) -> There:
    """Raises OpsctlError when the host does not answer."""
    far = session.host.connection == "ssh"
    first = _seconds(session, ["true"])
    command = _median(session, ["true"])
    profile = _median(session, LOGIN_SHELL, 3) - _median(session, NO_SHELL, 3) if far else None
    before = time.time()
    said = session.run(["date", "+%s.%N"], sudo=False, timeout_s=TIMEOUT_S).stdout
    offset, error = clock_offset(before, time.time(), said) or (None, 0.0)
    disks = parse_disks(session.run(["stat", "-f", "-c", "%n %a %S %i", "--", *MOUNTS], sudo=False).stdout)
    sudo_error = _raised(lambda: session.run(["true"], timeout_s=TIMEOUT_S))
    sshd: tuple[int | None, int | None] = (None, None)
    if far and sudo_error is None:
        sshd = parse_sshd(session.run(["/usr/sbin/sshd", "-T"], timeout_s=TIMEOUT_S).stdout)
    agent, agent_error, deaf = _agent(session) if sudo_error is None else (None, "", ())
    return There(
        connect_s=max(first - command, 0.0) if far else None, command_s=command if far else None, profile_s=profile,
        max_sessions=sshd[0], max_startups=sshd[1], clock_offset_s=offset if far else None, clock_error_s=error,
        sudo_error=_words(sudo_error) if sudo_error else None, disks=disks, agent=agent, agent_error=agent_error,
        deaf_instances=deaf)


def open_keys(folder: Path) -> Iterator[str]:
    """Private files below ``keys/`` that group or others may touch, and keys/ itself; paths relative to ``folder``."""
    keys = folder / "keys"
    if keys.is_dir() and keys.stat().st_mode & 0o077:
        yield "keys"
    for path in sorted(keys.rglob("*")):
        public = path.suffix == ".pub" or path.name.startswith("pubring.")
        if path.is_file() and not path.is_symlink() and not public and path.stat().st_mode & 0o077:
            yield str(path.relative_to(folder))


def _keys_in_git(folder: Path) -> list[str]:
    if shutil.which("git") is None:
        return []
    done = subprocess.run(["git", "-C", str(folder), "ls-files", "-z", "--", "keys"], capture_output=True, text=True,
                          check=False, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    return [name for name in done.stdout.split("\0") if name and not name.endswith(".pub")]


def _bundle(folder: Path) -> str:
    if not (folder / "bundle").exists():
        return "missing"
    try:
        verify_bundle(folder / "bundle", folder / "trust" / "bundle.asc")
    except OpsctlError as error:
        return "missing" if error.code == "bundle.missing" else error.message
    return ""


def _signs() -> str:
    """Signs and verifies a word with a key made for that; why it failed, or nothing."""
    with tempfile.TemporaryDirectory(prefix="opsctl-") as name:
        folder = Path(name)
        try:
            make_release_key(folder / "key")
        except OpsctlError as error:
            return error.message
        write_allowed_signers(folder / "signers", folder / "key.pub")
        (folder / "word").write_bytes(b"word")
        for argv, stdin in (
                (["sign", "-q", "-n", NAMESPACE, "-f", str(folder / "key"), str(folder / "word")], b""),
                (["verify", "-n", NAMESPACE, "-I", PRINCIPAL, "-f", str(folder / "signers"), "-s",
                  str(folder / "word.sig")], b"word")):
            done = subprocess.run(["ssh-keygen", "-Y", *argv], input=stdin, capture_output=True, check=False,
                                  timeout=TIMEOUT_S)
            if done.returncode:
                return (done.stderr + done.stdout).decode("utf-8", "replace").strip().partition("\n")[0] or argv[0]
    return ""


def _ansible() -> str:
    try:
        ansible_program("ansible-playbook")
    except OpsctlError:
        return ""
    return _version("ansible-core")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _said(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
                              stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return ""
    return done.stdout + done.stderr


def _agent(session: Session) -> tuple[str | None, str, tuple[str, ...]]:
    """Its version, why it did not answer, and the instances that its port says nothing of."""
    if not has_agent(session):
        return "", "", ()
    try:
        state = ask(session, ["state", "--json"], host=session.host.name)
    except OpsctlError as error:
        return None, error.message, ()
    return (str(state.get("agent", "")), "",
            tuple(str(one["instance"]) for one in state.get("instances", ()) if not one.get("voice")))


def _raised(act: Callable[[], object]) -> OpsctlError | None:
    try:
        act()
    except OpsctlError as error:
        if error.code != "host.no_sudo":
            raise
        return error
    return None


def _words(error: OpsctlError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


def _seconds(session: Session, argv: Sequence[str]) -> float:
    began = time.monotonic()
    session.run(argv, sudo=False, timeout_s=TIMEOUT_S)
    return time.monotonic() - began


def _median(session: Session, argv: Sequence[str], samples: int = SAMPLES) -> float:
    return statistics.median(_seconds(session, argv) for _ in range(samples))
