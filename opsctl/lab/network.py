"""The lab's bridge: machines and this computer on it, nothing beyond. No route leads out, no address is translated."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

from opsctl.lab.commands import CommandError, run
from opsctl.lab.subnets import networks_in_use

LINKS = Path("/sys/class/net")
FILTERS_BRIDGES = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")


def link_of(number: int, machine: str) -> str:
    """This computer's end of a machine's cable, named by systemd-nspawn; the lab's number keeps it below 16 letters."""
    return f"vb-{machine_name(number, machine)}"


def machine_name(number: int, machine: str) -> str:
    """What systemd-nspawn calls the machine: ``l2-gpu-1``. Unique on this computer."""
    return f"l{number}-{machine}"


def exists(link: str) -> bool:
    return (LINKS / link).exists()


def used_networks() -> tuple[IPv4Network, ...]:
    """What the interfaces and routes of this computer use."""
    addresses, routes = ["address"], ["route", "show", "table", "all"]
    return networks_in_use(*(run(["ip", "-json", "-4", *what]) for what in (addresses, routes)))


def create_bridge(bridge: str, address: str, prefix: int) -> None:
    """Makes the bridge and this computer's address on it; one that is there is left."""
    if not exists(bridge):
        # a bridge without an address of its own takes its ports' and changes it as machines come and go
        run(["ip", "link", "add", "name", bridge, "address", _stable_mac(bridge), "type", "bridge"])
        run(["ip", "link", "set", bridge, "addrgenmode", "none"])
    known = json.loads(run(["ip", "-json", "-4", "address", "show", "dev", bridge]))
    if not any(entry.get("local") == address for link in known for entry in link.get("addr_info", ())):
        run(["ip", "address", "add", f"{address}/{prefix}", "dev", bridge])
    run(["ip", "link", "set", bridge, "up"])


def unplug(link: str) -> None:
    """Takes a cable down: packets stop, and no side hears a farewell."""
    _if_there(link, ["ip", "link", "set", link, "down"])


def remove(link: str) -> None:
    """Removes a link; one that has gone is no error."""
    _if_there(link, ["ip", "link", "delete", link])


def _if_there(link: str, argv: list[str]) -> None:
    """A machine that just ended takes its cable with it at a moment of the kernel's choice."""
    if not exists(link):
        return
    try:
        run(argv)
    except CommandError:
        if exists(link):
            raise


def bridged_traffic_is_filtered() -> bool:
    """Docker's netfilter bridge module sends traffic between machines through this computer's FORWARD rules."""
    try:
        return FILTERS_BRIDGES.read_text().strip() == "1"
    except FileNotFoundError:
        return False


def pings(pid: int, address: str) -> bool:
    """Whether an address answers a ping sent from inside the machine that ``pid`` lives in; yes where none can be sent.
    """
    try:
        run(["nsenter", "--target", str(pid), "--all", "ping", "-q", "-c", "2", "-i", "0.2", "-W", "2", address])
    except CommandError as error:
        return not any(" 0 received" in line for line in error.log_tail)
    return True


def _stable_mac(bridge: str) -> str:
    number = int(bridge.removeprefix("opslab"))
    return f"02:6f:70:73:{number >> 8 & 255:02x}:{number & 255:02x}"  # locally administered, "ops" + number
