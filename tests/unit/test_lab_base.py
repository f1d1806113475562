"""debootstrap's lines become progress; mounts are read as the kernel writes them; nspawn's vector."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

from opsctl.engines.events import Event, Progress
from opsctl.lab.base import debootstrap_argv, follow, recipe
from opsctl.lab.machines import nspawn_argv
from opsctl.lab.mounts import Mount, mounts_below, parse_mounts
from opsctl.lab.network import link_of
from opsctl.lab.state import Lab, Machine

LINES = ["I: Target architecture can be executed\n", "I: Retrieving adduser 3.134\n", "I: Validating adduser 3.134\n",
         "I: Retrieving apt 2.6.1\n", "I: Unpacking adduser...\n", "I: Unpacking apt...\n", "W: something\n"]


def test_progress_of_debootstrap(tmp_path: Path) -> None:
    seen: list[Event] = []
    said = follow(LINES, tmp_path / "log", seen.append)
    assert [(event.subject, event.done, event.total) for event in seen if isinstance(event, Progress)] == [
        ("Retrieving packages", 1, 0), ("Validating packages", 1, 1), ("Retrieving packages", 2, 0),
        ("Unpacking packages", 1, 2), ("Unpacking packages", 2, 2)]
    assert said[-1] == "W: something"
    assert (tmp_path / "log").read_text() == "".join(LINES)


def test_a_base_is_named_by_its_recipe() -> None:
    assert recipe("bookworm") == recipe("bookworm") != recipe("trixie")


def test_debootstrap_takes_no_mirror_and_checks_signatures(tmp_path: Path) -> None:
    argv = debootstrap_argv("bookworm", tmp_path)
    assert "--force-check-gpg" in argv
    assert argv[-2:] == ["bookworm", str(tmp_path)]


def test_mounts_are_unmounted_from_the_top() -> None:
    listed = parse_mounts(
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
        "546 27 7:0 / /var/lib/opsctl-lab/a/layer rw,noatime shared:1 - ext4 /dev/loop0 rw,discard\n"
        "549 27 0:77 / /var/lib/opsctl-lab/a/root rw shared:1 master:2 - overlay overlay rw,upperdir=/a\\040b\n"
        "550 27 0:78 / /var/lib/opsctl-lab/ab rw - tmpfs tmpfs rw\n")
    assert listed[2] == Mount(Path("/var/lib/opsctl-lab/a/root"), "overlay", "overlay", "rw,upperdir=/a b")
    assert [mount.point.name for mount in mounts_below(Path("/var/lib/opsctl-lab/a"), listed)] == ["root", "layer"]


def test_a_machine_has_no_way_out_and_a_name_that_the_kernel_takes() -> None:
    lab = Lab("a-lab-with-a-long-name", 250, "bookworm", IPv4Network("10.91.0.0/24"), Path("/fleet"))
    argv = nspawn_argv(lab, Machine("gpu-200", "10.91.0.210", ("gpu",)), keep_unit=True)
    assert "--network-bridge=opslab250" in argv
    assert "--machine=l250-gpu-200" in argv
    assert "--keep-unit" in argv
    assert len(link_of(250, "gpu-200")) <= 15
    assert "--keep-unit" not in nspawn_argv(lab, Machine("gpu-1", "10.91.0.11", ("gpu",)), keep_unit=False)
