"""The state of a host as plain data: what opsctl owns there. Equal before and after means that nothing changed.

``settled`` is for two runs that should end in the same place.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from opsctl.releases.remote import HOST_PROGRAM

SCRIPT = r'''
import hashlib, json, os, subprocess
def out(*argv):
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
def tree(root):
    found = {}
    for directory, folders, files in os.walk(root):
        for name in sorted(folders + files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if os.path.islink(path):
                what = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    what = hashlib.sha256(file.read()).hexdigest()
            else:
                what = "directory"
            if "__pycache__" not in path:
                found[path] = [oct(status.st_mode), status.st_uid, status.st_gid, what]
    return found
print(json.dumps({
    "packages": out("dpkg-query", "--show"),
    "holds": out("apt-mark", "showhold"),
    "units": {unit: out("systemctl", "show", unit, "-p", "ActiveState,UnitFileState,ExecMainStartTimestamp")
              for unit in ("nginx", "haproxy", "opsctl-agent", "opsctl-setter", "inference@chat.0")},
    "files": {root: tree(root) for root in ("/etc/opsctl", "/opt/opsctl", "/srv", "/etc/haproxy", "/etc/nginx",
              "/etc/apt/sources.list.d", "/etc/apt/keyrings", "/etc/systemd/system", "/etc/sudoers.d")},
}, sort_keys=True))
'''


def of_host(lab: Any, host: str) -> dict[str, Any]:
    """A host as plain data: packages, package holds, units, files with modes, owners and hashes; once it has the agent
    also releases, drains, locks and holds; on the gateway and load balancer the ledger and the servers' weights.
    """
    answer = lab.run(host, ["sudo", "-n", "python3", "-"], stdin=SCRIPT)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    if HOST_PROGRAM not in found["files"]["/opt/opsctl"]:
        return found
    state = _ask(lab, host, "state", "--json")
    found["instances"] = [[one[key] for key in ("instance", "release", "health", "weight", "unfinished")]
                          for one in state["instances"]]
    found["drains"] = state["drains"]
    found["locks"] = _ask(lab, host, "locks")["locks"]
    found["holds of hosts"] = _ask(lab, host, "holds")["holds"]
    if "/etc/haproxy/haproxy.cfg" in found["files"]["/etc/haproxy"]:
        found["weights"] = [[row["server"], row["weight"], row["status"].split()[0]]
                            for row in _ask(lab, host, "balancer")["servers"]]
    if "/srv/opsctl-gateway/ledger" in found["files"]["/srv"]:
        found["ledger"] = [[line["action"], line["version"], line["digest"]]
                           for line in _ask(lab, host, "ledger-show", "--service", "chat")["lines"]]
    return found


def of_fleet(lab: Any) -> dict[str, str]:
    """A hash for each host of the lab."""
    return {host: hashlib.sha256(json.dumps(of_host(lab, host), sort_keys=True).encode()).hexdigest()
            for host in lab.hosts}


STARTED = "ExecMainStartTimestamp="
DATED = ("/srv/opsctl-gateway/ledger/", "/srv/opsctl-gateway/journal/")


def settled(lab: Any) -> dict[str, dict[str, Any]]:
    """The same of each host, without what tells one run from another: times, and files that hold the run's name."""
    return {host: _settled(of_host(lab, host)) for host in lab.hosts}


def _settled(found: dict[str, Any]) -> dict[str, Any]:
    found["units"] = {unit: [line for line in shown.splitlines() if not line.startswith(STARTED)]
                      for unit, shown in found["units"].items()}
    for tree in found["files"].values():
        for path in [path for path in tree if path.startswith(DATED)]:
            del tree[path]
    return found


def _ask(lab: Any, host: str, *verb: str) -> Any:
    answer = lab.run(host, ["sudo", "-n", HOST_PROGRAM, *verb])
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return json.loads(answer.stdout)


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """One line for each place where two of these differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [line for key in sorted(expected.keys() | found.keys())
                for line in differences(expected.get(key), found.get(key), f"{where}/{key}")]
    return [] if expected == found else [f"{where}: {expected} -> {found}"]
