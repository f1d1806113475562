"""For the tests of ``opsctl drift``: a root with a real dpkg and apt, a host that is well, and cases that differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_kit import overlaid

from opsctl.checking.model import Captured, Wanted
from opsctl.drifting import probe
from opsctl.drifting.differences import drift_of
from opsctl.drifting.hosts import blacklist, role_variables
from opsctl.drifting.model import Drift, Expected

FIXTURES = Path(__file__).parent / "fixtures" / "drift"
VERSION, OTHER = "580.126.09", "595.71.05"
PIN = f"nvidia-driver-pinning-{VERSION}"
PREFERENCES = "/etc/apt/preferences.d/nvidia-driver-pin"


def host() -> dict[str, Any]:
    """A whole host as the probe tells of it."""
    document: dict[str, Any] = yaml.safe_load((FIXTURES / "gpu-host.yml").read_text(encoding="utf-8"))
    document["files"]["/etc/apt/apt.conf.d/51opsctl-nvidia"] = blacklist()
    return finished(document)


def finished(document: dict[str, Any]) -> dict[str, Any]:
    """With the texts of its logs, and tabs in dpkg's list."""
    found = overlaid(document, {})
    found["logs"] = {name: (FIXTURES / "logs" / file).read_text(encoding="utf-8") if file.endswith(".log") else file
                     for name, file in document["logs"].items()}
    listed = found["commands"]["dpkg-list"]
    listed["out"] = listed["out"].replace(" ", "\t")
    return found


def expected(**changes: Any) -> Expected:
    """What is wanted of it."""
    wanted = Wanted("gpu-1", ("gpu",), driver=VERSION, gpu_uuids=("GPU-a", "GPU-b"))
    made = Expected(wanted, patterns=tuple(role_variables()["nvidia_driver_patterns"]), blacklist=blacklist(),
                    packages=("ca-certificates", "haproxy"), holds=("haproxy",),
                    bundle={"haproxy": {"2.6.12-1+deb12u2"}})
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    of_wanted = {key: own.pop(key) for key in list(own) if key not in vars(made)}
    return replace(made, **own, wanted=replace(wanted, **of_wanted))


@dataclass(frozen=True)
class Case:
    """A file ``cases/LAYER/words.yml``: how a host differs, and the lines that are to be said of it."""

    says: list[dict[str, str]]
    document: dict[str, Any]
    expected: Expected

    def drift(self) -> Drift:
        return drift_of(Captured(self.document), self.expected)


def cases() -> list[Path]:
    return sorted((FIXTURES / "cases").glob("*/*.yml"))


def load(path: Path) -> Case:
    """``packages`` changes lines of dpkg's list by name; a null takes one away; all else is laid over the host."""
    case = yaml.safe_load(path.read_text(encoding="utf-8"))
    document: dict[str, Any] = yaml.safe_load((FIXTURES / "gpu-host.yml").read_text(encoding="utf-8"))
    document["files"]["/etc/apt/apt.conf.d/51opsctl-nvidia"] = blacklist()
    listed = document["commands"]["dpkg-list"]
    for name, line in case.pop("packages", {}).items():
        mine = re.compile(rf"^{re.escape(name)} (?:amd64|all) .*\n", re.MULTILINE)
        listed["out"] = mine.sub("", listed["out"]) + (f"{name} {line}\n" if line else "")
    says, wanted = case.pop("says"), case.pop("expected", {})
    return Case(says, finished(overlaid(document, case)), expected(**wanted))


class Root:
    """A root in which a real dpkg and a real apt install tiny packages, and the probe looks at that root."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "root"
        self.debs = root / "debs"
        self.debs.mkdir()
        for folder in ("var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log/apt", "var/cache/apt/archives/partial",
                       "var/lib/apt/lists/partial", "etc/apt/preferences.d", "etc/opsctl", "etc/apt/apt.conf.d"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "var/lib/dpkg/status").touch()
        self.log = self.root / "var/log/dpkg.log"
        (root / "apt.conf").write_text(
            f'Dir "{self.root}";\nDir::State::status "{self.root}/var/lib/dpkg/status";\nAPT::Sandbox::User "root";\n'
            'Dir::Bin::methods "/usr/lib/apt/methods";\nDir::Bin::dpkg "/usr/bin/dpkg";\nAPT::Architecture "amd64";\n'
            f'DPkg::Options {{ "--root={self.root}"; "--log={self.log}"; "--force-script-chrootless"; }};\n'
            f'Dir::Log "{self.root}/var/log/apt";\nDPkg::Path "{os.environ["PATH"]}:/usr/sbin:/sbin";\n')
        self.apt_conf = root / "apt.conf"
        monkeypatch.setenv("DPKG_ADMINDIR", str(self.root / "var/lib/dpkg"))
        monkeypatch.setenv("DPKG_ROOT", str(self.root))
        monkeypatch.setattr(probe, "LOGS", str(self.root / "var/log"))
        monkeypatch.setattr(probe, "RECORD", str(self.root / "etc/opsctl/driver.json"))

    def deb(self, name: str, version: str, files: dict[str, str] | None = None) -> Path:
        tree = self.debs / f"{name}-{version}"
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
                                             "Maintainer: nobody <nobody@localhost>\nDescription: a tiny package\n")
        for path, content in (files or {}).items():
            (tree / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            (tree / path.lstrip("/")).write_text(content)
        if files and (configuration := [path for path in files if path.startswith("/etc")]):
            (tree / "DEBIAN/conffiles").write_text("".join(f"{path}\n" for path in configuration))
        path = self.debs / f"{name}_{version}_amd64.deb"
        run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(path))
        return path

    def dpkg(self, *arguments: str | Path) -> None:
        run("dpkg", f"--root={self.root}", f"--log={self.log}", "--force-script-chrootless", *map(str, arguments))

    def apt(self, *arguments: str | Path) -> None:
        run("apt-get", "-c", str(self.apt_conf), "-y", "-q", *map(str, arguments))

    def hold(self, *names: str) -> None:
        self.select(*names, selection="hold")

    def select(self, *names: str, selection: str) -> None:
        subprocess.run(["dpkg", f"--root={self.root}", "--set-selections"], check=True, text=True,
                       input="".join(f"{name} {selection}\n" for name in names))

    def record(self, packages: dict[str, str]) -> None:
        (self.root / "etc/opsctl/driver.json").write_text(json.dumps(
            {"version": VERSION, "flavour": "open", "fabric_manager": False, "pin": PIN, "packages": packages,
             "own": []}))


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
