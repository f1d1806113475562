"""journalctl, played: a journal is a file of ``unit<TAB>message`` lines, and a cursor the number of one.

``$PLAYED_JOURNAL`` names the file; one beside it with the suffix ``.ended`` ends whoever follows it.
Knows the options that opsctl uses; one that it does not know ends it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

START_US = 1_800_000_000_000_000


def install(programs: Path, journal: Path) -> dict[str, str]:
    """``journalctl`` in a folder for PATH, and the environment that it wants."""
    program = programs / "journalctl"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} \"$@\"\n", encoding="utf-8")
    program.chmod(0o755)
    journal.touch()
    return {"PLAYED_JOURNAL": str(journal)}


def write(journal: Path, *lines: tuple[str, str]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.writelines(f"{unit}\t{message}\n" for unit, message in lines)


def main() -> int:
    path = Path(os.environ["PLAYED_JOURNAL"])
    with path.with_suffix(".calls").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:] if not argument.startswith("--unit="))
    units = [argument.partition("=")[2] for argument in sys.argv[1:] if argument.startswith("--unit=")]
    unknown = set(options) - {"--quiet", "--no-pager", "--all", "--output", "--output-fields", "--after-cursor",
                              "--since", "--lines", "--no-tail", "--follow"}
    if unknown:
        sys.stderr.write(f"journalctl: unrecognized option {unknown}\n")
        return 1
    after = int(options["--after-cursor"].removeprefix("c=")) if "--after-cursor" in options else -1
    number = _show(path, units, after, int(options["--lines"]) if "--lines" in options else None)
    while "--follow" in options and not path.with_suffix(".ended").exists():
        time.sleep(0.02)
        number = _show(path, units, number, None)
    return 0


def _show(path: Path, units: list[str], after: int, most: int | None) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    mine = [(number, line.split("\t", 1)) for number, line in enumerate(lines) if number > after]
    mine = [(number, fields) for number, fields in mine if fields[0] in units]
    for number, (unit, message) in mine[len(mine) - most if most is not None and most < len(mine) else 0:]:
        sys.stdout.write(json.dumps({
            "__CURSOR": f"c={number}", "__REALTIME_TIMESTAMP": str(START_US + number * 1_000_000), "PRIORITY": "6",
            "_SYSTEMD_UNIT": unit, "MESSAGE": message}) + "\n")
    sys.stdout.flush()
    return max(after, len(lines) - 1)


if __name__ == "__main__":
    sys.exit(main())
