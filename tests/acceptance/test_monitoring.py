"""What watches: Prometheus asks everybody and has its rules, Alertmanager is heard, and alerts reach somebody."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from opsctl.agent import ledger
from opsctl.fleet.model import ALERTMANAGER_PORT, PROMETHEUS_PORT, Fleet
from opsctl.fleet.monitoring import alertmanagers, asked_since, scrape_jobs, wrong_rules, wrong_targets
from opsctl.lab.answer import Response
from opsctl.resources import resource
from opsctl.verifying import Doubtful, Wrong

ENOUGH = 3  # of what is wrong, in one sentence
ASKED_AGAIN_S = 25.0  # Prometheus asks every 10 s, and waits as long


def ask(asked, port: int, path: str) -> Any:
    """The JSON document that a program on the monitor host answers with."""
    address = asked.host.management_address
    place = f"[{address}]" if ":" in address else address
    request = f"GET {path} HTTP/1.1\r\nHost: {place}:{port}\r\nConnection: close\r\n\r\n".encode()
    answer = Response()
    answer.feed(asked.exchange(address, port, request, timeout_s=20))
    if answer.status != 200:
        raise Wrong(f"HTTP 200 from http://{place}:{port}{path}", f"HTTP {answer.status}")
    return json.loads(bytes(answer.text))


def targets(asked) -> Any:
    return ask(asked, PROMETHEUS_PORT, "/api/v1/targets?state=active")["data"]["activeTargets"]


def refuse(what: str, words: list[str], hint: str = "opsctl provision") -> None:
    if words:
        more = f", and {len(words) - ENOUGH} more" if len(words) > ENOUGH else ""
        raise Wrong(what, "; ".join(words[:ENOUGH]) + more, hint)


@pytest.mark.of("monitor", "Prometheus hears everybody in the fleet")
def test_targets(fleet: Fleet, asking, provisioned) -> None:
    before = active = targets(provisioned)
    shown = {service.name: asking.gateway.verb("ledger-show", "--service", service.name)["lines"]
             for service in fleet.services}
    quiet = [name for name, lines in shown.items() if ledger.tip(list(map(ledger.line_of, lines))) is None]
    until = time.monotonic() + ASKED_AGAIN_S
    while ((words := wrong_targets(scrape_jobs(fleet), active, quiet)) and not asked_since(before, active)
           and time.monotonic() < until):
        time.sleep(1)
        active = targets(provisioned)
    refuse("an answer from every exporter", words, "opsctl status")


@pytest.mark.of("monitor", "Prometheus has the rules that ship, and none of them fails")
def test_rules(provisioned) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((resource("monitoring") / "rules").glob("*.yml"))]
    groups = ask(provisioned, PROMETHEUS_PORT, "/api/v1/rules")["data"]["groups"]
    refuse("every rule loaded", wrong_rules(texts, groups))


@pytest.mark.of("monitor", "Prometheus tells Alertmanager, and Alertmanager is ready")
def test_alertmanager(fleet: Fleet, provisioned) -> None:
    ask(provisioned, ALERTMANAGER_PORT, "/api/v2/status")
    active = ask(provisioned, PROMETHEUS_PORT, "/api/v1/alertmanagers")["data"]["activeAlertmanagers"]
    known = " ".join(one["url"] for one in active)
    refuse("Prometheus telling every Alertmanager", [f"it does not tell {one}" for one in alertmanagers(fleet)
                                                     if f"//{one}/" not in known])


@pytest.mark.of("monitor", "alerts reach somebody")
def test_receivers(provisioned) -> None:
    names = {one["name"] for one in ask(provisioned, ALERTMANAGER_PORT, "/api/v2/receivers")}
    if "operators" not in names:
        raise Doubtful("alerts are shown in Alertmanager only: set alert_email_to and alert_smtp, or "
                       "alert_webhook_url, in the inventory")
