"""dpkg, apt, package sources and their keys, the gateway's bundle. Pure."""

from __future__ import annotations

import re

from opsctl.checking.model import (
    Captured,
    Judged,
    Wanted,
    first_line,
    fix,
    good,
    on,
    provision,
    shell,
    skip,
    some,
    warn,
)

OUR_SOURCE = "/etc/apt/sources.list.d/opsctl.sources"
OUR_UNIT = "opsctl-driver.service"
# what a provision mends by itself
OURS = re.compile(r"nvidia|^libcuda(?:1$|debugger)|^libnv(?:cuvid|optix|sdm)|^libxnvctrl|^cuda-drivers|^dkms$")
CUT_OFF = re.compile(r"unpacked but not yet configured|half configured|been triggered")
HARMLESS = ("md5sums control file",)  # dpkg works without them
# apt 2 says E: and W:, apt 3 Error: and Warning:
KEY_TROUBLE = re.compile(r"NO_PUBKEY|EXPKEYSIG|REVKEYSIG|KEYEXPIRED|BADSIG|is not signed|Missing key|is not bound|"
                         r"not considered secure|verification failed")
KEY_SOON = "Policy will reject signature within a year"
ADDRESS = re.compile(r"(?:https?|ftp|file|mirror\+\w+):[^\s']+")
FAILED = re.compile(r"^(?:Err:\d+ |W: Failed to fetch |E: Failed to fetch |Warning: Failed to fetch |"
                    r"Error: Failed to fetch |E: Release file for |Error: Release file for )(.*)$", re.MULTILINE)
WHY = re.compile(r"^\s+((?:Could not|Temporary failure|Connection|404|403|The HTTP).*)$", re.MULTILINE)
RELEASE_AGE = re.compile(r"is (?:expired|not valid yet) \([^)]*\)")
BROKEN = re.compile(r"^(?:E|Error): (?!Failed to fetch|The repository|Release file|Some index)(.*)$", re.MULTILINE)


def dpkg_state(captured: Captured, wanted: Wanted) -> Judged:
    """``dpkg --audit``: nothing is installed while something is half way, unless it is what the run itself mends."""
    why = ("dpkg did not answer" if captured.exit("dpkg-audit") is None else
           "there is no dpkg" if captured.exit("dpkg-audit") == 127 else
           "somebody works with dpkg just now, who is half way"
           if any("/dpkg/" in row["lock"] for row in captured.rows("locks")) else "")
    if why:
        return skip(why)
    found = audited(captured.out("dpkg-audit"))
    foreign = [name for name in found["grave"] if not OURS.search(name)]
    configure = shell(wanted, "dpkg --configure --pending && apt-get --fix-broken install")
    if foreign:
        return fix(f"dpkg is half way with {some(found['grave'])}", configure,
                   stops=captured.as_root)  # who is not root does not see whether somebody works with dpkg
    if found["grave"]:
        return fix(f"dpkg is half way with {some(found['grave'])}: the driver's, which a provision mends",
                   provision(wanted))
    if found["unpacked"]:  # a run that was cut off, and the same again goes on with it
        return fix(f"dpkg was cut off with {some(found['unpacked'])}: the next installation finishes that", configure)
    if found["light"]:
        return warn(f"dpkg lacks a list of checksums of {some(found['light'])}", on(
            wanted, "apt-get", "install", "--reinstall", found["light"][0]))
    return good("no package is half way")


def audited(text: str) -> dict[str, list[str]]:
    """Packages in ``dpkg --audit``: ``grave``, ``unpacked``, which apt finishes by itself as it installs, ``light``.

    A section is a paragraph of prose, then indented names.
    """
    found: dict[str, list[str]] = {"grave": [], "unpacked": [], "light": []}
    prose = ""
    for line in text.splitlines():
        if line.startswith(" ") and line.strip():
            kind = ("light" if any(mark in prose for mark in HARMLESS) else
                    "unpacked" if CUT_OFF.search(prose) else "grave")
            name = line.split()[0].partition(":")[0]
            found["grave" if kind == "unpacked" and OURS.search(name) else kind].append(name)
        else:
            prose = line if not line.strip() else f"{prose} {line}"
    return found


def dpkg_lock(captured: Captured, wanted: Wanted) -> Judged:
    if not captured.as_root:
        return skip("only root sees who holds the locks")
    held = captured.rows("locks")
    if not held:
        return good("nobody holds the locks of dpkg and apt")
    one = held[0]
    unit = one["unit"]
    who = f"{one['name'] or 'a process that has ended'} (pid {one['pid']}{', ' + unit if unit else ''})"
    if unit == OUR_UNIT:
        return warn(f"{who} holds {one['lock']}: a change of the driver that opsctl began", on(
            wanted, "journalctl", "--follow", "--unit", OUR_UNIT))
    return warn(f"{who} holds {one['lock']}: installing waits for it", on(
        wanted, *(["systemctl", "status", unit] if unit else ["ps", "-fp", str(one["pid"])])))


