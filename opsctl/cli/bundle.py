"""``opsctl bundle``: the offline mirror that hosts install from, built and checked on the operator's machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.speak import AsJson, Debug, Inventory, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.bundle.build import Built

app = typer.Typer(help="Packages, wheels and releases for hosts without a network.", no_args_is_help=True)

BundleOption = Annotated[Path | None, typer.Option("--bundle", metavar="DIR", show_default=False,
                                                   help="Bundle folder. Default: bundle/ beside the inventory.")]


@app.command()
def build(
    inventory: Inventory = None,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Mirror what the roles and engines install, and sign it with the fleet's own key.

    Uses this machine's package sources and pip configuration; installs nothing here. The same command again takes
    seconds and goes on where it was interrupted.

    [dim]$ opsctl bundle build inventory.ini[/dim]
    """
    with speaking("bundle build", as_json=as_json, debug=debug) as speaker:
        from opsctl.bundle.build import build_bundle

        found = find_inventory(inventory)
        directory = found.parent
        built = build_bundle(directory, (bundle or directory / "bundle").absolute(), speaker.emit, inventory=found)
        document = {"bundle": str(built.bundle), "changed": built.changed, "suites": list(built.suites),
                    "packages": built.packages, "package_bytes": built.package_bytes, "wheels": list(built.wheels),
                    "signed_by": built.signed_by, "seconds": round(built.seconds, 1)}
        speaker.result(document, built_summary(built))


@app.command()
def verify(
    inventory: Inventory = None,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check that the bundle is whole, unchanged, and signed by a key in trust/. Reads only.

    [dim]$ opsctl bundle verify inventory.ini[/dim]
    """
    with speaking("bundle verify", as_json=as_json, debug=debug) as speaker:
        from opsctl.bundle.verify import verify_bundle, verify_releases
        from opsctl.cli.views import human_bytes

        directory = find_inventory(inventory).parent
        where = (bundle or directory / "bundle").absolute()
        verified = verify_bundle(where, directory / "trust" / "bundle.asc", speaker.emit)
        releases = verify_releases(where, directory / "trust" / "allowed_signers", speaker.emit)
        document = {"bundle": str(where), "files": verified.files, "bytes": verified.bytes, "releases": releases,
                    "signed_by": verified.signed_by, "seconds": round(verified.seconds, 1)}
        speaker.result(document, f"{where} is whole: {verified.files} files, {human_bytes(verified.bytes)}, "
                                 f"{counted(releases, 'release')}, signed by {verified.signed_by}")


def built_summary(built: Built) -> str:
    """What a person reads after a build."""
    from opsctl.cli.views import human_bytes

    state = "built" if built.changed else "nothing changed"
    return (f"{built.bundle}: {state} in {built.seconds:.1f} s\n"
            f"  {counted(built.packages, 'Debian package')} for {' and '.join(built.suites)}, "
            f"{human_bytes(built.package_bytes)}; "
            f"{counted(len(built.wheels), 'wheel')}; signed by {built.signed_by}")


def counted(count: int, thing: str) -> str:
    """``1 wheel``, ``2 wheels``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"
