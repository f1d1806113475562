#!/usr/bin/python3
"""nvidia-ctk of opsctl's lab: ``cdi generate`` and ``--version``, from what the lab's nvidia-smi tells of its GPUs.

The specification has the real one's form: devices by index, by UUID and ``all``, the driver's library by its version.
"""

import argparse
import subprocess
import sys
from pathlib import Path

VERSION = "@UPSTREAM@"
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,driver_version", "--format=csv,noheader")
NO_DRIVER = "failed to generate CDI spec: failed to create device CDI specs: failed to initialize NVML: {why}"
HEAD = """\
---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
    - path: /dev/nvidiactl
    - path: /dev/nvidia-uvm
  mounts:
    - containerPath: /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{driver}
      hostPath: /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{driver}
      options: [ro, nosuid, nodev, rbind, rprivate]
devices:
"""
DEVICE = "  - containerEdits:\n      deviceNodes:\n{nodes}    name: {name}\n"


def specification(csv: str) -> str:
    """CDI's text for the rows ``index, UUID, driver version``; a GPU that is lost has no row of that form."""
    rows = [words for line in csv.splitlines() if len(words := [word.strip() for word in line.split(",")]) == 3]
    devices = {name: [index] for index, uuid, _ in rows for name in (index, uuid)}
    devices["all"] = [index for index, _, _ in rows]
    text = "".join(DEVICE.format(name=f'"{name}"' if name.isdecimal() else name, nodes="".join(
        f"        - path: /dev/nvidia{index}\n" for index in indexes)) for name, indexes in devices.items())
    return HEAD.format(driver=rows[0][2]) + text + "kind: nvidia.com/gpu\n"


def generate(output: str) -> int:
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        done = subprocess.CompletedProcess(QUERY, 12, "", "ERROR_LIBRARY_NOT_FOUND")
    if "GPU-" not in done.stdout:
        why = " ".join((done.stderr or done.stdout).split())
        sys.stderr.write(f'time="" level=error msg="{NO_DRIVER.format(why=why)}"\n')
        return 1
    text = specification(done.stdout)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="nvidia-ctk")
    parser.add_argument("--version", action="version", version=f"NVIDIA Container Toolkit CLI version {VERSION}")
    cdi = parser.add_subparsers(dest="command", required=True).add_parser("cdi")
    generating = cdi.add_subparsers(dest="act", required=True).add_parser("generate")
    generating.add_argument("--output", default="")
    return generate(parser.parse_args().output)


if __name__ == "__main__":
    sys.exit(main())
