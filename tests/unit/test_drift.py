"""What is said of a host that differs: a case is a file in fixtures/drift/cases/LAYER/."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_kit import overlaid
from drift_kit import Case, cases, expected, host, load

from opsctl.checking.model import Captured
from opsctl.drifting.booting import Next, dkms_states, grub_takes, next_boot
from opsctl.drifting.differences import drift_of
from opsctl.stack.lock import Entry

GRUB = """\
set default="{default}"
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
fi
function gfxmode {{
	set gfxpayload="${{1}}"
}}
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-6f1c' {{
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	if [ x$feature_platform_search_hint = xy ]; then
	search --no-floppy --fs-uuid --set=root 6f1c
	fi
	linux	/boot/vmlinuz-6.1.0-28-amd64 root=UUID=6f1c ro  quiet
	initrd	/boot/initrd.img-6.1.0-28-amd64
}}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-6f1c' {{
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-28-amd64' $menuentry_id_option 'gnulinux-6.1.0-28-amd64-advanced' {{
		linux	/boot/vmlinuz-6.1.0-28-amd64 root=UUID=6f1c ro
	}}
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-26-amd64' $menuentry_id_option 'gnulinux-6.1.0-26-amd64-advanced' {{
		linux	/vmlinuz-6.1.0-26-amd64 root=UUID=6f1c ro
	}}
}}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {{
	fwsetup
}}
"""


def test_a_host_that_is_as_provision_left_it() -> None:
    found = drift_of(Captured(host()), expected())
    assert found.differences == ()
    assert found.boot == Next("6.1.0-28-amd64", "the link /vmlinuz")
    assert [(one.release, one.running, one.next, one.version, one.flavour, one.dkms, one.why) for one in found.kernels
            ] == [("6.1.0-26-amd64", True, False, "580.126.09", "open", "installed", ""),
                  ("6.1.0-28-amd64", False, True, "580.126.09", "open", "installed", "")]


@pytest.mark.parametrize("path", cases(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_case(path: Path) -> None:
    case: Case = load(path)
    found = case.drift().differences
    assert [one.layer for one in found] == [says["layer"] for says in case.says], found
    for one, says in zip(found, case.says, strict=True):
        said = {"what": one.what, "wanted": one.wanted, "found": one.found, "fix": one.fix,
                "by": one.culprit.words if one.culprit else ""}
        for key, words in says.items():
            if key != "layer":
                assert words in said[key], (key, said)
        assert said["by"] == "" or says.get("by") != "", said
        assert "gpu-1" in one.fix or one.layer in ("record", "stack.lock")


def test_every_layer_has_cases() -> None:
    layers = {says["layer"] for path in cases() for says in load(path).says}
    assert layers == {"record", "packages", "holds", "pin", "kernel", "library", "services", "unattended-upgrades",
                      "GPUs", "next boot", "roles"}


def test_a_host_that_was_never_provisioned_is_passed_over() -> None:
    document = overlaid(host(), {"files": {"/etc/opsctl": None}})
    found = drift_of(Captured(document), expected())
    assert (found.skipped, found.differences) == ("never provisioned", ())


@pytest.mark.parametrize(("gpus", "system", "says"), [
    ({"2335": 2}, "debian12", ""), ({"2335": 8}, "debian12", "it was locked with 8 x"),
    ({"2335": 2}, "debian13", "it runs debian12")])
def test_the_machine_that_stack_lock_was_made_for(gpus: dict[str, int], system: str, says: str) -> None:
    entry = Entry(gpus, system, 580, "580.126.09", "open", fabric_manager=True, cuda="13.0")
    found = drift_of(Captured(host()), expected(entry=entry)).differences
    assert [one.layer for one in found] == (["stack.lock"] if says else [])
    assert not found or says in found[0].found
    late = overlaid(host(), {"pci": [], "late": ["pci"]})
    others = drift_of(Captured(late), expected(entry=Entry(gpus, "debian12", 580, "580.126.09", "open",
                                                           fabric_manager=True, cuda="13.0")))
    assert others.differences == (), "nobody says that its GPUs are gone when nobody could count them"


def test_what_did_not_answer_is_told_and_is_no_difference() -> None:
    hung = {"exit": None, "out": ""}
    document = overlaid(host(), {"commands": {"gpus": hung, "driver": hung, "units": hung, "blacklist": hung,
                                              "modinfo:6.1.0-28-amd64": hung}, "late": ["dpkg"]})
    found = drift_of(Captured(document), expected())
    assert found.differences == ()
    assert found.unknown == ("blacklist", "dpkg", "driver", "gpus", "modinfo:6.1.0-28-amd64", "units")


@pytest.mark.parametrize(("default", "environment", "release", "by"), [
    ("0", "", "6.1.0-28-amd64", "GRUB_DEFAULT=0"),
    ("1>1", "", "6.1.0-26-amd64", "GRUB_DEFAULT=1>1"),
    ("gnulinux-advanced-6f1c>gnulinux-6.1.0-26-amd64-advanced", "", "6.1.0-26-amd64", "GRUB_DEFAULT"),
    ("Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-26-amd64", "", "6.1.0-26-amd64", ""),
    ("1", "", "6.1.0-28-amd64", "GRUB_DEFAULT=1"),  # a menu's first entry
    ("no such entry", "", "6.1.0-28-amd64", ""),    # GRUB takes the first then
    ("2", "", "", ""),                              # the firmware's settings are no kernel
    ("${saved_entry}", "# GRUB Environment Block\nsaved_entry=1>1\n####", "6.1.0-26-amd64", "GRUB's saved_entry"),
    ("${saved_entry}", "# GRUB Environment Block\n####", "6.1.0-28-amd64", "GRUB's saved_entry"),
    ("0", "saved_entry=1>1\n", "6.1.0-28-amd64", "GRUB_DEFAULT=0"),
    ("0", "next_entry=gnulinux-advanced-6f1c>gnulinux-6.1.0-26-amd64-advanced\n", "6.1.0-26-amd64", "for one boot"),
])
def test_which_kernel_grub_takes(default: str, environment: str, release: str, by: str) -> None:
    found, words = grub_takes(GRUB.format(default=default), environment)
    assert found == release
    assert by in words


def test_grub_is_believed_before_the_link() -> None:
    files = {"/boot/grub/grub.cfg": GRUB.format(default="1>1"), "/boot/grub/grubenv": ""}
    assert next_boot(Captured(overlaid(host(), {"files": files}))).release == "6.1.0-26-amd64"
    files["/boot/grub/grub.cfg"] = "configfile elsewhere\n"
    assert next_boot(Captured(overlaid(host(), {"files": files}))) == Next("6.1.0-28-amd64", "the link /vmlinuz")
    bare = overlaid(host(), {"kernels": {"next": ""}})
    assert next_boot(Captured(bare)) == Next("6.1.0-28-amd64", "the newest that is installed")


@pytest.mark.parametrize(("line", "state"), [
    ("nvidia/580.126.09, 6.1.0-26-amd64, x86_64: installed", {("580.126.09", "6.1.0-26-amd64"): "installed"}),
    ("nvidia, 580.126.09, 6.1.0-26-amd64, x86_64: built", {("580.126.09", "6.1.0-26-amd64"): "built"}),
    ("nvidia-srv/580.126.09, 6.8.0-60-generic, x86_64: installed (WARNING! Diff between built and installed module!)",
     {("580.126.09", "6.8.0-60-generic"): "installed"}),
    ("nvidia/580.126.09: added", {("580.126.09", ""): "added"}),
    ("zfs/2.1.11, 6.1.0-26-amd64, x86_64: installed", {}),
])
def test_what_dkms_says(line: str, state: dict[tuple[str, str], str]) -> None:
    assert dkms_states(line + "\n") == state
