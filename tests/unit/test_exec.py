"""exec: one command on many hosts, what it says folded together, and in each host's journal before it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from session_server import SUDO, Server, make_key, serving
from typer.testing import CliRunner

from opsctl import executing
from opsctl.cli import main
from opsctl.executing import Outcome, audit_arguments, audit_line, fold, heading, summary

GONE = {"code": "host.unreachable", "message": "", "hint": "", "log_tail": []}


def gone(host: str) -> Outcome:
    return Outcome(host, 8.0, error=GONE | {"message": f"{host}: it does not answer"})


@pytest.mark.parametrize(("outcomes", "expected"), [
    ([], []),
    ([Outcome("a", 1, 0, "x"), Outcome("b", 2, 0, "y"), Outcome("c", 3, 0, "x")], [["a", "c"], ["b"]]),
    ([Outcome("a", 1, 1, "x"), Outcome("b", 2, 0, "x")], [["b"], ["a"]]),
    ([Outcome("a", 1, 0, "x", "e"), Outcome("b", 2, 0, "x")], [["a"], ["b"]]),
    ([gone("a"), gone("b"), Outcome("c", 1, 0)], [["c"], ["a", "b"]]),
])
def test_equal_answers_stand_together_and_bad_ones_last(outcomes: list[Outcome], expected: list[list[str]]) -> None:
    assert [[one.host for one in group] for group in fold(outcomes)] == expected


def test_headings_and_the_last_line() -> None:
    group = [Outcome("gpu-1", 0.11, 0), Outcome("gpu-2", 0.31, 0)]
    assert heading(group) == "gpu-1, gpu-2: exit 0, 0.1 to 0.3 s"
    assert heading([gone("gpu-1")]) == "gpu-1: host.unreachable, 8.0 s"
    assert summary([*group, gone("gpu-3")]) == "2 of 3 hosts: exit 0"


def test_a_long_command_line_is_not_cut_off_in_the_journal() -> None:
    argv = audit_arguments(audit_line(["echo", "x" * 5000, "it's\nhere"], "root", "ann@laptop", sudo=True))
    assert argv[:3] == ["logger", "-t", "opsctl-audit"]
    assert int(argv[argv.index("--size") + 1]) > 5000
    assert json.loads(argv[-1])["argv"][2] == "it's\nhere"
    assert "\n" not in argv[-1]  # logger would make two lines of it


@pytest.fixture(scope="module")
def client_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("client") / "login")


class Played:
    """Two hosts, ``far`` over SSH and ``here``, each with a logger that writes to a file and a name of its own."""

    def __init__(self, folder: Path, server: Server, client_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        self.programs = {"far": folder / "server" / "bin", "here": folder / "bin"}
        self.programs["here"].mkdir()
        (self.programs["here"] / "sudo").write_text(SUDO["allowed"], encoding="utf-8")
        for programs in self.programs.values():
            (programs / "logger").write_text(f'#!/bin/sh\necho "$@" >> {programs}/journal\n', encoding="utf-8")
            for program in programs.iterdir():
                program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.programs['here']}:{os.environ['PATH']}")
        monkeypatch.setenv("WHO", "here")
        server.environment["WHO"] = "far"
        (folder / "known_hosts").write_text(server.pin, encoding="utf-8")
        self.inventory = folder / "inventory.ini"
        self.inventory.write_text(
            f"[gpu]\nfar ansible_host=127.0.0.1 ansible_port={server.port} ansible_user=ann "
            f"ansible_ssh_private_key_file={client_key} "
            "service_address=192.0.2.11 management_address=192.0.2.11\n"
            "here ansible_connection=local service_address=192.0.2.12 management_address=192.0.2.12\n"
            "[lb]\nhere\n[gateway]\nhere\n[monitor]\nhere\n", encoding="utf-8")
        (folder / "services.yml").write_text("chat:\n  group: gpu\n  port: 8100\n  listen: 8000\n", encoding="utf-8")

    def journal(self, host: str) -> list[dict[str, object]]:
        text = (self.programs[host] / "journal").read_text(encoding="utf-8")
        return [json.loads(line[line.index("{"):]) for line in text.splitlines()]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        said = CliRunner().invoke(main.app, ["exec", "-i", str(self.inventory), *arguments])
        return said.exit_code, said.stdout, said.stderr


@pytest.fixture
def played(tmp_path: Path, client_key: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    with serving(tmp_path / "server", client_key) as server:
        yield Played(tmp_path, server, client_key, monkeypatch)


def test_hosts_that_say_the_same_stand_together(played: Played) -> None:
    code, out, err = played.run("--", "printf", "%s\\n", "a b", "$HOME", "--json")
    assert code == 0, err
    assert out.startswith("far, here: exit 0, ")
    assert out.splitlines()[1:] == ["  a b", "  $HOME", "  --json"]
    assert err.strip() == "2 of 2 hosts: exit 0"


def test_it_is_in_every_hosts_journal_before_it_runs(played: Played) -> None:
    code, out, _ = played.run("--no-sudo", "--limit", "far", "--", "cat", str(played.programs["far"] / "journal"))
    assert code == 0
    assert '"verb": "exec"' in out
    (line,) = played.journal("far")
    assert line["argv"] == ["cat", str(played.programs["far"] / "journal")]
    assert (line["user"], line["sudo"]) == ("ann", False)
    assert "@" in str(line["by"])
    assert not (played.programs["here"] / "journal").exists()


def test_as_root_unless_it_is_not_wanted(played: Played) -> None:
    assert "  yes" in played.run("--limit", "far", "--", "sh", "-c", "echo $AS_ROOT")[1]
    assert "  yes" not in played.run("--limit", "far", "--no-sudo", "--", "sh", "-c", "echo $AS_ROOT")[1]


def test_one_that_fails_is_exit_9_and_shows_what_it_said(played: Played) -> None:
    code, out, err = played.run("--", "sh", "-c", "echo $WHO >&2; test $WHO = here")
    assert code == 9
    assert [line.split(",")[0] for line in out.splitlines()] == ["here: exit 0", "  here", "far: exit 1", "  far"]
    assert "1 of 2 hosts" in err


def test_a_host_that_does_not_answer_is_exit_9_and_the_others_did_it(played: Played) -> None:
    played.server.close()
    code, out, _ = played.run("--json", "--", "echo", "hello")
    document = json.loads(out)
    assert code == 9
    assert document["schema"] == "opsctl.exec/v1"
    assert document["command"] == ["echo", "hello"]
    assert document["groups"] == [["here"], ["far"]]
    far, here = document["hosts"]
    assert (far["returncode"], far["error"]["code"]) == (None, "host.unreachable")
    assert (here["returncode"], here["stdout"], here["audited"]) == (0, "hello\n", True)


def test_one_that_never_ends_is_given_up(played: Played) -> None:
    code, out, _ = played.run("--limit", "here", "--timeout", "0.3", "--json", "--", "sleep", "60")
    assert code == 9
    assert json.loads(out)["hosts"][0]["error"]["code"] == "host.timed_out"


@pytest.mark.parametrize("logger", ["exit 1", "sleep 60"])
def test_a_broken_journal_is_told_and_keeps_nobody_from_mending_it(played: Played, logger: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "AUDIT_TIMEOUT_S", 0.3)
    (played.programs["here"] / "logger").write_text(f"#!/bin/sh\nexec {logger}\n".replace("exec exit", "exit"),
                                                    encoding="utf-8")
    code, out, err = played.run("--limit", "here", "--", "echo", "mended")
    assert (code, "  mended" in out) == (0, True)
    assert "not in the journal of here" in err


def test_a_command_is_wanted_and_its_options_are_not_taken_for_ours(played: Played) -> None:
    assert played.run()[0] == 2
    assert played.run("df", "-h")[0] == 2
    assert not (played.programs["here"] / "journal").exists()
