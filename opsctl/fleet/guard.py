"""What an inventory says of the guard (``guard_policy``), checked before any host hears it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsctl.agent.guard.policy import policy_of
from opsctl.errors import ConfigurationError
from opsctl.fleet.gpus import Wrong

POLICY = "guard_policy"
READ = (POLICY,)
HINT = f'{POLICY}={{"less_margin_c": 4}}; the keys and their meaning: docs/guard-numbers.md'


def first_wrong(variables: Mapping[str, Any]) -> Wrong | None:
    """The first number of the guard that cannot be right."""
    given = variables.get(POLICY)
    if given in (None, ""):
        return None
    if not isinstance(given, Mapping):
        return Wrong(POLICY, str(given), "is no table of numbers", HINT)
    try:
        policy_of(given, Path(POLICY))
    except ConfigurationError as error:
        words = error.message.removeprefix(f"{POLICY}: ").rstrip(".")
        return Wrong(POLICY, str(dict(given)), f"cannot be: {words}", HINT)
    return None


def numbers(variables: Mapping[str, Any]) -> dict[str, int | str]:
    """What goes into the host's guard.toml. Fractions as text: hosts with Python 3.10 read whole numbers only."""
    given = {key: float(value) for key, value in (variables.get(POLICY) or {}).items()}
    return {key: int(value) if value.is_integer() else f"{value:g}" for key, value in sorted(given.items())}
