"""Ansible as a process: what it does becomes typed events, and the outcome is decided from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opsctl.engines import ansible
from opsctl.engines.events import Event, PhaseStarted, TaskResult
from opsctl.errors import ConfigurationError, MixedError, RefusedError
from opsctl.provisioning import judge


def run(tmp_path: Path, tasks: str, *, host_line: str = "here ansible_connection=local",
        events: list[Event] | None = None, check: bool = False) -> ansible.PlaybookOutcome:
    (tmp_path / "inventory.ini").write_text(host_line + "\n")
    playbook = tmp_path / "play.yml"
    playbook.write_text("- name: Preflight\n  hosts: all\n  gather_facts: false\n  tasks:\n"
                        + textwrap.indent(textwrap.dedent(tasks), "    "))
    heard: list[Event] = [] if events is None else events
    return ansible.run_playbook(playbook, fleet_directory=tmp_path, inventory=tmp_path / "inventory.ini",
                                ssh_config=Path(os.devnull), log=tmp_path / "ansible.log", emit=heard.append,
                                check=check)


def test_a_run_speaks_in_events(tmp_path: Path) -> None:
    heard: list[Event] = []
    outcome = run(tmp_path, f"""
        - name: Write a file.
          ansible.builtin.copy: {{dest: {tmp_path}/out, content: x, mode: "0600"}}
        - name: Touch two.
          ansible.builtin.file: {{path: "{tmp_path}/{{{{ item }}}}", state: directory, mode: "0700"}}
          loop: [one, two]
        - name: Look.
          ansible.builtin.stat: {{path: /}}
    """, events=heard)
    assert outcome.changed == [("here", "Write a file."), ("here", "Touch two.")]
    assert outcome.failures == []
    assert PhaseStarted("Preflight") in heard
    told = [(event.task, event.item) for event in heard if isinstance(event, TaskResult) and event.status == "changed"]
    assert told == [("Write a file.", ""), ("Touch two.", "one"), ("Touch two.", "two")]
    again = run(tmp_path, f"""
        - name: Write a file.
          ansible.builtin.copy: {{dest: {tmp_path}/out, content: x, mode: "0600"}}
    """)
    assert again.changed == []


def test_check_mode_tells_what_would_be_and_does_none_of_it(tmp_path: Path) -> None:
    """Commands are skipped in check mode, and a plan without them would say that there is nothing to do."""
    (tmp_path / "there").write_text("old\n")
    heard: list[Event] = []
    outcome = run(tmp_path, f"""
        - name: Write a file.
          ansible.builtin.copy: {{dest: {tmp_path}/there, content: "new\\n", mode: "0600"}}
        - name: Run a program.
          ansible.builtin.command: {{argv: [touch, {tmp_path}/ran]}}
          changed_when: true
        - name: Run another, where it is needed.
          ansible.builtin.command: {{argv: [touch, {tmp_path}/ran]}}
          changed_when: true
          when: false
        - name: Look.
          ansible.builtin.command: {{argv: ["true"]}}
          changed_when: false
          check_mode: false
    """, events=heard, check=True)
    assert outcome.changed == [("here", "Write a file."), ("here", "Run a program.")]
    assert outcome.modules["Write a file."] == "ansible.builtin.copy"
    (diff,) = [event.detail for event in heard if isinstance(event, TaskResult) and event.task == "Write a file."]
    assert {"-old", "+new"} <= set(diff)
    assert (tmp_path / "there").read_text() == "old\n"
    assert not (tmp_path / "ran").exists()


def test_a_failing_task_brings_its_last_lines(tmp_path: Path) -> None:
    outcome = run(tmp_path, """
        - name: Try.
          ansible.builtin.command: {argv: [python3, -c, "print('out'); raise SystemExit('the disk is full')"]}
    """)
    (failure,) = outcome.failures
    assert failure.host == "here"
    assert failure.task == "Try."
    assert "the disk is full" in failure.detail
    assert not failure.unreachable


def test_a_secret_is_never_in_the_events(tmp_path: Path) -> None:
    heard: list[Event] = []
    outcome = run(tmp_path, """
        - name: Use the token.
          ansible.builtin.command: {argv: [python3, -c, "raise SystemExit('s3cret')"]}
          no_log: true
    """, events=heard)
    assert outcome.failures[0].message == "the output is hidden because it may hold a secret"
    assert "s3cret" not in repr(heard)


def test_an_unreachable_host_is_told_apart(tmp_path: Path) -> None:
    outcome = run(tmp_path, "- ansible.builtin.ping:\n",
                  host_line="away ansible_host=127.0.0.1 ansible_port=9 ansible_ssh_common_args='-o BatchMode=yes'")
    (failure,) = outcome.failures
    assert failure.unreachable
    assert "Connection refused" in failure.message


@pytest.mark.parametrize("tasks", ["- ansible.builtin.no_such_module: {}\n", "- {broken: [}\n"])
def test_a_playbook_that_cannot_start_is_one_sentence_and_a_log(tmp_path: Path, tasks: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        run(tmp_path, tasks)
    assert caught.value.code == "ansible.stopped"
    assert caught.value.log_tail
    assert str(tmp_path / "ansible.log") in caught.value.hint


def failure(phase: str, host: str = "gpu-1") -> ansible.Failure:
    return ansible.Failure(host, phase, "Check the disk.", "2 GB free, 8 GB wanted", ("a line",))


@pytest.mark.parametrize(("failures", "changed", "expected"), [
    ([], [], None),
    ([], [("gpu-1", "x")], None),
    ([failure("Preflight")], [], RefusedError),
    ([failure("Inference"), failure("Inference", "gpu-2")], [("gpu-1", "x")], MixedError),
    ([failure("Agent")], [], MixedError),
])
def test_the_outcome_decides_the_exit_code(failures: list[ansible.Failure], changed: list[tuple[str, str]],
                                           expected: type[Exception] | None) -> None:
    outcome = ansible.PlaybookOutcome(changed=changed, failures=failures)
    if expected is None:
        judge(outcome, Path("ansible.log"))
        return
    with pytest.raises(expected, match="gpu-1: Check the disk: 2 GB free, 8 GB wanted"):
        judge(outcome, Path("ansible.log"))


def test_opsctl_is_not_imported_by_the_gpl_callback_nor_ansible_by_opsctl() -> None:
    package = Path(ansible.__file__).parent.parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        if file.parent.name == "callback":
            assert "GPL-3.0-or-later" in text
            assert "import opsctl" not in text
            assert "from opsctl" not in text
        else:
            assert "\nimport ansible" not in text, file
            assert "\nfrom ansible" not in text, file


def test_ansible_dies_with_the_controller(tmp_path: Path) -> None:
    """A controller killed with SIGKILL leaves no ansible-playbook behind."""
    (tmp_path / "inventory.ini").write_text("here ansible_connection=local\n")
    (tmp_path / "play.yml").write_text(textwrap.dedent(f"""
        - name: Long
          hosts: all
          gather_facts: false
          tasks:
            - name: Say who runs this.
              ansible.builtin.copy: {{dest: {tmp_path}/started, content: x, mode: "0600"}}
            - name: Wait.
              ansible.builtin.wait_for: {{timeout: 60}}
    """))
    controller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(f"""
        from pathlib import Path
        from opsctl.engines import ansible
        here = Path({str(tmp_path)!r})
        ansible.run_playbook(here / "play.yml", fleet_directory=here, inventory=here / "inventory.ini",
                             ssh_config=Path("/dev/null"), log=here / "log",
                             emit=lambda event: print(type(event).__name__, getattr(event, "task", ""), flush=True))
    """)], stdout=subprocess.PIPE, text=True)
    assert controller.stdout is not None
    for line in controller.stdout:
        if "Wait." in line:
            break
    children = Path(f"/proc/{controller.pid}/task/{controller.pid}/children").read_text().split()
    assert children
    watched = [os.pidfd_open(int(child)) for child in children]
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    import select
    for descriptor in watched:
        assert select.select([descriptor], [], [], 20)[0], "ansible-playbook outlived its controller"
        os.close(descriptor)


def test_the_word_that_tells_most_is_the_last_one_of_the_first_host() -> None:
    said = [ansible.Failure("gpu-1", "Agent", "Start it.", "unable to start"),
            ansible.Failure("gpu-2", "Agent", "Start it.", "unable to start"),
            ansible.Failure("gpu-1", "Agent", "Stop and show why.", "the port is taken", ("bind: in use",))]
    with pytest.raises(MixedError, match=r"gpu-1: .*the port is taken \(also on gpu-2\)") as caught:
        judge(ansible.PlaybookOutcome(failures=said), Path("ansible.log"))
    assert caught.value.log_tail == ("bind: in use",)


def test_an_exit_code_without_a_failed_task_is_no_success() -> None:
    with pytest.raises(MixedError, match="exit code 250 in Agent"):
        judge(ansible.PlaybookOutcome(stats={"gpu-1": {"ok": 3}}, phase="Agent", exit_code=250), Path("ansible.log"))


# As sudo -S does: prompts on stderr, reads a line, becomes.
SUDO = """#!/bin/sh
while [ "$1" != -u ]; do
    [ "$1" != -p ] || printf '%s' "$2" >&2
    shift
