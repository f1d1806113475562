"""Prints as JSON whether the layers of a driver agree, and whether all GPUs are there: ``{"wrong", "layers", "gpus"}``.

One argument, JSON: ``version``, ``fabric_manager``, ``gpu_uuids`` (may be empty). A driver is right only when the
module in the kernel, the module on disk, the library and the fabric manager have the same version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADED = Path("/proc/driver/nvidia/version")
# A machine of opsctl's lab has no kernel module to ask; its packages write here which one they built.
LAB_MODULE = Path("/lib/modules/lab/nvidia.version")
MODULES = ("nvidia", "nvidia-current")  # of NVIDIA's packages, and of Debian's own
# Asked for its version by its file where nvidia-smi, which needs a GPU to say it, says nothing.
LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
QUERY = ("nvidia-smi", "--query-gpu=driver_version,pci.bus_id,uuid", "--format=csv,noheader")
ROW = re.compile(r"\s*(?P<version>\d[\d.]+), *(?P<bus>[0-9A-Fa-f:.]+), *(?P<uuid>GPU-\S+)\s*$")
FABRIC_UNIT = "nvidia-fabricmanager.service"


def judge(wanted: Mapping[str, Any], layers: Mapping[str, str], uuids: Sequence[str]) -> list[str]:
    """What is wrong, a sentence each. ``layers``: versions by layer, and the state of the fabric manager's unit."""
    version = wanted["version"]
    names = {"loaded": "the module in the kernel", "module": "the module on disk", "library": "the library"}
    if wanted["fabric_manager"]:
        names["fabric_manager"] = "the fabric manager"
    wrong = [f"{what} is {layers[layer] or 'not there'} where {version} is wanted"
             for layer, what in names.items() if layers[layer] != version]
    if wanted["fabric_manager"] and layers["fabric_unit"] != "active":
        wrong.append(f"{FABRIC_UNIT} is {layers['fabric_unit'] or 'not there'}")
    if not wanted["fabric_manager"] and layers["fabric_manager"]:
        wrong.append("a fabric manager is installed, and there are no NVSwitches for it")
    missing = [uuid for uuid in wanted["gpu_uuids"] if uuid not in uuids]
    if missing and uuids:
        wrong.append(f"{len(missing)} of the {len(wanted['gpu_uuids'])} GPUs in gpu_uuids are missing: "
                     f"{', '.join(missing)}")
    return wrong


def silence(version: str, layers: Mapping[str, str], says: str) -> str:
    """That no GPU answers, and whether there is a driver that they could answer through."""
    known = f"the driver {version} is installed, and " if layers["library"] == version else ""
    return f"{known}no GPU answers; nvidia-smi says: {says[:200] or 'nothing'}"


def gpus_of(csv: str) -> list[tuple[str, str, str]]:
    """Driver version, PCI bus id and UUID of each GPU, in PCI order, from those of nvidia-smi's lines that tell one."""
    rows = [(match["version"], match["bus"], match["uuid"]) for match in map(ROW.match, csv.splitlines()) if match]
    return sorted(rows, key=lambda row: row[1])


def words_in(csv: str) -> str:
    """What else it says: of a GPU that is lost, beside the rows of the others."""
    return " ".join(" ".join(line for line in csv.splitlines() if not ROW.match(line)).split())


def version_in(text: str) -> str:
    found = re.search(r"(?<![\w.])(\d{3,4}\.\d+(?:\.\d+)?)(?![\w.])", text)
    return found[1] if found else ""


def said(argv: Sequence[str]) -> tuple[int, str]:
    """Exit status and words of a program; 127 when there is no such program."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                              env={**os.environ, "LC_ALL": "C.UTF-8"})
    except FileNotFoundError:
        return 127, ""
    return done.returncode, done.stdout.strip()


def module_on_disk() -> str:
    for name in MODULES:
        status, version = said(["modinfo", "-k", os.uname().release, "-F", "version", name])
        if status == 0 and version_in(version):
            return version_in(version)
    return LAB_MODULE.read_text().strip() if LAB_MODULE.exists() else ""


def library_on_disk() -> str:
    """``535.261.03`` of ``libnvidia-ml.so.535.261.03``, which the library's links end at; empty when there is none."""
    file = LIBRARY.resolve()
    return version_in(file.name.partition(".so.")[2]) if file.exists() else ""


def package_version(name: str) -> str:
    status, version = said(["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", name])
    installed, _, version = version.partition(" ")
    return re.sub(r"^\d+:|-[^-]*$", "", version) if status == 0 and installed == "installed" else ""


def main() -> None:
    wanted = json.loads(sys.argv[1])
    status, listed = said(QUERY)
    gpus = gpus_of(listed)  # whatever the status: one GPU that is lost makes it 15
    layers = {
        "loaded": version_in(LOADED.read_text()) if LOADED.exists() else "",
        "module": module_on_disk(),
        "library": gpus[0][0] if gpus else library_on_disk(),
        "library_says": words_in(listed) if status else "",
        "fabric_manager": package_version("nvidia-fabricmanager"),
        "fabric_unit": said(["systemctl", "is-active", FABRIC_UNIT])[1],
    }
    found = [uuid for _, _, uuid in gpus]
    wrong = judge(wanted, layers, found)
    if not found:
        wrong.append(silence(wanted["version"], layers, words_in(listed)))
    elif status:
        wrong.append(f"nvidia-smi says: {words_in(listed)[:200] or 'nothing'}")
    json.dump({"wrong": wrong, "layers": layers, "gpus": found}, sys.stdout)


if __name__ == "__main__":
    main()
