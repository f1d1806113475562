"""The GPUs themselves: are they all there, sound, and linked at full width. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from opsctl.checking.model import Captured, Judged, Wanted, fix, good, on, shell, skip, some, warn
from opsctl.checking.reading import (
    Device,
    devices,
    gpus_on_bus,
    known,
    lost,
    number,
)
from opsctl.stack.catalogue import catalogue, is_called

NO_XML = "nvidia-smi gave no XML to read this from"
# XIDs that a program causes by itself: docs.nvidia.com/deploy/xid-errors (graphics engine exception, page fault, reset
# channel, preemptive cleanup).
OF_PROGRAMS = frozenset({13, 31, 43, 45})
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
BEFORE_REBAR = frozenset({"Kepler", "Maxwell", "Pascal", "Volta", "Turing"})  # no resizable BAR1 on these boards


def count(captured: Captured, wanted: Wanted) -> Judged:
    """On the bus, with the driver, and in ``gpus.yml``: a GPU that is missing in one of them is missing."""
    there = gpus_on_bus(captured)
    gone = lost(captured)
    if gone:
        name, why = next(iter(gone.items()))
        return fix(f"{len(gone)} of {len(there)} GPUs do not answer ({name}: {why})",
                   f"opsctl drain {wanted.host}, then {on(wanted, 'systemctl', 'reboot')}   (power it off whole if it "
                   "does not come back)")
    if not there:
        return fix("it is to have GPUs, and there is no NVIDIA GPU on its PCI bus", on(wanted, "lspci", "-d", "10de:"),
                   stops=bool(wanted.driver))
    seen = devices(captured)
    missing = [uuid for uuid in wanted.gpu_uuids if uuid not in {one.uuid for one in seen}]
    if seen and missing:
        return fix(f"{len(missing)} of {len(wanted.gpu_uuids)} GPUs in gpus.yml are not there: {some(missing)}",
                   on(wanted, "nvidia-smi", "-L") + f"   (then reseat it, or opsctl gpus accept {wanted.host})")
    if seen and len(seen) != len(there):
        return fix(f"{len(there)} GPUs on the PCI bus, and the driver has {len(seen)}", shell(
            wanted, "journalctl -k -b --grep NVRM | tail"))
    if len(there) < len(wanted.gpu_uuids):
        return fix(f"{len(there)} GPUs on the PCI bus, and gpus.yml names {len(wanted.gpu_uuids)}", on(
            wanted, "lspci", "-d", "10de:"))
    return good(f"{len(there)} GPUs{'' if seen else ' on its PCI bus'}: {some(_names(captured))}")


def model(captured: Captured, wanted: Wanted) -> Judged:
    if not wanted.gpu_model:
        return good("the inventory names no gpu_model")
    others = [gpu for gpu in known(captured) if not is_called(gpu, wanted.gpu_model)]
    if others:
        return fix(f"gpu_model={wanted.gpu_model}, and it has a {others[0].name} (10de:{others[0].device_id})",
                   f"correct gpu_model of {wanted.host} in the inventory", stops=bool(wanted.driver))
    return good(f"its GPUs are {wanted.gpu_model}") if known(captured) else skip("nobody here knows its GPUs")


def ecc(captured: Captured, wanted: Wanted) -> Judged:
    """Errors that were not corrected, since the driver was loaded (volatile) and ever (aggregate)."""
    found = devices(captured)
    if not found:
        return skip("the driver told of no GPU")
    bad = {one.bus: one.ecc_uncorrected for one in found if one.ecc_uncorrected}
    worn = [one.bus for one in found if one.text("ecc_errors/aggregate/sram_threshold_exceeded") == "Yes"]
    past = {one.bus: total for one in found if (total := _aggregate(one))}
    off = [one.bus for one in found if one.ecc_mode == "Disabled"]
    if worn:
        return fix(f"too many SRAM errors on {some(worn)}: the GPU is to be replaced", on(
            wanted, "nvidia-smi", "-q", "-d", "ECC") + f"   (opsctl drain {wanted.host}; send it in)")
    if bad:
        return fix(f"memory errors that were not corrected: {some([f'{bus}: {total}' for bus, total in bad.items()])}",
                   f"opsctl drain {wanted.host}, then {on(wanted, 'systemctl', 'reboot')}")
    if off:
        return warn(f"ECC is switched off on {some(off)}: errors pass unseen", on(wanted, "nvidia-smi", "-e", "1")
                    + "   (counts from the next reboot on)")
    if past:
        return warn(f"memory errors in the past: {some([f'{bus}: {total}' for bus, total in past.items()])}", on(
            wanted, "nvidia-smi", "-q", "-d", "ECC,ROW_REMAPPER"))
    return good("no memory errors" if any(one.ecc_mode for one in found) else "its GPUs have no ECC")


def _aggregate(device: Device) -> int:
    if device.node is None:
        return 0
    return sum(number(element.text or "") or 0 for element in device.node.iterfind("ecc_errors/aggregate/*")
               if "uncorrectable" in element.tag)


def row_remap(captured: Captured, wanted: Wanted) -> Judged:
    """Rows of memory that were replaced by spare ones (Ampere and newer), pages that were retired (older)."""
    found = [one for one in devices(captured) if one.node is not None]
    if not found:
        return skip(NO_XML)
    failed = [one.bus for one in found if one.text("remapped_rows/remapped_row_failure") == "Yes"]
    pending = [one.bus for one in found if "Yes" in (one.text("remapped_rows/remapped_row_pending"),
                                                     one.text("retired_pages/pending_retirement"))]
    remapped = sum(number(one.text("remapped_rows/remapped_row_unc")) or 0 for one in found)
    if failed:
        return fix(f"no spare rows are left on {some(failed)}: the GPU is to be replaced", on(
            wanted, "nvidia-smi", "-q", "-d", "ROW_REMAPPER") + f"   (opsctl drain {wanted.host}; send it in)")
    if pending:
        return fix(f"rows of {some(pending)} wait for a reset to be replaced", f"opsctl drain {wanted.host}, then "
                   + on(wanted, "systemctl", "reboot"))
    return good(f"{remapped} rows were replaced after errors" if remapped else "no row was replaced")


def pcie_link(captured: Captured, wanted: Wanted) -> Judged:
    """Width and generation that a GPU has against what it can: its own word, from the XML or /sys.

    A GPU that idles lowers its generation, so the current one counts only at full clocks (P0).
    """
    seen = {_bus(one.bus): one for one in devices(captured) if one.node is not None}
    narrow, slow, told = [], [], 0
    for one in gpus_on_bus(captured):
        device = seen.get(_bus(one["address"]))
        width, most = _widths(one, device)
        told += bool(width and most)
        if width and most and width < most:
            narrow.append(f"{one['address']}: x{width} of x{most}")
        slow += _slow(one["address"], device)
    if narrow:
        return warn(f"GPUs have fewer PCIe lanes than they can: {some(narrow)}", shell(
            wanted, "lspci -d 10de: -vv | grep -E '^[0-9a-f]|LnkCap:|LnkSta:'") + "   (reseat it; look at the slot)")
    if slow:
        return warn(f"GPUs have a slower PCIe generation than they can: {some(slow)}", shell(
            wanted, "lspci -d 10de: -vv | grep -E '^[0-9a-f]|LnkCap:|LnkSta:'") + "   (firmware: PCIe speed Auto)")
    return good("every GPU has all its PCIe lanes") if told else skip("neither /sys nor the driver tells of its links")


def _widths(one: Mapping[str, Any], device: Device | None) -> tuple[int | None, int | None]:
    if device is not None:
        where = "pci/pci_gpu_link_info/link_widths/"
        return (number(device.text(f"{where}current_link_width")), number(device.text(f"{where}max_link_width")))
    return number(one["current_link_width"]), number(one["max_link_width"])


def _slow(address: str, device: Device | None) -> list[str]:
    if device is None:
        return []
    where = "pci/pci_gpu_link_info/pcie_gen/"
    now, most, own = (number(device.text(where + name)) for name in (
        "current_link_gen", "max_link_gen", "max_device_link_gen"))
    if most and own and most < own:
        return [f"{address}: the slot gives {most} of {own}"]
    if now and most and now < most and device.text("performance_state") == "P0":
        return [f"{address}: {now} of {most}"]
    return []


def _bus(address: str) -> str:
    """``0000:1a:00.0`` of 00000000:1A:00.0."""
    return address.lower()[-12:]


def nvlink(captured: Captured, wanted: Wanted) -> Judged:
    if captured.exit("nvlink") not in (0, None):
        return skip("nvidia-smi nvlink told nothing")
    links = link_states(captured.out("nvlink"))
    up = {gpu: states.count(True) for gpu, states in links.items()}
    down = {gpu: states.count(False) for gpu, states in links.items() if False in states}
    if not any(up.values()):
        fabric = next((gpu.name for gpu in known(captured) if gpu.fabric), "")
        if fabric and links:
            return fix(f"every NVLink is inactive, and {fabric} talks to its peers by them", shell(
                wanted, "systemctl status nvidia-fabricmanager; nvidia-smi nvlink --status"))
        return good("no NVLink bridge") if captured.exit("nvlink") == 0 else skip("nvidia-smi nvlink did not end")
    if down or len(set(up.values())) > 1:
        which = [f"GPU {gpu}: {up[gpu]} up, {down.get(gpu, 0)} down" for gpu in links
                 if gpu in down or up[gpu] < max(up.values())]
        return fix(f"NVLinks are down ({some(which)})", shell(wanted, "nvidia-smi nvlink --errorcounters; "
                   "journalctl -k -b --grep 'Xid.*: 74'") + f"   (opsctl drain {wanted.host}, then reboot it)")
    return good(f"{max(up.values())} NVLinks of each GPU are up")


def link_states(text: str) -> dict[str, list[bool]]:
    """``nvidia-smi nvlink --status`` by GPU: is each link up."""
    found: dict[str, list[bool]] = {}
    gpu = ""
    for line in text.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            gpu = match[1]
            found[gpu] = []
        elif (match := re.match(r"\s+Link \d+: (.+)", line)) and gpu:
            found[gpu].append("inactive" not in match[1].lower())
    return found


def persistence(captured: Captured, wanted: Wanted) -> Judged:
    found = devices(captured)
    off = [one.bus for one in found if one.persistence == "Disabled"]
    if not any(one.persistence for one in found):
        return skip("the driver does not say")
    if off:
        return warn(f"persistence is off on {some(off)}: each start of an engine waits for the GPU to wake",
                    on(wanted, "systemctl", "enable", "--now", "nvidia-persistenced"))
    return good("persistence is on")


def rebar(captured: Captured, wanted: Wanted) -> Judged:
    """BAR1 that covers all memory wants Resizable BAR and Above 4G Decoding in the firmware."""
    found = [(one, number(one.text("bar1_memory_usage/total")), number(one.text("fb_memory_usage/total")))
             for one in devices(captured)]
    told = [(one, bar, memory) for one, bar, memory in found if bar and memory]
    if not told:
        return skip(NO_XML)
    small = [(one, bar, memory) for one, bar, memory in told
             if bar < memory and one.text("product_architecture") not in BEFORE_REBAR]
    if small:
        one, bar, memory = small[0]
        return warn(f"BAR1 of {one.bus} is {bar} MiB for {memory} MiB of memory: GPUs cannot reach each other's",
                    on(wanted, "systemctl", "reboot", "--firmware-setup") + "   (switch on Above 4G Decoding and "
                    "Resizable BAR)")
    covered = all(bar >= memory for _, bar, memory in told)
    return good("BAR1 covers all memory" if covered else "these boards have no Resizable BAR")


def acs(captured: Captured, wanted: Wanted) -> Judged:
    """Bridges that redirect what peers send each other take it by way of the CPU."""
    if len(gpus_on_bus(captured)) < 2:
        return good("one GPU has no peer") if gpus_on_bus(captured) else skip("there is no GPU on its PCI bus")
    if captured.exit("lspci-bridges") != 0:
        return skip("lspci is not installed (apt-get install pciutils), or may not read bridges")
    redirecting = [part.split()[0] for part in re.split(r"\n(?=\S)", captured.out("lspci-bridges"))
                   if re.search(r"ACSCtl:.*(?:ReqRedir|CmpltRedir)\+", part)]
    if redirecting:
        return warn(f"{len(redirecting)} PCI bridges send traffic between GPUs by way of the CPU (ACS): "
                    f"{some(redirecting)}", on(wanted, "setpci", "-s", redirecting[0], "ECAP_ACS+6.w=0")
                    + "   (each of them, until the next boot; for good: ACS in the firmware)")
    return good("no PCI bridge redirects traffic between GPUs")


def xids(captured: Captured, wanted: Wanted) -> Judged:
    """Errors that the driver wrote to the kernel's log since the boot."""
    if captured.exit("xids") in (127, None):
        return skip("there is no journal to read")
    found = Counter((match[1], int(match[2])) for match in XID.finditer(captured.out("xids")))
    grave = [f"XID {xid} on {bus}" + (f" ({times} times)" if times > 1 else "")
             for (bus, xid), times in sorted(found.items()) if xid not in OF_PROGRAMS]
    if grave:
        return warn(f"the driver reported errors since the boot: {some(grave)}", on(
            wanted, "journalctl", "--boot", "--grep", "NVRM: Xid"))
    return good(f"{sum(found.values())} errors of programs since the boot" if found else "no XID since the boot")


def throttling(captured: Captured, wanted: Wanted) -> Judged:
    """Slowed down by heat or by the power supply now. A power cap is no fault."""
    found = devices(captured)
    if not found:
        return skip("the driver told of no GPU")
    slow = [f"{one.bus}: {', '.join(one.reasons)}" for one in found if one.reasons]
    if slow:
        return warn(f"GPUs are slowed down: {some(slow)}", on(wanted, "nvidia-smi", "-q", "-d",
                                                              "TEMPERATURE,PERFORMANCE") + "   (look at its cooling)")
    return good("no GPU is slowed down")


def _names(captured: Captured) -> list[str]:
    names = Counter(one.name for one in devices(captured)) or Counter(
        catalogue()[device].name if device in catalogue() else f"10de:{device}"
        for device in (one["device"].removeprefix("0x") for one in gpus_on_bus(captured)))
    return [f"{times} x {name}" for name, times in names.items()]


