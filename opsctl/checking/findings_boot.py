"""Secure boot, nouveau, kernels and their headers, IOMMU. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opsctl.checking.model import Captured, Judged, Wanted, fix, good, on, shell, skip, some, warn
from opsctl.checking.reading import driver_packages, gpus_on_bus, loaded, module

SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
BLACKLISTED = re.compile(r"^(?:blacklist nouveau$|options nouveau .*\bmodeset=0|"
                         r"install nouveau /(?:usr/)?bin/(?:true|false))", re.MULTILINE)
OFF_AT_BOOT = re.compile(r"(?:modprobe\.blacklist=\S*\bnouveau\b|nouveau\.modeset=0|module_blacklist=\S*\bnouveau\b)")
NO_NOUVEAU = ("printf 'blacklist nouveau\\noptions nouveau modeset=0\\n' > /etc/modprobe.d/blacklist-nouveau.conf && "
              "update-initramfs -u")


def secure_boot(captured: Captured, wanted: Wanted) -> Judged:
    """A module that is there and not signed will not load where secure boot is on."""
    is_on = secure_boot_on(captured)
    if is_on is None:
        return skip("its firmware does not say whether secure boot is on")
    if not is_on:
        return good("secure boot is off" if captured.file("/sys/firmware/efi") is not None else "it has no UEFI")
    there = module(captured, "modinfo")
    if there and not there.get("signer") and not loaded(captured)[0]:
        return fix("secure boot is on and the nvidia module on disk is not signed: the kernel refuses it",
                   shell(wanted, "dkms autoinstall --force; modinfo -F signer nvidia"))
    return good("secure boot is on" + (f", and {there['signer']} signed the module" if there.get("signer") else ""))


def mok(captured: Captured, wanted: Wanted) -> Judged:
    """DKMS signs with a key of the machine's own, which a person has to enrol at its console, once."""
    is_on = secure_boot_on(captured)
    if not is_on:
        return good("no module needs a signature") if is_on is False else skip("its firmware does not say whether "
                                                                               "secure boot is on")
    if loaded(captured)[0]:
        return good("the nvidia module is loaded, so its key is enrolled")
    said = captured.out("mok-test")
    if "is already enrolled" in said:
        return good("the key that DKMS signs with is enrolled")
    if captured.exit("mok-test") == 127 and said == "" and "mok-test" in captured.document.get("commands", {}):
        return skip("mokutil is not installed, so nobody can ask which keys are enrolled")
    what = ("secure boot is on, and the key that DKMS signs with is not enrolled" if said else
            "secure boot is on, and DKMS has no key yet to sign the module with")
    return fix(f"{what}: the driver's module will not load",
               shell(wanted, "update-secureboot-policy --new-key 2>/dev/null || dkms generate_mok; "
                     "mokutil --import /var/lib/shim-signed/mok/MOK.der || mokutil --import /var/lib/dkms/mok.pub")
               + "   (then reboot and confirm at its console; or switch secure boot off)", stops=bool(wanted.driver))


def secure_boot_on(captured: Captured) -> bool | None:
    """From the firmware's own variable: four bytes of attributes, one of value."""
    variable = captured.file(SECURE_BOOT)
    if variable is not None and len(variable) >= 10:
        return variable[8:10] == "01"
    return False if captured.file("/sys/firmware/efi") is None and captured.file("/proc/meminfo") is not None else None


def nouveau_loaded(captured: Captured, wanted: Wanted) -> Judged:
    modules = captured.file("/proc/modules")
    bound = [one["address"] for one in gpus_on_bus(captured) if one["driver"] == "nouveau"]
    if modules is None and not bound:
        return good("its kernel has no modules") if captured.file("/proc/meminfo") else skip("/proc/modules is missing")
    if not bound and not re.search(r"^nouveau ", modules or "", re.MULTILINE):
        return good("nouveau is not loaded")
    what = f"nouveau is loaded{' and drives ' + some(bound) if bound else ''}"
    if wanted.driver and not driver_packages(captured):  # a fresh Debian: nothing is wrong with it
        return warn(f"{what}: the first provision brings a driver that blacklists it, and may have to reboot for that",
                    shell(wanted, f"{NO_NOUVEAU} && systemctl reboot"))
    if not is_blacklisted(captured):
        return fix(f"{what}, and is not blacklisted: the driver cannot take the GPUs", shell(
            wanted, f"{NO_NOUVEAU} && systemctl reboot"))
    return fix(f"{what}; its blacklist counts from the next boot on", on(wanted, "systemctl", "reboot"))


