"""The records of cutovers that are under way or were cut off: ``/var/lib/opsctl/undo/<instance>.json``.

A first start is a cutover from nothing. A record of this boot may belong to a worker that runs; one of an earlier boot
belongs to nobody. Who works on an instance holds the lock beside its record, which ends with its process.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from opsctl.agent.durable import READABLE, locked, make_directory, remove_durably, write_atomically
from opsctl.agent.paths import Paths
from opsctl.errors import OpsctlError

SUFFIX = ".json"
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)  # ProtectSystem=strict shows the agent a /run that is read-only


@dataclass(frozen=True)
class Record:
    """What undoes a cutover. ``from_release`` is empty for a first start; ``ran``: the unit ran before it.

    ``touched`` is off while the release before is only measured: then nothing of the instance is to be undone.
    """

    instance: str
    from_release: str
    to_release: str
    owner: str = ""
    ran: bool = True
    touched: bool = True


def write(paths: Paths, record: Record) -> None:
    document = {"instance": record.instance, "from": record.from_release, "to": record.to_release,
                "owner": record.owner, "ran": record.ran, "touched": record.touched, "boot": boot(paths)}
    write_atomically(paths.undo(record.instance), json.dumps(document))


def read(paths: Paths, instance: str) -> Record | None:
    """The record of ``instance``, None when nothing is to be undone.

    Raises:
        OpsctlError: ``cutover.bad_record``: it is there and cannot be read; only a person knows what was served.
    """
    path = paths.undo(instance)
    try:
        document = json.loads(path.read_bytes())
        return Record(instance, str(document["from"]), str(document["to"]), str(document["owner"]),
                      bool(document["ran"]), bool(document.get("touched", True)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        service, _, index = instance.rpartition(".")
        raise OpsctlError("cutover.bad_record", f"{path} cannot be read: what {instance} served before is not known.",
                          hint=f"point {paths.services / service / f'current.{index}'} at the release that should "
                          "serve, then remove that file") from None


def remove(paths: Paths, instance: str) -> None:
    remove_durably(paths.undo(instance))


def boot(paths: Paths) -> str:
    """A name for this boot, given by the first that asks as root; empty while nobody has: then nothing is of this boot.

    Not the kernel's boot_id: a sandboxed unit with its own view of /proc, in a container, reads another machine's.
    """
    with suppress(FileNotFoundError):
        return paths.boot_id.read_text().strip()
    try:
        make_directory(paths.boot_id.parent)
        with tempfile.NamedTemporaryFile("w", dir=paths.boot_id.parent, prefix=".boot.") as file:
            file.write(f"{uuid.uuid4()}\n")
            file.flush()
            os.fchmod(file.fileno(), READABLE)
            with suppress(FileExistsError):  # somebody was quicker
                os.link(file.name, paths.boot_id)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        return ""
    return paths.boot_id.read_text().strip()


def of_earlier_boot(paths: Paths, instance: str) -> bool:
    """Whether a cutover of ``instance`` was cut off by the machine's end. A record without a boot is old."""
    try:
        record = json.loads(paths.undo(instance).read_bytes())
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return not isinstance(record, dict) or record.get("boot") != boot(paths)


def instances(paths: Paths) -> list[str]:
    """All that have a record, in the order of their names."""
    return sorted(path.name.removesuffix(SUFFIX) for path in paths.undos.glob(f"*{SUFFIX}")
                  if not path.name.startswith("."))


@contextmanager
def held(paths: Paths, instance: str, *, wait: bool = True) -> Iterator[bool]:
    """Yields False when ``wait`` is off and another works on the instance."""
    with locked(paths.undos / f".{instance}.lock", wait=wait) as mine:
        yield mine
