"""What a release showed on this host when it passed its gate: ``/var/lib/opsctl/gates/<instance>/<release>.json``.

Later plans tell from it how long a start takes, and a later gate how fast the release before was when its engine
cannot be asked any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opsctl.agent.durable import write_atomically
from opsctl.agent.paths import Paths


def read(paths: Paths, instance: str, release: str) -> dict[str, Any] | None:
    """The last gate that ``release`` passed on ``instance``; None when it never did or the file is damaged.

    ``{"release", "tokens_per_second" (or None), "chat", "start_s", "stop_s", "gate_s", "at"}``; ``chat``: it answered a
    chat completion; ``at`` is UTC, ISO 8601.
    """
    try:
        document = json.loads(_file(paths, instance, release).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("release") == release else None


def write(paths: Paths, instance: str, release: str, measured: Mapping[str, Any]) -> None:
    """Replaces what ``release`` showed before on ``instance``."""
    at = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    write_atomically(_file(paths, instance, release), json.dumps({"release": release, **measured, "at": at}))


def _file(paths: Paths, instance: str, release: str) -> Path:
    return paths.gates / instance / f"{release}.json"
