"""What keeps a host's driver and brings it back: decisions by table, and a real apt and dpkg in a throw-away root."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_driver_programs import FILES, program
from test_lab_vendor_install import DRIVER, FAILS, PIN_FILE, Throwaway, machine, pytestmark, repository
from vendor_kit import NEWEST, OLD, of

assert machine is not None and repository is not None  # fixtures of another file
keeper = program("driver_keep")
in_a_root = pytestmark
PROGRAM = "usr/local/lib/opsctl/driver-keep"
HELD = (*DRIVER, "libnvidia-ml1", f"nvidia-driver-pinning-{OLD}")
BEGUN = json.dumps({"run": "R1", "to": NEWEST, "instances": ["chat.0"]})


def package(name: str, version: str = "580.126.09-1", **more: Any) -> dict[str, Any]:
    return {"name": name, "architecture": "amd64", "version": version, "hold": True, "status": "installed",
            "pin": name.startswith("nvidia-driver-pinning-"), **more}


class TestDecisions:
    def test_what_belongs_to_a_driver(self) -> None:
        listed = ("nvidia-driver-cuda\tamd64\t580.126.09-1\thold\tinstalled\n"
                  "libcuda1\ti386\t1:580.126.09-1\tinstall\tinstalled\n"
                  "nvidia-driver-pinning-580.126.09\tall\t580.126.09-1\thold\tinstalled\n"
                  "nvidia-container-toolkit\tamd64\t1.19.0-1\tinstall\tinstalled\n"
                  "nvidia-old\tamd64\t550.1.1-1\tdeinstall\tconfig-files\n")
        found = keeper.members(listed)
        assert [keeper.word(one) for one in found] == ["nvidia-driver-cuda:amd64", "libcuda1:i386",
                                                       "nvidia-driver-pinning-580.126.09"]
        assert keeper.versions_of(found) == ["580.126.09"]
        assert keeper.file_name(found[1]) == "libcuda1_1%3a580.126.09-1_i386.deb"

    def test_what_is_to_come_back_and_what_goes(self) -> None:
        kept = [package("a"), package("b"), package("c")]
        now = [package("a"), package("b", "595.71.05-1"), package("c", status="half-configured"), package("d")]
        lacking, extra = keeper.unlike(kept, now)
        assert [one["name"] for one in lacking] == ["b", "c"]
        assert [one["name"] for one in extra] == ["d"]

    @pytest.mark.parametrize(("output", "named"), [
        ("Remv haproxy [2.6]\n", "haproxy"), ("Purg dkms [3]\n", "dkms"),
        ("Remv d [1]\nInst b [1] (2 x [amd64])\n", ""), ("Remv b [2]\nInst b [2] (1 x [amd64])\n", "")])
    def test_nothing_else_goes_with_it(self, output: str, named: str) -> None:
        assert (named in keeper.refusal(output, ["d"])) if named else keeper.refusal(output, ["d"]) == ""

    def test_a_file_of_apts_cache_is_believed_by_what_dpkg_wrote_down(self, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
        tree = tmp_path / "tree/DEBIAN"
        tree.mkdir(parents=True)
        (tree / "control").write_text("Package: libcuda1\nVersion: 580.126.09-1\nArchitecture: amd64\n"
                                      "Maintainer: x\nDescription: x\n")
        (tree / "md5sums").write_text("0123456789abcdef0123456789abcdef  usr/lib/libcuda.so.1\n")
        one = package("libcuda1")
        for name in ("archives", "sums", "kept"):
            (tmp_path / name).mkdir()
        subprocess.run(["dpkg-deb", "--build", tree.parent, tmp_path / "archives" / keeper.file_name(one)], check=True,
                       capture_output=True)
        monkeypatch.setattr(keeper, "ARCHIVES", tmp_path / "archives")
        monkeypatch.setattr(keeper, "SUMS", tmp_path / "sums")
        assert not keeper.from_cache(tmp_path / "kept", one)  # dpkg says nothing of it
        (tmp_path / "sums/libcuda1:amd64.md5sums").write_text("fff  usr/lib/libcuda.so.1\n")
        assert not keeper.from_cache(tmp_path / "kept", one)
        (tmp_path / "sums/libcuda1:amd64.md5sums").write_text((tree / "md5sums").read_text())
        assert keeper.from_cache(tmp_path / "kept", one)


class TestKernels:
    @pytest.fixture
    def boot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Debian's /boot after three kernels; the oldest has no module, and the second runs."""
        versions = {"6.1.0-9-amd64": "", "6.1.0-10-amd64": NEWEST, "6.1.0-11-amd64": NEWEST}
        for name in versions:
            (tmp_path / f"vmlinuz-{name}").touch()
        monkeypatch.setattr(keeper, "BOOT", tmp_path)
        monkeypatch.setattr(keeper, "BOOTS_NEXT", (tmp_path / "link",))
        monkeypatch.setattr(keeper, "modules", lambda: versions)
        monkeypatch.setattr(keeper, "running", lambda: "6.1.0-10-amd64")
        monkeypatch.setattr(keeper, "loaded_version", lambda: NEWEST)
        monkeypatch.setattr(keeper, "said", lambda _: NEWEST)
        monkeypatch.setattr(keeper, "installed", list)
        return tmp_path

    def test_an_old_one_without_a_module_is_told(self, boot: Path) -> None:
        assert keeper.verify(NEWEST) == []
        assert keeper.told(NEWEST) == [f"the module for kernel 6.1.0-9-amd64 is not there where {NEWEST} is wanted"]

    def test_the_one_that_boots_next_counts(self, boot: Path) -> None:
        (boot / "link").symlink_to("boot/vmlinuz-6.1.0-9-amd64")
        (wrong,) = keeper.verify(NEWEST)
        assert "6.1.0-9-amd64" in wrong
        assert keeper.told(NEWEST) == []

    @pytest.mark.parametrize("kernel", ["6.1.0-10-amd64", "6.1.0-11-amd64"])
    def test_so_does_the_running_one_and_without_a_link_the_newest(self, boot: Path, kernel: str,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeper, "modules", lambda: {"6.1.0-9-amd64": NEWEST, "6.1.0-10-amd64": NEWEST,
                                                        "6.1.0-11-amd64": NEWEST, kernel: "1.2"})
        (wrong,) = keeper.verify(NEWEST)
        assert f"{kernel} is 1.2" in wrong

    def test_a_labs_counts(self, boot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keeper, "modules", lambda: {"lab": ""})
        assert len(keeper.verify(NEWEST)) == 1


