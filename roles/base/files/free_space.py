"""Prints, for each path given, the free space of the file system it lies on: ``[{"path": "/srv", "free_mib": 5120}]``.

A path that is not there yet counts as its nearest parent that is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def free_mib(path: Path) -> int:
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // 2**20


if __name__ == "__main__":
    sys.stdout.write(json.dumps([{"path": path, "free_mib": free_mib(Path(path))} for path in sys.argv[1:]]))
