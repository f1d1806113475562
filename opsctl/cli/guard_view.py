"""What the guard's verbs print: tables and sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from opsctl.cli.status import LEVELS

PIPE_WIDTH = 300

if TYPE_CHECKING:
    from opsctl.guarding.explaining import Section
    from opsctl.guarding.ordering import Change
    from opsctl.guarding.rows import InstanceRow


def instances(rows: Sequence[InstanceRow], silent: Sequence[Mapping[str, str]] = ()) -> Group:
    """``opsctl guard status``; hosts that say nothing and have no row stand below."""
    table = plain("host", "instance", "rung", "weight", "clocks", "margin", "slowdown", "mode", "why")
    for row in rows:
        rung = row.word + (", down" if row.down else "") + (", latched" if row.latched else "")
        table.add_row(row.host, row.instance, Text(rung, LEVELS[row.level]),
                      "" if row.weight is None else f"{row.weight} %", row.clocks, margin_words(row), soon(row),
                      row.mode, Text(row.why, LEVELS[row.level]))
    shown = {row.host for row in rows}
    first = table if rows else Text("no instance has GPUs here: nothing to guard")
    return Group(first, *(Text(one["words"], "bold red") for one in silent if one["host"] not in shown))


def margin_words(row: InstanceRow) -> str:
    """``-1 °C (GPU 3)``; empty where the GPUs tell none."""
    return "" if row.margin_c is None else f"{row.margin_c:.0f} °C (GPU {row.gpu})"


def soon(row: InstanceRow) -> str:
    return "" if row.time_to_slowdown_s is None else f"in {row.time_to_slowdown_s:.0f} s"


def sections(found: Sequence[Section]) -> Group:
    """``opsctl guard explain``."""
    lines: list[Text] = []
    for title, said in found:
        lines += [Text(title, "bold"), *(Text(f"  {line}") for line in said), Text()]
    return Group(*lines[:-1])


def planned(changes: Sequence[Change]) -> Table:
    """What ``opsctl guard mode`` would change."""
    table = plain("host", "now", "then", "at once")
    for one in changes:
        table.add_row(one.host, one.before, one.after, one.effect if one.changed else "as it is")
    return table


class Whole:
    """Off a terminal nothing is folded or cut: whoever reads a pipe wants a row a line."""

    def __init__(self, what: RenderableType) -> None:
        self._what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options if console.is_terminal else options.update(width=max(options.max_width, PIPE_WIDTH))
        yield from console.render(self._what, wide)


def plain(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table
