"""``opsctl model``: signed releases of a service: import, list, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from opsctl.cli.speak import AsJson, Debug, find_inventory, speaking

if TYPE_CHECKING:
    from opsctl.fleet.model import Fleet

app = typer.Typer(help="Signed releases of a service: import a model, list, verify.", no_args_is_help=True)

InventoryOption = Annotated[Path | None, typer.Option("--inventory", "-i", show_default=False, help="Inventory file. "
                                                      "Default: $OPSCTL_INVENTORY, then ./inventory.ini.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", metavar="DIR", show_default=False,
                                                   help="Bundle folder. Default: bundle/ beside the inventory.")]
ServiceOption = Annotated[str, typer.Option("--service", help="Service of services.yml; not needed when there is one.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", show_default=False,
                                                    help="Engine argument, such as max_model_len=8192; repeat it.")]


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="DIR|FILE|URL|release:VERSION", help="The model: safetensors or "
                                          "GGUF; or a release whose files get other arguments.")],
    version: Annotated[str, typer.Option("--version", help="Name of the release: v1, v2 ... A name is taken once.")],
    service: ServiceOption = "",
    settings: Settings = None,
    engine: Annotated[str, typer.Option("--engine", help="What serves it: llamacpp (GGUF) or vllm (safetensors).")
                      ] = "llamacpp",
    engine_lock: Annotated[Path | None, typer.Option(
        "--engine-lock", metavar="FILE", show_default=False, help="Pinned engine: requirements with hashes, as uv pip "
        "compile --generate-hashes writes them. vllm needs one; llamacpp brings its own.")] = None,
    python: Annotated[str, typer.Option("--python", metavar="VERSION", show_default="that of the service's hosts",
                                        help="The hosts' Python, which the engine's lock is for.")] = "",
    inventory: InventoryOption = None,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hash, check and sign a model as a release, in the bundle. Serving is untouched.

    Weights are safetensors or GGUF; pickles are refused. The same content again is nothing to do, other content under
    a taken name is refused. release:v3 takes the files and arguments of v3 and moves no byte.

    [dim]$ opsctl model import /data/qwen3-8b.gguf --version v1 --set max_model_len=8192[/dim]

    [dim]$ opsctl model import release:v1 --version v1.1 --set max_model_len=65536[/dim]

    [dim]$ opsctl model import /data/deepseek --version v2 --engine vllm --engine-lock requirements.txt[/dim]
    """
    with speaking("model import", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli.views import human_bytes
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import the_service
        from opsctl.fleet.systems import python_of
        from opsctl.releases.importing import Request, import_model
        from opsctl.releases.publish import published_releases

        fleet = read_fleet(find_inventory(inventory))
        found = the_service(fleet, service)
        name = found.name
        if engine_lock is not None:
            python = python_of(name, fleet.group(found.group), python)
        with published_releases(fleet, speaker.emit) as gateway:
            imported = import_model(Request(
                source=source, service=name, version=version, settings=tuple(settings or ()),
                bundle=_bundle(fleet, bundle), key=fleet.directory / "keys" / "release",
                allowed_signers=_allowed_signers(fleet), gateway=gateway, engine=engine, engine_lock=engine_lock,
                python=python), speaker.emit)
        release = imported.release
        document = {"changed": imported.changed, "service": name, "version": release.version, "digest": imported.digest,
                    "directory": str(imported.directory or ""), "files": len(release.files), "bytes": release.size,
                    "engine": release.engine.directory, "arguments": dict(release.arguments)}
        did = "imported and signed" if imported.changed else "is there already, nothing to do"
        speaker.result(document, f"{name} {release.version}: {did}, {_counted(len(release.files))}, "
                                 f"{human_bytes(release.size)}, engine {release.engine.name} {release.engine.version}\n"
                                 f"  {imported.directory or 'on the gateway alone'}\n"
                                 f"next: opsctl update-model --version {release.version}; in a new fleet opsctl "
                                 f"provision, when first_release is {release.version}")


@app.command("list")
def list_(
    service: ServiceOption = "",
    inventory: InventoryOption = None,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List releases: in the bundle here, and on the gateway when it answers."""
    with speaking("model list", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.releases.listing import list_releases

        fleet = read_fleet(find_inventory(inventory))
        services = [fleet.service(service).name] if service else [one.name for one in fleet.services]
        listed = list_releases(fleet, services, _bundle(fleet, bundle))
        if listed.silence:
            speaker.say(f"[yellow]the gateway was not asked: {listed.silence}[/yellow]")
        speaker.result({"releases": listed.releases, "gateway": listed.silence or "asked"}, _table(listed.releases))


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help="Only this version. Default: every release of the bundle.",
                                           show_default=False)] = "",
    service: ServiceOption = "",
    inventory: InventoryOption = None,
    bundle: BundleOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check signature, manifest and every file of releases in the bundle. Reads only."""
    with speaking("model verify", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli.views import human_bytes
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import the_service
        from opsctl.releases.listing import verify_version
        from opsctl.releases.store import reporting, verify_all

        fleet = read_fleet(find_inventory(inventory))
        where = _bundle(fleet, bundle)

        def report(name: str) -> Any:
            return reporting(speaker.emit, f"verifying {name}")

        if version:
            found = verify_version(where, the_service(fleet, service).name, version, _allowed_signers(fleet), report)
        else:
            found = verify_all(where, _allowed_signers(fleet), report, fleet.service(service).name if service else "")
        rows = [{"service": one.release.service, "version": one.release.version, "digest": one.digest,
                 "files": len(one.release.files), "bytes": one.release.size} for one in found]
        lines = [f"{one.release.service} {one.release.version}: {_counted(len(one.release.files))}, "
                 f"{human_bytes(one.release.size)}, whole and signed" for one in found]
        speaker.result({"verified": rows}, "\n".join(lines) or f"{where} holds no release")


def _table(releases: list[dict[str, Any]]) -> Table | str:
    from opsctl.cli.views import human_bytes

    if not releases:
        return "no release yet; opsctl model import makes one"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("service", "version", "digest", "size", "created", "where", "ledger"):
        table.add_column(column)
    for row in releases:
        table.add_row(row["service"], row["version"], row["digest"][:12], human_bytes(row["bytes"]),
                      row["created"][:16].replace("T", " "),
                      " ".join(row["where"]), " ".join(["now"] * row["now"] + ["bad"] * row["bad"]))
    return table


def _counted(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"


def _bundle(fleet: Fleet, bundle: Path | None) -> Path:
    return (bundle or fleet.directory / "bundle").absolute()


def _allowed_signers(fleet: Fleet) -> Path:
    return fleet.directory / "trust" / "allowed_signers"
