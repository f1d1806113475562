"""``opsctl lab inbox``: what the alerts of a lab told the person on call."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, speaking
from opsctl.errors import ExitCode, UsageError


def inbox(
    alert: Annotated[str, typer.Option("--alert", help="Only what is about this alert.", metavar="NAME")] = "",
    until: Annotated[str, typer.Option("--until", metavar="STATUS", help="With --alert: wait until webhook and mail "
                                       "last said this: firing or resolved.")] = "",
    within: Annotated[float, typer.Option("--within", min=1, metavar="SECONDS", help="Wait no longer.")] = 120.0,
    name: Annotated[str | None, typer.Option("--name", help="Which lab. Default: lab, or the only one there is.",
                                             show_default=False)] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the webhook calls and mails that reached the lab's inbox on ops-1 (a lab with GPUs has one).

    Exit 9: what --until waits for did not come.

    [dim]$ opsctl lab inbox --alert GpuThermalMarginLow --until firing[/dim]
    """
    with speaking("lab inbox", as_json=as_json, debug=debug) as speaker:
        from opsctl.engines.events import Progress
        from opsctl.lab import inbox as inboxes
        from opsctl.lab import laboratory

        if until not in ("", "firing", "resolved") or (until and not alert):
            raise UsageError("inbox.bad_until", f"--until {until} waits for firing or resolved, of one --alert.",
                             hint="opsctl lab inbox --alert GpuThermalMarginLow --until firing")
        machine, root = laboratory.inbox_of(name)

        def tell(waited_s: float) -> None:
            speaker.emit(Progress(f"waiting for {alert} to be {until}", int(waited_s), 0, "seconds", host=machine.name))

        if until:
            waited = inboxes.wait_for(root, alert, until, within, tell)
            messages = inboxes.last_words(waited.messages, alert)
        else:
            waited = inboxes.Waited(inboxes.read(root), came=True, waited_s=0.0)
            messages = inboxes.about(waited.messages, alert) if alert else waited.messages
        speaker.result({"messages": messages, "waited_s": round(waited.waited_s, 1)}, _render(messages),
                       ExitCode.DONE if waited.came else ExitCode.FOUND_WRONG)
        if not waited.came:
            speaker.say(Text(f"{alert} was not {until} by webhook and mail within {within:g} s", "red"))


def _render(messages: list[dict[str, Any]]) -> Group | str:
    if not messages:
        return "nothing has arrived"
    parts: list[Text] = []
    for one in messages:
        style = "green" if one["status"] == "resolved" else "red"
        if one["by"] == "mail":
            parts += [Text(f"{one['at']}  mail to {', '.join(one['to'])}: {one['subject']}", f"bold {style}"),
                      *(Text(f"  {line}") for line in one["text"].strip().split("\n"))]
            continue
        for alert in one["alerts"]:
            parts += [Text(f"{one['at']}  webhook: {alert['status']} {alert['alertname']}", f"bold {style}"),
                      Text(f"  {alert['summary']}"), Text(f"  do: {alert['action']}")]
    return Group(*parts)
