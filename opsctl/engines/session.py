"""A conversation with one host: Fabric's connection with strict host keys, or a local process; both answer alike.

``Session`` runs argument vectors, ``on_each`` runs a function on many hosts at once. Neither owns anything on a host.
Left to itself, Fabric takes any host key, even a changed one, and each command costs 40 ms of waiting: see ``_strict``
and ``_socket``.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shlex
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import paramiko
from fabric import Config, Connection

from opsctl.engines.child import die_with_parent
from opsctl.errors import OpsctlError, RefusedError
from opsctl.fleet import known_hosts
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.ssh_config import ALIVE_COUNT, ALIVE_INTERVAL_S, CONNECT_TIMEOUT_S, render

T = TypeVar("T")

WORKERS = 32
LOGIN_TIMEOUT_S = 20  # key exchange and login of a busy host; the connection itself has CONNECT_TIMEOUT_S
CHUNK = 1 << 16
SUDO_PROBE = ["sudo", "-n", "true"]

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its threads would print tracebacks of their own


@dataclass(frozen=True)
class Completed:
    """What a command left. ``returncode`` is 128 + the signal's number, or 255, when it did not exit by itself."""

    returncode: int
    stdout: str
    stderr: str


class Session:
    """One host, connected at its first command and reused until ``close``, which is for good; for one thread at a time.

    >>> with Session(fleet, fleet.host("gpu-1")) as session:
    ...     session.run(["systemctl", "is-active", "nginx"]).stdout
    """

    def __init__(self, fleet: Fleet, host: Host | str) -> None:
        self.host = fleet.host(host) if isinstance(host, str) else host
        self._closed = False
        self._way: _Way = _Local() if self.host.connection == "local" else _Remote(fleet, self.host)

    def run(self, argv: Sequence[str], *, sudo: bool = True, timeout_s: float = 30.0, stdin: bytes = b"") -> Completed:
        """Runs a command to its end, as root unless ``sudo`` is False; its exit code is the caller's to judge.

        Raises:
            RefusedError: ``host.unreachable``, ``host.foreign_key``, ``host.not_trusted``, ``host.login_refused``,
                ``host.no_sudo``: the command has not run.
            OpsctlError: ``host.timed_out``, ``host.connection_lost``: it may have run. ``host.session_closed``: not.
        """
        return self.send(argv, [stdin] if stdin else [], sudo=sudo, timeout_s=timeout_s)

    def send(self, argv: Sequence[str], chunks: Iterable[bytes], *, sudo: bool = True, timeout_s: float = 30.0
             ) -> Completed:
        """As ``run``, with ``chunks`` of bytes as its standard input, sent as they come and never gathered.

        ``timeout_s`` is how long the host may take no byte, and how long it may go on after the last chunk: a long
        transfer that moves never runs into it.
        """
        if self._closed:  # by somebody who wants an end: whoever tries again and again must not open it anew
            raise OpsctlError("host.session_closed", f"{self.host.name}: the session was closed.",
                              hint="run the same command again")
        become = sudo and self._way.user() != "root"
        completed = self._way.exchange(["sudo", "-n", "--", *argv] if become else list(argv), chunks, timeout_s,
                                       self.host)
        if become and completed.returncode == 1 and "sudo:" in completed.stderr:
            self._check_sudo(timeout_s)
        elif become and completed.returncode == 127 and "sudo" in completed.stderr:
            raise no_sudo(self.host, self._way.user(), completed.stderr, "sudo is not installed there")
        return completed

    def close(self) -> None:
        self._closed = True
        self._way.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _check_sudo(self, timeout_s: float) -> None:
        """Was it sudo that said no? Asked of sudo itself, because its words come in the host's language."""
        probe = self._way.exchange(SUDO_PROBE, [], timeout_s, self.host)
        if probe.returncode:
            raise no_sudo(self.host, self._way.user(), probe.stderr)


def on_each(fleet: Fleet, hosts: Sequence[Host], function: Callable[[Session], T], workers: int = WORKERS
            ) -> dict[str, T | OpsctlError]:
    """Calls ``function`` with a session of each host, ``workers`` at a time; the answers in the order of ``hosts``.

    An ``OpsctlError`` of one host is its answer; any other exception, and Ctrl-C, ends them all.
    """
    sessions = {host.name: Session(fleet, host) for host in hosts}
    if not sessions:
        return {}

    def call(session: Session) -> T | OpsctlError:
        try:
            return function(session)
        except OpsctlError as error:
            return error
        finally:
            session.close()

    pool = ThreadPoolExecutor(max_workers=min(workers, len(sessions)), thread_name_prefix="session")
    try:
        futures = {name: pool.submit(call, session) for name, session in sessions.items()}
        answers = {name: future.result() for name, future in futures.items()}
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for session in sessions.values():
            session.close()
        raise
    pool.shutdown()
    return answers


