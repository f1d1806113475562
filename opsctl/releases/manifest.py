"""Makes the manifest of a release. Its dataclasses and how it is read are the hosts' too: ``opsctl.agent.manifest``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opsctl.agent.manifest import Engine, Release, ReleaseFile, check_name, digest, directory_name, parse
from opsctl.serving.adapter import Adapter, Lock, Value

__all__ = ["Engine", "Release", "ReleaseFile", "check_name", "digest", "directory_name", "make_release", "parse"]


def make_release(service: str, version: str, adapter: Adapter, arguments: Mapping[str, Value],
                 files: Sequence[ReleaseFile], *, lock: Lock, source: str, now: float) -> Release:
    """A release with a pinned engine. ``arguments`` are those given; ``now`` is POSIX time.

    Defaults are filled in, so that a later opsctl with other defaults does not change what a release means.
    """
    return Release(
        service=service,
        version=check_name(version),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        engine=Engine(lock.engine, lock.version, lock.python, lock.text),
        arguments=adapter.arguments(arguments),
        files=tuple(sorted(files, key=lambda file: file.path)),
        source=source,
    )
