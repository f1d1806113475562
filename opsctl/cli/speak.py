"""How a verb speaks: stdout is the result, stderr is talk, ``--json`` is one document, errors become exit codes.

>>> with speaking("status", as_json=True) as speaker:
...     speaker.result({"hosts": []}, "no hosts")
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from opsctl.cli.signals import Interrupts
from opsctl.cli.views import View, choose_view
from opsctl.engines.events import Event, RunStarted
from opsctl.errors import ConfigurationError, ExitCode, OpsctlError, UsageError
from opsctl.runs import Declined

Inventory = Annotated[
    Path | None,
    typer.Argument(help="Inventory file. Default: $OPSCTL_INVENTORY, then ./inventory.ini.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", hidden=True)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
NOT_KEPT = ("inventory", "as_json", "debug", "ask_become_pass", "only_plan")
Limit = Annotated[str, typer.Option("--limit", help="Only these hosts: a host pattern, as Ansible's.")]
AllowFinding = Annotated[list[str] | None, typer.Option(
    "--allow-finding", metavar="ID", show_default=False,
    help="Go on though opsctl check finds this, by its id (driver-run-file); may be given again.")]


class Result(Console):
    """A console for stdout: a reader that went early (``| head``) is no error of ours."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process, or whatever thread happens to speak."""
        _say_no_more(self)


class Talk(Result):
    """A console for stderr: when its listener is gone, or its disk is full, the work goes on without a word."""

    def __exit__(self, *about: Any) -> None:
        try:
            super().__exit__(*about)  # everything that Rich writes comes by here
        except OSError:
            _say_no_more(self)


def _say_no_more(console: Console) -> None:
    """Also not what lies in Python's own buffer, which would be tried again at exit and turn its code into 120."""
    console.quiet = True
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, console.file.fileno())
        os.close(nowhere)


