"""``opsctl lab load``: streams through the load balancer, drawn while they run, counted at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.speak import AsJson, Debug, Speaker, find_inventory, speaking
from opsctl.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from opsctl.lab.load import Load

PLAIN_EVERY_S = 5.0
FRAMES_A_SECOND = 4
AUTO = "auto"



def load(
    command: Annotated[list[str] | None, typer.Argument(
        help="Run this under the load, and end with it; write -- before it.", show_default=False)] = None,
    service: Annotated[str, typer.Option("--service", help="Which service. Default: the only one.",
                                         show_default=False)] = "",
    clients: Annotated[int, typer.Option("--clients", min=1, max=1000, help="How many stream at the same time.")] = 36,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long; 0: until Ctrl-C.")] = 0.0,
    streams: Annotated[int, typer.Option("--streams", min=0, help="How many streams; 0: no limit.")] = 0,
    tokens: Annotated[str, typer.Option("--tokens", help="Tokens of a stream; auto: see the next.")] = AUTO,
    seconds_per_stream: Annotated[float, typer.Option(
        "--seconds-per-stream", min=0.1, help="With auto: how long a stream takes, about.")] = 5.0,
    inventory: Annotated[Path | None, typer.Option("--inventory", "-i", show_default=False, help="Inventory file. "
                                                   "Default: $OPSCTL_INVENTORY, then ./inventory.ini.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Stream completions through the load balancer and count what is lost; exit 9 when anything was.

    No stream is tried twice. One is whole when HTTP 200, \\[DONE] and exactly its tokens arrived. Ctrl-C lets
    those that run end, and prints the result.

    [dim]$ opsctl lab load -- opsctl update-model --version v2 --yes[/dim]
    """
    with speaking("lab load", as_json=as_json, debug=debug) as speaker:
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import the_service
        from opsctl.lab.load import Load, target

        path = find_inventory(inventory)
        fleet = read_fleet(path)
        running = Load(target(fleet, the_service(fleet, service).name), clients=clients, tokens=_tokens(tokens),
                       seconds_per_stream=seconds_per_stream, streams=streams)
        returncode = 0
        with _drawn(speaker, running):
            running.start()
            try:
                returncode = _until_done(speaker, running, seconds, command or [], path)
            except KeyboardInterrupt:
                running.ask_to_finish()
                speaker.say("the streams that run end now; Ctrl-C again drops them")
            running.finish()
        _result(speaker, running, returncode)


def _tokens(given: str) -> int | None:
    if given == AUTO:
        return None
    if given.isdigit() and int(given) > 0:
        return int(given)
    raise UsageError("load.bad_tokens", f"--tokens {given} is not a number of tokens.", hint="a number, or auto")


def _until_done(speaker: Speaker, running: Load, seconds: float, command: Sequence[str], inventory: Path) -> int:
    """Returns the exit code of the command; without one, 0."""
    if command:
        running.wait_until_steady()
        return _run(speaker, command, inventory)
    until = time.monotonic() + seconds if seconds else None
    while not running.wait(0.2):
        if until is not None and time.monotonic() >= until:
            break
    return 0


def _run(speaker: Speaker, command: Sequence[str], inventory: Path) -> int:
    """Runs a command off a terminal, on the same fleet; what it says is shown line by line, above the graph."""
    from rich.text import Text

    from opsctl.engines.child import die_with_parent

    environment = os.environ | {"OPSCTL_INVENTORY": str(inventory), "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env=environment,
                                   preexec_fn=die_with_parent)  # noqa: PLW1509 - one prctl call, no allocation
    except OSError as error:
        raise UsageError("load.no_such_command", f"{command[0]}: {(error.strerror or str(error)).lower()}.",
                         hint="opsctl lab load -- COMMAND ARGUMENTS") from None
    assert process.stdout is not None  # noqa: S101 - for the type checker
    try:
        for line in process.stdout:
            speaker.say(Text.from_ansi(line.rstrip("\n")))
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # a terminal has sent it one already; kill has not
        process.wait()
        raise


@contextmanager
def _drawn(speaker: Speaker, running: Load) -> Iterator[None]:
    """The graph on a terminal, a line now and then elsewhere; the last one stays."""
    if speaker.talk.is_terminal and not speaker.as_json and not os.environ.get("CI"):
        from rich.live import Live

        with Live(console=speaker.talk, refresh_per_second=FRAMES_A_SECOND,
                  get_renderable=lambda: _frame(speaker, running)):
            yield
        return
    enough = threading.Event()
    lines = threading.Thread(target=_say_lines, args=(speaker, running, enough), name="lines", daemon=True)
    lines.start()
    try:
        yield
    finally:
        enough.set()
        lines.join()


def _frame(speaker: Speaker, running: Load) -> RenderableType:
    from opsctl.cli.load_view import HEIGHT, render
    from opsctl.lab.load_picture import take

    width, height = speaker.talk.size
    graph = max(3, min(HEIGHT, height - 12))
    return render(take(running), width, height=graph, instances=max(1, height - graph - 8),
                  colours=speaker.talk.color_system is not None and not speaker.talk.no_color)


def _say_lines(speaker: Speaker, running: Load, enough: threading.Event) -> None:
    from opsctl.cli.load_view import plain_line
    from opsctl.lab.load_picture import take

    while not enough.wait(PLAIN_EVERY_S):
        speaker.say(f"{time.strftime('%H:%M:%S')} load: {plain_line(take(running))}")


def _result(speaker: Speaker, running: Load, returncode: int) -> None:
    """The verdict of the load comes before that of the command that ran under it."""
    from opsctl.cli.load_view import closing
    from opsctl.lab.load_figures import figures

    found = figures(running.records)
    document = {"service": running.target.service, "clients": running.clients, "seconds": round(running.now, 1),
                **found.as_document(), "command_exit_code": returncode}
    speaker.result(document, closing(found, running.now, running.clients),
                   ExitCode.FOUND_WRONG if found.lost else ExitCode.DONE)
    if returncode and not found.lost:
        raise typer.Exit(returncode if returncode > 0 else 128 - returncode)
