"""Prints ``stale`` when a file is newer than the last start or reload of a unit, else ``fresh``: UNIT FILE..."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path


def verdict(changed: str, modified: Iterable[float]) -> str:
    """``changed``: when the unit last changed its state, as systemctl --timestamp=us+utc shows it; empty: never."""
    if not changed:
        return "fresh"  # never started: it has no old files in its head
    moment = datetime.strptime(changed, "%a %Y-%m-%d %H:%M:%S.%f UTC").replace(tzinfo=timezone.utc)
    return "stale" if max(modified, default=0.0) > moment.timestamp() else "fresh"


def main() -> None:
    unit, *files = sys.argv[1:]
    # A reload is a change of state too: reloading, then active again.
    shown = subprocess.run(
        ["systemctl", "show", unit, "--property=StateChangeTimestamp", "--value", "--timestamp=us+utc"],
        stdout=subprocess.PIPE, check=True, text=True)
    modified = [path.stat().st_mtime for path in map(Path, files) if path.exists()]
    sys.stdout.write(verdict(shown.stdout.strip(), modified))


if __name__ == "__main__":
    main()