class _Way(ABC):
    """How commands get to a host."""

    @abstractmethod
    def user(self) -> str: ...

    @abstractmethod
    def exchange(self, argv: list[str], chunks: Iterable[bytes], timeout_s: float, host: Host) -> Completed: ...

    @abstractmethod
    def close(self) -> None: ...


class _Local(_Way):
    """This machine: a process of its own session, which dies with us."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def user(self) -> str:
        return "root" if os.geteuid() == 0 else getpass.getuser()

    def exchange(self, argv: list[str], chunks: Iterable[bytes], timeout_s: float, host: Host) -> Completed:
        try:
            process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       start_new_session=True,
                                       preexec_fn=die_with_parent)  # noqa: PLW1509 - one prctl call, no allocation
        except FileNotFoundError:
            return Completed(127, "", f"{argv[0]}: command not found\n")
        except PermissionError:
            return Completed(126, "", f"{argv[0]}: permission denied\n")
        self._process = process
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("pipes were asked for")
        watch = _Watch(timeout_s, lambda: _kill(process))
        readers = [_Reader(lambda: process.stdout.read1(CHUNK), watch),  # type: ignore[union-attr]
                   _Reader(lambda: process.stderr.read1(CHUNK), watch)]  # type: ignore[union-attr]
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended without reading all: its exit code tells
                for chunk in chunks:
                    process.stdin.write(chunk)
                    watch.touch()
                process.stdin.close()
            watch.touch()
            stdout, stderr = (reader.text() for reader in readers)
            returncode = -1 if watch.expired else process.wait()
        finally:
            watch.stop()
            _kill(process)
            for pipe in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if watch.expired:
            raise timed_out(host, argv, timeout_s)
        return Completed(returncode if returncode >= 0 else 128 - returncode, stdout, stderr)

    def close(self) -> None:
        if self._process is not None:
            _kill(self._process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process; one that became root by sudo is no longer ours to kill, and goes when its pipes close."""
    if process.poll() is None:
        with contextlib.suppress(PermissionError):
            process.kill()
            process.wait()


class _Remote(_Way):
    """Over SSH, by the generated configuration alone: nobody's ~/.ssh/config and no system one is read."""

    def __init__(self, fleet: Fleet, host: Host) -> None:
        self._fleet = fleet
        self._host = host
        self._connection: Connection | None = None

    def user(self) -> str:
        return str(self._open().user)

    def exchange(self, argv: list[str], chunks: Iterable[bytes], timeout_s: float, host: Host) -> Completed:
        try:
            channel = self._channel(timeout_s)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.close()
            raise lost(host, error) from None
        try:
            return self._exchange(channel, argv, chunks, timeout_s, host)
        except (paramiko.SSHException, OSError, EOFError) as error:
            self.close()
            raise lost(host, error) from None
        finally:
            _close(channel)

    def _channel(self, timeout_s: float) -> paramiko.Channel:
        """A channel for one command; a connection that broke since the last one is made anew: nothing was asked yet."""
        reused = self._connection is not None
        try:
            channel: paramiko.Channel = self._open().transport.open_session(timeout=timeout_s)
        except (paramiko.SSHException, OSError, EOFError):
            self.close()
            if not reused:
                raise
            channel = self._open().transport.open_session(timeout=timeout_s)
        return channel

    def _exchange(self, channel: paramiko.Channel, argv: list[str], chunks: Iterable[bytes], timeout_s: float,
                  host: Host) -> Completed:
        watch = _Watch(timeout_s, lambda: _close(channel))
        try:
            channel.exec_command(shlex.join(argv))  # the one place where an argument vector becomes a shell's text
            readers = [_Reader(lambda: channel.recv(CHUNK), watch), _Reader(lambda: channel.recv_stderr(CHUNK), watch)]
            try:
                for chunk in chunks:
                    for start in range(0, len(chunk), CHUNK):
                        channel.sendall(chunk[start:start + CHUNK])
                        watch.touch()
                channel.shutdown_write()
            except OSError:
                if not (watch.expired or channel.exit_status_ready() or channel.eof_received):
                    raise
            watch.touch()
            stdout, stderr = (reader.text() for reader in readers)
            if not watch.expired:
                channel.status_event.wait(timeout_s)
        finally:
            watch.stop()
        if watch.expired:
            raise timed_out(host, argv, timeout_s)
        if channel.exit_status == -1:  # killed by a signal, or the connection broke, which shows in a moment
            transport = channel.get_transport()
            transport.join(0.5)
            if not transport.is_active():
                raise transport.get_exception() or EOFError("it was closed")
        return Completed(channel.exit_status if channel.exit_status >= 0 else 255, stdout, stderr)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            disconnect(connection)

    def _open(self) -> Connection:
        if self._connection is not None and self._connection.is_connected:
            return self._connection
        self.close()
        self._connection = connect(self._fleet, self._host)
        return self._connection


