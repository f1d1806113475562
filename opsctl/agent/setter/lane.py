"""One thread for each GPU: a call into the driver that hangs holds up this GPU and nothing else.

A thread cannot be ended inside the driver and is left alone; while it hangs, everybody else is told so at once. What
nobody waits for any more is not begun, and what was in the driver meanwhile is taken back: whoever was told that it
hangs may rest on that it did not happen.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from opsctl.agent.setter.protocol import Answer, RefusedRequest

PATIENCE_S = 1.5  # setting takes milliseconds to tenths of a second


@dataclass
class Job:
    work: Callable[[], Answer]
    take_back: Callable[[], None] | None = None
    over: threading.Event = field(default_factory=threading.Event)
    answer: Answer | RefusedRequest | None = None
    given_up: bool = False


class Lane:
    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._waiting = 0
        self._lock = threading.Lock()
        self._name = name
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def ask(self, work: Callable[[], Answer], take_back: Callable[[], None], patience_s: float = PATIENCE_S) -> Answer:
        """What ``work`` gives, done after what came before. Raises RefusedRequest: its own, or ``hangs``."""
        if self.hangs():
            raise self.hanging()
        job = self.post(work, take_back)
        job.over.wait(patience_s)
        with self._lock:
            job.given_up = not job.over.is_set()
        if job.given_up:
            raise self.hanging()
        if isinstance(job.answer, RefusedRequest):
            raise job.answer
        return job.answer or {}

    def post(self, work: Callable[[], Answer], take_back: Callable[[], None] | None = None) -> Job:
        """Has it done and waits for nothing."""
        job = Job(work, take_back)
        with self._lock:
            self._waiting += 1
        self._jobs.put(job)
        return job

    def hangs(self) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since >= PATIENCE_S

    def idle(self) -> bool:
        with self._lock:
            return self._waiting == 0

    def hanging(self) -> RefusedRequest:
        return RefusedRequest("hangs", f"{self._name}: a call into the driver has not returned")

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            self._busy_since = time.monotonic()
            if not job.given_up:
                job.answer = _done(job.work)
                with self._lock:
                    late = job.given_up
                    if not late:
                        job.over.set()
                if late and job.take_back is not None:
                    _done(job.take_back)
            self._busy_since = None
            with self._lock:
                self._waiting -= 1


def _done(work: Callable[[], Answer | None]) -> Answer | RefusedRequest:
    try:
        return work() or {}
    except RefusedRequest as error:
        return error
    except Exception as error:  # noqa: BLE001 - whoever waits is told, and the lane lives on
        return RefusedRequest("failed", f"unexpected {type(error).__name__}: {error}")
