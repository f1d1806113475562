"""What a load looks like: whole pictures, as snapshots that someone looks at in review.

To take new ones after a change that is meant: OPSCTL_SNAPSHOT=1 .venv/bin/pytest tests/unit/test_lab_load_view.py
To see one as on a terminal: cat tests/unit/snapshots/load-colours.ansi
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from opsctl.cli.load_view import closing, plain_line, render
from opsctl.lab.load import LOOK_S, Look, Record
from opsctl.lab.load_figures import figures, most_in_flight, p95, version
from opsctl.lab.load_picture import Picture, by_release, columns, looks_a_column, state

SNAPSHOTS = Path(__file__).parent / "snapshots"
OLD, NEW = "v1-aaaaaaaaaaaa", "v2-bbbbbbbbbbbb"
SERVERS = ("gpu-1.chat.0", "gpu-2.chat.0", "gpu-3.chat.0")
CHANGES_AT = (10, 26, 42)  # seconds; each drains for 5, is away for 4, then fills again


def look(number: int) -> Look:
    """One moment of a rollout over three instances, 38 streams of 40 clients in the middle of it."""
    at = number * LOOK_S
    in_flight, releases, weights = {}, {}, {}
    for server, begins in zip(SERVERS, CHANGES_AT, strict=True):
        gone = at - begins
        releases[server] = NEW if gone > 9 else OLD
        if gone < 0:
            in_flight[server], weights[server] = 11 + (number + begins) % 4, 100
        elif gone < 5:
            in_flight[server], weights[server] = round(12 * (1 - gone / 5)), 0
        elif gone < 9:
            in_flight[server], weights[server] = 0, -1 if gone < 7 else 0
        else:
            in_flight[server], weights[server] = min(12, round((gone - 9) * 4)) + number % 3, 100
    return Look(at, {server: count for server, count in in_flight.items() if count},
                max(0, 38 - sum(in_flight.values())), releases, dict.fromkeys(SERVERS, 40), weights,
                1 if number == 77 else 0)


def picture(looks: int) -> Picture:
    return Picture("chat", 40, 57, looks * LOOK_S, tuple(look(number) for number in range(1, looks + 1)), SERVERS,
                   (OLD, NEW), {(OLD, True): 412, (NEW, True): 318, (OLD, False): 1}, 712.4)


def drawn(what: RenderableType, width: int = 100, *, colours: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colours, color_system="truecolor" if colours else None,
            no_color=not colours, legacy_windows=False).print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def compare(text: str, name: str) -> None:
    if os.environ.get("OPSCTL_SNAPSHOT"):
        (SNAPSHOTS / name).write_text(text)
    assert text == (SNAPSHOTS / name).read_text()


@pytest.mark.parametrize(("looks", "width", "name"), [(120, 100, "load-wide.txt"), (120, 72, "load-narrow.txt"),
                                                      (26, 100, "load-early.txt"), (0, 100, "load-nothing.txt")])
def test_the_picture_without_colours(looks: int, width: int, name: str) -> None:
    compare(drawn(render(picture(looks), width, colours=False), width), name)


def test_the_picture_with_colours() -> None:
    compare(drawn(render(picture(120), 100), 100, colours=True), "load-colours.ansi")


@pytest.mark.parametrize("width", [60, 80, 100, 132, 200, 300])
@pytest.mark.parametrize("looks", [0, 1, 3, 119, 120, 240])
def test_no_line_is_wider_than_the_terminal(width: int, looks: int) -> None:
    console = Console(width=width, file=io.StringIO())
    lines = console.render_lines(render(picture(looks), width), pad=False)
    assert len(lines) == len(drawn(render(picture(looks), width, colours=False), 1000).splitlines())
    assert max(sum(segment.cell_length for segment in line) for line in lines) <= width


def test_many_instances_leave_room_for_the_graph() -> None:
    text = drawn(render(picture(120), 100, instances=2, colours=False))
    assert "gpu-2.chat.0" in text
    assert "gpu-3.chat.0" not in text
    assert "and 1 more" in text


def test_the_line_for_logs() -> None:
    assert plain_line(picture(24)) == (
        "v1 33 in flight, 5 waiting, 712 tokens/s, 1 of 731 lost; "
        "gpu-1.chat.0 v1 7 draining, gpu-2.chat.0 v1 13 serving, gpu-3.chat.0 v1 13 serving")
    assert plain_line(picture(0)) == "none in flight, 712 tokens/s, 1 of 731 lost; "


@pytest.mark.parametrize(("weights", "in_flight", "word"), [
    ({}, {}, ""), ({"a": 100}, {}, "serving"), ({"a": 50}, {}, "at 50 %"), ({"a": 0}, {"a": 3}, "draining"),
    ({"a": 0}, {}, "drained"), ({"a": -1}, {}, "down"),
])
def test_the_state_of_an_instance(weights: dict[str, int], in_flight: dict[str, int], word: str) -> None:
    assert state(Look(1.0, in_flight, 0, {}, {}, weights, 0), "a") == word


def test_columns_keep_their_looks_as_time_goes_on() -> None:
    """A column that is full never changes again, or the picture would flicker."""
    size = looks_a_column(40, 60.0)
    assert size == 3
    before = columns(picture(90).looks, SERVERS, 40, size)
    after = columns(picture(93).looks, SERVERS, 40, size)
    assert before[1:-1] == after[1:len(before) - 1]
    assert len(columns(picture(240).looks, SERVERS, 40, size)) == 40


def test_an_instance_that_has_not_said_its_release_is_counted() -> None:
    assert by_release(Look(1.0, {"a": 2, "b": 1}, 0, {"a": OLD}, {}, {}, 0)) == {OLD: 2, "": 1}


def record(start: float, end: float, server: str = "gpu-1.chat.0", release: str = OLD, lacking: str = "") -> Record:
    return Record(start, start + 0.1, end, server, release, 50, 50, lacking)


RECORDS = [record(0, 4), record(1, 6), record(2, 5, lacking="ended in the middle"), record(7, 10, release=NEW),
           record(1, 4, "gpu-2.chat.0"), Record(3.0, None, 3.1, "", "", 60, 0, "no answer, connection refused")]


def test_the_closing_table() -> None:
    compare(drawn(closing(figures(RECORDS), 10.2, 3)), "load-closing.txt")


def test_the_figures_as_a_document() -> None:
    document = figures(RECORDS).as_document()
    assert (document["whole"], document["lost"], document["tokens"]) == (4, 2, {"least": 50, "most": 60})
    assert document["rows"][1] == {"release": "v1", "server": "gpu-1.chat.0", "whole": 2, "lost": 1, "median_s": 4.5,
                                   "p95_s": 5, "most_in_flight": 3}
    assert document["reasons"][0] == {"why": "ended in the middle", "server": "gpu-1.chat.0", "count": 1}


def test_figures_of_nothing() -> None:
    assert figures([]).as_document() == {"whole": 0, "lost": 0, "median_s": None, "p95_s": None,
                                         "tokens": {"least": 0, "most": 0}, "rows": [], "reasons": []}


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 2), (19, 19), (20, 19), (21, 20), (100, 95)])
def test_the_95th_percentile(count: int, rank: int) -> None:
    assert p95([float(number) for number in range(count, 0, -1)]) == rank


def test_small_words() -> None:
    assert version("v3.1-0123456789ab") == "v3.1"
    assert version("") == ""
    assert most_in_flight([record(0, 2), record(2.05, 3), record(0, 1)]) == 2
