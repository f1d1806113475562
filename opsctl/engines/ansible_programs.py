"""Where ansible-core's programs are, and the settings they get when a fleet has no ansible.cfg of its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from opsctl.errors import OpsctlError

NO_SETTINGS = Path(__file__).with_name("no_settings.cfg")  # Ansible refuses a file without a suffix, as /dev/null


def ansible_program(name: str) -> str:
    """The path of one of ansible-core's programs: beside this interpreter first, then on PATH.

    Raises:
        OpsctlError: it is in neither place.
    """
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise OpsctlError("ansible.missing", f"{name} is neither beside {sys.executable} nor on PATH.",
                          hint="pip install opsctl brings ansible-core; check the environment opsctl runs in")
    return found


def inherited(base: Mapping[str, str], fleet_directory: Path) -> dict[str, str]:
    """What every program of ansible-core gets: the fleet's own ansible.cfg or none, and of the user's ``ANSIBLE_*``
    variables only the vault's, so that a shell's settings change nothing here and secrets open as they do by hand.
    """
    kept = {key: value for key, value in base.items()
            if not key.startswith("ANSIBLE_") or key.startswith("ANSIBLE_VAULT")}
    own = fleet_directory / "ansible.cfg"
    return kept | {"ANSIBLE_CONFIG": str(own if own.is_file() else NO_SETTINGS), "ANSIBLE_NOCOLOR": "1",
                   "LC_ALL": "C.UTF-8"}
