"""Which Debian packages the bundle mirrors: those the roles say they install, and no other list."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from opsctl.errors import ConfigurationError

KEY_ENDING = "_packages"
PACKAGE_NAME = re.compile(r"^[a-z0-9][a-z0-9+.-]+$")  # Debian Policy 5.6.1


def role_packages(roles: Path) -> tuple[str, ...]:
    """Every name in every list whose key ends in ``_packages`` in ``roles/*/defaults/main.yml``, sorted.

    Raises:
        ConfigurationError: such a key is no list of package names, or no role names any package.
    """
    names: set[str] = set()
    for defaults in sorted(roles.glob("*/defaults/main.yml")):
        document = yaml.safe_load(defaults.read_text(encoding="utf-8")) or {}
        for key, value in document.items():
            if not str(key).endswith(KEY_ENDING):
                continue
            if not isinstance(value, list):
                raise ConfigurationError("bundle.not_a_package_list",
                                         f"{defaults}: {key} is {value!r}, not a list of package names.",
                                         hint=f"write {key}: [name, ...]")
            for name in value:
                if not isinstance(name, str) or not PACKAGE_NAME.match(name):
                    raise ConfigurationError("bundle.not_a_package_name",
                                             f"{defaults}: {key} holds {name!r}, which is no Debian package name.",
                                             hint="write the package's name alone, without version or condition")
                names.add(name)
    if not names:
        raise ConfigurationError("bundle.no_packages", f"no role in {roles} names a package to mirror.",
                                 hint="list them in roles/<role>/defaults/main.yml under a key ending in _packages")
    return tuple(sorted(names))
