"""Which kernel boots next, and whether each installed kernel would come up with the driver. Pure.

Not asked by anybody until a machine reboots: a module that DKMS never built, one of another version, one that secure
boot refuses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from opsctl.checking.findings_boot import kernels, next_kernel, secure_boot_on
from opsctl.checking.model import Captured
from opsctl.checking.reading import module
from opsctl.stack.driver import Desired

GRUB = (("/boot/grub/grub.cfg", "/boot/grub/grubenv"), ("/boot/grub2/grub.cfg", "/boot/grub2/grubenv"))
ENTRY = re.compile(r"\s*(?P<kind>menuentry|submenu)\s+(?P<quote>['\"])(?P<title>.*?)(?P=quote)(?P<rest>.*)\{\s*$")
IDENTITY = re.compile(r"(?:\$menuentry_id_option|--id)\s+['\"]?([^'\"\s{]+)")
KERNEL = re.compile(r"\s*linux(?:16|efi)?\s+(\S*/)?vmlinuz-(?P<release>\S+)")
DEFAULT = re.compile(r"^\s*set default=\"?([^\"\n]*)\"?\s*$", re.MULTILINE)
# "nvidia/580.126.09, 6.1.0-18-amd64, x86_64: installed"; older ones have a comma for the slash.
DKMS = re.compile(r"nvidia[\w-]*(?:/|, ?)(?P<version>[\d.]+)(?:, ?(?P<release>[^,\s]+), ?[^:]+)?: (?P<state>\w+)")


@dataclass
class Menu:
    """An entry of GRUB's menu, or a menu of them."""

    title: str
    identity: str = ""
    release: str = ""
    entries: list[Menu] = field(default_factory=list)
    is_menu: bool = False


@dataclass(frozen=True)
class Next:
    """``release``: empty where there is no kernel to boot; ``by``: what says so, in words."""

    release: str
    by: str


@dataclass(frozen=True)
class Kernel:
    """One installed kernel as it would come up. ``why``: what would be wrong then; empty: nothing."""

    release: str
    running: bool
    next: bool
    version: str
    flavour: str
    dkms: str
    headers: bool
    signer: str
    why: str = ""


def next_boot(captured: Captured) -> Next:
    """What GRUB would take where its files can be read, else what the distribution's link names, else the newest."""
    for menu, environment in GRUB:
        text = captured.file(menu)
        release, by = grub_takes(text, captured.file(environment) or "") if text else ("", "")
        if release:
            return Next(release, by)
    said = str(kernels(captured).get("next", ""))
    return Next(next_kernel(captured), "the link /vmlinuz" if said else "the newest that is installed")


def grub_takes(menu: str, environment: str) -> tuple[str, str]:
    """The kernel of GRUB's next boot, and what says so; two empty texts where that cannot be told.

    ``menu``: the text of grub.cfg; ``environment``: of grubenv.
    """
    saved = dict(line.split("=", 1) for line in environment.splitlines() if "=" in line)
    defaults = [value for value in DEFAULT.findall(menu) if "next_entry" not in value]
    written = defaults[0] if defaults else "0"
    if saved.get("next_entry"):
        wish, by = saved["next_entry"], "GRUB's next_entry, for one boot"
    elif "saved_entry" in written:
        wish, by = saved.get("saved_entry") or "0", "GRUB's saved_entry"
    else:
        wish, by = written, f"GRUB_DEFAULT={written}"
    root = entries_of(menu)
    found = _chosen(root, wish) or _chosen(root, "0")
    return (found.release, by) if found and found.release else ("", "")


def entries_of(menu: str) -> Menu:
    """The menu that a grub.cfg makes; what its scripts would decide is not looked at."""
    root = Menu("", is_menu=True)
    open_menus, depth, starts = [root], 0, [-1]
    for line in menu.splitlines():
        match = ENTRY.match(line)
        if match:
            identity = IDENTITY.search(match["rest"])
            entry = Menu(match["title"], identity[1] if identity else "", is_menu=match["kind"] == "submenu")
            open_menus[-1].entries.append(entry)
            open_menus.append(entry)
            starts.append(depth)
            depth += 1
            continue
        kernel = KERNEL.match(line)
        if kernel and not open_menus[-1].release:
            open_menus[-1].release = kernel["release"]
        if line.strip() == "}":
            depth -= 1
            if depth == starts[-1]:
                open_menus.pop()
                starts.pop()
        elif line.rstrip().endswith("{"):
            depth += 1
    return root


def _chosen(root: Menu, wish: str) -> Menu | None:
    """``0``, ``1>2``, titles or ids, as GRUB reads them; of a menu the first entry."""
    found: Menu | None = root
    for part in wish.split(">"):
        if found is None:
            return None
        named = next((one for one in found.entries if part in (one.title, one.identity)), None)
        at = int(part) if part.isdigit() else -1
        found = named or (found.entries[at] if 0 <= at < len(found.entries) else None)
    while found is not None and found.is_menu:
        found = found.entries[0] if found.entries else None
    return found


def installed_kernels(captured: Captured, record: Desired) -> tuple[Kernel, ...]:
    """Every kernel that could boot, with its module; none where the machine has no kernel of its own."""
    following = next_boot(captured).release
    states = dkms_states(captured.out("dkms"))
    found = []
    for one in kernels(captured).get("installed", ()):
        release = str(one["release"])
        if not one["image"]:
            continue  # headers alone make a folder below /lib/modules too
        name = f"modinfo:{release}"
        if captured.exit(name) is None:
            continue  # it did not answer in time
        there = module(captured, name)
        state = states.get((record.version, release), states.get((record.version, ""), ""))
        kernel = Kernel(release, release == kernels(captured).get("running"), release == following,
                        there.get("version", ""), flavour_of(there), state,
                        bool(one["headers"]), there.get("signer", ""))
        found.append(replace(kernel, why=_why(kernel, record, secure_boot_on(captured))))
    return tuple(found)


def _why(kernel: Kernel, record: Desired, secure_boot: bool | None) -> str:
    if not kernel.version:
        words = ["no nvidia module"]
        if kernel.dkms:
            words.append(f"DKMS says {kernel.dkms}")
        if not kernel.headers:
            words.append("no headers to build one with")
        return ", ".join(words)
    if kernel.version != record.version:
        return f"module {kernel.version}"
    if record.flavour and kernel.flavour and kernel.flavour != record.flavour:
        return f"the {kernel.flavour} module"
    if secure_boot and not kernel.signer:
        return "a module that is not signed, which secure boot refuses"
    return ""


def flavour_of(module: Mapping[str, str]) -> str:
    """By its licence, as the module itself tells it."""
    licence = module.get("license", "")
    return {"Dual MIT/GPL": "open", "NVIDIA": "proprietary"}.get(licence, "")


def dkms_states(text: str) -> dict[tuple[str, str], str]:
    """``dkms status``: by version and kernel, ``installed``, ``built``; ``added`` is so for any."""
    return {(match["version"], match["release"] or ""): match["state"] for match in DKMS.finditer(text)}


def module_on_disk(captured: Captured) -> str:
    """The version that the running kernel would load; a machine of the lab has a file that says so for its kernel."""
    running = str(kernels(captured).get("running", ""))
    said = module(captured, f"modinfo:{running}").get("version", "")
    return said or (captured.file("/lib/modules/lab/nvidia.version") or "").partition(" ")[0].strip()
