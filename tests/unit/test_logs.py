"""logs: what is asked for, in which order it stands; a host that goes away costs neither a line nor a double."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from threading import Event

import played_journal
import pytest
from session_server import SUDO, Server, make_key, serving
from typer.testing import CliRunner

from opsctl.cli import main
from opsctl.engines.following import Heard, Kind, becomes, ssh_arguments, wrapped
from opsctl.errors import UsageError
from opsctl.fleet.model import Fleet, Host, Placement
from opsctl.fleet.ssh_config import write_ssh_config
from opsctl.logs.entries import Entry, Place, Since, arguments, merge, parse, printable, read_since, units
from opsctl.logs.reading import follow, read

CHAT = "inference@chat.0.service"
PAUSES_S = (0.05,)
HOSTS = (Host("gpu-1", "10.0.0.1", ("gpu",)), Host("gpu-2", "10.0.0.2", ("gpu",)), Host("ops-1", "10.0.0.9", ("lb",)))
PLACED = tuple(Placement(instance, instance[:-2], int(instance[-1]), host, "10.0.0.1", 8100)
               for host in ("gpu-1", "gpu-2") for instance in ("chat.0", "embed.0"))


@pytest.mark.parametrize(("instance", "names", "expected"), [
    ("", (), {"gpu-1": (CHAT, "inference@embed.0.service"), "gpu-2": (CHAT, "inference@embed.0.service")}),
    ("chat.0", (), {"gpu-1": (CHAT,), "gpu-2": (CHAT,)}),
    ("chat.*", (), {"gpu-1": (CHAT,), "gpu-2": (CHAT,)}),
    ("", ("opsctl-agent", "srv.mount"), dict.fromkeys(("gpu-1", "gpu-2", "ops-1"),
                                                      ("opsctl-agent.service", "srv.mount"))),
])
def test_whose_journals_are_read(instance: str, names: tuple[str, ...], expected: dict[str, tuple[str, ...]]) -> None:
    assert units(HOSTS, PLACED, instance, names) == expected


@pytest.mark.parametrize(("hosts", "instance", "names", "says"), [
    (HOSTS, "chat.7", (), "chat.0, embed.0"), (HOSTS[2:], "", (), "--unit"),
    (HOSTS, "chat.0", ("x",), "one of the two"),
])
def test_nothing_to_read_is_a_wrong_turn(hosts: tuple[Host, ...], instance: str, names: tuple[str, ...], says: str
                                         ) -> None:
    with pytest.raises(UsageError) as caught:
        units(hosts, PLACED, instance, names)
    assert says in caught.value.hint


@pytest.mark.parametrize(("text", "expected"), [
    ("", ""), ("90s", "-90s"), ("1h", "-3600s"), ("2d", "-172800s"), ("1.5h", "-5400s"),
    ("2026-11-22 03:10", "2026-11-22 03:10:00 UTC"), ("2026-11-22", "2026-11-22 00:00:00 UTC"),
    ("2026-11-22T05:10:00+02:00", "2026-11-22 03:10:00 UTC"),
])
def test_since_when(text: str, expected: str) -> None:
    assert read_since(text).argument() == expected


@pytest.mark.parametrize("text", ["yesterday-ish", "0s", "-1h", "1 week", "--help"])
def test_a_time_that_is_none_is_refused_here(text: str) -> None:
    with pytest.raises(UsageError):
        read_since(text)


def test_a_window_stays_where_it_began() -> None:
    assert Since(seconds=60).argument(elapsed_s=30) == "-90s"


def test_following_begins_where_reading_ended() -> None:
    assert "--follow" not in arguments([CHAT], lines=5)
    silent, empty, known = Place((CHAT,)), Place((CHAT,), read=True), Place((CHAT,), read=True, cursor="c=7")
    assert "--lines=5" in silent.arguments(5, "-60s")
    assert not {"--lines=5"} & set(empty.arguments(5, "-60s"))
    for place in (empty, known):
        assert "--no-tail" in place.arguments(5, "-60s")
    assert "--after-cursor=c=7" in known.arguments(5, "-60s")
    assert "--since=-60s" not in known.arguments(5, "-60s")


def line(**changes: object) -> str:
    return json.dumps({"__CURSOR": "c=1", "__REALTIME_TIMESTAMP": "1800000000000000", "PRIORITY": "3",
                       "_SYSTEMD_UNIT": CHAT, "MESSAGE": "hello"} | changes)


@pytest.mark.parametrize(("changes", "unit", "instance", "text"), [
    ({}, CHAT, "chat.0", "hello"),
    ({"MESSAGE": list(b"caf\xc3\xa9 \xff")}, CHAT, "chat.0", "café \ufffd"),
    ({"MESSAGE": ["one", "two"]}, CHAT, "chat.0", "one\ntwo"),
    ({"MESSAGE": None}, CHAT, "chat.0", ""),
    ({"_SYSTEMD_UNIT": "init.scope", "UNIT": CHAT}, CHAT, "chat.0", "hello"),
    ({"_SYSTEMD_UNIT": "opsctl-agent.service"}, "opsctl-agent.service", "opsctl-agent", "hello"),
])
def test_lines_of_a_journal(changes: dict[str, object], unit: str, instance: str, text: str) -> None:
    assert parse("gpu-1", line(**changes)) == Entry("gpu-1", 1_800_000_000_000_000, unit, instance, 3, text, "c=1")


@pytest.mark.parametrize("text", ["", "-- No entries --", "{}", "[]", '{"__REALTIME_TIMESTAMP": "x"}', '{"cut'])
def test_what_is_no_entry_is_left_out(text: str) -> None:
    assert parse("gpu-1", text) is None


def entry(host: str, t_us: int) -> Entry:
    return Entry(host, t_us, CHAT, "chat.0", 6, f"{host} {t_us}")


def test_hosts_are_merged_by_time_and_none_is_put_out_of_its_own_order() -> None:
    merged = merge({"b": [entry("b", 1), entry("b", 9), entry("b", 2)], "a": [entry("a", 3), entry("a", 9)]})
    assert [one.text for one in merged] == ["b 1", "a 3", "b 9", "b 2", "a 9"]


def test_a_log_line_does_not_paint_on_the_terminal() -> None:
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07 bell\rback\tkept\nkept\x9b2J") == \
        "red 0;title bellback\tkept\nkept2J"


def test_sudo_only_where_it_is_needed() -> None:
    far, here = Host("a", "a", (), user="root"), Host("b", "b", (), connection="local")
    assert [becomes(far, "ann", 1000), becomes(Host("c", "c", ()), "ann", 0), becomes(Host("c", "c", ()), "root", 0),
            becomes(here, "ann", 1000), becomes(here, "root", 0)] == [False, True, False, True, False]
    assert wrapped(["x"], become=True)[:3] == ["sudo", "-n", "--"]
    assert "ControlPath=none" in ssh_arguments(Path("/c"), far, ["x"])


# From here on: a real SSH server, or this machine, and a journal that is played.

@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


class Played:
    """A fleet with ``far`` over SSH and ``here`` on this machine, each with a journal."""

    def __init__(self, folder: Path, server: Server, client_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self.journals = {"far": folder / "far.journal", "here": folder / "here.journal"}
        server.environment |= played_journal.install(folder / "server" / "bin", self.journals["far"])
        (folder / "bin").mkdir()
        (folder / "bin" / "sudo").write_text(SUDO["allowed"], encoding="utf-8")
        (folder / "bin" / "sudo").chmod(0o755)
        for name, value in played_journal.install(folder / "bin", self.journals["here"]).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        (folder / "known_hosts").write_text(server.pin, encoding="utf-8")
        (folder / "inventory.ini").write_text(
            f"[gpu]\nfar ansible_host=127.0.0.1 ansible_port={server.port} ansible_user=ann "
            f"ansible_ssh_private_key_file={client_key} "
            f"service_address=192.0.2.11 management_address=192.0.2.11\n"
            "here ansible_connection=local service_address=192.0.2.12 management_address=192.0.2.12\n"
            "[lb]\nhere\n[gateway]\nhere\n[monitor]\nhere\n", encoding="utf-8")
        (folder / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n", encoding="utf-8")
        self.inventory = folder / "inventory.ini"
        self.fleet = Fleet(folder, self.inventory, (
            Host("far", "127.0.0.1", ("gpu",), user="ann", port=server.port, identity_file=str(client_key)),
            Host("here", "here", ("gpu",), connection="local")), ())
        write_ssh_config(self.fleet)
        self.places = {"far": Place((CHAT,)), "here": Place((CHAT,))}

    def say(self, host: str, *messages: str, unit: str = CHAT) -> None:
        played_journal.write(self.journals[host], *((unit, message) for message in messages))

    def calls(self, host: str) -> list[list[str]]:
        path = self.journals[host].with_suffix(".calls")
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def played(tmp_path: Path, client_key: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    with serving(tmp_path / "server", client_key) as server:
        fleet = Played(tmp_path, server, client_key, monkeypatch)
        yield fleet
        for journal in fleet.journals.values():  # the server's shells outlive their channels while nothing is said
            journal.with_suffix(".ended").touch()


def test_logs_of_all_hosts_as_lines_and_as_a_document(played: Played) -> None:
    played.say("far", "f0", "f1")
    played.say("here", "h0", "\x1b[2Jh1")
    played.say("here", "of another unit", unit="ssh.service")
    said = CliRunner().invoke(main.app, ["logs", str(played.inventory), "-n", "5"])
    assert said.exit_code == 0, said.stderr
    fronts = [text.split()[:2] + text.split()[-1:] for text in said.stdout.splitlines()]
    assert fronts == [["far", "chat.0", "f0"], ["here", "chat.0", "h0"], ["far", "chat.0", "f1"],
                      ["here", "chat.0", "h1"]]
    said = CliRunner().invoke(main.app, ["logs", str(played.inventory), "-n", "1", "--json", "--limit", "far"])
    document = json.loads(said.stdout)
    assert document["schema"] == "opsctl.logs/v1"
    assert document["lines"] == [{"t": "2027-01-15T08:00:01.000000Z", "host": "far", "instance": "chat.0",
                                  "unit": CHAT, "priority": 6, "text": "f1"}]
    assert document["errors"] == {}


def test_a_host_that_does_not_answer_is_named_and_the_others_are_read(played: Played) -> None:
    played.say("here", "h0")
    played.server.close()
    said = CliRunner().invoke(main.app, ["logs", str(played.inventory)])
    assert said.exit_code == 9
    assert "far" in said.stderr
    assert said.stdout.rstrip().endswith("h0")
    said = CliRunner().invoke(main.app, ["logs", str(played.inventory), "--json"])
    assert json.loads(said.stdout)["errors"]["far"]["code"] == "host.unreachable"


def test_following_has_no_document(played: Played) -> None:
    assert CliRunner().invoke(main.app, ["logs", str(played.inventory), "-f", "--json"]).exit_code == 2


Batches = Iterator[tuple[list[Heard], list[Entry]]]


def until(batches: Batches, enough: Callable[[list[str], list[Kind]], bool]) -> tuple[list[str], list[Kind]]:
    texts: list[str] = []
    kinds: list[Kind] = []
    for heard, entries in batches:
        texts += [one.text for one in entries]
        kinds += [one.kind for one in heard]
        if enough(texts, kinds):
            break
    return texts, kinds


def test_a_connection_that_breaks_costs_neither_a_line_nor_a_double(played: Played) -> None:
    played.say("far", "f0", "f1")
    read(played.fleet, played.places, 10, "")
    with closing(follow(played.fleet, played.places, 10, Since(), PAUSES_S)) as batches:
        played.say("far", "f2")
        played.say("here", "h0")
        texts, kinds = until(batches, lambda texts, _: {"f2", "h0"} <= set(texts))
        assert (sorted(texts), kinds) == (["f2", "h0"], [])
        for transport in list(played.server.transports):
            transport.close()
        played.say("far", "f3", "f4")
        texts, kinds = until(batches, lambda texts, kinds: "f4" in texts and Kind.BACK in kinds)
    assert texts == ["f3", "f4"]
    assert kinds == [Kind.GONE, Kind.BACK]


def test_a_host_that_was_silent_at_first_is_followed_from_its_newest_lines(played: Played) -> None:
    played.say("far", *(f"f{number}" for number in range(20)))
    with closing(follow(played.fleet, {"far": played.places["far"]}, 3, Since(), PAUSES_S)) as batches:
        assert until(batches, lambda texts, _: "f19" in texts)[0] == ["f17", "f18", "f19"]


def test_a_host_that_stays_away_is_noted_once(played: Played) -> None:
    read(played.fleet, played.places, 10, "")
    played.server.close()
    with closing(follow(played.fleet, played.places, 10, Since(), PAUSES_S)) as batches:
        assert until(batches, lambda _, kinds: bool(kinds)) == ([], [Kind.GONE])
        played.say("here", "h0")
        assert until(batches, lambda texts, _: "h0" in texts) == (["h0"], [])


def test_nothing_runs_on_here_when_nobody_follows(played: Played) -> None:
    unit = f"only-{played.inventory.parent.name}.service"
    places = {"far": Place((unit,), read=True), "here": Place((unit,), read=True)}
    with closing(follow(played.fleet, places, 10, Since(), PAUSES_S)) as batches:
        played.say("far", "f0", unit=unit)
        played.say("here", "h0", unit=unit)
        until(batches, lambda texts, _: {"f0", "h0"} <= set(texts))
        assert {text.split()[0] for text in running(unit)} >= {"ssh", "timeout", sys.executable}
        played.journals["far"].with_suffix(".ended").touch()  # the far one is not ours to end
    ended(lambda: not running(unit))


def running(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return [text for text in found if mark in text]


def ended(condition: Callable[[], bool], patience_s: float = 10) -> None:
    until_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until_s
        Event().wait(0.02)


def test_ctrl_c_of_a_follow_is_a_good_end(played: Played) -> None:
    played.say("here", "h0")
    argv = [sys.executable, "-m", "opsctl", "logs", str(played.inventory), "-f", "--limit", "here"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        try:
            assert process.stdout.readline().endswith("h0\n")
            played.say("here", "h1")
            assert process.stdout.readline().endswith("h1\n")
            process.send_signal(signal.SIGINT)
            assert (process.wait(30), process.stderr.read()) == (0, "")
        finally:
            process.kill()


def test_a_pipe_that_is_closed_is_no_error(played: Played) -> None:
    played.say("here", *("x" * 1000 for _ in range(500)))
    argv = [sys.executable, "-m", "opsctl", "logs", str(played.inventory), "-n", "500", "--limit", "here"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 0
