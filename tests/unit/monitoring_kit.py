"""Debian's own promtool, amtool, Prometheus and Alertmanager for tests; rules and configurations as they ship."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from rendering import render

from opsctl.resources import resource

CACHE = Path.home() / ".cache" / "opsctl-tests" / "monitoring"
UNPACKED = CACHE / "root"
PACKAGES = ("prometheus", "prometheus-alertmanager")
PROGRAMS = ("promtool", "prometheus", "amtool", "prometheus-alertmanager")
MONITORING = resource("monitoring")
RULES = MONITORING / "rules"
MAIL = MONITORING / "notifications" / "mail.tmpl"
DEFAULTS: dict[str, Any] = {
    **yaml.safe_load((resource("roles/monitoring") / "defaults" / "main.yml").read_text()),
    **yaml.safe_load((resource("roles/monitoring") / "vars" / "main.yml").read_text()),
    "monitoring_runbook_base": "ops-1:/usr/local/share/opsctl",
}


def find_programs() -> Path:
    """The folder with Debian's programs: the system's, or the packages unpacked beside it, which takes seconds once.

    Skips the test, with apt's last words, where neither is to be had.
    """
    if all((Path("/usr/bin") / program).exists() for program in PROGRAMS):
        return Path("/usr/bin")
    folder = UNPACKED / "usr" / "bin"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not (CACHE / ".complete").exists():
            _unpack()
            (CACHE / ".complete").touch()
    return folder


def _unpack() -> None:
    done = subprocess.run(["apt-get", "download", "--quiet", *PACKAGES], cwd=CACHE, capture_output=True, text=True,
                          check=False, timeout=300)
    archives = [archive for name in PACKAGES for archive in sorted(CACHE.glob(f"{name}_*.deb"))[-1:]]
    if done.returncode or len(archives) < len(PACKAGES):
        pytest.skip("prometheus and prometheus-alertmanager are neither installed nor to be downloaded: "
                    + (done.stderr.strip().splitlines() or ["apt-get says nothing"])[-1])
    for archive in archives:
        subprocess.run(["dpkg-deb", "--extract", archive, UNPACKED], check=True, timeout=120)
        archive.unlink()


def command_of(programs: Path, program: str) -> list[str]:
    """How to run one of the programs.

    Debian's Alertmanager reads a file below /usr/share, which is not there when its package is only unpacked: it gets
    a view of its own, where it is. Skips where that is not allowed.
    """
    if programs == Path("/usr/bin"):
        return [str(programs / program)]
    # slave: what is unmounted outside goes here too, and no disk of a machine is held
    view = ["unshare", "--mount", "--propagation", "slave",
            *(["--user", "--map-root-user"] if os.geteuid() else []), "sh", "-c",
            'mount -t overlay overlay -o "lowerdir=$0:/usr/share" /usr/share && exec "$@"',
            str(UNPACKED / "usr" / "share")]
    tried = subprocess.run([*view, "true"], capture_output=True, text=True, check=False, timeout=30)
    if tried.returncode:
        pytest.skip(f"no view of its own for {program}, whose package is not installed: {tried.stderr.strip()}")
    return [*view, str(programs / program)]


def rendered(name: str, **changed: object) -> str:
    """A file of rules as the role writes it: our values in brackets."""
    made = jinja2.Environment(variable_start_string="[[", variable_end_string="]]", block_start_string="[%",
                              block_end_string="%]", trim_blocks=True, keep_trailing_newline=True,
                              undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - rules, not HTML
    return made.from_string((RULES / name).read_text()).render(**{**DEFAULTS, **changed})


def write_rules(directory: Path, **changed: object) -> list[Path]:
    """All rules into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for rules in sorted(RULES.glob("*.yml")):
        files.append(directory / rules.name)
        files[-1].write_text(rendered(rules.name, **changed))
    return files


def alerts() -> dict[str, list[dict[str, Any]]]:
    """Every alert that ships, with each of its rules."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(rendered(path.name))["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    found.setdefault(rule["alert"], []).append(rule)
    return found


def prometheus_configuration(**changed: object) -> str:
    return render("templates/prometheus.yml.j2", **{**DEFAULTS, **changed})


def alertmanager_configuration(**changed: object) -> str:
    return render("templates/alertmanager.yml.j2", **{**DEFAULTS, **changed})


def moved(text: str, **paths: Path) -> str:
    """A configuration with its files elsewhere: ``rules``, ``mail`` and ``password``."""
    there = {"rules": "/etc/prometheus/opsctl/rules", "mail": "/etc/prometheus/opsctl/mail.tmpl",
             "password": str(DEFAULTS["monitoring_password_file"])}
    for name, path in paths.items():
        text = text.replace(there[name], str(path))
    return text


def run_tool(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in argv], capture_output=True, text=True, check=False, timeout=60)
