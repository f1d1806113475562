"""Curves of the guard's bench as an SVG file, by hand: a row of panels, a column for each trouble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT, GAP, LEFT, TOP = 330, 190, 46, 52, 58
COLOURS = ("#000000", "#0072b2", "#e69f00", "#d55e00", "#009e73")  # told apart by colour-blind people too (Okabe, Ito)
DASHES = ("6 3", "", "2 2", "8 2 2 2", "1 3")
MOST_POINTS = 120  # of a curve: what the eye tells apart
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """``curves`` by name, in the same order everywhere; ``marks`` are level lines with their names."""

    title: str
    unit: str
    x: tuple[float, float]
    y: tuple[float, float]
    curves: Mapping[str, Points]
    marks: tuple[tuple[float, str], ...] = ()


def svg(title: str, note: str, rows: Sequence[Sequence[Panel]]) -> str:
    """The picture: rows of panels, a legend on top."""
    width = LEFT + max(len(row) for row in rows) * (WIDTH + GAP)
    height = TOP + len(rows) * (HEIGHT + GAP) + 26
    names = list(rows[0][0].curves)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
             f'<rect width="{width}" height="{height}" fill="white"/>', _text(LEFT, 18, title, size=14)]
    for number, name in enumerate(names):
        x = LEFT + number * 190
        parts += [f'<line x1="{x}" y1="34" x2="{x + 26}" y2="34" {_pen(number)}/>', _text(x + 32, 38, name)]
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            parts += _panel(panel, LEFT + column * (WIDTH + GAP), TOP + row * (HEIGHT + GAP))
    return "\n".join([*parts, _text(LEFT, height - 8, note, colour="#555"), "</svg>", ""])


def _panel(panel: Panel, left: float, top: float) -> list[str]:
    (x0, x1), (y0, y1) = panel.x, panel.y

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * WIDTH, top + HEIGHT - (min(max(y, y0), y1) - y0) / (y1 - y0) * HEIGHT

    parts = [f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
             _text(left, top - 5, panel.title)]
    for part in range(5):
        x, y = x0 + (x1 - x0) * part / 4, y0 + (y1 - y0) * part / 4
        parts += [_text(place(x, y0)[0], top + HEIGHT + 14, f"{x:g} s", anchor="middle", colour="#555"),
                  _text(left - 5, place(x0, y)[1] + 4, f"{y:g}{panel.unit}", anchor="end", colour="#555")]
    for level, name in panel.marks:
        y = place(x0, level)[1]
        parts += [f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#bbb"/>',
                  _text(left + WIDTH - 4, y - 3, name, anchor="end", colour="#777")]
    for number, points in enumerate(panel.curves.values()):
        shown = [place(x, y) for x, y in points if x0 <= x <= x1]
        shown = shown[::max(1, len(shown) // MOST_POINTS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in shown)
        parts.append(f'<polyline points="{line}" fill="none" {_pen(number)}/>')
    return parts


def _pen(number: int) -> str:
    dashes = f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
    return f'stroke="{COLOURS[number]}" stroke-width="1.6"{dashes}'


def _text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#000", size: int = 11) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
            f"{escape(words)}</text>")
