"""Why an instance gets less traffic: one file an owner in ``/var/lib/opsctl/drains/<instance>/``; the least wins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FULL = 100


def read_drains(directory: Path) -> list[dict[str, Any]]:
    """The drains of one instance. A file that cannot be read drains too: somebody wanted the traffic gone."""
    found = []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else []:
        try:
            document = json.loads(path.read_bytes())
            weight = int(document["weight"])
        except FileNotFoundError:  # just removed
            continue
        except (OSError, ValueError, KeyError, TypeError):
            document, weight = {}, 0
        found.append({**document, "instance": directory.name, "owner": document.get("owner", path.stem),
                      "weight": max(0, min(FULL, weight))})
    return found


def least_weight(drains: Sequence[dict[str, Any]]) -> int:
    """Percent."""
    return min((int(drain["weight"]) for drain in drains), default=FULL)
