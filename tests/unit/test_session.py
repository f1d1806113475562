"""Sessions against a server on the loopback and against this machine: what they answer, and whom they believe."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from session_server import Server, make_key, serving

from opsctl.engines.session import Session, on_each
from opsctl.errors import ExitCode, OpsctlError, RefusedError
from opsctl.fleet.model import Fleet, Host
from opsctl.fleet.ssh_config import choose_control_directory, private_directory, write_ssh_config

NASTY = ["printf", "%s|", "a b", "it's", '"quoted"', "$HOME", "`id`", "a\nb", "*", "", "ü;&|"]


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


@pytest.fixture
def server(tmp_path: Path, client_key: Path) -> Iterator[Server]:
    with serving(tmp_path / "server", client_key) as running:
        yield running


def make_fleet(directory: Path, *hosts: Host, pins: str = "") -> Fleet:
    (directory / "known_hosts").write_text(pins, encoding="utf-8")
    return Fleet(directory=directory, inventory=directory / "inventory.ini", hosts=hosts, services=())


def remote(server: Server, client_key: Path, name: str = "gpu-1", user: str = "ann", jump: str = "") -> Host:
    return Host(name=name, address="127.0.0.1", groups=("gpu",), user=user, port=server.port,
                identity_file=str(client_key), proxy_jump=jump)


def local() -> Host:
    return Host(name="this", address="this", groups=("gpu",), connection="local")


@pytest.fixture(params=["ssh", "local"])
def session(request: pytest.FixtureRequest, tmp_path: Path, server: Server, client_key: Path) -> Iterator[Session]:
    """A session of either kind; as a user with sudo over SSH, and without sudo here."""
    host = remote(server, client_key) if request.param == "ssh" else local()
    with Session(make_fleet(tmp_path, host, pins=server.pin), host) as opened:
        yield opened


def refused(fleet: Fleet, host: Host) -> RefusedError:
    with pytest.raises(RefusedError) as caught, Session(fleet, host) as session:
        session.run(["true"])
    assert caught.value.exit_code is ExitCode.REFUSED
    assert caught.value.hint
    assert host.name in caught.value.message
    return caught.value


def test_arguments_arrive_as_they_are(session: Session) -> None:
    assert session.run(NASTY, sudo=False).stdout == "".join(f"{argument}|" for argument in NASTY[2:])


def test_exit_code_and_both_streams_come_back(session: Session) -> None:
    done = session.run(["sh", "-c", "echo out; echo err >&2; exit 3"], sudo=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_standard_input_is_empty_and_ends(session: Session) -> None:
    assert session.run(["cat"], sudo=False).stdout == ""
    assert session.run(["cat"], sudo=False, stdin="für".encode()).stdout == "für"


def test_stream_of_bytes_arrives_whole(session: Session) -> None:
    chunks = [os.urandom(700_001) for _ in range(7)]
    done = session.send(["sha256sum"], iter(chunks), sudo=False)
    assert done.stdout.split()[0] == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_long_output_while_input_is_sent_does_not_block(session: Session) -> None:
    done = session.send(["cat"], [b"x" * 3_000_000], sudo=False)
    assert len(done.stdout) == 3_000_000


def test_command_that_reads_nothing_still_says_its_exit_code(session: Session) -> None:
    assert session.send(["false"], [b"x" * 10_000_000], sudo=False).returncode == 1


def test_unknown_command_is_127(session: Session) -> None:
    assert session.run(["opsctl-no-such-command"], sudo=False).returncode == 127


def test_endless_command_times_out_and_the_session_goes_on(session: Session) -> None:
    started = time.monotonic()
    with pytest.raises(OpsctlError) as caught:
        session.run(["sleep", "60"], sudo=False, timeout_s=0.5)
    assert caught.value.code == "host.timed_out"
    assert time.monotonic() - started < 10
    assert session.run(["echo", "still here"], sudo=False).stdout == "still here\n"


def test_sudo_is_used_unless_the_user_is_root(tmp_path: Path, server: Server, client_key: Path) -> None:
    for user, expected in (("ann", "yes\n"), ("root", "\n")):
        host = remote(server, client_key, user=user)
        with Session(make_fleet(tmp_path, host, pins=server.pin), host) as session:
            assert session.run(["sh", "-c", "echo $AS_ROOT"]).stdout == expected
            assert session.run(["false"]).returncode == 1


def test_sudo_that_wants_a_password_is_refused_in_any_language(tmp_path: Path, client_key: Path) -> None:
    with serving(tmp_path / "server", client_key, sudo="refused") as server:
        host = remote(server, client_key)
        error = refused(make_fleet(tmp_path, host, pins=server.pin), host)
    assert error.code == "host.no_sudo"
    assert "NOPASSWD" in error.hint
    assert "--ask-become-pass" in error.hint
    assert "ann" in error.message


def test_changed_host_key_is_refused_before_login(tmp_path: Path, server: Server, client_key: Path) -> None:
    other = make_key(tmp_path / "other").with_suffix(".pub").read_text(encoding="ascii").split()[1]
    host = remote(server, client_key)
    pins = "# a comment\n" + server.pin.replace(server.key.text, other)
    error = refused(make_fleet(tmp_path, host, pins=pins), host)
    assert error.code == "host.foreign_key"
    assert f"{tmp_path / 'known_hosts'}:2" in error.message
    assert server.key.fingerprint in error.message
    assert "opsctl trust --replace gpu-1" in error.hint
    assert server.logins == []


def test_host_that_is_not_pinned_is_refused_before_login(tmp_path: Path, server: Server, client_key: Path) -> None:
    host = remote(server, client_key)
    error = refused(make_fleet(tmp_path, host), host)
    assert (error.code, server.logins) == ("host.not_trusted", [])
    assert "opsctl trust" in error.hint


@pytest.mark.parametrize("pinned", [False, True], ids=["a foreign machine", "a login that is refused"])
def test_who_is_refused_leaves_no_connection(tmp_path: Path, server: Server, client_key: Path, pinned: bool) -> None:
    """sshd takes ten of those that have not logged in, then it turns everybody away (MaxStartups)."""
    host = remote(server, make_key(tmp_path / "unknown") if pinned else client_key)
    fleet = make_fleet(tmp_path, host, pins=server.pin if pinned else "")
    before = sockets()
    for _ in range(3):
        refused(fleet, host)
    until = time.monotonic() + 5
    while sockets() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert sockets() <= before


def sockets() -> int:
    """This process' own."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(descriptor.readlink()).startswith("socket:")
    return found