def holder(run: str, beat_s: float) -> dict[str, Any]:
    return {"run": run, "user": "bob", "machine": "desk", "verb": "provision", "beat_s": beat_s}


class Played:
    """The program with a host that is told: what is loaded, whether instances serve, and what was run."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, *, loaded: str, serves: bool = True,
                 restored: str = "580.126.09") -> None:
        self.loaded, self.serves, self.ran = loaded, serves, []
        monkeypatch.setattr(keeper, "HOME", home)
        monkeypatch.setattr(keeper, "CHANGE", home / "change.json")
        monkeypatch.setattr(keeper, "UNIT_FILE", home / "unit")
        monkeypatch.setattr(keeper, "loaded_version", lambda: self.loaded)
        monkeypatch.setattr(keeper, "LOAD_WAIT_S", 0)
        monkeypatch.setattr(keeper, "verify", lambda version: [] if version == self.loaded else [f"not {version}"])
        monkeypatch.setattr(keeper, "restore", lambda: self._restore(restored))
        monkeypatch.setattr(keeper, "run", self._run)
        keeper.write(home / "change.json", {"run": "R1", "from": "580.126.09", "to": "595.71.05", "phase": "changing",
                                            "instances": ["chat.0"], "boot": "b", "host": "gpu-1"})
        monkeypatch.setattr(keeper, "ROTATION", home / "rotation.json")
        monkeypatch.setattr(keeper, "said", lambda _: "")
        keeper.leave()

    def _restore(self, version: str) -> None:
        self.ran.append("restore")
        self.loaded = version
        keeper.mark("restored")

    def _run(self, argv: list[str], **_: Any) -> int:
        self.ran.append(" ".join(argv[1:]))
        return int(argv[1] == "accept" and not (self.serves or "restore" in self.ran))

    @property
    def phase(self) -> str:
        change = keeper.read_change()
        return str(change["phase"])


class TestAfterABoot:
    def test_the_new_driver_serves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        host = Played(tmp_path, monkeypatch, loaded="595.71.05")
        assert keeper.go_on() == {"phase": "accepted"}
        assert host.ran[-2:] == ["undrain chat.0 --owner run:R1", f"disable {keeper.UNIT}"]
        assert not (tmp_path / "unit").exists()
        assert keeper.go_on() == {"phase": "accepted"}

    @pytest.mark.parametrize("how", [{"loaded": ""}, {"loaded": "595.71.05", "serves": False}])
    def test_or_the_old_one_comes_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any) -> None:
        host = Played(tmp_path, monkeypatch, **how)
        assert keeper.go_on() == {"phase": "back"}
        assert "undrain chat.0 --owner run:R1" in host.ran

    def test_with_another_boot_where_its_module_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        host = Played(tmp_path, monkeypatch, loaded="595.99", restored="595.99")
        assert keeper.go_on() == {"phase": "restored"}
        assert host.ran[-1] == "--no-block reboot"
        assert (tmp_path / "unit").exists()
        host.loaded = "580.126.09"
        assert keeper.go_on() == {"phase": "back"}
        assert host.ran.count("restore") == 1

    @pytest.mark.parametrize(("told", "reboots"), [
        ({}, True),
        ({"locks": [{"name": "host", "holder": holder("R2", 3)}]}, False),
        ({"locks": [{"name": "host", "holder": holder("R2", 61)}]}, True),  # nobody is there any more
        ({"locks": [{"name": "host", "holder": holder("R1", 3)}]}, True),  # it waits for this
        ({"locks": [{"name": "service-chat", "holder": holder("R2", 3)}]}, True),
        ({"holds": [{"host": "gpu-1", "by": "ann"}]}, False), ({"holds": [{"host": "gpu-2", "by": "ann"}]}, True)])
    def test_but_not_under_somebody_who_has_the_machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       told: dict[str, Any], reboots: bool) -> None:
        host = Played(tmp_path, monkeypatch, loaded="595.99", restored="595.99")
        monkeypatch.setattr(keeper, "said", lambda argv: json.dumps({argv[-1]: told.get(argv[-1], [])}))
        assert keeper.go_on() == {"phase": "restored"}
        assert (host.ran[-1] == "--no-block reboot") is reboots
        assert (tmp_path / "unit").exists()  # it goes on after whoever reboots it

    def test_it_gives_up_where_neither_serves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        host = Played(tmp_path, monkeypatch, loaded="", restored="")
        assert keeper.go_on() == {"phase": "restored"}
        with pytest.raises(keeper.SorryError, match="does not serve"):
            keeper.go_on()
        assert host.phase == "broken"
        assert not (tmp_path / "unit").exists()


def keep(machine: Throwaway, *words: str, status: int = 0) -> Any:
    done = machine.run("python3", f"/{PROGRAM}", *words)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr.splitlines()[-1]


def have_old(machine: Throwaway) -> None:
    machine.write("etc/opsctl-lab")
    machine.write("etc/opsctl/driver.json", '{"version": "old"}\n')
    machine.write(PROGRAM, (FILES / "driver_keep.py").read_text())
    machine.does("apt-get", "-qy", "install", f"nvidia-driver-pinning-{OLD}")
    machine.does("apt-get", "-qy", "install", *of(OLD, DRIVER))
    machine.does("apt-mark", "hold", *HELD)


def go_new(machine: Throwaway) -> subprocess.CompletedProcess[str]:
    swap = machine.apt("--allow-change-held-packages", "install", f"nvidia-driver-pinning-{NEWEST}",
                       f"nvidia-driver-pinning-{OLD}-")
    assert swap.returncode == 0, swap.stdout + swap.stderr
    machine.write("etc/opsctl/driver.json", '{"version": "new"}\n')
    return machine.apt("--allow-change-held-packages", "install", *of(NEWEST, (*DRIVER, "libnvidia-ml1")))


def cut_off(machine: Throwaway) -> None:
    """No source, no list of one, no cache."""
    machine.write("etc/apt/sources.list.d/vendor.sources", "")
    machine.write("etc/apt/sources.list", "")
    machine.does("sh", "-c", "rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb")


def is_old(machine: Throwaway) -> None:
    seen = machine.packages()
    assert {seen[name].split()[1] for name in (*DRIVER, "libnvidia-ml1", "libcuda1")} == {OLD}
    assert not [name for name, state in seen.items() if state.startswith(("iF", "hF", "iU", "hU"))]
    assert set(machine.does("apt-mark", "showhold").split()) >= set(HELD)
    assert f"Pin: version {OLD}-*" in (machine.upper / PIN_FILE).read_text()
    assert machine.does("cat", "/etc/opsctl/driver.json") == '{"version": "old"}\n'
    assert machine.does("cat", "/lib/modules/lab/nvidia.version") == f"{OLD}\n"


@pytest.mark.parametrize("builds", [True, False])
def test_back_without_any_source(machine: Throwaway, builds: bool) -> None:
    have_old(machine)
    assert keep(machine, "keep") == {"version": OLD, "changed": True}
    assert keep(machine, "keep") == {"version": OLD, "changed": False}
    assert keep(machine, "begin", BEGUN)["from"] == OLD
    if not builds:
        machine.write(FAILS)
    assert (go_new(machine).returncode == 0) is builds
    machine.does("rm", "-f", f"/{FAILS}")
    assert keep(machine, "keep") == {"version": OLD, "changed": False}  # the one before counts
    cut_off(machine)
    assert keep(machine, "restore")["changed"]
    is_old(machine)
    assert keep(machine, "look")["change"]["phase"] == "restored"
    assert not keep(machine, "restore")["changed"]
    assert keep(machine, "done") == {"changed": True}
    assert keep(machine, "look")["change"] is None
    assert keep(machine, "look")["kept"] == [OLD]


def test_no_way_back_is_told_before_anything_is_done(machine: Throwaway) -> None:
    have_old(machine)
    cut_off(machine)
    said = keep(machine, "keep", status=3)
    assert "there is no way back" in said
    assert f"nvidia-driver-cuda {OLD}-1+lab" in said
    assert keep(machine, "look")["kept"] == []


def test_a_kept_file_that_rots_is_noticed(machine: Throwaway) -> None:
    have_old(machine)
    keep(machine, "keep")
    machine.does("sh", "-c", f"for f in /var/lib/opsctl/driver/kept/{OLD}/libnvidia-ml1_*.deb; do echo rot >>$f; done")
    assert "is not what was kept" in keep(machine, "keep", status=3)
    assert "is not what was kept" in keep(machine, "begin", BEGUN, status=3)
