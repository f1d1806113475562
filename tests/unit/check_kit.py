"""Captures of hosts for the tests of ``opsctl check``: a whole host that is well, and cases that differ from it."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opsctl.checking.model import Captured, Finding, Wanted
from opsctl.checking.table import findings_for

FIXTURES = Path(__file__).parent / "fixtures" / "check"
CAPTURED = ("commands", "files", "kernels", "disks", "locks", "listeners", "gpu_users", "pci", "bundle", "root")


@dataclass(frozen=True)
class Case:
    """A file ``CHECK/VERDICT-words.yml``: how a host differs, and what is to be said of it."""

    check: str
    verdict: str
    says: str
    types: str
    stops: bool
    captured: Captured
    wanted: Wanted

    def finding(self) -> Finding:
        return next(one for one in findings_for("gpu-1", self.captured, self.wanted) if one.id == self.check)


def cases() -> list[Path]:
    return sorted(path for path in FIXTURES.glob("*/*.yml") if path.parent.name != "hosts")


def host(name: str) -> dict[str, Any]:
    """A whole host as a document; ``@file`` as a program's words is a file beside it."""
    document: dict[str, Any] = yaml.safe_load((FIXTURES / "hosts" / f"{name}.yml").read_text(encoding="utf-8"))
    for said in document["commands"].values():
        if said["out"].startswith("@"):
            said["out"] = (FIXTURES / "hosts" / said["out"][1:]).read_text(encoding="utf-8")
    return document


def read(document: dict[str, Any]) -> tuple[Captured, Wanted]:
    wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in document["wanted"].items()}
    return (Captured({key: document[key] for key in CAPTURED}, tuple(document["command_s"])),
            Wanted("gpu-1", **wanted))


def load(path: Path) -> Case:
    """A case: its ``host`` (gpu-host unless it says another), with the case's own words laid over."""
    case = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "source" not in case:
        raise ValueError(f"{path}: says no source")
    document = host(case.get("host", "gpu-host"))
    document = overlaid(document, {key: case[key] for key in (*CAPTURED, "wanted", "command_s") if key in case})
    if "xml" in case:
        document["commands"]["nvidia-smi"]["out"] = changed(document["commands"]["nvidia-smi"]["out"], case["xml"])
    captured, wanted = read(document)
    return Case(path.parent.name, path.name.partition("-")[0], case["says"], case.get("types", ""),
                case.get("stops", False), captured, wanted)


def overlaid(below: Any, above: Any) -> Any:
    """Tables are joined, key by key; a null takes a key away, but for a program's ``exit``; all else is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    joined = {**below, **{key: overlaid(below.get(key), value) for key, value in above.items()}}
    return {key: value for key, value in joined.items() if value is not None or key in ("exit", "bundle")}


def changed(text: str, fields: dict[str, str]) -> str:
    """nvidia-smi's XML with other values in the first GPU."""
    head, mark, body = text.partition("<nvidia_smi_log>")
    root = ET.fromstring(mark + body)  # noqa: S314 - a file of ours
    gpu = root.find("gpu")
    for path, value in fields.items():
        node = gpu.find(path) if gpu is not None else None
        if node is None:
            raise ValueError(f"no {path} in the XML")
        node.text = value
    return head + ET.tostring(root, encoding="unicode")
