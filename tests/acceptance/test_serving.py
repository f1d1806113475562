"""What serves: instances, their releases and signatures, the agent's word, HAProxy, and a whole stream through it."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from opsctl.agent import ledger, manifest, trust
from opsctl.errors import OpsctlError
from opsctl.fleet.model import Fleet
from opsctl.lab.answer import Answer, Response, request
from opsctl.verifying import (
    PROVISION,
    Target,
    Wrong,
    check_release,
    check_server,
    check_voice,
    first_difference,
    haproxy_configuration,
)

TOKENS = 8
CONFIGURATION = "/etc/haproxy/haproxy.cfg"


@pytest.mark.of("instance", "{what} is active and enabled")
def test_unit(asking, asked, target: Target) -> None:
    asking.ledger(target.service)
    asked.instance(target.what)
    unit = f"inference@{target.what}.service"
    service = asked.machine.service(unit)
    if not (service.is_running and service.is_enabled):
        words = ["not active"] * (not service.is_running) + ["not enabled"] * (not service.is_enabled)
        raise Wrong(f"{unit} active and enabled", " and ".join(words))


@pytest.mark.of("instance", "{what} answers GET /health with 200 on its own port {port}")
def test_health(asking, asked, target: Target) -> None:
    asking.ledger(target.service)
    asked.instance(target.what)
    address = target.placement.address
    ask = f"GET /health HTTP/1.1\r\nHost: {address}:{target.port}\r\nConnection: close\r\n\r\n".encode()
    answer = Response()
    answer.feed(asked.exchange(address, target.port, ask, timeout_s=10))
    if answer.status != 200:
        raise Wrong(f"HTTP 200 from {address} port {target.port}", f"HTTP {answer.status}",
                    f"ssh -F .opsctl/ssh_config {target.host} journalctl -u inference@{target.what} -n 50")


@pytest.mark.of("instance", "{what} serves the ledger's release")
def test_release(asking, asked, target: Target) -> None:
    check_release(asked.instance(target.what), asking.ledger(target.service))


@pytest.mark.of("instance", "the release that {what} serves is signed by a key in trust/")
def test_signature(fleet: Fleet, asked, target: Target) -> None:
    found = asked.instance(target.what)
    if not found["release"]:
        pytest.skip("it serves no release")
    name = manifest.directory_name(found["release"], found["digest"]) if found["digest"] else ""
    folder = f"/srv/opsctl/{target.service}/releases/{name}"
    files = [asked.machine.file(f"{folder}/{part}") for part in (manifest.MANIFEST, manifest.SIGNATURE)]
    if not name or not all(file.exists for file in files):
        raise Wrong(f"a signed manifest of {found['release']}", f"none in {folder}", PROVISION)
    try:
        signed = trust.verify(*(file.content for file in files), fleet.directory / "trust" / "allowed_signers",
                              f"release {name}")
    except OpsctlError as error:
        raise Wrong("a manifest that trust/allowed_signers signed", error.message, error.hint) from None
    if (signed.release.service, signed.directory_name) != (target.service, name):
        raise Wrong(f"the manifest of {target.service} {name}", f"that of {signed.release.service} "
                    f"{signed.directory_name}", "opsctl stage brings it anew")


@pytest.mark.of("instance", "the agent tells load balancers of {what} what its drains say")
def test_voice(asking, asked, target: Target) -> None:
    asking.ledger(target.service)
    found = asked.instance(target.what)
    if not found["release"] or found["unit"] != "active":
        pytest.skip("it does not run")
    check_voice(found, asked.state["drains"])


@pytest.mark.of("balancer", "HAProxy's configuration is the one that the fleet makes")
def test_configuration(fleet: Fleet, provisioned) -> None:
    there = provisioned.machine.file(CONFIGURATION)
    if not there.exists:
        raise Wrong(CONFIGURATION, "no such file")
    wanted = haproxy_configuration(fleet, provisioned.host)
    if there.content_string != wanted:
        raise Wrong(*first_difference(wanted, there.content_string))


@pytest.mark.of("server", "HAProxy sends requests to {what}")
def test_server(asking, asked, target: Target) -> None:
    asking.ledger(target.service)
    weight, placement = 100, target.placement
    if asking.reaches(placement.host):
        weight = int(asking.host(placement.host).instance(placement.instance).get("weight", 100))
    check_server(target.what, asked.servers, weight)


@pytest.mark.of("endpoint", "a streamed completion of {what} through port {port} comes whole, with its token count")
def test_completion(asking, asked, target: Target) -> None:
    if ledger.tip(asking.ledger(target.service)) is None:
        pytest.skip("no release yet")
    address = asked.host.service_address
    place = f"[{address}]" if ":" in address else address
    answer = Answer()
    answer.feed(asked.exchange(address, target.port,
                               request(urlsplit(f"http://{place}:{target.port}/v1"), target.service, TOKENS), 120))
    lacking = answer.lacking(TOKENS)
    if lacking:
        raise Wrong(f"HTTP 200, {TOKENS} tokens and data: [DONE] from {address} port {target.port}", lacking,
                    "opsctl status")
