"""``opsctl top`` as it looks: a line a GPU, with a bar that fills up as its margin goes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from opsctl.cli.status import LEVELS
from opsctl.guarding.rows import NEAR_C, margin

if TYPE_CHECKING:
    from opsctl.guarding.rows import GpuRow

BAR = 10  # characters
COLD_C = 30.0  # a margin at which the bar is empty
EIGHTHS = " ▏▎▍▌▋▊▉█"
GIB = 1024
Cell = Callable[["GpuRow"], "Text | str"]


def bar(left_c: float | None) -> Text:
    """Empty with much margin, full without any."""
    if left_c is None:
        return Text("")
    eighths = round(max(0.0, min(1.0, 1 - left_c / COLD_C)) * BAR * 8)
    whole, part = divmod(eighths, 8)
    filled = "█" * whole + (EIGHTHS[part] if part else "")
    colour = "bold red" if left_c <= 0 else "yellow" if left_c <= NEAR_C else "green"
    return Text.assemble((filled, colour), ("·" * (BAR - len(filled)), "dim"))


def temperature(row: GpuRow) -> Text:
    """``lost`` or ``unreadable`` in its place, where it is."""
    if row.state != "ok":
        return Text(row.state, LEVELS["bad"])
    return Text("" if row.temperature_c is None else f"{row.temperature_c:.0f} °C")


def margin_cell(row: GpuRow) -> Text:
    """The lesser of core and memory; ``m`` says that it is the memory's."""
    left = margin(asdict(row))
    if left is None:
        return Text("")
    memory = row.memory_margin_c is not None and (row.margin_c is None or row.memory_margin_c < row.margin_c)
    style = "bold red" if left <= 0 else "yellow" if left <= NEAR_C else ""
    return Text(f"{left:.0f}{'m' if memory else ''}", style)


def power(row: GpuRow) -> str:
    if row.power_w is None:
        return ""
    return f"{row.power_w:.0f}" + ("" if row.power_limit_w is None else f"/{row.power_limit_w:.0f}") + " W"


def clocks(row: GpuRow) -> Text:
    """``1584 MHz guard``: who keeps them down."""
    if row.clock_mhz is None and row.clock_limit_mhz is None:
        return Text(row.slowed_by)
    mhz = row.clock_mhz if row.clock_mhz is not None else row.clock_limit_mhz
    style = {"": "", "guard": "cyan", "driver": "yellow"}.get(row.slowed_by, "bold red")
    return Text(f"{mhz:.0f} MHz {row.slowed_by}".rstrip(), style)


def memory(row: GpuRow) -> str:
    if row.memory_used_mib is None:
        return ""
    total = "" if row.memory_total_mib is None else f"/{row.memory_total_mib / GIB:.0f}"
    return f"{row.memory_used_mib / GIB:.0f}{total} GiB"


def rung(row: GpuRow) -> Text:
    weight = "" if row.weight in (None, 100) else f" {row.weight} %"
    style = LEVELS["bad"] if row.rung is not None and row.rung >= 4 else LEVELS["warning"] if row.rung else ""
    return Text(f"{row.word}{weight}{' latched' if row.latched else ''}", style)


def soon(row: GpuRow) -> Text:
    seconds = row.time_to_slowdown_s
    return Text("") if seconds is None else Text(f"{seconds:.0f} s", "bold red" if seconds < 10 else "yellow")


# Heading, cell, rank: the lower, the longer it stays when the terminal is narrow; whether numbers stand to the right.
COLUMNS: tuple[tuple[str, Cell, int, bool], ...] = (
    ("host", lambda row: row.host, 0, False),
    ("GPU", lambda row: f"{row.index} {row.model}".rstrip(), 1, False),
    ("instance", lambda row: row.instance, 9, False),
    ("temp", temperature, 2, True),
    ("", lambda row: bar(margin(asdict(row))), 7, False),
    ("margin", margin_cell, 3, True),
    ("slowdown", soon, 6, True),
    ("rung", rung, 4, False),
    ("clocks", clocks, 5, False),
    ("power", power, 10, True),
    ("busy", lambda row: "" if row.utilisation_percent is None else f"{row.utilisation_percent:.0f} %", 8, True),
    ("memory", memory, 12, True),
    ("note", lambda row: Text(row.note, LEVELS[row.level]), 11, False),
)
ALWAYS = 4  # ranks up to this one are shown, and cut off, on any terminal
GAP = 2  # between columns


def table(rows: Sequence[GpuRow], width: int) -> Table:
    """The columns that fit into ``width`` characters whole."""
    columns = {heading: [_text(cell(row)) for row in rows] for heading, cell, _, _ in COLUMNS}
    left, shown = width + GAP, set()
    for heading, _, rank, _ in sorted(COLUMNS, key=lambda column: column[2]):
        left -= max([len(heading), *(text.cell_len for text in columns[heading])]) + GAP
        if left < 0 and rank > ALWAYS:
            break
        shown.add(heading)
    found = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    chosen = [(heading, right) for heading, _, _, right in COLUMNS if heading in shown]
    for heading, right in chosen:
        found.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for cells in zip(*(columns[heading] for heading, _ in chosen), strict=True):
        found.add_row(*cells)
    return found


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def summary(rows: Sequence[GpuRow]) -> str:
    """``16 GPUs on 2 hosts; least margin -1 °C (gpu-1 GPU 0); 1 slowed by the guard, 2 by the hardware``."""
    hosts = len({row.host for row in rows})
    parts = [f"{len(rows)} GPU{'' if len(rows) == 1 else 's'} on {hosts} host{'' if hosts == 1 else 's'}"]
    known = [(left, row) for row in rows if (left := margin(asdict(row))) is not None]
    if known:
        left, row = min(known, key=lambda one: one[0])
        parts.append(f"least margin {left:.0f} °C ({row.host} GPU {row.index})")
    slowed = [f"{count} by the {who}" for who in ("guard", "driver", "hardware")
              if (count := sum(row.slowed_by == who for row in rows))]
    return "; ".join([*parts, *([f"slowed: {', '.join(slowed)}"] if slowed else [])])


def once(rows: Sequence[GpuRow], silent: Sequence[Mapping[str, str]], width: int) -> RenderableType:
    """All of it, for a pipe or ``--once``."""
    return Group(table(rows, width) if rows else Text("no GPUs"), *_silent(silent), Text(summary(rows), "dim"))


def frame(rows: Sequence[GpuRow], silent: Sequence[Mapping[str, str]], asked: int, size: tuple[int, int], *,
          at: str, by_margin: bool) -> RenderableType:
    """One picture of the live table; ``asked`` hosts have said nothing at all yet."""
    width, height = size
    keys = f"q quit  m {'inventory order' if by_margin else 'hottest first'}"
    head = Text.assemble((f"{at}  ", "dim"), summary(rows), (f"; {asked} not heard yet" if asked else "", "yellow"))
    room = max(1, height - 4 - 2 * min(len(silent), 5))  # what they say may need two lines
    hidden = len(rows) - room
    more = [Text(f"and {hidden} more; m or --sort margin shows the hottest first", "dim")] if hidden > 0 else []
    said = [*_silent(silent[:5])] if len(silent) <= 5 else [*_silent(silent[:4]),
                                                            Text(f"and {len(silent) - 4} more hosts", "bold red")]
    return Group(head, Text(keys, "dim"), table(rows[:room], width), *more, *said)


def _silent(silent: Sequence[Mapping[str, str]]) -> list[Text]:
    return [Text(one["words"] if one["words"].startswith(one["host"]) else f"{one['host']}: {one['words']}", "bold red")
            for one in silent]
