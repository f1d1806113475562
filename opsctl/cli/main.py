"""The command line: collects one file per verb. ``provision.py`` is the one to read first."""

from __future__ import annotations

import typer

import opsctl
from opsctl.cli import (
    bundle,
    check,
    doctor,
    drain,
    drift,
    drill,
    execute,
    gc,
    gpus,
    guard,
    history,
    hold,
    init,
    lab,
    lock,
    logs,
    model,
    plan,
    provision,
    release,
    resume,
    rollback,
    runs,
    stack,
    stage,
    status,
    top,
    trust,
    undrain,
    update_model,
    upgrade_driver,
    verify,
)

app = typer.Typer(
    name="opsctl",
    help="Bare GPU machines to guarded, monitored LLM servers; models changed under live traffic.\n\n"
    "Try it: [bold]opsctl lab up[/bold], then [bold]opsctl provision[/bold].",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opsctl {opsctl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options that stand before a verb."""


app.command("init")(init.init)
app.command("trust")(trust.trust)
app.command("check")(check.check)
app.command("plan")(plan.plan)
app.command("provision")(provision.provision)
app.command("status")(status.status)
app.command("top")(top.top)
app.command("verify")(verify.verify)
app.command("drift")(drift.drift)
app.add_typer(stack.app, name="stack")
app.command("stage")(stage.stage)
app.command("update-model")(update_model.update_model)
app.command("rollback")(rollback.rollback)
app.command("upgrade-driver")(upgrade_driver.upgrade_driver)
app.command("drain")(drain.drain)
app.command("undrain")(undrain.undrain)
app.add_typer(guard.app, name="guard")
app.add_typer(drill.app, name="drill")
app.command("history")(history.history)
app.command("gc")(gc.gc)
app.command("runs")(runs.runs)
app.command("resume")(resume.resume)
app.command("hold")(hold.hold)
app.command("release")(release.release)
app.add_typer(lock.app, name="lock")
app.command("logs")(logs.logs)
app.command("exec")(execute.execute)
app.command("doctor")(doctor.doctor)
app.add_typer(gpus.app, name="gpus")
app.add_typer(model.app, name="model")
app.add_typer(bundle.app, name="bundle")
app.add_typer(lab.app, name="lab")


def main() -> None:
    """The ``opsctl`` command."""
    app()
