"""One number for the state of a host: what opsctl owns there, hashed. Equal before and after means nothing changed."""

from __future__ import annotations

import hashlib
import json

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
              for unit in ("nginx", "haproxy", "opsctl-agent", "inference@chat.0")},
    "files": {root: tree(root) for root in ("/etc/opsctl", "/opt/opsctl", "/srv", "/etc/haproxy", "/etc/nginx",
              "/etc/apt/sources.list.d", "/etc/apt/keyrings", "/etc/systemd/system", "/etc/sudoers.d")},
}, sort_keys=True))
'''


def of_host(lab, host: str) -> dict[str, object]:
    """What opsctl owns on a host, as plain data: packages, holds, units, files with modes, owners and hashes."""
    answer = lab.run(host, ["sudo", "-n", "python3", "-"], stdin=SCRIPT)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def of_fleet(lab) -> dict[str, str]:
    """A hash for each host of the lab."""
    return {host: hashlib.sha256(json.dumps(of_host(lab, host), sort_keys=True).encode()).hexdigest()
            for host in lab.hosts}
