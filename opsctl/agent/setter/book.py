"""What the setter has set and not yet restored: in memory, and fsynced in a file before it is set.

The file is of one boot: a boot forgets all clocks and power limits, so what another one wrote is just forgotten.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

from opsctl.agent.durable import write_atomically
from opsctl.agent.paths import Paths


@dataclass(frozen=True)
class Entry:
    """One GPU: ``max_mhz`` the highest clock, ``limit_mw`` power limit, ``before_mw`` the one before. None: not set."""

    max_mhz: int | None = None
    limit_mw: int | None = None
    before_mw: int | None = None


class Book:
    """By UUID, in a file that is replaced whole. Used by several threads; who only looks waits for no disk."""

    def __init__(self, paths: Paths, boot: str, say: Callable[[str], None]) -> None:
        self._path = paths.setter_state
        self._boot = boot
        self._lock = threading.Lock()
        self._closed = False
        self._entries = self._read(say)  # replaced whole, never changed: read without the lock

    def close(self) -> None:
        """The file is another process's from now on."""
        with self._lock:
            self._closed = True

    def entries(self) -> dict[str, Entry]:
        return dict(self._entries)

    def of(self, gpu: str) -> Entry:
        return self._entries.get(gpu, Entry())

    def put(self, gpu: str, entry: Entry) -> None:
        """Writes down, on the disk, what is about to be set or was restored. Raises OSError: then nothing changed."""
        with self._lock:
            if self._entries.get(gpu, Entry()) == entry:
                return
            after = {key: value for key, value in {**self._entries, gpu: entry}.items() if value != Entry()}
            if not self._closed:
                document = {"boot": self._boot, "gpus": {key: asdict(value) for key, value in after.items()}}
                write_atomically(self._path, json.dumps(document), mode=0o600)
            self._entries = after

    def _read(self, say: Callable[[str], None]) -> dict[str, Entry]:
        try:
            document = json.loads(self._path.read_bytes())
            if document["boot"] != self._boot:
                return {}
            return {str(key): Entry(**value) for key, value in document["gpus"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            say(f"{self._path} cannot be read ({error}): what was set before is not known and not restored")
            return {}
