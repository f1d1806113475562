"""Who changed a package last, from logs as apt, dpkg and sudo write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_driver_programs import program

from opsctl.drifting.history import OPSCTL, Culprit, History, logged, read_history, transactions, typed_in

LOGS = Path(__file__).parent / "fixtures" / "drift" / "logs"
SINCE = "2026-11-20 09:15:39"  # when provision wrote its record


def text(name: str) -> str:
    return (LOGS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def history() -> History:
    return read_history(text("history.log"), text("dpkg.log"), text("typed.log"))


@pytest.mark.parametrize(("package", "by", "when", "user", "words"), [
    ("libcuda1", "unattended-upgrade", "2026-11-21 06:12:44", "", "upgrade 580.126.09-1 -> 580.159.04-1"),
    ("libnvidia-ml1", "dpkg", "2026-11-22 02:47:58", "ann", "dpkg without apt"),
    ("nvidia-driver-cuda", "apt", "2026-11-21 14:20:09", "bób", "apt purge nvidia-driver-cuda"),
    ("haproxy", "apt", "2026-11-22 03:00:00", "ann", "apt-get remove haproxy"),
    ("nvidia-kernel-open-dkms", "apt", "2026-11-22 04:10:00", "ann", "install nvidia-kernel-open-dkms=595.71.05-1"),
    ("dkms", "apt", "2026-11-22 04:10:00", "ann", "3.0.11-1"),
])
def test_the_last_who_touched_a_package(history: History, package: str, by: str, when: str, user: str, words: str
                                        ) -> None:
    found = history.last(package)
    assert found is not None
    assert (found.by, found.when, found.user) == (by, when, user)
    assert words in found.words


def test_what_a_person_reads(history: History) -> None:
    found = history.last("libnvidia-ml1")
    assert found is not None
    assert found.words == ("dpkg without apt, 2026-11-22 02:47:58, upgrade 580.126.09-1 -> 595.71.05-1 "
                           "(ann: /usr/bin/dpkg -i libnvidia-ml1_595.71.05-1_amd64.deb)")


def test_nobody_is_named_for_what_no_log_tells(history: History) -> None:
    assert history.last("nvidia-modprobe") is None
    assert History().last("libcuda1") is None


def test_before_the_swaps_it_was_opsctl_itself() -> None:
    apt = text("history.log").partition("Start-Date: 2026-11-21  06")[0]
    dpkg = text("dpkg.log").partition("2026-11-21 06")[0]
    found = read_history(apt, dpkg).last("libcuda1")
    assert found is not None
    assert (found.by, found.command) == ("opsctl", "opsctl-driver.service")
    ansible = read_history(apt, dpkg).last("haproxy")
    assert ansible is not None
    assert (ansible.by, ansible.user) == ("apt", "ops")
    assert ansible.command.startswith("Ansible, opsctl provision or another playbook: ")


def test_opsctl_is_known_by_the_command_line_of_its_own_program() -> None:
    assert OPSCTL in " ".join(program("driver_transaction").APT)


@pytest.mark.parametrize(("apt", "dpkg", "by"), [
    (True, False, "unattended-upgrade"), (False, True, "dpkg"), (False, False, None)])
def test_one_of_the_logs_is_gone(apt: bool, dpkg: bool, by: str | None) -> None:
    found = read_history(text("history.log") if apt else "", text("dpkg.log") if dpkg else "").last("libcuda1")
    assert (found.by if found else None) == by


def test_a_log_of_dpkg_that_ends_earlier_does_not_hide_a_later_transaction() -> None:
    old = text("dpkg.log").partition("2026-11-21 06")[0]
    found = read_history(text("history.log"), old).last("libcuda1")
    assert found is not None
    assert found.by == "unattended-upgrade"


def test_dpkg_within_a_transaction_that_is_about_others() -> None:
    """In the same second, and still not apt's: apt does not name the package."""
    dpkg = "2026-11-21 06:12:46 upgrade nvidia-modprobe:amd64 580.126.09-1 580.159.04-1\n"
    found = read_history(text("history.log"), dpkg).last("nvidia-modprobe")
    assert found is not None
    assert found.by == "dpkg"


@pytest.mark.parametrize(("line", "by"), [
    ("upgrade libcuda1:amd64 580.126.09-1 580.159.04-1", "unattended-upgrade"),
    ("upgrade libcuda1:amd64 580.159.04-1 595.71.05-1", "dpkg"),  # right after, in the second in which apt ended
    ("remove libcuda1:amd64 580.159.04-1 <none>", "dpkg"),
])
def test_what_became_of_a_package_tells_whose_line_it_is(line: str, by: str) -> None:
    found = read_history(text("history.log"), f"2026-11-21 06:12:51 {line}\n").last("libcuda1")
    assert found is not None
    assert found.by == by


