"""Prints as JSON what a host has of certain packages: ``{"seen"}``; with ``upstream`` also what its sources have.

Arguments: where packages come from, the file in which a role wrote down what it brought, and names or patterns of
packages. Looks at dpkg and at apt's lists, and touches nothing.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FIELDS = "${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"


def packages(listed: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Versions by name; the states of those that are not installed whole, ``half-configured``; who is on hold."""
    installed, states, held = {}, {}, []
    for line in listed.splitlines():
        name, version, want, status = line.split("\t")
        if status in ("not-installed", "config-files"):
            continue
        installed[name] = version
        if status != "installed":
            states[name] = status
        if want == "hold":
            held.append(name)
    return installed, states, held


def sources_have(patterns: Sequence[str]) -> str:
    """The stanzas of every version of a package of such a name."""
    known = re.compile("|".join(map(fnmatch.translate, patterns)))
    names = sorted(name for name in said(["apt-cache", "pkgnames"]).split() if known.match(name))
    return said(["apt-cache", "show", "--all-versions", "--", *names]) if names else ""


def said(argv: Sequence[str]) -> str:
    """What a program prints. dpkg-query's exit status says that one of several patterns fits nothing: no error."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
                          env={**os.environ, "LC_ALL": "C.UTF-8"})
    return done.stdout


def main() -> None:
    source, record, *patterns = sys.argv[1:]
    recorded = sorted(json.loads(Path(record).read_text())["packages"]) if Path(record).exists() else []
    installed, states, held = packages(said(["dpkg-query", "--show", f"--showformat={FIELDS}", "--", *patterns,
                                             *recorded]))
    found: dict[str, object] = {"seen": {"installed": installed, "states": states, "held": held, "recorded": recorded}}
    if source == "upstream":
        found["index_text"] = sources_have(patterns)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
