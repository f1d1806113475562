"""The probe of opsctl drift on real logs, with a real dpkg and apt in a root of their own, and for real here."""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drift_kit import FIXTURES, OTHER, PIN, PREFERENCES, VERSION, Root, expected

from opsctl.checking.model import Captured
from opsctl.checking.sending import program
from opsctl.drifting import probe
from opsctl.drifting.differences import differences, drift_of
from opsctl.drifting.history import logged, read_history, transactions
from opsctl.drifting.hosts import PROBE
from opsctl.drifting.model import Difference
from opsctl.drifting.reading import read

LOGS = FIXTURES / "logs"
PYTHONS = [sys.executable, *([path] if (path := shutil.which("python3.8")) and subprocess.run(
    [path, "--version"], capture_output=True, check=False).returncode == 0 else [])]
with_dpkg = pytest.mark.skipif(os.geteuid() != 0 or any(shutil.which(name) is None for name in (
    "dpkg", "dpkg-deb", "apt-get")), reason="not a Debian, or not root")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_probe_runs_here_and_its_words_are_compared(python: str) -> None:
    watched = [Path(path) for path in ("/var/lib/dpkg", "/var/log", "/var/lib/apt/lists") if Path(path).is_dir()]
    before = [path.stat().st_mtime_ns for path in watched]
    done = subprocess.run([python, "-", '{"packages": ["*nvidia*", "ca-certificates", "no-such-package"]}'],
                          input=program(PROBE), capture_output=True, check=True, timeout=90)
    assert [path.stat().st_mtime_ns for path in watched] == before
    assert done.stderr == b""
    document = json.loads(done.stdout)
    assert document["schema"] == "opsctl.drift-probe/v1"
    assert document["late"] == []
    assert document["files"]["/etc/os-release"]
    assert document["kernels"]["running"] == os.uname().release
    if shutil.which("dpkg-query"):
        assert "ca-certificates\tall\t" in document["commands"]["dpkg-list"]["out"]
    said = drift_of(Captured(document), expected())
    assert said.skipped == "never provisioned"
    document["files"]["/etc/opsctl"] = ""
    (record, *rest) = drift_of(Captured(document), expected()).differences
    assert (record.layer, record.found) == ("record", "none")
    assert {one.layer for one in rest} <= {"roles"}


