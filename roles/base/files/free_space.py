"""Prints, for each path given, the free space of the file system it lies on: ``[{"path": "/srv", "free_mib": 5120}]``.

A path that is not there yet counts as its nearest parent that is.
"""

import json
import os
import sys


def free_mib(path: str) -> int:
    while not os.path.exists(path):
        path = os.path.dirname(path)
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // 2**20


print(json.dumps([{"path": path, "free_mib": free_mib(path)} for path in sys.argv[1:]]))
