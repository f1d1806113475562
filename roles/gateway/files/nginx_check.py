#!/usr/bin/python3
"""Says whether nginx accepts a file with server blocks, before the file is in its place: ``nginx-check FILE``.

``nginx -t`` reads whole configurations only, and the whole one includes what is in place already.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

WHOLE = "pid /dev/null;\nerror_log stderr;\nevents {{}}\nhttp {{\n    include {piece};\n}}\n"


def main() -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as whole:
        whole.write(WHOLE.format(piece=sys.argv[1]))
        whole.flush()
        return subprocess.run(["/usr/sbin/nginx", "-t", "-q", "-c", whole.name], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