done
shift 2
read -r said
[ "$said" = "pass word" ] || exit 1
exec "$@"
"""


def test_a_sudo_password_goes_through_a_pipe(tmp_path: Path) -> None:
    """It is in no argument, no environment and no file; sudo gets it all the same."""
    (tmp_path / "sudo").write_text(SUDO)
    (tmp_path / "sudo").chmod(0o700)
    (tmp_path / "inventory.ini").write_text(
        f"here ansible_connection=local ansible_become=true ansible_become_user=daemon "
        f"ansible_become_exe={tmp_path}/sudo\n")
    (tmp_path / "play.yml").write_text(textwrap.dedent("""
        - name: Preflight
          hosts: all
          gather_facts: false
          tasks:
            - name: Look.
              ansible.builtin.stat: {path: /}
    """))
    for password, failures in (("pass word", 0), ("wrong", 1)):
        outcome = ansible.run_playbook(
            tmp_path / "play.yml", fleet_directory=tmp_path, inventory=tmp_path / "inventory.ini",
            ssh_config=Path(os.devnull), log=tmp_path / "log", emit=lambda event: None, become_password=password)
        assert len(outcome.failures) == failures, outcome.failures


def test_a_folder_with_a_blank_and_the_vaults_password_reach_ansible(tmp_path: Path) -> None:
    given = ansible.environment({"ANSIBLE_VAULT_PASSWORD_FILE": "/v", "ANSIBLE_FORKS": "1", "HOME": "/h"},
                                fleet_directory=tmp_path, ssh_config=Path("/a fleet/ssh_config"), events_fd=3)
    assert given["ANSIBLE_SSH_ARGS"] == "-F '/a fleet/ssh_config' -o ControlPersist=60s"
    assert given["ANSIBLE_VAULT_PASSWORD_FILE"] == "/v"
    assert given["ANSIBLE_FORKS"] == "32"
    assert given["HOME"] == "/h"


def test_what_another_thread_opens_meanwhile_stays_open() -> None:
    """The pipe's writing end goes to the child and is closed here; its number is soon somebody else's connection."""
    with ansible._event_pipe() as (_, writing):
        number = writing.fileno()
        writing.close()
        other = os.open(os.devnull, os.O_RDONLY)
        assert other == number
    os.fstat(other)
    os.close(other)
