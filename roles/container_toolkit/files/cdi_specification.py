#!/usr/bin/python3
"""The CDI specification of a host's GPUs: whether it is of the driver that runs, and writing it anew.

``look JSON`` prints ``{"loaded", "gpus", "stale"}``; ``write JSON`` has nvidia-ctk write it, and says why not. JSON:
``driver``, the one that is to be there (empty: whichever is), and ``toolkit``, its version. What a specification was
written for stands beside opsctl's other records, because the specification itself names neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPECIFICATION = Path("/etc/cdi/nvidia.yaml")
RECORD = Path("/var/lib/opsctl/cdi.json")
LOADED = Path("/proc/driver/nvidia/version")
KIND = "nvidia.com/gpu"
PARTS = {"driver": "driver", "gpus": "GPUs", "toolkit": "toolkit"}


def loaded_version(text: str) -> str:
    """The driver's version in /proc/driver/nvidia/version; empty when there is none."""
    found = re.search(r"^NVRM version:.*?\b(\d{3,4}\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else ""


def stale(wanted: Mapping[str, Any], text: bytes | None, record: Mapping[str, Any]) -> str:
    """Why the specification is to be written anew; empty when it is right. ``wanted``: driver, toolkit and GPUs."""
    if text is None:
        return f"{SPECIFICATION} is missing"
    if not record:
        return f"{SPECIFICATION} was written by somebody else"
    if record["sha256"] != hashlib.sha256(text).hexdigest():
        return f"{SPECIFICATION} is not as opsctl wrote it"
    for key, word in PARTS.items():
        if record[key] != wanted[key]:
            was, now = (", ".join(one) if isinstance(one, list) else one for one in (record[key], wanted[key]))
            return f"{SPECIFICATION} is of {word} {was or 'none'}, and the host has {now or 'none'}"
    return ""


def uuids_in(text: str) -> list[str]:
    """The GPUs that nvidia-smi lists, without those that are lost."""
    return [line.strip() for line in text.splitlines() if line.startswith(("GPU-", "MIG-"))]


def said(argv: Sequence[str]) -> tuple[int, str]:
    """Exit status and words of a program; 127 when there is no such program."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                              env={**os.environ, "LC_ALL": "C.UTF-8"})
    except FileNotFoundError:
        return 127, f"{argv[0]}: no such program"
    return done.returncode, done.stdout


def there() -> tuple[str, list[str]]:
    """The driver in the kernel, and the GPUs."""
    loaded = loaded_version(LOADED.read_text()) if LOADED.exists() else ""
    return loaded, uuids_in(said(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"])[1]) if loaded else []


def write(wanted: Mapping[str, Any]) -> str:
    """Has the specification written, whole or not at all; returns what went wrong, or nothing."""
    # Not beside it: whoever reads /etc/cdi meanwhile would find each device twice, and use none. Folders are not read.
    new = SPECIFICATION.parent / ".opsctl" / SPECIFICATION.name
    new.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    status, words = said(["nvidia-ctk", "cdi", "generate", "--output", str(new)])
    text = new.read_bytes() if new.exists() else b""
    if status or KIND.encode() not in text:
        new.unlink(missing_ok=True)
        return f"nvidia-ctk cdi generate ended with {status} and no devices of {KIND}: {words.strip()[-500:]}"
    new.chmod(0o644)
    replace(new, SPECIFICATION)
    record = RECORD.with_name(RECORD.name + ".new")
    record.write_text(json.dumps({**wanted, "sha256": hashlib.sha256(text).hexdigest()}, sort_keys=True) + "\n")
    replace(record, RECORD)
    return ""


def replace(new: Path, old: Path) -> None:
    """Renames once the content is on the disk."""
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.rename(old)


def main() -> int:
    what, asked = sys.argv[1], json.loads(sys.argv[2])
    loaded, gpus = there()
    wanted = {"driver": loaded, "toolkit": asked["toolkit"], "gpus": gpus}
    if what == "look":
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        text = SPECIFICATION.read_bytes() if SPECIFICATION.exists() else None
        # A driver that is still to come, as a plan sees it, counts as there.
        seen = {**wanted, "driver": asked["driver"] or loaded}
        json.dump({"loaded": loaded, "gpus": gpus, "stale": stale(seen, text, record)}, sys.stdout)
        return 0
    if asked["driver"] not in ("", loaded):
        why = f"the driver {asked['driver']} is wanted, and the kernel has {loaded or 'none'}"
    else:
        why = write(wanted) if loaded else "no driver is loaded, and there are no devices to be named"
    if why:
        sys.stderr.write(f"{SPECIFICATION} was not written: {why}\n")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