def nouveau_blacklist(captured: Captured, wanted: Wanted) -> Judged:
    if captured.exit("modprobe-config") != 0:
        return skip("modprobe is not there to say what is blacklisted")
    if is_blacklisted(captured):
        return good("nouveau is blacklisted")
    if wanted.driver and not driver_packages(captured):
        return skip("no package of the driver is there yet, and they blacklist nouveau")
    return warn("nouveau is not blacklisted: a boot without the driver's packages loads it", shell(wanted, NO_NOUVEAU))


def is_blacklisted(captured: Captured) -> bool:
    return bool(BLACKLISTED.search(captured.out("modprobe-config"))
                or OFF_AT_BOOT.search(captured.file("/proc/cmdline") or ""))


def headers_running(captured: Captured, wanted: Wanted) -> Judged:
    return _headers(captured, wanted, str(kernels(captured).get("running", "")), "the running kernel")


def headers_next(captured: Captured, wanted: Wanted) -> Judged:
    following = next_kernel(captured)
    if not following:
        return skip("it has no kernel in /boot that would be the next one")
    if following == kernels(captured).get("running"):
        return good(f"the next boot takes the running kernel, {following}")
    return _headers(captured, wanted, following, "the kernel of the next boot")


def _headers(captured: Captured, wanted: Wanted, release: str, which: str) -> Judged:
    there = next((one for one in kernels(captured).get("installed", ()) if one["release"] == release), None)
    if there is None or not there["modules"]:
        return skip(f"there is no /lib/modules/{release}: it has no kernel of its own")
    if there["headers"]:
        return good(f"{which}, {release}, has its headers")
    built = module(captured, "modinfo").get("filename", "")
    if built and "dkms" not in built and release == kernels(captured).get("running"):
        return good(f"the module of {release} came built: no headers are needed")
    return fix(f"no headers of {which}, {release}: DKMS cannot build the driver's module for it",
               on(wanted, "apt-get", "install", f"linux-headers-{release}"))


def module_next(captured: Captured, wanted: Wanted) -> Judged:
    """Whether the GPUs survive the next reboot: the class of fault that shows at three in the morning."""
    following, running = next_kernel(captured), kernels(captured).get("running")
    version, _ = loaded(captured)
    if not following:
        return skip("it has no kernel in /boot that would be the next one")
    if following == running:
        return good(f"the next boot takes the running kernel, {following}")
    there = module(captured, "modinfo-next")
    if not there:
        return fix(f"the next boot takes kernel {following}, and there is no nvidia module for it: after a reboot the "
                   "GPUs are gone", shell(wanted, f"apt-get install linux-headers-{following} && dkms autoinstall -k "
                                          f"{following}; modinfo -k {following} -F version nvidia"))
    if there.get("version") != version:
        return warn(f"the next boot takes kernel {following}, whose nvidia module is {there.get('version')}; "
                    f"{version} runs now", on(wanted, "dkms", "autoinstall", "-k", following))
    return good(f"kernel {following} of the next boot has the module {version} too")


def kernels(captured: Captured) -> Mapping[str, Any]:
    found: Mapping[str, Any] = captured.document.get("kernels", {})
    return found


def next_kernel(captured: Captured) -> str:
    """What the distribution's link names; else the newest that is installed whole; empty where there is none."""
    said = str(kernels(captured).get("next", ""))
    whole = [one["release"] for one in kernels(captured).get("installed", ()) if one["modules"]]
    return said or max(whole, key=_order, default="")


def _order(release: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[a-z]+", release)]


def iommu(captured: Captured, wanted: Wanted) -> Judged:
    """Peers that go through a translating IOMMU are slow, and hang on some boards (NVIDIA/nccl#606, #2079)."""
    gpus = gpus_on_bus(captured)
    if not gpus:
        return skip("there is no GPU on its PCI bus")
    kinds = {one["iommu_group/type"] for one in gpus}
    if kinds <= {""}:
        return good("no IOMMU is in the GPUs' way")
    if kinds <= {"identity"}:
        return good("the IOMMU passes the GPUs' traffic through")
    if len(gpus) < 2:
        return good("the IOMMU translates, and one GPU has no peer to talk to")
    return warn(f"the IOMMU translates what GPUs send each other ({some(sorted(kinds))}): slow, and on some boards it "
                "hangs", shell(wanted, "sed -i 's/^GRUB_CMDLINE_LINUX=\"/&iommu=pt /' /etc/default/grub && update-grub")
                + f"   (then reboot: opsctl drain {wanted.host} first)")