def test_the_probe_is_python_3_8() -> None:
    tree = ast.parse(program(PROBE).decode(), feature_version=(3, 8))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used & {"removeprefix", "removesuffix", "readlink", "batched", "pairwise"} <= {"readlink"}
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name.partition(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_a_program_and_a_file_that_hang_are_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dpkg.log")  # whoever opens it waits for a writer
    monkeypatch.setattr(probe, "LOGS", str(tmp_path))
    monkeypatch.setattr(probe, "DEADLINE_S", 0.5)
    monkeypatch.setattr(probe, "programs", lambda _names, _pin: {"dkms": (["sleep", "60"], 30.0)})
    workers: list[float] = []
    real = probe.threading.Thread.join
    monkeypatch.setattr(probe.threading.Thread, "join", lambda self, timeout: (workers.append(timeout), real(
        self, min(timeout, 2.0)))[0])
    began = time.monotonic()
    document = probe.capture({"packages": ["haproxy"]})
    assert time.monotonic() - began < 6.0
    assert document["commands"]["dkms"]["exit"] is None
    assert document["late"] == ["dpkg"]
    assert max(workers) <= 5.5


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fixtures' logs, rotated twice, one of each with bytes that are no UTF-8 and one that breaks off."""
    monkeypatch.setattr(probe, "LOGS", str(tmp_path))
    (tmp_path / "apt").mkdir()
    for name, cuts in (("apt/history.log", ("Start-Date: 2026-11-21  06", "Start-Date: 2026-11-22  03")),
                       ("dpkg.log", ("2026-11-21 06:12:46", "2026-11-22 02:47:58 startup"))):
        raw = (LOGS / Path(name).name).read_bytes()
        first, second = (raw.index(cut.encode()) for cut in cuts)
        (tmp_path / f"{name}.10.gz").write_bytes(gzip.compress(b"\xff\xfe Commandline: \xe9\n" + raw[:first]))
        (tmp_path / f"{name}.2.gz").write_bytes(gzip.compress(raw[first:second]))
        (tmp_path / name).write_bytes(raw[second:])
        (tmp_path / f"{name}.bak").write_text("Start-Date: 2026-11-23  00:00:00\nInstall: libcuda1:amd64 (9)\n\n"
                                              "2026-11-23 00:00:00 upgrade libcuda1:amd64 8 9\n")
    return tmp_path


PATTERNS = ["*nvidia*", "libcuda1", "haproxy", "dkms"]


def test_rotated_logs_are_read_oldest_first_and_for_our_packages_alone(logs: Path) -> None:
    whole = transactions((LOGS / "history.log").read_text(encoding="utf-8"))
    found = transactions(probe.history(PATTERNS))
    assert [one.began for one in found] == [one.began for one in whole]
    assert [one.command for one in found] == [one.command for one in whole]
    assert [one.user for one in found] == [one.user for one in whole]
    assert found[4].error == "Sub-process /usr/bin/dpkg returned an error code (1)"
    names = {change.name for one in found for change in one.changes}
    assert names == {"haproxy", "nvidia-driver-cuda", "libnvidia-ml1", "libcuda1", "nvidia-kernel-open-dkms", "dkms"}
    assert probe.history(["libssl3"]).count("Start-Date") == 1
    ours = [one for one in logged((LOGS / "dpkg.log").read_text()) if one.name in names]
    assert logged(probe.dpkg_log(PATTERNS)) == ours
    assert "status" not in probe.dpkg_log(PATTERNS)


def test_a_rotated_log_that_breaks_off_gives_what_it_has(logs: Path) -> None:
    for name in ("apt/history.log.2.gz", "dpkg.log.2.gz"):
        packed = (logs / name).read_bytes()
        (logs / name).write_bytes(packed[:-12])
    found = read_history(probe.history(PATTERNS), probe.dpkg_log(PATTERNS))
    assert found.transactions[0].began == "2026-11-20 09:12:03"
    assert found.logged[-1].name == "nvidia-kernel-open-dkms", "the newer log is read all the same"
    (logs / "dpkg.log.2.gz").write_bytes(b"no gzip at all")
    assert probe.dpkg_log(PATTERNS)


def test_no_logs_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LOGS", str(tmp_path / "none"))
    assert (probe.history(PATTERNS), probe.dpkg_log(PATTERNS)) == ("", "")


def looked(layers: tuple[str, ...] = ("packages", "holds", "pin"), since: str = "2026-01-01 00:00:00"
           ) -> list[Difference]:
    """What the probe tells of the root, judged; of the layers that a root of files alone can have."""
    document = probe.capture({"packages": expected().patterns})
    document["files"] |= {"/etc/opsctl/driver.json": Path(probe.RECORD).read_text(), "/etc/opsctl": ""}
    document["changed"] = {"/etc/opsctl/driver.json": since, PREFERENCES: probe.moment(time.time())}
    seen = read(Captured(document), expected(packages=(), holds=()))
    return [one for one in differences(seen) if one.layer in layers]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Pin, two libraries and the tools, from apt, held and recorded."""
    made = Root(tmp_path, monkeypatch)
    names = ("libnvidia-ml1", "libcuda1", "nvidia-modprobe")
    pin = made.deb(PIN, "1", {PREFERENCES: "Package: *nvidia*\nPin: version 580*\nPin-Priority: 1000\n"})
    made.apt("install", pin, *(made.deb(name, f"{VERSION}-1") for name in names))
    made.hold(PIN, *names)
    made.record(dict.fromkeys(names, f"{VERSION}-1"))
    return made


@with_dpkg
def test_nothing_differs_after_apt_installed_it(root: Root) -> None:
    assert looked() == []


@with_dpkg
def test_a_library_that_dpkg_swapped_behind_our_back_names_dpkg(root: Root) -> None:
    root.dpkg("-i", root.deb("libnvidia-ml1", f"{OTHER}-1"))
    found, hold = looked()
    assert (found.layer, found.what) == ("packages", "libnvidia-ml1")
    assert (found.wanted, found.found) == (f"{VERSION}-1", f"{OTHER}-1")
    assert found.culprit is not None
    assert (found.culprit.by, found.culprit.act, found.culprit.old) == ("dpkg", "upgrade", f"{VERSION}-1")
    assert found.fix == "opsctl provision --limit gpu-1"
    assert (hold.layer, hold.what, hold.culprit) == ("holds", "libnvidia-ml1", found.culprit)
    root.dpkg("-i", root.debs / f"libnvidia-ml1_{VERSION}-1_amd64.deb")
    root.hold("libnvidia-ml1")
    assert looked() == []


@with_dpkg
def test_a_hold_that_is_gone_alone(root: Root) -> None:
    root.select("libcuda1", selection="install")
    (found,) = looked(since=probe.moment(time.time()))
    assert (found.layer, found.what, found.wanted, found.found, found.culprit) == (
        "holds", "libcuda1", "hold", "install", None)


@with_dpkg
def test_apt_is_named_with_its_command_line_and_takes_the_hold_along(root: Root) -> None:
    deb = root.deb("libcuda1", f"{OTHER}-1")
    root.apt("install", "--allow-change-held-packages", deb)
    package, hold = looked()
    assert (package.what, hold.layer, hold.what, hold.found) == ("libcuda1", "holds", "libcuda1", "install")
    for one in (package, hold):
        assert one.culprit is not None
        assert one.culprit.by == "apt"
        assert "install --allow-change-held-packages" in one.culprit.command


@with_dpkg
def test_what_is_removed_half_installed_and_new(root: Root) -> None:
    root.apt("remove", "--allow-change-held-packages", "nvidia-modprobe")
    root.dpkg("--unpack", root.deb("libcuda1", f"{VERSION}-1+local"))
    root.dpkg("-i", root.deb("nvidia-settings", f"{OTHER}-1"))
    found = {one.what: one for one in looked(("packages",))}
    assert {name: one.found for name, one in found.items()} == {
        "nvidia-modprobe": "not installed", "libcuda1": f"{VERSION}-1+local, unpacked",
        "nvidia-settings": f"{OTHER}-1"}
    assert [one.culprit.act for one in found.values() if one.culprit] == ["upgrade", "remove", "install"]


@with_dpkg
def test_a_preferences_file_that_was_changed_is_brought_back_by_what_is_said(root: Root) -> None:
    file = root.root / PREFERENCES.lstrip("/")
    text = file.read_text()
    file.write_text("# Pin-Priority: -1\n")
    (changed,) = looked()
    assert (changed.layer, changed.what, changed.found) == ("pin", PREFERENCES, "changed")
    assert changed.culprit is not None
    assert changed.culprit.by == "a hand"
    file.unlink()
    (missing,) = looked()
    assert (missing.what, missing.found) == (PREFERENCES, "missing")
    assert "--force-confmiss" in missing.fix
    root.dpkg("--force-confmiss", "-i", root.debs / f"{PIN}_1_amd64.deb")
    root.hold(PIN)
    assert file.read_text() == text
    assert looked() == []
