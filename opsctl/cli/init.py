"""``opsctl init [DIR]``: a new fleet's directory, or what is missing of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opsctl.cli.speak import AsJson, Debug, speaking

WHAT = {
    "inventory.ini": "your machines: edit it",
    "services.yml": "what they serve: edit it",
    ".gitignore": "keeps keys/, bundle/ and .opsctl/ out of git",
    "ansible.cfg": "plain ansible-playbook works from here",
    "known_hosts": "pinned host keys; opsctl trust fills it",
    "keys/release": "private: signs releases. Keep a backup; without it nothing new can be released",
    "keys/release.pub": "its public half",
    "keys/bundle": "private: signs the bundle of packages",
    "trust/allowed_signers": "whose releases the hosts take",
    "trust/bundle.asc": "whose packages the hosts take",
}
NEXT = """\
next:
  edit inventory.ini and services.yml
  opsctl trust                                     look at the machines' host keys and pin them
  opsctl bundle build                              packages for hosts without internet
  opsctl model import DIR --service chat --version v1
  opsctl provision\
"""


def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder; made if missing.",
                                              show_default=False)] = Path(),
    as_json: AsJson = False, debug: Debug = False,
) -> None:
    """Make a fleet's folder: inventory, services, keys, settings. Never overwrites; completes what is missing."""
    from opsctl.fleet.project import initialise, lacking

    with speaking("init", as_json=as_json, debug=debug) as speaker:
        made = initialise(directory)
        where = directory.absolute()
        absent = lacking(where)
        document = {"directory": str(where), "made": list(made), "lacking": list(absent)}
        for name in absent:
            speaker.say(f"{name} is not here, and its public half is trusted already: copy it from the operator who "
                        "made the fleet. Without it this copy cannot sign")
        if not made:
            speaker.result(document, f"{where} is complete; nothing was changed")
            return
        lines = [f"made in {where}:", *(f"  {name:<22} {WHAT[name]}" for name in made)]
        if "inventory.ini" in made:
            lines += ["", NEXT if where == Path.cwd() else NEXT.replace("next:", f"next:\n  cd {directory}")]
        speaker.result(document, "\n".join(lines))