def connect(fleet: Fleet, host: Host) -> Connection:
    """A connection over SSH through all its jumps, with only the fleet's pinned keys believed at each of them.

    Raises:
        RefusedError: ``host.unreachable``, ``host.foreign_key``, ``host.not_trusted``, ``host.login_refused``.
        ConfigurationError: known_hosts has a line that engines would read differently.
    """
    pins = known_hosts.load(fleet.known_hosts)
    connection = _strict(_connection(fleet, host), fleet)
    chain: list[Connection] = [connection]
    while chain[0].gateway:
        chain.insert(0, _strict(chain[0].gateway, fleet))
    try:
        for hop in chain:
            with _explained(fleet, host, hop, pins):
                if not hop.gateway:
                    hop.connect_kwargs["sock"] = _socket(hop.host, hop.port)
                hop.open()
    except BaseException:
        for hop in reversed(chain):
            _close(hop)
            hop.client.close()  # Fabric closes what was let in alone; a key that was refused leaves a connection too
        raise
    return connection


def disconnect(connection: Connection) -> None:
    """Closes a connection and its jumps: closing one alone leaves its gateway open."""
    hop: Connection | None = connection
    while hop:
        _close(hop)
        hop = hop.gateway


def _close(what: Connection | paramiko.Channel) -> None:
    """Closing says goodbye, which fails where nobody listens any more."""
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
        what.close()


def _connection(fleet: Fleet, host: Host) -> Connection:
    """The connection with its jumps as its gateways. Fabric would visit several jumps in the wrong order."""
    settings = paramiko.SSHConfig.from_text(render(fleet))

    def make(name: str, gateway: Connection | None) -> Connection:
        place = name.rpartition("@")[2].partition(":")[0]
        for hop in settings.lookup(place).get("proxyjump", "").split(",") if gateway is None else []:
            gateway = make(hop.strip(), gateway) if hop.strip() else gateway
        return Connection(name, config=Config(ssh_config=settings, lazy=True), gateway=gateway or False,
                          connect_timeout=CONNECT_TIMEOUT_S, forward_agent=False)

    return make(host.name, None)


def _strict(connection: Connection, fleet: Fleet) -> Connection:
    """Only the fleet's pinned keys are believed. Fabric's own default takes every key, known, unknown or changed."""
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    if fleet.known_hosts.is_file():
        connection.client.load_host_keys(str(fleet.known_hosts))
    connection.connect_timeout = CONNECT_TIMEOUT_S
    connection.connect_kwargs = {
        **connection.connect_kwargs,
        "banner_timeout": LOGIN_TIMEOUT_S,
        "auth_timeout": LOGIN_TIMEOUT_S,
        "channel_timeout": CONNECT_TIMEOUT_S,  # a jump's next hop may be without power
    }
    if connection.connect_kwargs.get("key_filename"):
        connection.connect_kwargs["look_for_keys"] = False
    return connection


def _socket(address: str, port: int) -> socket.socket:
    """A TCP connection that sends at once (each command waits 40 ms otherwise) and notices a host without power."""
    connected = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ALIVE_INTERVAL_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ALIVE_INTERVAL_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ALIVE_COUNT)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ALIVE_INTERVAL_S * ALIVE_COUNT * 1000)
    return connected


