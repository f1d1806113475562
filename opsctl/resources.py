"""Where the files that ship with opsctl lie: beside the package in a checkout, in ``opsctl/data`` in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a shipped file or folder: ``playbooks``, ``roles``, ``templates``, ``inventory.example`` ..."""
    shipped = PACKAGE / "data" / name
    return shipped if shipped.exists() else PACKAGE.parent / name
