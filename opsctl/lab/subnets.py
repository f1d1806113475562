"""Chooses the lab's subnet: one that no interface, route or other lab of this computer uses. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, ip_network

from opsctl.errors import RefusedError

# Tried in this order. A company that routes all of 10/8 leaves 172.16/12 or 192.168/16; one that routes all three
# leaves the benchmarking range (RFC 2544), which is meant for isolated test networks.
RANGES = tuple(map(IPv4Network, ("10.91.0.0/16", "172.30.0.0/16", "192.168.128.0/17", "198.18.0.0/15")))
PREFIX = 24
# A VPN writes the default route as 0.0.0.0/1 and 128.0.0.0/1: a route this wide says where the rest goes,
# not that its addresses are in use here.
WIDEST_IN_USE = 8


def candidates() -> Iterator[IPv4Network]:
    for block in RANGES:
        yield from block.subnets(new_prefix=PREFIX)


def choose_subnet(used: Iterable[IPv4Network]) -> IPv4Network:
    """The first /24 that overlaps nothing in ``used``.

    Raises:
        RefusedError: all are in use.
    """
    taken = [network for network in used if network.prefixlen >= WIDEST_IN_USE]
    for candidate in candidates():
        if not any(candidate.overlaps(network) for network in taken):
            return candidate
    ranges = ", ".join(map(str, RANGES))
    raise RefusedError("lab.no_subnet", f"every subnet that a lab may take ({ranges}) is in use on this computer.",
                       hint="look at `ip route`; opsctl lab status shows the labs, opsctl lab down ends one")


def networks_in_use(addresses_json: str, routes_json: str) -> tuple[IPv4Network, ...]:
    """Networks named by ``ip -json -4 address`` and ``ip -json -4 route show table all``; the default route is none."""
    found = [ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)
             for link in json.loads(addresses_json) for address in link.get("addr_info", ())
             if address.get("family") == "inet"]
    found += [ip_network(route["dst"], strict=False) for route in json.loads(routes_json) if route["dst"] != "default"]
    return tuple(network for network in found if isinstance(network, IPv4Network))