def test_pin_of_another_port_does_not_count(tmp_path: Path, server: Server, client_key: Path) -> None:
    host = remote(server, client_key)
    pins = f"127.0.0.1 {server.key.type} {server.key.text}\n"
    assert refused(make_fleet(tmp_path, host, pins=pins), host).code == "host.not_trusted"


def test_known_hosts_that_engines_would_read_differently_is_refused(tmp_path: Path, server: Server, client_key: Path
                                                                    ) -> None:
    host = remote(server, client_key)
    fleet = make_fleet(tmp_path, host, pins=server.pin + f"@cert-authority * {server.key.type} {server.key.text}\n")
    with pytest.raises(OpsctlError, match=r"known_hosts:2") as caught, Session(fleet, host) as session:
        session.run(["true"])
    assert caught.value.exit_code is ExitCode.CONFIGURATION


def test_closed_port_is_unreachable(tmp_path: Path, server: Server, client_key: Path) -> None:
    host = remote(server, client_key)
    server.close()
    error = refused(make_fleet(tmp_path, host, pins=server.pin), host)
    assert error.code == "host.unreachable"
    assert "connection refused" in error.message


def test_port_that_says_nothing_is_unreachable(tmp_path: Path, client_key: Path, monkeypatch: pytest.MonkeyPatch
                                               ) -> None:
    monkeypatch.setattr("opsctl.engines.session.CONNECT_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        host = Host(name="gpu-1", address="127.0.0.1", groups=(), user="ann", port=mute.getsockname()[1],
                    identity_file=str(client_key))
        assert refused(make_fleet(tmp_path, host), host).code == "host.unreachable"


def test_foreign_login_key_is_refused_with_the_line_that_helps(tmp_path: Path, server: Server) -> None:
    host = remote(server, make_key(tmp_path / "stranger"))
    error = refused(make_fleet(tmp_path, host, pins=server.pin), host)
    assert error.code == "host.login_refused"
    assert f"ssh-copy-id -i {tmp_path / 'stranger'} -p {server.port} ann@127.0.0.1" in error.hint