@pytest.mark.parametrize("act", ["Install", "Reinstall", "Upgrade", "Downgrade", "Remove", "Purge"])
def test_every_kind_of_line(act: str) -> None:
    versions = {"Install": "2-1, automatic", "Upgrade": "1-1, 2-1", "Downgrade": "1-1, 2-1"}.get(act, "2-1")
    (found,) = transactions(f"Start-Date: 2026-11-21  06:12:44\n{act}: x:i386 (1), a+b:amd64 ({versions}), c:all (3)\n")
    change = found.changes[1]
    old, new = {"Install": ("", "2-1"), "Reinstall": ("", "2-1"), "Remove": ("2-1", ""), "Purge": ("2-1", "")}.get(
        act, ("1-1", "2-1"))
    assert (change.name, change.act, change.old, change.new) == ("a+b", act.lower(), old, new)
    assert [one.name for one in found.changes] == ["x", "a+b", "c"]


def test_entries_that_cannot_be_read_are_passed_over() -> None:
    cut_before = "Upgrade: libcuda1:amd64 (1, 2)\nEnd-Date: 2026-11-21  06:12:44\n\n"
    assert transactions(cut_before + "Start-Date: \nUpgrade: libcuda1:amd64 (1, 2)\n") == []
    assert transactions("\x00\x00\ufffd\ufffd\n" + text("history.log"))[0].began == "2026-11-20 09:12:03"
    assert logged("2026-11-21 06:12:46 upgrade\n2026-11-21 06:12 upgrade a 1 2\n\ufffd\n") == []
    assert [one.command for one in typed_in(text("typed.log")) if "python3" in one.command] == []


@pytest.mark.parametrize(("package", "since", "by", "user"), [
    ("libnvidia-ml1", SINCE, "a hand", "ann"),      # by a pattern
    ("nvidia-modprobe", SINCE, "a hand", "ann"),    # by its name
    ("haproxy", SINCE, "a hand", "bob@laptop"),     # by opsctl exec, whose line is better than sudo's
    ("libcuda1", SINCE, "unattended-upgrade", ""),  # not by who set another's selection
])
def test_who_took_a_hold_away(history: History, package: str, since: str, by: str, user: str) -> None:
    found = history.unheld(package, since)
    assert found is not None
    assert (found.by, found.user) == (by, user)


def test_selections_that_came_from_a_file_may_have_been_any() -> None:
    line = "2026-11-22T02:50:00+0000 gpu-1 sudo[1]:  ann : PWD=/ ; USER=root ; COMMAND=/usr/bin/dpkg --set-selections"
    found = read_history("", "", line).unheld("libcuda1", SINCE)
    assert found is not None
    assert found.user == "ann"


def test_apt_that_failed_does_not_hide_who_really_changed_it() -> None:
    apt = text("history.log").replace("End-Date: 2026-11-21  06:12:51", "Error: Sub-process failed\nEnd-Date: "
                                      "2026-11-21  06:12:51")
    dpkg = "2026-11-20 20:00:00 upgrade libcuda1:amd64 580.126.09-1 580.159.04-1\n"
    found = read_history(apt, dpkg).last("libcuda1")
    assert found is not None
    assert (found.by, found.when) == ("dpkg", "2026-11-20 20:00:00")


def test_a_hold_that_nobody_was_seen_to_take() -> None:
    quiet = read_history(text("history.log"), text("dpkg.log"))
    assert quiet.unheld("nvidia-modprobe", SINCE) is None
    past = quiet.unheld("libnvidia-ml1", SINCE)
    assert past is not None
    assert past.by == "dpkg", "dpkg -i takes a hold off"
    assert quiet.unheld("nvidia-driver-cuda", "2026-11-22 00:00:00") is None, "that was before"
    assert quiet.unheld("libcuda1", "") is None, "nobody knows since when"
    found = quiet.unheld("libcuda1", SINCE)
    assert found is not None
    assert found.by == "unattended-upgrade", "apt takes the hold off as it changes a package"


def test_who_wrote_a_file(history: History) -> None:
    path = "/etc/apt/apt.conf.d/51opsctl-nvidia"
    assert history.wrote(path, "2026-11-22 02:51:40") == Culprit(
        "2026-11-22 02:51:40", "a hand", command=f"/usr/bin/vi {path}", user="ann")
    assert history.wrote(path, "2026-11-22 12:00:00") == Culprit("2026-11-22 12:00:00", "a hand")
