"""The name of a boot: given once, the same for all who ask, another after the next boot."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opsctl.agent import unfinished
from opsctl.agent.paths import Paths


def test_the_first_who_asks_names_the_boot(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(lambda _: unfinished.boot(paths), range(64)))
    assert len(names) == 1
    assert all(names)
    assert [entry.name for entry in paths.boot_id.parent.iterdir()] == ["boot"]
    paths.boot_id.unlink()  # as /run is empty after a boot
    assert unfinished.boot(paths) not in names


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_who_may_not_name_it_sees_no_record_of_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
                                                         ) -> None:
    paths = Paths(tmp_path)
    unfinished.write(paths, unfinished.Record("chat.0", "v1-0123456789ab", "v2-0123456789ab"))
    assert not unfinished.of_earlier_boot(paths, "chat.0")
    paths.boot_id.unlink()

    def refused(_: Path) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(unfinished, "make_directory", refused)
    assert unfinished.boot(paths) == ""
    assert unfinished.of_earlier_boot(paths, "chat.0")