def apt_keys(captured: Captured, wanted: Wanted) -> Judged:
    """Whether apt itself, with its own verifier (gpgv or sqv), believes the signatures of the host's sources."""
    if captured.exit("apt-update") in (127, None):
        return _no_answer(captured)
    lines = [line for line in captured.out("apt-update").splitlines() if KEY_TROUBLE.search(line)]
    if lines:
        where = _addresses(lines)
        why = next((found[0] for line in lines if (found := re.search(
            r"NO_PUBKEY \w+|EXPKEYSIG \w+|SHA1 is not considered secure since [\d-]+|Missing key \w+", line))),
            first_line(lines[0]))
        return _by_source(wanted, f"apt does not believe the signature of {some(where) or 'a source'}: {why}",
                          shell(wanted, "apt-get update; grep -rn Signed-By /etc/apt/sources.list.d; "
                                "ls -l /usr/share/keyrings /etc/apt/keyrings")
                          + "   (get that repository's current key; never Trusted: yes)")
    if KEY_SOON in captured.out("apt-update"):
        return warn("apt will reject the key of a source within a year (SHA1)", on(
            wanted, "apt-get", "--audit", "update"))
    return good("apt believes the signatures of its sources")


def apt_sources(captured: Captured, wanted: Wanted) -> Judged:
    if captured.exit("apt-update") in (127, None):
        return _no_answer(captured)
    said = captured.out("apt-update")
    broken = BROKEN.findall(said)
    if broken:
        return _by_source(wanted, f"apt cannot read its sources: {broken[0]}", shell(
            wanted, "apt-get update; ls /etc/apt/sources.list.d"), stops=True)
    failed = [line for line in FAILED.findall(said) if not KEY_TROUBLE.search(line)]
    silent = _addresses([line for line in failed if "InRelease" in line or "Release" in line])
    keyless = _addresses([line for line in said.splitlines() if KEY_TROUBLE.search(line)])
    silent = [address for address in silent if address not in keyless]
    if silent:
        old = RELEASE_AGE.search(said)
        why = f"its Release file {old[0]}" if old else first_line("\n".join(WHY.findall(said))) or "no answer"
        return _by_source(wanted, f"{some(silent)}: {why}", on(wanted, "apt-get", "update")
                          + ("   (opsctl doctor compares the clocks)" if old else ""))
    if not re.search(r"^(?:Get|Hit|Ign):\d+ ", said, re.MULTILINE):
        if wanted.package_source == "upstream":
            return fix("it has no package sources, and package_source=upstream takes packages from there",
                       on(wanted, "ls", "/etc/apt/sources.list.d"), stops=True)
        return good("it has no sources of its own; packages come from the gateway")
    return good("all its package sources answer")


def gateway_packages(captured: Captured, wanted: Wanted) -> Judged:
    """The bundle's web server. A fleet that was never provisioned has none yet, and that is no fault."""
    asked = captured.document.get("bundle")
    if not wanted.gateway or not asked:
        return skip("it takes no packages from the gateway" if not wanted.gateway else "nobody asked the gateway")
    if asked["status"] == 200:
        return good(f"the gateway's bundle answers at {wanted.gateway}")
    if captured.file(OUR_SOURCE) is None:
        return skip("not provisioned yet: the gateway's bundle comes with the first provision")
    why = f"status {asked['status']}" if asked["status"] else asked["error"]
    return fix(f"{asked['url']} does not answer ({why}), and packages and releases come from there",
               f"opsctl exec --limit {wanted.host} -- curl -sSI {asked['url']}   (then nginx on the gateway, and what "
               "stands between)")


def _by_source(wanted: Wanted, what: str, command: str, *, stops: bool = False) -> Judged:
    """With ``package_source=gateway`` a provision never reads the host's own sources; the site's own upgrades do."""
    return fix(what, command, stops=stops) if wanted.package_source == "upstream" else warn(what, command)


def _no_answer(captured: Captured) -> Judged:
    if captured.exit("apt-update") == 127 and captured.exit("dpkg-audit") not in (127, None) and not captured.asked(
            "apt-update"):
        return skip("nobody asked apt: a provision never reads the host's own sources")
    return skip("there is no apt-get" if captured.exit("apt-update") == 127 else "apt-get did not end within its time")


def _addresses(lines: list[str]) -> list[str]:
    """The repositories in apt's lines, without what follows the repository itself."""
    found = [match[0].rstrip(":,") for line in lines for match in [ADDRESS.search(line)] if match]
    return list(dict.fromkeys(re.sub(r"/?(?:dists/.*|InRelease|Release)$", "", address).rstrip("/")
                              for address in found))
