"""Hears requests on the socket: a thread for each connection, a lane for each GPU, and holders for what is set.

Who sets clocks or power of a GPU holds it with its connection, until they are released. A GPU without a holder for
``grace_s`` is restored: an agent that was killed has that long to come back and ask again. Whatever hangs in the driver
or on the disk, connections are taken, and instances stopped and started.
"""

from __future__ import annotations

import os
import pwd
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial

from opsctl.agent import audit
from opsctl.agent.paths import Paths
from opsctl.agent.setter import protocol, units
from opsctl.agent.setter.board import Board
from opsctl.agent.setter.book import Book
from opsctl.agent.setter.lane import PATIENCE_S, Lane
from opsctl.agent.setter.protocol import Answer, RefusedRequest

GRACE_S = 5.0
CONNECTIONS = 16
LANES = 64  # GPUs that were ever asked for; more: somebody makes UUIDs up
TICK_S = 0.1
IDLE_TICK_S = 1.0  # while nothing is set
AGAIN_S = 5.0  # between two attempts to restore
AGENT_USER = "opsctl-agent"


def known_users() -> set[int]:
    """Root and the agent's user; others are refused whatever the socket's mode says."""
    users = {0}
    with suppress(KeyError):
        users.add(pwd.getpwnam(AGENT_USER).pw_uid)
    return users


