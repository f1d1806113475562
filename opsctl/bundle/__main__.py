"""``python -m opsctl.bundle BUNDLE TRUSTED_KEY``: verifies a bundle for a playbook that runs without opsctl."""

from __future__ import annotations

import sys
from pathlib import Path

from opsctl.bundle.verify import verify_bundle
from opsctl.errors import ExitCode, OpsctlError


def main() -> int:
    """Exit code 0, or the error's own with its sentence and hint on stderr."""
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python -m opsctl.bundle BUNDLE TRUSTED_KEY\n")
        return int(ExitCode.USAGE)
    try:
        verify_bundle(Path(sys.argv[1]), Path(sys.argv[2]))
    except OpsctlError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return int(error.exit_code)
    return 0


sys.exit(main())