class Speaker:
    """What a verb says and where; views get its events."""

    def __init__(self, verb: str, *, as_json: bool, debug: bool) -> None:
        self.verb = verb
        self.as_json = as_json
        self.debug = debug
        self.exit_code = ExitCode.DONE
        self.out = Result(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.talk = Talk(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self.view: View = choose_view(self.talk, quiet_terminal=as_json)
        self.run = ""  # the run that is under way
        self.interrupts = Interrupts(lambda: f"{self.way_on()}\n")

    def emit(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.run = event.run
        self.view.show(event)

    def way_on(self) -> str:
        """What to type after an interruption."""
        same = "the same command again continues"
        return f"opsctl resume {self.run}   continues, and so does the same command again" if self.run else same

    def say(self, text: RenderableType) -> None:
        """Talk: goes to stderr, never into a pipe."""
        self.talk.print(text)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner while something takes seconds; on a terminal only."""
        if not self.talk.is_terminal:
            yield
            return
        with self.talk.status(what):
            yield

    def result(self, document: dict[str, Any], text: RenderableType, exit_code: ExitCode = ExitCode.DONE) -> None:
        """The one result of the verb: ``document`` with ``--json``, else ``text``."""
        self.view.close()
        self.exit_code = exit_code
        if self.as_json:
            self._document(document)
        else:
            self.out.print(text)

    def confirm(self, question: str, *, yes: bool) -> None:
        """Asks on a terminal; off one, ``--yes`` is wanted.

        Raises:
            UsageError: off a terminal without ``--yes``.
            Declined: the answer was no.
            KeyboardInterrupt: it was Ctrl-C.
        """
        if yes:
            return
        if not sys.stdin.isatty():
            raise UsageError("confirm.needs_yes", f"{self.verb} asks before it acts, and there is no terminal.",
                             hint="look at what it printed, then add --yes")
        try:
            answer = typer.confirm(question, err=True)
        except typer.Abort:
            raise KeyboardInterrupt from None
        if not answer:
            raise Declined

    def _document(self, document: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps({"schema": f"opsctl.{self.verb.replace(' ', '-')}/v1", **document}, indent=2,
                                    default=str) + "\n")
        sys.stdout.flush()

    def _interrupted(self, code: str, message: str, hint: str) -> None:
        self.view.close()
        self.talk.print(f"{message}; {hint}" if hint else message, style="yellow", markup=False)
        if self.as_json:
            self._document({"error": {"code": code, "message": message, "hint": hint}, "run": self.run,
                            "exit_code": int(ExitCode.INTERRUPTED)})

    def _error(self, error: OpsctlError) -> None:
        self.view.close()
        for line in error.log_tail:
            self.talk.print(f"  | {line}", markup=False, style="dim")
        self.talk.print(f"error: {error.message}", markup=False, style="bold red")
        if error.hint:
            self.talk.print(f" hint: {error.hint}", markup=False, style="yellow")
        self.talk.print(f" code: {error.code} (exit {int(error.exit_code)})", markup=False, style="dim")
        if self.as_json:
            self._document({"error": error.as_document(), "exit_code": int(error.exit_code)})


@contextmanager
def speaking(verb: str, *, as_json: bool = False, debug: bool = False) -> Iterator[Speaker]:
    """Runs a verb's body; turns errors into one sentence and an exit code, and signals into exit 130."""
    speaker = Speaker(verb, as_json=as_json, debug=debug or bool(os.environ.get("OPSCTL_DEBUG")))
    speaker.interrupts.begin()
    try:
        yield speaker
    except OpsctlError as error:
        if speaker.debug:
            traceback.print_exc()
        speaker._error(error)
        raise typer.Exit(int(error.exit_code)) from None
    except Declined:
        speaker._interrupted("declined", "declined; nothing was changed", "")
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    except (KeyboardInterrupt, typer.Abort):
        speaker._interrupted("interrupted", "interrupted", speaker.way_on())
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None
    except typer.Exit:
        raise
    except Exception as error:  # the one place that keeps tracebacks from users
        if speaker.debug:
            raise
        speaker._error(OpsctlError("unexpected", f"unexpected {type(error).__name__}: {error}",
                                   hint="run again with --debug for the traceback, and report it"))
        raise typer.Exit(int(ExitCode.UNEXPECTED)) from None
    finally:
        speaker.view.close()
        speaker.interrupts.end()
    if speaker.exit_code is not ExitCode.DONE:
        raise typer.Exit(int(speaker.exit_code))


def find_inventory(argument: Path | None) -> Path:
    """The inventory a verb works on: argument, ``$OPSCTL_INVENTORY``, ``./inventory.ini``; absolute.

    Raises:
        ConfigurationError: the file is not there.
    """
    path = argument or Path(os.environ.get("OPSCTL_INVENTORY") or "inventory.ini")
    if not path.is_file():
        raise ConfigurationError("inventory.missing", f"there is no inventory at {path.absolute()}.",
                                 hint="opsctl init makes one; opsctl lab up makes a whole fleet to try")
    return path.absolute()


@dataclass(frozen=True)
class Resumed:
    """What ``opsctl resume`` hands to the verb that it calls."""

    run: str


def verb_of(context: typer.Context) -> str:
    """Its name, whoever calls it: ``opsctl resume`` calls it ``opsctl update-model``, for its usage lines."""
    return str(context.command.name)


def typed(context: typer.Context) -> tuple[str, ...]:
    """The command line as it was typed, for whoever resumes the run, without what was for this time or person alone."""
    words = [verb_of(context)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if parameter.param_type_name != "option" or name in NOT_KEPT or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, bool):
                words.append(max([*(parameter.opts if one else parameter.secondary_opts)], key=len))
            else:
                words += [max(parameter.opts, key=len), str(one.absolute() if isinstance(one, Path) else one)]
    return tuple(words)


def wanted_run(context: typer.Context) -> str:
    """The run that ``opsctl resume`` wants continued; empty when a person typed the verb."""
    return context.obj.run if isinstance(context.obj, Resumed) else ""
