"""What is missing for a lab is named whole, with the line that gets it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opsctl.errors import ExitCode, RefusedError
from opsctl.lab import requirements
from opsctl.lab.requirements import FILE_SYSTEMS, PROGRAMS, Computer, missing, words

ALL_CAPABILITIES = (1 << 41) - 1
READY = Computer(is_root=True, capabilities=ALL_CAPABILITIES, programs=frozenset(PROGRAMS),
                 file_systems=frozenset(FILE_SYSTEMS), keyring=True, loop_devices=True, free_bytes=50_000_000_000)


def test_nothing_is_missing() -> None:
    assert missing(READY) == ()


def without(*programs: str) -> Computer:
    return replace(READY, programs=READY.programs - set(programs))


@pytest.mark.parametrize(("computer", "sentence", "hint"), [
    (replace(READY, is_root=False, capabilities=0), "root", "sudo opsctl lab up"),
    (without("systemd-nspawn"), "systemd-nspawn", "apt-get install systemd-container"),
    (without("systemd-nspawn", "debootstrap"), "systemd-nspawn; debootstrap",
     "apt-get install debootstrap systemd-container"),
    (without("ssh", "ssh-keygen"), "ssh; ssh-keygen", "apt-get install openssh-client"),
    (replace(READY, keyring=False), "Debian's archive keyring", "apt-get install debian-archive-keyring"),
    (replace(READY, file_systems=frozenset({"ext4", "cgroup2"})), "the kernel's overlay file system",
     "modprobe overlay"),
    (replace(READY, loop_devices=False), "loop devices (/dev/loop-control)", "modprobe loop"),
    (replace(READY, free_bytes=1_500_000_000), "disk space: 1.5 GB free in /var, 4 GB wanted", "make room in /var"),
    (replace(READY, capabilities=ALL_CAPABILITIES & ~(1 << 21)), "CAP_SYS_ADMIN",
     "use a real or virtual machine, or a privileged container"),
    (replace(without("debootstrap"), is_root=False), "root; debootstrap",
     "apt-get install debootstrap; then sudo opsctl lab up"),
])
def test_what_is_missing_is_said_with_its_cure(computer: Computer, sentence: str, hint: str) -> None:
    assert words(missing(computer)) == (f"a lab needs what is missing here: {sentence}.", hint)


def test_it_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "look", lambda: replace(READY, is_root=False))
    with pytest.raises(RefusedError) as caught:
        requirements.require()
    assert caught.value.code == "lab.missing"
    assert caught.value.exit_code == ExitCode.REFUSED