def test_connection_that_breaks_under_a_command_is_said_and_made_anew(tmp_path: Path, server: Server, client_key: Path
                                                                      ) -> None:
    host = remote(server, client_key)

    def chunks() -> Iterator[bytes]:
        yield b"x"
        for transport in server.transports:
            transport.close()
        yield b"y" * 10_000_000

    with Session(make_fleet(tmp_path, host, pins=server.pin), host) as session:
        with pytest.raises(OpsctlError) as caught:
            session.send(["cat"], chunks(), sudo=False)
        assert caught.value.code == "host.connection_lost"
        assert session.run(["echo", "again"], sudo=False).stdout == "again\n"


def test_connection_that_broke_between_commands_is_made_anew(tmp_path: Path, server: Server, client_key: Path) -> None:
    host = remote(server, client_key)
    with Session(make_fleet(tmp_path, host, pins=server.pin), host) as session:
        session.run(["true"])
        for transport in server.transports:
            transport.close()
        assert session.run(["echo", "again"], sudo=False).stdout == "again\n"


def test_command_killed_by_a_signal_is_not_a_broken_connection(session: Session) -> None:
    assert session.run(["sh", "-c", "kill -9 $$"], sudo=False).returncode > 128


def test_commands_do_not_wait_for_delayed_acknowledgements(tmp_path: Path, server: Server, client_key: Path) -> None:
    host = remote(server, client_key)
    with Session(make_fleet(tmp_path, host, pins=server.pin), host) as session:
        session.run(["true"])
        connected = session._way._connection.transport.sock  # type: ignore[attr-defined]
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) < 15_000


@pytest.fixture
def behind_jumps(tmp_path: Path, client_key: Path) -> Iterator[tuple[Server, Server, Server]]:
    with serving(tmp_path / "a", client_key) as first, serving(tmp_path / "b", client_key) as second, \
            serving(tmp_path / "c", client_key) as target:
        yield first, second, target


def test_jumps_are_visited_in_their_order(tmp_path: Path, behind_jumps: tuple[Server, Server, Server], client_key: Path
                                          ) -> None:
    first, second, target = behind_jumps
    hosts = (remote(first, client_key, "ops-1"), remote(second, client_key, "ops-2"),
             remote(target, client_key, "gpu-1", jump="ops-1,ops-2"))
    fleet = make_fleet(tmp_path, *hosts, pins=first.pin + second.pin + target.pin)
    with Session(fleet, "gpu-1") as session:
        assert session.run(["echo", "far"], sudo=False).stdout == "far\n"
    assert [port for _, port in first.forwards] == [second.port]
    assert [port for _, port in second.forwards] == [target.port]


def test_jump_of_a_jump_is_followed(tmp_path: Path, behind_jumps: tuple[Server, Server, Server], client_key: Path
                                    ) -> None:
    first, second, target = behind_jumps
    hosts = (remote(first, client_key, "ops-1"), remote(second, client_key, "ops-2", jump="ops-1"),
             remote(target, client_key, "gpu-1", jump="ops-2"))
    with Session(make_fleet(tmp_path, *hosts, pins=first.pin + second.pin + target.pin), "gpu-1") as session:
        assert session.run(["echo", "far"], sudo=False).stdout == "far\n"
    assert len(first.logins) == len(second.logins) == len(target.logins) == 1


@pytest.mark.parametrize("which", ["jump", "target"])
def test_host_key_is_checked_at_the_jump_and_behind_it(which: str, tmp_path: Path, client_key: Path,
                                                       behind_jumps: tuple[Server, Server, Server]) -> None:
    jump, _, target = behind_jumps
    hosts = (remote(jump, client_key, "ops-1"), remote(target, client_key, "gpu-1", jump="ops-1"))
    wrong, right = (jump, target) if which == "jump" else (target, jump)
    other = make_key(tmp_path / "other").with_suffix(".pub").read_text(encoding="ascii").split()[1]
    fleet = make_fleet(tmp_path, *hosts, pins=right.pin + wrong.pin.replace(wrong.key.text, other))
    error = refused(fleet, hosts[1])
    assert error.code == "host.foreign_key"
    assert ("ops-1" in error.message) is (which == "jump")
    assert wrong.logins == []