class Server:
    def __init__(self, paths: Paths, book: Book, board: Board, say: Callable[[str], None], grace_s: float = GRACE_S,
                 users: Callable[[], Collection[int]] = known_users) -> None:
        self._paths, self._book, self._board, self._say = paths, book, board, say
        self._grace_s, self._users = grace_s, users
        self._lanes: dict[str, Lane] = {}
        self._journal = Lane("journal")  # a journal that stands still holds up nobody
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._holders: dict[str, set[socket.socket]] = {}  # by GPU: whose requests set something there
        self._restore_at: dict[str, float] = {}  # by GPU: set, and held by nobody
        self._complained: dict[str, str] = {}  # why a GPU could not be restored, said once

    def listen(self) -> socket.socket:
        """The socket, for root and the group that this process runs with."""
        path = self._paths.setter_socket
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        umask = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(umask)
        listener.listen(CONNECTIONS)
        return listener

    def serve(self, listener: socket.socket, stopping: int) -> None:
        """Until ``stopping`` can be read. What a process before this one left set is restored first."""
        for gpu in self._book.entries():
            self._restore(gpu)
        while not select.select([stopping], [], [], 0)[0]:
            self._look_for_holders()
            tick_s = TICK_S if self._book.entries() else IDLE_TICK_S
            ready, _, _ = select.select([listener.fileno(), stopping], [], [], tick_s)
            if listener.fileno() in ready:
                self._welcome(listener.accept()[0])

    def end(self, listener: socket.socket) -> None:
        """Hears nobody any more, and waits for calls in the driver: never ended within, however long they take."""
        self._board.end()
        listener.close()
        with self._lock:
            left = list(self._connections)
        for connection in left:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        while not all(lane.idle() for lane in list(self._lanes.values())):
            time.sleep(TICK_S)

    def _look_for_holders(self) -> None:
        self._forget_released()
        now = time.monotonic()
        alone = [gpu for gpu in self._book.entries() if not self._held(gpu)]
        self._restore_at = {gpu: self._restore_at.get(gpu, now + self._grace_s) for gpu in alone}
        for gpu, at in self._restore_at.items():
            if now >= at:
                self._restore_at[gpu] = now + AGAIN_S
                self._restore(gpu)

    def _held(self, gpu: str) -> bool:
        with self._lock:
            return bool(self._holders.get(gpu))

    def _hold(self, gpu: str, connection: socket.socket) -> bool:
        """False: it held the GPU already."""
        with self._lock:
            holders = self._holders.setdefault(gpu, set())
            new = connection not in holders
            holders.add(connection)
            return new

    def _let_go(self, connection: socket.socket, gpus: Collection[str]) -> None:
        with self._lock:
            for gpu in gpus:
                self._holders.get(gpu, set()).discard(connection)

    def _forget_released(self) -> None:
        """Where nothing is set, nobody holds anything, whoever released it."""
        entries = self._book.entries()
        with self._lock:
            self._holders = {gpu: holders for gpu, holders in self._holders.items() if gpu in entries and holders}

    def _restore(self, gpu: str) -> None:
        """Without waiting for it; one that is held when its turn comes is left alone."""
        lane = self._lane(gpu)
        if not lane.hangs():
            lane.post(partial(self._restore_one, gpu))

    def _restore_one(self, gpu: str) -> Answer:
        if self._held(gpu) or gpu not in self._book.entries():
            return {}
        try:
            answer = self._board.release(gpu)
        except RefusedRequest as error:
            if self._complained.get(gpu) != error.words:
                self._say(f"{gpu} is not restored yet: {error.words}")
            self._complained[gpu] = error.words
            raise
        self._complained.pop(gpu, None)
        self._record("restore", "opsctl-setter", {"gpu": gpu, **answer})
        return answer

    def _welcome(self, connection: socket.socket) -> None:
        """A thread for a connection, unless nobody may have it."""
        peer = _peer(connection)
        with self._lock:
            full = len(self._connections) >= CONNECTIONS
        if peer not in self._users():
            self._refuse(connection, "no_permission", f"user {peer} may not ask")
        elif full:
            self._refuse(connection, "failed", f"{CONNECTIONS} connections are the most")
        else:
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._converse, args=(connection, _name(peer)), daemon=True).start()
            return
        connection.close()

    def _converse(self, connection: socket.socket, by: str) -> None:
        with connection:
            try:
                self._hear(connection, by)
            except OSError:
                pass  # gone
            finally:
                with self._lock:
                    self._connections.discard(connection)
                    gpus = list(self._holders)
                self._let_go(connection, gpus)

    def _refuse(self, connection: socket.socket, code: str, words: str) -> None:
        with suppress(OSError):
            connection.sendall(protocol.line(protocol.refusal(RefusedRequest(code, words))))

    def _hear(self, connection: socket.socket, by: str) -> None:
        rest = b""
        while data := connection.recv(protocol.LINE_LIMIT):
            *lines, rest = (rest + data).split(b"\n")
            if max(map(len, (*lines, rest))) > protocol.LINE_LIMIT:
                self._refuse(connection, "invalid", "this line is too long")
                return
            for line in lines:
                connection.sendall(protocol.line(self._answer(connection, line, by)))

    def _answer(self, connection: socket.socket, line: bytes, by: str) -> Answer:
        request: Answer = {}
        try:
            request = protocol.read(line)
            before = self._book.entries()
            answer: Answer = {"ok": True, **self._do(connection, request)}
            changed = request["verb"] in protocol.UNITS or self._book.entries() != before
        except RefusedRequest as error:
            answer, changed = protocol.refusal(error), bool(request)
        if changed:  # the agent says the same again and again
            self._record(request["verb"], by, {**request, **answer})
        return answer

    def _do(self, connection: socket.socket, request: Answer) -> Answer:
        verb = request["verb"]
        if verb == "stop":
            return units.stop(self._paths, request["instance"], request["how"])
        if verb == "start":
            return units.start(self._paths, request["instance"])
        if verb == "state":
            return self._state()
        if verb == "release-all":
            return self._release_all()
        gpu = request["gpu"]
        if verb == "release":
            answer = self._ask(gpu, partial(self._board.release, gpu))
            self._forget_released()
            return answer
        work = (partial(self._board.clocks, gpu, request["max_mhz"]) if verb == "clocks"
                else partial(self._board.power, gpu, request["watts"]))
        new = self._hold(gpu, connection)  # before it is set: nobody shall restore it meanwhile
        try:
            answer = self._ask(gpu, work)
        except RefusedRequest:
            if new:
                self._let_go(connection, [gpu])
            raise
        self._hold(gpu, connection)  # somebody's release before it may have made it nobody's
        return answer

    def _ask(self, gpu: str, work: Callable[[], Answer]) -> Answer:
        return self._lane(gpu).ask(work, partial(self._board.back_to, gpu, self._book.of(gpu)))

    def _release_all(self) -> Answer:
        """Every GPU, also when one refuses or hangs; the answer is one of the refusals then."""
        lanes = {gpu: self._lane(gpu) for gpu in self._book.entries()}
        jobs = {gpu: lane.post(partial(self._board.release, gpu)) for gpu, lane in lanes.items() if not lane.hangs()}
        until = time.monotonic() + PATIENCE_S
        late = [lane for gpu, lane in lanes.items()
                if gpu not in jobs or not jobs[gpu].over.wait(max(0.0, until - time.monotonic()))]
        self._forget_released()
        if late:
            raise late[0].hanging()  # it is done when that is over
        for job in jobs.values():
            if isinstance(job.answer, RefusedRequest):
                raise job.answer
        return {}

    def _state(self) -> Answer:
        with self._lock:
            held, lanes = any(self._holders.values()), dict(self._lanes)
        return {"held": held, "hangs": sorted(gpu for gpu, lane in lanes.items() if lane.hangs()), "gpus": {
            gpu: {"max_mhz": entry.max_mhz, "watts": None if entry.limit_mw is None else entry.limit_mw // 1000}
            for gpu, entry in self._book.entries().items()}}

    def _lane(self, gpu: str) -> Lane:
        with self._lock:
            if gpu not in self._lanes and len(self._lanes) >= LANES:
                raise RefusedRequest("unknown_gpu", f"{gpu} is one of more GPUs than a machine has")
            if gpu not in self._lanes:
                self._lanes[gpu] = Lane(gpu)
            return self._lanes[gpu]

    def _record(self, verb: str, by: str, what: Answer) -> None:
        def write() -> Answer:
            audit.record(f"setter {verb}", {**{key: value for key, value in what.items() if key != "verb"}, "by": by})
            return {}

        if not self._journal.hangs():
            self._journal.post(write)


def _peer(connection: socket.socket) -> int:
    """The user at the other end, as the kernel says."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
