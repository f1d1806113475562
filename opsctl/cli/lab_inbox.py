"""``opsctl lab inbox``: what the alerts of a lab told the person on call."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from opsctl.cli.speak import AsJson, Debug, speaking
from opsctl.errors import ExitCode, UsageError

LOOK_EVERY_S = 0.5
BOTH = ("webhook", "mail")


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
        from opsctl.lab import inbox as inboxes
        from opsctl.lab import laboratory, layers, state

        if until not in ("", "firing", "resolved") or bool(until) > bool(alert):
            raise UsageError("inbox.bad_until", f"--until {until} waits for firing or resolved, of one --alert.",
                             hint="opsctl lab inbox --alert GpuThermalMarginLow --until firing")
        laboratory.require_root()
        lab = state.find(name)
        root = layers.root(lab.place(lab.machines[0]))
        began = time.monotonic()
        came = True
        messages = inboxes.read(root)
        with speaker.waiting(f"waiting for {alert} to be {until}" if until else "looking"):
            while until and inboxes.last_statuses(messages, alert) != dict.fromkeys(BOTH, until):
                if time.monotonic() - began > within:
                    came = False
                    break
                time.sleep(LOOK_EVERY_S)
                messages = inboxes.read(root)
        waited_s = round(time.monotonic() - began, 1)
        shown = [one for one in messages if not alert or inboxes.last_statuses([one], alert)]
        if until:
            shown = [found[-1] for by in BOTH if (found := [one for one in shown if one["by"] == by])]
        speaker.result({"messages": shown, "waited_s": waited_s}, _render(shown),
                       ExitCode.DONE if came else ExitCode.FOUND_WRONG)
        if not came:
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