@contextlib.contextmanager
def _explained(fleet: Fleet, host: Host, hop: Connection, pins: Sequence[known_hosts.Pin]) -> Iterator[None]:
    """What goes wrong while connecting, as errors that name the machine, the file and the way on."""
    name = known_hosts.pin_name(hop.host, hop.port)
    where = host.name if hop.original_host == host.name else f"{host.name}, at its jump {hop.original_host}"
    try:
        yield
    except paramiko.BadHostKeyException as error:
        pin = next(iter(known_hosts.pins_of(pins, name)))
        shown = known_hosts.HostKey(error.key.get_name(), error.key.get_base64()).fingerprint
        raise RefusedError(
            "host.foreign_key", f"{where}: {name} shows the host key {shown}, and {fleet.known_hosts}:{pin.line} pins "
            f"{pin.key.fingerprint}: it is another machine, or one that was installed anew.",
            hint=f"if that is so and you know the new key: opsctl trust --replace {hop.original_host}") from None
    except paramiko.AuthenticationException:
        raise _login_refused(host, hop, where) from None
    except (paramiko.SSHException, OSError, EOFError) as error:
        if not known_hosts.pins_of(pins, name) and "known_hosts" in str(error):
            raise RefusedError("host.not_trusted", f"{where}: the host key of {name} is not pinned in "
                               f"{fleet.known_hosts}.", hint="opsctl trust shows it and asks") from None
        if "No authentication methods" in str(error):
            raise _login_refused(host, hop, where) from None
        raise RefusedError(
            "host.unreachable", f"{where}: {name} does not answer: {_why(error)}.",
            hint=f"ssh -F {fleet.ssh_config} {hop.original_host}   says more; --limit '!{host.name}' goes on without") \
            from None


def _login_refused(host: Host, hop: Connection, where: str) -> RefusedError:
    keys = hop.connect_kwargs.get("key_filename") or []
    key = keys if isinstance(keys, str) else next(iter(keys), "")
    tried = f"the key {key}" if key else "any key of yours or of your agent"
    options = " ".join([f"-i {key}"] * bool(key) + [f"-p {hop.port}"] * (hop.port != 22) + [f"{hop.user}@{hop.host}"])
    return RefusedError("host.login_refused", f"{where}: {hop.user}@{hop.host} does not let {tried} log in.",
                        hint=f"ssh-copy-id {options}   (a key with a passphrase: ssh-add first)")


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {CONNECT_TIMEOUT_S} s"
    if isinstance(error, paramiko.ChannelException):
        return f"its jump says: {error.text.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


def no_sudo(host: Host, user: str, stderr: str, why: str = "it wants a password or does not let them") -> RefusedError:
    """``user`` cannot become root on a host."""
    return RefusedError(
        "host.no_sudo", f"{host.name}: {user} cannot become root there with sudo: {why}.",
        hint="opsctl provision --ask-become-pass sets it up; by hand, as root there: "
             f"echo '{user} ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/opsctl",
        log_tail=stderr.splitlines()[-5:])


def lost(host: Host, error: BaseException) -> OpsctlError:
    """The connection broke while a command ran: nobody knows how far that came."""
    return OpsctlError("host.connection_lost", f"{host.name}: the connection broke while a command ran: {_why(error)}.",
                       hint=f"opsctl status --limit {host.name} shows what the host says now")


def timed_out(host: Host, argv: Sequence[str], timeout_s: float) -> OpsctlError:
    """A command did not end in time: it may still be running there."""
    return OpsctlError("host.timed_out", f"{host.name}: {argv[0]} did not finish within {timeout_s:g} s.",
                       hint="it may still be running there; the same command again is safe")


class _Watch:
    """Calls ``act`` once when nobody has touched it for ``timeout_s``."""

    def __init__(self, timeout_s: float, act: Callable[[], object]) -> None:
        self._timeout_s = timeout_s
        self._act = act
        self._until = time.monotonic() + timeout_s
        self._done = threading.Event()
        self.expired = False
        threading.Thread(target=self._wait, name="watch", daemon=True).start()

    def touch(self) -> None:
        self._until = time.monotonic() + self._timeout_s

    def stop(self) -> None:
        self._done.set()

    def _wait(self) -> None:
        while not self._done.wait(max(self._until - time.monotonic(), 0.01)):
            if time.monotonic() >= self._until:
                self.expired = True
                self._act()
                return


class _Reader:
    """Reads a stream to its end in a thread, so that neither side waits for the other."""

    def __init__(self, read: Callable[[], bytes], watch: _Watch) -> None:
        self._read = read
        self._watch = watch
        self._parts: list[bytes] = []
        self._thread = threading.Thread(target=self._gather, name="reader", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """All of it, once the stream has ended; what there is, once the watch has expired."""
        while self._thread.is_alive() and not self._watch.expired:
            self._thread.join(0.2)
        return b"".join(self._parts).decode("utf-8", "replace")

    def _gather(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed under us: whoever did so knows why
            while part := self._read():
                self._parts.append(part)
