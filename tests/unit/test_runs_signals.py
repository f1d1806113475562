"""Ctrl-C and its relatives, as a process hears them: answered at once, bounded, and left at once the second time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

VERB = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from opsctl.cli import signals
from opsctl.cli.speak import speaking
from opsctl.engines.events import RunStarted
signals.CLEANUP_S = {bound}
import typer
try:
    with speaking("update-model") as speaker:
        speaker.emit(RunStarted("update-model", "R1", ("gpu-1",)))
        speaker.interrupts.careful = {careful}
        try:
            print("at work", flush=True)
            time.sleep({work})
        finally:
            time.sleep({cleanup})
            print("put in order", flush=True)
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


def verb(cleanup: float, bound: float = 15.0, careful: bool = True, before: str = "", work: float = 60
         ) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", VERB.format(bound=bound, cleanup=cleanup, careful=careful, before=before, work=work)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "at work":
        assert process.poll() is None
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_answered_at_once_and_things_are_put_in_order(number: signal.Signals) -> None:
    process = verb(cleanup=0.5)
    process.send_signal(number)
    assert process.stderr is not None
    began = time.monotonic()
    while "interrupted: putting things in order" not in process.stderr.readline():
        assert process.poll() is None
    assert time.monotonic() - began < 0.5
    out, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "put in order" in out
    assert "opsctl resume R1" in said


def test_the_second_leaves_at_once() -> None:
    process = verb(cleanup=60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "putting things in order" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "put in order" not in out


def test_what_cannot_be_put_in_order_is_bounded() -> None:
    process = verb(cleanup=60, bound=0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "not all could be put in order in time" in said
    assert "opsctl resume R1" in said


def test_a_verb_that_only_looks_ends_without_a_speech() -> None:
    process = verb(cleanup=0, careful=False)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "putting things in order" not in said


def test_nohup_is_honoured() -> None:
    process = verb(cleanup=0, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)", work=1)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, "put in order" in out) == (0, True)


def deaf(**given: Any) -> subprocess.Popen[str]:
    """A verb at work whose stderr nobody reads any more."""
    process = verb(**given)
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    return process


def test_a_signal_is_heard_though_nobody_hears_the_answer() -> None:
    process = deaf(cleanup=0.2)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, "put in order" in out) == (130, True)


def test_what_cannot_be_put_in_order_is_bounded_though_nobody_hears_of_it() -> None:
    process = deaf(cleanup=60, bound=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 130


TALK = """
import sys, threading
from opsctl.cli.speak import speaking
from opsctl.engines.events import Note
with speaking("update-model", as_json={as_json}) as speaker:
    sys.stdin.readline()
    mover = threading.Thread(target=lambda: [speaker.emit(Note("on it")) for _ in range(3)])
    mover.start()
    mover.join()
    speaker.say("done")
    speaker.result({{"changed": 1}}, "all is well")
"""


@pytest.mark.parametrize("as_json", [True, False])
def test_a_listener_that_goes_stops_no_work(as_json: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", TALK.format(as_json=as_json)], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    out, _ = process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert ('"changed": 1' if as_json else "all is well") in out


def test_a_full_disk_under_the_talk_stops_no_work() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", TALK.format(as_json=True)], text=True, input="\n", check=False,
                              stdout=subprocess.PIPE, stderr=full, timeout=20)
    assert (done.returncode, '"changed": 1' in done.stdout) == (0, True)
