"""The module of Debian's own driver, whose file is nvidia-current, in what a host says to a check."""

from __future__ import annotations

from opsctl.checking.model import Captured
from opsctl.checking.reading import module

# modinfo nvidia nvidia-current, with 535.261.03 of Debian: it complains of one, tells of the other, and ends with 1.
SAID = """\
modinfo: ERROR: Module nvidia not found.
filename:       /lib/modules/6.1.0-56-amd64/updates/dkms/nvidia-current.ko
version:        535.261.03
firmware:       nvidia/535.261.03/gsp_tu10x.bin
"""


def said(status: int, out: str) -> Captured:
    return Captured({"commands": {"modinfo": {"exit": status, "out": out}}})


def test_the_one_that_is_there_is_told() -> None:
    assert module(said(1, SAID), "modinfo")["version"] == "535.261.03"
    assert module(said(1, SAID.splitlines()[0]), "modinfo") == {}
    assert module(said(127, SAID), "modinfo") == {}
