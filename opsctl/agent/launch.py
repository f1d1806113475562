"""``opsctl-launch chat.0``: joins the release and the placement of an instance into one command, and becomes it.

Runs as ExecStart of ``inference@``. It checks the signature and the manifest at every start, not the files' hashes
(that took place at ``stage``; weights are hundreds of gigabytes). The unit is not started again on its two exit codes
of refusal. They are none of opsctl's, for after the exec the unit's exit code is the engine's, and an engine that
crashes with 3 or 5 must be started again; 96 and 97 lie above sysexits.h (64-78) and below the shell's and systemd's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opsctl.agent import environment, trust
from opsctl.agent import manifest as manifests
from opsctl.agent.paths import Paths
from opsctl.agent.settings import read_placement
from opsctl.agent.state import current_release
from opsctl.errors import ConfigurationError, ExitCode, OpsctlError, RefusedError
from opsctl.serving import adapter
from opsctl.serving.adapter import Command, Launch

EXIT_WRONG = 96  # configuration: placement, trust, the engine's name
EXIT_REFUSED = 97  # the release: unsigned, tampered, not staged


def prepare(paths: Paths, instance: str) -> Command:
    """The command of an instance.

    Raises:
        ConfigurationError: placement, trust or engine is wrong.
        RefusedError: no release, or one that may not run.
    """
    placement = read_placement(paths, instance)
    name = current_release(paths, placement)
    directory = paths.releases(placement.service) / name
    if not name or not directory.is_dir():
        raise RefusedError("instance.no_release", f"{instance} has no release to serve ({directory}).",
                           hint="opsctl provision starts it on the ledger's release")
    signed = trust.read_signed(directory, paths.allowed_signers)
    release = signed.release
    if release.service != placement.service:
        raise RefusedError("release.tampered", f"{directory} is a release of {release.service}.",
                           hint="stage the release of this service")
    if not environment.is_complete(paths, release.engine):
        raise RefusedError("engine.not_built", f"the engine {release.engine.directory} is not built on this host.",
                           hint=f"opsctl-host stage --service {release.service} --release {name}")
    engine = adapter(release.engine.name)
    return engine.command(Launch(
        service=release.service, release=name, files=directory / manifests.FILES,
        paths=tuple(file.path for file in release.files), arguments=engine.arguments(release.arguments),
        address=placement.address, port=placement.port, environment=paths.engines / release.engine.directory,
        gpus=placement.gpus, tensor_parallel=placement.tensor_parallel, version=release.engine.version,
    ))


def main(argv: Sequence[str] | None = None) -> int:
    """The ``opsctl-launch`` command; returns only when the engine could not be started."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1:
        sys.stderr.write("usage: opsctl-launch INSTANCE\n")
        return int(ExitCode.USAGE)
    program = "the engine"
    try:
        command = prepare(Paths(), arguments[0])
        program = command.argv[0]
        runtime = os.environ.get("RUNTIME_DIRECTORY")
        if runtime:  # a mark of the process before this one would keep the new one out of rotation
            Path(runtime, "draining").unlink(missing_ok=True)
        os.execve(command.argv[0], command.argv, {**os.environ, **command.environment})  # noqa: S606 - that is the job
    except OpsctlError as error:
        sys.stderr.write(f"{error.message} [{error.code}] {error.hint}\n")
        return exit_code(error)
    except OSError as error:
        sys.stderr.write(f"{program} could not be executed: {error}\n")
        return int(ExitCode.UNEXPECTED)


def exit_code(error: OpsctlError) -> int:
    """What systemd is told; what is no refusal may be better in ten seconds."""
    if isinstance(error, ConfigurationError):
        return EXIT_WRONG
    return EXIT_REFUSED if isinstance(error, RefusedError) else int(ExitCode.UNEXPECTED)


if __name__ == "__main__":
    sys.exit(main())
