"""A fleet of three hosts that are slow enough to have streams in flight whenever something happens, and who watches it.

Found by trying, on two cores: a model of 100 MB, engines of one thread each (more only spin), 16 requests at a time
each, engines nicer than sshd and Python. Forty clients then have streams of 3 to 8 s, a dozen on each instance.
"""

from __future__ import annotations

import shlex
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from command import Said, succeeds

from opsctl.agent import balancer
from opsctl.fleet.inventory import read_fleet
from opsctl.lab.load import Load, Record, target
from opsctl.lab.load_figures import figures

# An engine that is told to end drops its streams at once: what saves them is the drain before, and nothing else.
ENGINE = ("threads=1", "parallel=16", "max_model_len=512", "drain_timeout_s=0")
CLIENTS = 40
SECONDS_PER_STREAM = 4.5
LEAST_IN_FLIGHT = 5
NICE = "[Service]\nNice=19\n"
POLL_S = 0.1


def be_nice(lab: Any) -> None:
    """Engines give way to sshd and Python, which share their two cores here; before they start."""
    script = f"d=/etc/systemd/system/inference@.service.d; mkdir -p $d && printf {shlex.quote(NICE)} >$d/nice.conf"
    for host in lab.gpu_hosts:
        done = lab.run(host, ["sudo", "sh", "-c", f"{script} && systemctl daemon-reload"])
        assert done.returncode == 0, done.stderr


def import_slow(lab: Any, version: str, seed: int) -> None:
    """A release of the slow model, in the bundle; another seed is another model."""
    file = lab.directory / f"{version}.gguf"
    succeeds("lab", "model", file, "--size", "mid", "--seed", str(seed))
    words = [word for setting in ENGINE for word in ("--set", setting)]
    succeeds("model", "import", file, "--service", "chat", "--version", version, *words, inventory=lab.inventory)


def load_on(lab: Any, *, clients: int = CLIENTS) -> Load:
    return Load(target(read_fleet(lab.inventory), "chat"), clients=clients, seconds_per_stream=SECONDS_PER_STREAM)


def lost(records: list[Record]) -> Counter[tuple[str, str]]:
    """Reasons and instances, counted."""
    return Counter((record.lacking, record.server) for record in records if not record.whole)


def told(load: Load) -> str:
    """What a failing test shows of a load."""
    found = figures(load.records)
    return "\n".join([*map(str, found.rows), *map(str, found.reasons)])


@dataclass(frozen=True)
class Drain:
    """The load balancer gave an instance no more requests. ``in_flight``: streams it was answering at that moment."""

    server: str
    at: float
    in_flight: int


class DrainWatch:
    """Sees drains by itself, on HAProxy's own page: the moment when the weight of a server that is up falls to 0."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._page = load.target.statistics[0]
        self._enough = threading.Event()
        self._news = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._watch, name="drains")
        self.drains: list[Drain] = []

    def __enter__(self) -> DrainWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._enough.set()
        self._thread.join()

    def wait_for(self, count: int, act: Future[Said], timeout_s: float = 300.0) -> Drain:
        """The drain of that number, counted from 1, which ``act`` is to bring about."""
        with self._news:
            act.add_done_callback(lambda _: self._notify())
            assert self._news.wait_for(lambda: len(self.drains) >= count or act.done(), timeout_s), self.drains
            assert len(self.drains) >= count, f"it ended before: {act.result()}"
            return self.drains[count - 1]

    def _notify(self) -> None:
        with self._news:
            self._news.notify_all()

    def _watch(self) -> None:
        rotating: set[str] = set()
        while not self._enough.wait(POLL_S):
            for row in self._rows():
                server = row["server"]
                if row["status"].startswith("UP") and row["weight"]:
                    rotating.add(server)
                elif server in rotating:
                    rotating.discard(server)
                    if not row["weight"]:
                        self._note(server)

    def _note(self, server: str) -> None:
        with self._news:
            self.drains.append(Drain(server, self._load.now, self._load.in_flight(server)))
            self._news.notify_all()

    def _rows(self) -> list[dict[str, Any]]:
        try:
            with urllib.request.urlopen(self._page, timeout=5) as page:
                return [row for row in balancer.servers(page.read().decode()) if row["service"] == "chat"]
        except OSError:  # just while one process hands over to the next
            return []


def reload_balancer(lab: Any) -> None:
    """As a person or Ansible does, and sees that another process serves now: systemctl does not wait for it."""
    script = ("before=$(pgrep -x haproxy) && systemctl reload haproxy && "
              'until pgrep -x haproxy | grep -qvxF "$before"; do sleep 0.1; done')
    done = lab.run("ops-1", ["sudo", "timeout", "30", "sh", "-c", script])
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"


@contextmanager
def without_server_state(lab: Any) -> Iterator[None]:
    """HAProxy's processes tell each other nothing, as in a configuration that somebody wrote by hand."""
    program = "/usr/local/lib/opsctl/haproxy-state"
    forget = f"mv {program} {program}.kept && printf '#!/bin/sh\\n' >{program} && chmod 755 {program} && " \
             "rm -f /var/lib/haproxy/server-state"
    assert lab.run("ops-1", ["sudo", "sh", "-c", forget]).returncode == 0
    try:
        yield
    finally:
        assert lab.run("ops-1", ["sudo", "mv", f"{program}.kept", program]).returncode == 0
