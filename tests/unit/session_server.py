"""An SSH server on the loopback, so that sessions meet a real protocol without root, sshd or a machine.

It runs what it is told in /bin/sh, forwards as a jump does, and notes who logged in. ``sudo`` is a script of ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import paramiko
from paramiko.common import cMSG_CHANNEL_SUCCESS

from opsctl.fleet.known_hosts import HostKey, pin_name

SUDO = {
    "allowed": '#!/bin/sh\nwhile true; do case "$1" in -n|-H|--) shift;; *) break;; esac; done\n'
               'AS_ROOT=yes; export AS_ROOT\nexec "$@"\n',
    "refused": "#!/bin/sh\necho 'sudo: ein Passwort ist notwendig' >&2\nexit 1\n",
    "asking": "#!/bin/sh\necho 'sudo: a password is required' >&2\nexit 1\n",
}


def make_key(path: Path) -> Path:
    """An ed25519 key pair at ``path`` and ``path``.pub."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


class Server:
    """Listens until ``close``. ``logins`` are the users let in, ``forwards`` the places that it connected others to."""

    def __init__(self, folder: Path, client_key: Path, sudo: str = "allowed") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host_key = paramiko.Ed25519Key.from_private_key_file(str(make_key(folder / "host")))
        self.allowed = paramiko.Ed25519Key.from_private_key_file(str(client_key)).get_base64()
        self.logins: list[str] = []
        self.forwards: list[tuple[str, int]] = []
        programs = folder / "bin"
        programs.mkdir()
        (programs / "sudo").write_text(SUDO[sudo], encoding="utf-8")
        (programs / "sudo").chmod(0o755)
        self.environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin"}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.transports: list[paramiko.Transport] = []
        self.programs: dict[str, Path] = {}  # what runs in place of a program with an absolute path
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def key(self) -> HostKey:
        return HostKey(self.host_key.get_name(), self.host_key.get_base64())

    @property
    def pin(self) -> str:
        """The line that known_hosts has for it."""
        return f"{pin_name('127.0.0.1', self.port)} {self.key.type} {self.key.text}\n"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which would take one more connection
        self._listener.close()
        for transport in self.transports:
            transport.close()

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connected)
            transport.add_server_key(self.host_key)
            self.transports.append(transport)
            transport.start_server(event=threading.Event(), server=_Answers(self, transport))


class _Answers(paramiko.ServerInterface):
    def __init__(self, server: Server, transport: paramiko.Transport) -> None:
        self._server = server
        self._transport = transport

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        if key.get_base64() != self._server.allowed:
            return paramiko.AUTH_FAILED
        self._server.logins.append(username)
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED if kind == "session" else paramiko.OPEN_FAILED_UNKNOWN_CHANNEL_TYPE

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        for program, path in self._server.programs.items():
            command = command.replace(program.encode(), bytes(path))
        # paramiko says yes only after this returns, and a command that is over by then would close the channel first,
        # which no sshd does. A second yes harms nobody.
        yes = paramiko.Message()
        yes.add_byte(cMSG_CHANNEL_SUCCESS)
        yes.add_int(channel.remote_chanid)
        self._transport._send_user_message(yes)
        threading.Thread(target=_execute, args=(channel, command, self._server.environment), daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
                                           ) -> int:
        try:
            connected = socket.create_connection(destination, timeout=5)
        except OSError:
            return paramiko.OPEN_FAILED_CONNECT_FAILED
        self._server.forwards.append(destination)
        threading.Thread(target=_forward, args=(self._transport, connected), daemon=True).start()
        return paramiko.OPEN_SUCCEEDED


def _execute(channel: paramiko.Channel, command: bytes, environment: dict[str, str]) -> None:
    process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment)
    assert process.stdin
    assert process.stdout
    assert process.stderr

    def feed() -> None:
        try:
            while data := channel.recv(65536):
                process.stdin.write(data)
            process.stdin.close()
        except (BrokenPipeError, OSError):
            return

    def errors() -> None:
        while data := process.stderr.read1(65536):
            channel.sendall_stderr(data)

    threads = [threading.Thread(target=feed, daemon=True), threading.Thread(target=errors, daemon=True)]
    for thread in threads:
        thread.start()
    try:
        while data := process.stdout.read1(65536):
            channel.sendall(data)
        threads[1].join()
        channel.send_exit_status(process.wait())
    except OSError:
        process.kill()
    finally:
        channel.close()
        process.wait()


def _forward(transport: paramiko.Transport, connected: socket.socket) -> None:
    channel = transport.accept(5)
    if channel is None:
        connected.close()
        return

    def pump() -> None:
        try:
            while data := connected.recv(65536):
                channel.sendall(data)
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError, EOFError):  # the other side went first
                channel.close()

    threading.Thread(target=pump, daemon=True).start()
    try:
        while data := channel.recv(65536):
            connected.sendall(data)
    except OSError:
        return
    finally:
        connected.close()


@contextmanager
def serving(folder: Path, client_key: Path, sudo: str = "allowed") -> Iterator[Server]:
    server = Server(folder, client_key, sudo)
    try:
        yield server
    finally:
        server.close()
