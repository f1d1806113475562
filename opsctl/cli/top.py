"""``opsctl top``: the GPUs of the fleet, as they are now."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsctl.cli.speak import AsJson, Debug, Inventory, Limit, Speaker, find_inventory, speaking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opsctl.fleet.model import Fleet, Host
    from opsctl.guarding.looking import Answer, Heard

LATE_S = 10.0  # a host that said nothing for so long is told


class Sort(StrEnum):
    """In which order."""

    INVENTORY = "inventory"
    MARGIN = "margin"


def top(
    inventory: Inventory = None,
    limit: Limit = "",
    sort: Annotated[Sort, typer.Option("--sort", help="margin: the least margin first.")] = Sort.INVENTORY,
    every: Annotated[float, typer.Option("--every", min=0.5, max=60.0, metavar="SECONDS",
                                         help="How often hosts are asked.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once; so it does off a terminal.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Watch the fleet's GPUs: temperature and margin, slowdown to come, rung, clocks, power, load; q or Ctrl-C ends.

    margin: degrees until a GPU is slowed down (m: of its memory); the bar is full at 0. clocks say who keeps them down:
    guard, driver or hardware.
    """
    with speaking("top", as_json=as_json, debug=debug) as speaker:
        from opsctl.cli import guard_view, top_view
        from opsctl.fleet.inventory import read_fleet
        from opsctl.fleet.select import select_hosts
        from opsctl.fleet.ssh_config import write_ssh_config
        from opsctl.guarding.looking import look, watched
        from opsctl.guarding.rows import gpu_rows, silent

        fleet = read_fleet(find_inventory(inventory))
        hosts = watched(fleet, select_hosts(fleet, limit))
        write_ssh_config(fleet)
        by_margin = sort is Sort.MARGIN
        if not once and not as_json and speaker.out.is_terminal:
            _live(speaker, fleet, hosts, every, by_margin=by_margin)
            return
        with speaker.waiting(f"asking {len(hosts)} hosts"):
            answers = look(fleet, hosts)
        rows, quiet = gpu_rows(hosts, answers, by_margin=by_margin), silent(hosts, answers)
        width = speaker.out.width if speaker.out.is_terminal else guard_view.PIPE_WIDTH
        speaker.result({"inventory": str(fleet.inventory), "gpus": [row.as_document() for row in rows],
                        "silent": quiet}, guard_view.Whole(top_view.once(rows, quiet, width)))


def _live(speaker: Speaker, fleet: Fleet, hosts: Sequence[Host], every_s: float, *, by_margin: bool) -> None:
    """Until q or Ctrl-C, on the terminal's other screen, as top does."""
    from rich.live import Live

    from opsctl.cli import keys, top_view
    from opsctl.guarding.looking import Watcher
    from opsctl.guarding.rows import gpu_rows, silent

    with Watcher(fleet, hosts, every_s) as watcher, keys.reading() as heard, \
            Live(console=speaker.out, screen=True, auto_refresh=False) as live:
        while True:
            answers = told(watcher.heard(), time.monotonic(), max(LATE_S, 3 * every_s))
            live.update(top_view.frame(
                gpu_rows(hosts, answers, by_margin=by_margin), silent(hosts, answers),
                sum(answer is None for answer in answers.values()), speaker.out.size, at=time.strftime("%H:%M:%S"),
                by_margin=by_margin), refresh=True)
            key = keys.wait(min(every_s, 0.5), heard=heard)
            if key == "q":
                return
            by_margin ^= key == "m"


def told(heard: Mapping[str, Heard], now_s: float, late_s: float) -> dict[str, Any]:
    """Each host's answer; one that is older than ``late_s`` says so. Pure."""
    found: dict[str, Answer | None] = {}
    for host, one in heard.items():
        answer = one.answer
        if isinstance(answer, dict) and now_s - one.at_s > late_s:
            answer = {**answer, "words": f"{host} said nothing for {now_s - one.at_s:.0f} s"}
        found[host] = answer
    return found
