"""What captured texts say, as values. Pure; what a text does not say is None or nothing, never a guess."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opsctl.agent.gpu.reasons import words
from opsctl.checking.model import Captured
from opsctl.stack.catalogue import Gpu, catalogue

DISPLAY, BRIDGE = "0x03", "0x0680"  # PCI classes: VGA and 3D controllers; "other bridge", which NVSwitches are
ABSENT = ("", "N/A", "[N/A]", "Requested functionality has been deprecated")
CSV_FIELDS = ("index", "uuid", "name", "bus", "driver", "persistence", "ecc_mode", "ecc_uncorrected", "reasons")
# nvidia-smi, of a GPU that is off the bus: "... for GPU0000:1A:00.0: Unknown Error" or "GPU is lost"
NO_HANDLE = re.compile(r"Unable to determine the device handle for (GPU\s*\S+?):\s+(.*)")
VERSION = re.compile(r"(?<![\w.])(\d{3,4}\.\d{1,3}(?:\.\d{1,3})?)(?![\w.])")


@dataclass(frozen=True)
class Device:
    """What the driver says of a GPU: ``node`` is its element in ``nvidia-smi -q -x``, None where only CSV was had."""

    name: str
    bus: str
    uuid: str
    persistence: str
    ecc_mode: str
    ecc_uncorrected: int | None
    reasons: tuple[str, ...]
    node: ET.Element | None = None

    def text(self, path: str) -> str:
        """A field of the XML; empty where it is absent or not supported."""
        return field_of(self.node, path) if self.node is not None else ""


def field_of(node: ET.Element, path: str) -> str:
    text = " ".join((node.findtext(path) or "").split())
    return "" if text in ABSENT else text


def devices(captured: Captured) -> tuple[Device, ...]:
    """The GPUs that answer to the driver, in its order: from the XML, or from CSV where there is no whole XML."""
    root = _xml(captured)
    if root is not None:
        return tuple(_of_xml(node) for node in root.iterfind("gpu"))
    return tuple(_of_csv(captured.out("nvidia-smi-csv"))) if captured.exit("nvidia-smi-csv") is not None else ()


def lost(captured: Captured) -> dict[str, str]:
    """GPUs that the driver knows and that do not answer, each with nvidia-smi's reason."""
    said = captured.out("nvidia-smi") + "\n" + captured.out("nvidia-smi-csv")
    return {match[1]: match[2].strip() for match in NO_HANDLE.finditer(said)}


def library_version(captured: Captured) -> str:
    """Of the library that nvidia-smi loads: ``driver_version``."""
    root = _xml(captured)
    if root is not None:
        return field_of(root, "driver_version")
    rows = list(_rows(captured.out("nvidia-smi-csv")))
    return rows[0]["driver"] if rows else ""


def loaded(captured: Captured) -> tuple[str, str]:
    """Version and flavour of the module in the kernel, from /proc/driver/nvidia/version; both empty: none is."""
    text = captured.out("driver") if captured.exit("driver") == 0 else ""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version:")), "")
    version = VERSION.search(line)
    return (version[1], "open" if "Open Kernel Module" in line else "proprietary") if version else ("", "")


def module(captured: Captured, name: str) -> dict[str, str]:
    """``modinfo``'s fields (the first of each); nothing when there is no such module.

    Asked for both names that the driver's module may have, it says 1 and tells of the one that is there.
    """
    if captured.exit(name) not in (0, 1):
        return {}
    found: dict[str, str] = {}
    for line in captured.out(name).splitlines():
        key, mark, value = line.partition(":")
        if mark and key != "modinfo":  # its own complaints
            found.setdefault(key.strip(), value.strip())
    return found


def gpus_on_bus(captured: Captured) -> list[Mapping[str, Any]]:
    return [one for one in captured.rows("pci") if one["class"].startswith(DISPLAY)]


def switches_on_bus(captured: Captured) -> int:
    return sum(one["class"].startswith(BRIDGE) for one in captured.rows("pci"))


