"""The records of first starts that are under way or were cut off: ``/var/lib/opsctl/undo/first-start-<instance>.json``.

A record of this boot may belong to a job that runs; one of an earlier boot belongs to nobody. Who works on an instance
holds the lock beside its record, which ends with its process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from opsctl.agent.durable import locked, write_atomically
from opsctl.agent.paths import Paths

PREFIX = "first-start-"


def write(paths: Paths, instance: str) -> None:
    document = {"instance": instance, "boot": boot(paths)}
    write_atomically(paths.undo(instance), json.dumps(document))


def boot(paths: Paths) -> str:
    return paths.boot_id.read_text().strip()


def of_earlier_boot(paths: Paths, instance: str) -> bool:
    """Whether the first start of ``instance`` was cut off by the machine's end. A record without a boot is old."""
    try:
        record = json.loads(paths.undo(instance).read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return not isinstance(record, dict) or record.get("boot") != boot(paths)


def instances(paths: Paths) -> list[str]:
    """All that have a record, in the order of their names."""
    return sorted(path.stem.removeprefix(PREFIX) for path in paths.undos.glob(f"{PREFIX}*.json"))


@contextmanager
def held(paths: Paths, instance: str, *, wait: bool = True) -> Iterator[bool]:
    """Yields False when ``wait`` is off and another works on the instance."""
    with locked(paths.undos / f".{PREFIX}{instance}.lock", wait=wait) as mine:
        yield mine
