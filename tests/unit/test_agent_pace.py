"""A rate limit: over all files, changeable, and none at all when there is none. On a clock that only sleeps."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from release_kit import serving

from opsctl.agent.fetch import fetch
from opsctl.agent.pace import LEAST_CHUNK, MOST_CHUNK, Pace, read_limit, write_limit


class Clock:
    """Goes on only by sleeping, and when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_the_rate_is_kept() -> None:
    clock = Clock()
    pace = Pace(lambda: 1000, clock, clock.sleep)
    for _ in range(20):
        pace.spend(500)
    assert clock.now == pytest.approx(10.0)
    assert max(clock.slept) <= 0.25


def test_slow_sources_may_catch_up_but_little() -> None:
    clock = Clock()
    pace = Pace(lambda: 1000, clock, clock.sleep)
    clock.now = 60.0  # nothing came for a minute
    pace.spend(1250)
    assert clock.now == pytest.approx(61.0)


def test_no_limit_never_sleeps() -> None:
    clock = Clock()
    pace = Pace(clock=clock, pause=clock.sleep)
    pace.spend(10**12)
    assert (clock.slept, pace.chunk()) == ([], MOST_CHUNK)


@pytest.mark.parametrize(("rate", "chunk"), [(1000, LEAST_CHUNK), (400_000, 100_000), (10**9, MOST_CHUNK)])
def test_chunks_are_small_enough_to_see_progress(rate: int, chunk: int) -> None:
    assert Pace(lambda: rate).chunk() == chunk


@pytest.mark.parametrize(("later", "ends_at"), [(10_000, 0.25 + 0.975), (500, 0.25 + 19.5), (None, 0.25)])
def test_another_limit_counts_at_once(later: int | None, ends_at: float) -> None:
    """10 s of debt, and the limit changes while they are slept."""
    clock = Clock()
    pace = Pace(lambda: 1000 if clock.now < 0.25 else later, clock, clock.sleep)
    pace.spend(10_000)
    assert clock.now == pytest.approx(ends_at, abs=0.01)


def test_a_limit_that_comes_later() -> None:
    clock = Clock()
    pace = Pace(lambda: None if clock.now < 5 else 1000, clock, clock.sleep)
    pace.spend(10**9)
    clock.now = 6.0
    pace.spend(2000)
    assert clock.now == pytest.approx(8.0, abs=0.26)


@pytest.mark.parametrize(("content", "limit"), [("250000\n", 250_000), ("", None), ("x", None), ("5", 1000)])
def test_what_the_file_says(tmp_path: Path, content: str, limit: int | None) -> None:
    (tmp_path / "limit").write_text(content)
    assert read_limit(tmp_path / "limit") == limit


def test_the_file_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "jobs" / "limit"
    write_limit(path, None)
    assert read_limit(path) is None
    write_limit(path, 5000)
    assert read_limit(path) == 5000
    write_limit(path, None)
    assert not path.exists()


def test_a_fetch_keeps_the_rate_over_all_files_and_tries(tmp_path: Path) -> None:
    """What an earlier try brought costs nothing again; a connection that breaks starts no new allowance."""
    clock = Clock()
    pace = Pace(lambda: 100_000, clock, clock.sleep)
    content = bytes(range(256)) * 1000
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "b.part").write_bytes(content[:56_000])
    seen: list[int] = []
    with serving({"/a": content, "/b": content}, break_after=100_000, breaks_left=2) as web:
        for name in "ab":
            fetch(f"{web.url}/{name}", tmp_path / name, size=len(content), sha256=digest, advance=seen.append,
                  pause=clock.sleep, pace=pace)
    pauses = [0.2] * 2  # after each break
    assert clock.now == pytest.approx((2 * len(content) - 56_000) / 100_000 + sum(pauses), abs=0.5)
    assert sum(seen) == 2 * len(content)
    assert max(seen) <= 56_000