def known(captured: Captured) -> tuple[Gpu, ...]:
    """The GPUs on the bus that the catalogue knows."""
    ids = [one["device"].removeprefix("0x") for one in gpus_on_bus(captured)]
    return tuple(catalogue()[device] for device in ids if device in catalogue())


def driver_packages(captured: Captured) -> dict[str, str]:
    """Versions of installed packages of NVIDIA's, by name."""
    rows = [line.split("\t") for line in captured.out("dpkg-list").splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2].strip() in ("ii", "hi")}


def key_values(text: str) -> dict[str, str]:
    """``KEY=value`` lines, as systemctl show and timedatectl show print them."""
    return {key: value for key, mark, value in (line.partition("=") for line in text.splitlines()) if mark}


def memory_bytes(captured: Captured, key: str) -> int | None:
    """A line of /proc/meminfo."""
    match = re.search(rf"^{key}:\s+(\d+) kB$", captured.file("/proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def number(text: str) -> int | None:
    """``16`` of ``16x``, ``81559`` of ``81559 MiB``."""
    match = re.match(r"\s*(\d+)", text)
    return int(match[1]) if match else None


def container_of(cgroup: str) -> str:
    """The id of the container whose cgroup this is, as docker, podman, containerd and Kubernetes name theirs."""
    match = re.search(r"(?:docker|libpod|cri-containerd|crio|kubepods|containerd)\S*?([0-9a-f]{64})", cgroup)
    return match[1] if match else ""


def container_names(captured: Captured) -> dict[str, str]:
    """``name (image)`` by container id."""
    rows = [line.split("\t") for name in ("docker", "podman") if captured.exit(name) == 0
            for line in captured.out(name).splitlines()]
    return {row[0]: f"{row[1]} ({row[2]})" for row in rows if len(row) == 3}


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _xml(captured: Captured) -> ET.Element | None:
    text = captured.out("nvidia-smi")
    start = text.find("<nvidia_smi_log>")
    if start < 0:
        return None
    try:
        return ET.fromstring(text[start:])  # noqa: S314 - entities are declared before the root, which is cut off
    except ET.ParseError:
        return None


def _of_xml(node: ET.Element) -> Device:
    active = [element.tag.removeprefix("clocks_event_reason_").removeprefix("clocks_throttle_reason_")
              for parent in ("clocks_event_reasons", "clocks_throttle_reasons")
              for element in node.iterfind(f"{parent}/*") if (element.text or "").strip() == "Active"]
    mask = sum({"sw_thermal_slowdown": 0x20, "hw_thermal_slowdown": 0x40, "hw_power_brake_slowdown": 0x80,
                "hw_slowdown": 0x8}.get(name, 0) for name in active)
    counts = [number(element.text or "") for element in node.iterfind("ecc_errors/volatile//*")
              if "uncorrectable" in element.tag]
    known_counts = [count for count in counts if count is not None]
    return Device(field_of(node, "product_name"), node.get("id", ""), field_of(node, "uuid"),
                  field_of(node, "persistence_mode"), field_of(node, "ecc_mode/current_ecc"),
                  sum(known_counts) if known_counts else None, tuple(words(mask)), node)


def _of_csv(text: str) -> Iterator[Device]:
    for row in _rows(text):
        mask = int(row["reasons"], 16) if row["reasons"].startswith("0x") else 0
        mode = "" if row["ecc_mode"] in ABSENT else row["ecc_mode"]
        yield Device(row["name"], row["bus"], row["uuid"], row["persistence"], mode, number(row["ecc_uncorrected"]),
                     tuple(words(mask & 0xE8)))


def _rows(text: str) -> Iterator[dict[str, str]]:
    for row in csv.reader(text.splitlines()):
        if len(row) == len(CSV_FIELDS):
            yield dict(zip(CSV_FIELDS, (value.strip() for value in row), strict=True))
