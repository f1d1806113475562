"""A load to look at: streams in flight by release over the last minute, and a strip for every instance.

``render`` draws a ``Picture``; ``plain_line`` says the same in one line. Both are pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from opsctl.lab.load import LOOK_S
from opsctl.lab.load_figures import Figures, version
from opsctl.lab.load_picture import Column, Picture, columns, looks_a_column, state

SECONDS = 60.0  # at least so much of the past
HEIGHT = 10  # lines of the graph
WIDEST = 120  # two columns a second
EIGHTHS = " ▁▂▃▄▅▆▇█"
# Blue and orange first: they differ for everybody's eyes, and on light and dark terminals.
COLOURS = ("#4c9be8", "#f2a33a", "#67c587", "#c678dd", "#e0556b", "#3fc1c9")
FILLS = "█▒▓░"  # instead, where there are no colours
NO_STYLE = Style.null()
WAITING = "grey42"
WAITING_FILL = "·"
STATE_STYLE = {"serving": "green", "draining": "yellow", "drained": "yellow", "down": "red"}


@dataclass(frozen=True)
class Ink:
    """How releases are told apart; without colours by pattern."""

    releases: tuple[str, ...]
    colours: bool = True

    def colour(self, release: str) -> str:
        if release not in self.releases:
            return WAITING
        return COLOURS[self.releases.index(release) % len(COLOURS)]

    def fill(self, release: str) -> str:
        if release not in self.releases:
            return WAITING_FILL
        return FILLS[self.releases.index(release) % len(FILLS)]

    def sample(self, release: str) -> Text:
        """A piece of a release's colour, for the legend."""
        return Text("■", self.colour(release)) if self.colours else Text(self.fill(release))


def render(picture: Picture, width: int, *, height: int = HEIGHT, instances: int = 16, colours: bool = True
           ) -> RenderableType:
    """The whole picture for a terminal of ``width`` characters, with at most so many ``instances``."""
    ink = Ink(picture.releases, colours)
    label = max((len(server) for server in picture.servers), default=0) + 1
    wide = max(10, min(WIDEST, width - label - 34))
    size = looks_a_column(wide, SECONDS)
    shown = columns(picture.looks, picture.servers, wide, size)
    top = scale(shown, picture.clients)
    parts: list[RenderableType] = [_title(picture), Text()]
    parts += _graph(shown, wide, label, height, top, ink)
    parts += [_axis(wide, label, round(wide * size * LOOK_S)), Text()]
    parts += [*_strips(picture, shown, wide, label, ink, instances), Text(), _legend(picture, ink)]
    return Group(*parts)


def scale(shown: Sequence[Column], clients: int) -> int:
    """Streams at the top of the graph: all clients, or more if there are."""
    return max([clients, 1, *(round(sum(column.by_release.values()) + column.waiting) for column in shown)])


def _title(picture: Picture) -> Text:
    minutes, seconds = divmod(int(picture.seconds), 60)
    tokens = f", {picture.tokens} tokens a stream" if picture.tokens else ", finding how long a stream is"
    return Text.assemble((picture.service, "bold"), f"  {picture.clients} clients{tokens}, ",
                         f"{picture.per_second:.0f} tokens/s", ("  ", ""), (f"{minutes}:{seconds:02d}", "dim"))


