"""Which distribution's release each host runs, by inventory and stack.lock, before anybody asks the host. Pure.

What a release has (its codename, Python, glibc) stands in ``opsctl/stack/systems.csv``, with where that is known from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsctl.errors import RefusedError
from opsctl.fleet.gpus import Wrong
from opsctl.fleet.model import Host
from opsctl.stack.knowledge import System, knowledge

OS_RELEASE = "os_release"
DEFAULT = "debian12"
# Everything that is read here, so that a caller with lazy variables can fetch these only.
READ = (OS_RELEASE,)


def first_wrong(variables: Mapping[str, Any]) -> Wrong | None:
    """What cannot be right about a host's release."""
    written = str(variables.get(OS_RELEASE, DEFAULT))
    known = {system.key: system for system in knowledge().systems}
    if written in known:
        return None
    near = [key for key, system in known.items() if written.lower() in
            (system.name.lower(), system.codename, system.name.lower().replace(" ", ""))]
    return Wrong(OS_RELEASE, written, "is no distribution's release that hosts may run",
                 f"{OS_RELEASE}={near[0]}" if near else f"{OS_RELEASE} is one of {', '.join(known)}")


def os_release_of(variables: Mapping[str, Any], locked: str = "") -> str:
    """``debian13``: what the inventory says, else what stack.lock was made with, else Debian 12."""
    return str(variables.get(OS_RELEASE) or locked or DEFAULT)


def system_of(os_release: str) -> System | None:
    """What a release has; None: it is none that is known here, as in a stack.lock of a later opsctl."""
    return next((system for system in knowledge().systems if system.key == os_release), None)


def default_system() -> System:
    return next(system for system in knowledge().systems if system.key == DEFAULT)


def python_of(service: str, hosts: Sequence[Host], wanted: str = "") -> str:
    """The Python that a service's hosts have, which an engine's lock is for. ``wanted``: what an operator typed.

    Raises:
        RefusedError: ``engine.python``: they have several, or another one than was typed.
    """
    having: dict[str, list[Host]] = {}
    for host in hosts:
        system = system_of(host.os_release)
        having.setdefault(system.python if system else "", []).append(host)
    having.pop("", None)
    for python, others in having.items():
        if wanted and python != wanted:
            raise RefusedError("engine.python", f"the lock is for Python {wanted}, and {others[0].name}, which serves "
                               f"{service}, runs {others[0].os_release} and has {python}.",
                               hint=f"--python {python}, and a lock for it; or {OS_RELEASE}= of {others[0].name} in "
                                    "the inventory, where it runs another release")
    if len(having) > 1 and not wanted:
        said = " and ".join(f"{python} ({hosts[0].name})" for python, hosts in having.items())
        raise RefusedError("engine.python", f"the hosts of {service} have Python {said}, and a lock is for one.",
                           hint="a service for each in services.yml, whose group has hosts of one release")
    return wanted or next(iter(having), default_system().python)
