"""The lab's subnet overlaps nothing that this computer uses."""

from __future__ import annotations

import json
from ipaddress import IPv4Network

import pytest

from opsctl.errors import RefusedError
from opsctl.lab.subnets import choose_subnet, networks_in_use


@pytest.mark.parametrize(("used", "chosen"), [
    ([], "10.91.0.0/24"),
    (["192.0.2.0/24", "127.0.0.0/8"], "10.91.0.0/24"),
    (["10.91.0.0/24"], "10.91.1.0/24"),
    (["10.91.0.0/24", "10.91.2.0/24"], "10.91.1.0/24"),
    (["10.91.0.64/26"], "10.91.1.0/24"),
    (["10.91.0.7/32"], "10.91.1.0/24"),
    (["10.91.0.0/16"], "172.30.0.0/24"),
    (["10.0.0.0/8"], "172.30.0.0/24"),
    (["10.0.0.0/8", "172.16.0.0/12"], "192.168.128.0/24"),
    (["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"], "198.18.0.0/24"),
    (["0.0.0.0/1", "128.0.0.0/1"], "10.91.0.0/24"),  # a VPN's way to write the default route
])
def test_the_first_free_subnet(used: list[str], chosen: str) -> None:
    assert choose_subnet(map(IPv4Network, used)) == IPv4Network(chosen)


def test_none_is_free() -> None:
    used = map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.18.0.0/15"))
    with pytest.raises(RefusedError, match="every subnet") as caught:
        choose_subnet(used)
    assert caught.value.code == "lab.no_subnet"
    assert caught.value.hint


def test_networks_of_interfaces_and_routes() -> None:
    addresses = json.dumps([
        {"ifname": "lo", "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8}]},
        {"ifname": "eth0", "addr_info": [{"family": "inet", "local": "192.0.2.7", "prefixlen": 24}]},
        {"ifname": "tun0", "addr_info": [{"family": "inet", "local": "10.8.0.2", "prefixlen": 32}]},
        {"ifname": "down0", "addr_info": []},
    ])
    routes = json.dumps([
        {"dst": "default", "gateway": "192.0.2.1", "dev": "eth0"},
        {"dst": "10.91.0.0/16", "dev": "tun0"},
        {"type": "local", "dst": "192.0.2.7", "dev": "eth0"},
    ])
    assert set(map(str, networks_in_use(addresses, routes))) == {
        "127.0.0.0/8", "192.0.2.0/24", "10.8.0.2/32", "10.91.0.0/16", "192.0.2.7/32"}