def _graph(shown: Sequence[Column], wide: int, label: int, height: int, top: int, ink: Ink) -> list[Text]:
    """Stacked areas, the newest release below, streams that no instance has answered yet above all."""
    padding = [Column({}, 0.0, 0, {})] * (wide - len(shown))
    stacks = [_stack(column, ink) for column in (*padding, *shown)]
    lines = []
    for row in reversed(range(height)):
        mark = {height - 1: str(top), height // 2: str(round(top * (height // 2 + 1) / height)), 0: "0"}.get(row, "")
        line = Text(f"{mark:>{label - 1}} ", "dim")
        _fill(line, [_cell([(release, count * height * 8 / top - row * 8) for release, count in stack], ink)
                     for stack in stacks])
        lines.append(line)
    lines[0].append("  streams in flight", "dim")
    losses = "".join("x" if column.lost else " " for column in (*padding, *shown))
    if losses.strip():
        lines.append(Text.assemble((f"{'lost':>{label - 1}} ", "bold red"), (losses, "bold red")))
    return lines


def _fill(line: Text, cells: Iterable[tuple[str, Style]]) -> None:
    """Appends characters, those of one style as one piece: a terminal far away gets a tenth of the bytes."""
    for style, group in itertools.groupby(cells, key=lambda cell: cell[1]):
        line.append("".join(character for character, _ in group), style)


def _stack(column: Column, ink: Ink) -> list[tuple[str, float]]:
    """(release, upper edge in streams), from the bottom; the last one is what waits."""
    edges, upper = [], 0.0
    for release in reversed(ink.releases):
        upper += column.by_release.get(release, 0.0)
        edges.append((release, upper))
    upper += sum(count for release, count in column.by_release.items() if release not in ink.releases) + column.waiting
    return [*edges, ("", upper)]


def _cell(edges: Iterable[tuple[str, float]], ink: Ink) -> tuple[str, Style]:
    """One character, of edges in eighths above its lower side: the two largest areas in it, one above the other."""
    pieces, below = [], 0.0
    for release, edge in edges:
        upper = min(8.0, max(below, edge))
        if upper - below >= 0.5:
            pieces.append((upper - below, release, upper))
        below = upper
    if not pieces:
        return " ", NO_STYLE
    largest = sorted(sorted(pieces, reverse=True)[:2], key=lambda piece: piece[2])
    first = largest[0]
    if not ink.colours:
        return (ink.fill(max(largest)[1]) if sum(piece[0] for piece in largest) >= 4 else " "), NO_STYLE
    eighths = round(first[2])
    if len(largest) == 2:
        return EIGHTHS[eighths], Style(color=ink.colour(first[1]), bgcolor=ink.colour(largest[1][1]))
    return EIGHTHS[eighths], Style(color=ink.colour(first[1]))


def _axis(wide: int, label: int, seconds: int) -> Text:
    past, middle = f"{seconds} s ago", f"{seconds // 2} s"
    line = f"{past:<{wide // 2 - len(middle) // 2}}{middle}"
    return Text(" " * label + f"{line:<{wide - 3}}now", "dim")


def _strips(picture: Picture, shown: Sequence[Column], wide: int, label: int, ink: Ink, most: int) -> list[Text]:
    look = picture.look
    if look is None:
        return [Text("no look yet", "dim")]
    peak = max((count for column in shown for _, count in column.by_server.values()), default=0.0) or 1.0
    lines = []
    for server in picture.servers[:most]:
        line = Text(f"{server:<{label}}" + " " * (wide - len(shown)))
        _fill(line, [_bar(*column.by_server[server], peak, ink) for column in shown])
        release, word = look.releases.get(server, ""), state(look, server)
        line.append("  ").append_text(ink.sample(release))
        line.append(f" {version(release) or '?':<6} {look.in_flight.get(server, 0):>3} in flight  ")
        lines.append(line.append(word, STATE_STYLE.get(word, "")))
    hidden = len(picture.servers) - most
    return lines if hidden <= 0 else [*lines, Text(f"and {hidden} more", "dim")]


def _bar(release: str, count: float, peak: float, ink: Ink) -> tuple[str, Style]:
    if not count:
        return " ", NO_STYLE
    style = Style(color=ink.colour(release)) if ink.colours else NO_STYLE
    return EIGHTHS[min(8, max(1, round(count * 8 / peak)))], style


def _legend(picture: Picture, ink: Ink) -> Text:
    line = Text()
    for release in picture.releases:
        line.append_text(ink.sample(release)).append(f" {version(release)} ", "bold")
        line.append(f"{picture.tally.get((release, True), 0)} whole   ")
    if picture.look is not None and picture.look.waiting:
        line.append(f"{picture.look.waiting} waiting   ", WAITING)
    return line.append(f"{picture.lost} lost", "bold red" if picture.lost else "bold green")


def plain_line(picture: Picture) -> str:
    """``v1 24, v2 12 in flight, 2 waiting, 712 tokens/s, 0 of 212 lost; gpu-1.chat.0 v2 12 serving, ...``."""
    streams = [f"{version(release) or '?'} {count}" for release, count in sorted(picture.in_flight().items())]
    look = picture.look
    instances = [] if look is None else [
        " ".join(filter(None, (server, version(look.releases.get(server, "")), str(look.in_flight.get(server, 0)),
                               state(look, server)))) for server in picture.servers[:16]]
    waiting = f", {look.waiting} waiting" if look and look.waiting else ""
    return (f"{', '.join(streams) or 'none'} in flight{waiting}, {picture.per_second:.0f} tokens/s, "
            f"{picture.lost} of {picture.whole + picture.lost} lost; {', '.join(instances)}")


def closing(found: Figures, seconds: float, clients: int) -> RenderableType:
    """The table at the end, by release and instance, and one sentence."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("release", "instance"):
        table.add_column(column)
    for column in ("whole", "lost", "median", "95 %", "most in flight"):
        table.add_column(column, justify="right")
    for row in found.rows:
        table.add_row(row.release or "?", row.server or "none", str(row.whole),
                      f"[bold red]{row.lost}[/]" if row.lost else "0", _seconds(row.median_s), _seconds(row.p95_s),
                      str(row.most_in_flight))
    table.add_row("all", "", str(found.whole), f"[bold red]{found.lost}[/]" if found.lost else "0",
                  _seconds(found.median_s), _seconds(found.p95_s), "", style="bold")
    least, most = found.tokens
    tokens = f"{least}" if least == most else f"{least} to {most}"
    said = (f"{clients} clients, {seconds:.0f} s, {tokens} tokens a stream: "
            f"{found.lost} of {found.whole + found.lost} lost")
    return Group(table, *(f"  lost: {count} x {why}" + (f" ({server})" if server else "")
                          for why, server, count in found.reasons), said)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