def test_dead_host_behind_a_jump_is_unreachable(tmp_path: Path, behind_jumps: tuple[Server, Server, Server],
                                                client_key: Path) -> None:
    jump, _, target = behind_jumps
    hosts = (remote(jump, client_key, "ops-1"), remote(target, client_key, "gpu-1", jump="ops-1"))
    target.close()
    error = refused(make_fleet(tmp_path, *hosts, pins=jump.pin + target.pin), hosts[1])
    assert error.code == "host.unreachable"
    assert "jump" in error.message


def test_a_session_that_was_closed_stays_closed(session: Session) -> None:
    """Somebody waits for an end: a thread that asks again and again must not make the connection anew."""
    session.run(["true"], sudo=False)
    session.close()
    with pytest.raises(OpsctlError) as caught:
        session.run(["true"], sudo=False)
    assert caught.value.code == "host.session_closed"


def test_each_host_answers_or_says_why_not(tmp_path: Path, server: Server, client_key: Path) -> None:
    good, gone = remote(server, client_key), dataclasses.replace(remote(server, client_key, "gpu-2"), port=1)
    fleet = make_fleet(tmp_path, good, gone, local(), pins=server.pin)
    answers = on_each(fleet, fleet.hosts, lambda session: session.run(["echo", session.host.name], sudo=False).stdout)
    assert list(answers) == ["gpu-1", "gpu-2", "this"]
    assert (answers["gpu-1"], answers["this"]) == ("gpu-1\n", "this\n")
    assert isinstance(answers["gpu-2"], RefusedError)


def test_mistake_in_a_function_is_not_an_answer(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path, local())
    with pytest.raises(ZeroDivisionError):
        on_each(fleet, fleet.hosts, lambda _: 1 // 0)


def test_interruption_does_not_wait_for_the_hosts(tmp_path: Path, server: Server, client_key: Path) -> None:
    hosts = [remote(server, client_key), local()]
    fleet = make_fleet(tmp_path, *hosts, pins=server.pin)
    previous = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            on_each(fleet, hosts, lambda session: session.run(["sleep", "60"], sudo=False, timeout_s=60))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - started < 10


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def test_plain_ssh_takes_the_same_configuration(tmp_path: Path, behind_jumps: tuple[Server, Server, Server],
                                                client_key: Path) -> None:
    jump, _, target = behind_jumps
    hosts = (remote(jump, client_key, "ops-1"), remote(target, client_key, "gpu-1", jump="ops-1"))
    fleet = make_fleet(tmp_path, *hosts, pins=jump.pin + target.pin)
    config = write_ssh_config(fleet)

    def ssh(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ssh", "-F", str(config), "-o", "ControlPersist=no", *arguments], capture_output=True,
                              text=True, timeout=30, check=False, stdin=subprocess.DEVNULL)

    done = ssh("gpu-1", "echo", "far")
    assert (done.returncode, done.stdout) == (0, "far\n"), done.stderr
    fleet.known_hosts.write_text(jump.pin, encoding="utf-8")
    done = ssh("-o", "ControlPath=none", "gpu-1", "echo", "far")
    assert done.returncode == 255
    assert "Host key verification failed" in done.stderr
    ssh("-O", "exit", "ops-1")  # the jump's shared connection would stay for a minute


def test_users_own_ssh_configuration_does_not_matter(tmp_path: Path, server: Server, client_key: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    (tmp_path / "home" / ".ssh" / "config").write_text("Host *\n  Port 1\n  User nobody\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    host = remote(server, client_key)
    with Session(make_fleet(tmp_path, host, pins=server.pin), host) as session:
        assert session.run(["true"], sudo=False).returncode == 0
    assert server.logins == ["ann"]


Wrong = Callable[[Path], None]


@pytest.mark.parametrize("spoil", [lambda path: path.symlink_to("/tmp"), lambda path: path.write_text("")])
def test_folder_of_shared_connections_that_is_not_ours_is_refused(spoil: Wrong, tmp_path: Path) -> None:
    spoil(tmp_path / "c")
    with pytest.raises(RefusedError) as caught:
        private_directory(tmp_path / "c")
    assert caught.value.code == "ssh.foreign_directory"


def test_folder_of_shared_connections_is_private_and_its_path_short(tmp_path: Path) -> None:
    private_directory(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    for directory in (Path("/fleet"), tmp_path / ("long" * 30)):
        assert len(str(choose_control_directory(directory) / ("0" * 40))) + 17 <= 107
