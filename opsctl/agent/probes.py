"""Asks an engine on this host: is it well, what is in flight, under which names does it serve."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from opsctl.agent.settings import Placement
from opsctl.serving.adapter import Adapter, metric

TIMEOUT_S = 2.0
LIMIT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; status 0 when there was none."""

    status: int
    text: str = ""


def ask(placement: Placement, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """GET from the engine of an instance; never raises."""
    address = f"[{placement.address}]" if ":" in placement.address else placement.address
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}:{placement.port}{path}", timeout=timeout_s) as response:
            return Answer(response.status, response.read(LIMIT_BYTES).decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Answer(error.code)
    except (OSError, http.client.HTTPException):
        return Answer(0)


def is_healthy(placement: Placement, adapter: Adapter) -> bool:
    return ask(placement, adapter.health_path).status == 200


def in_flight(placement: Placement, adapter: Adapter) -> tuple[int | None, int | None]:
    """Running and waiting requests; None where the engine does not say."""
    text = ask(placement, adapter.metrics_path).text
    running, waiting = metric(text, adapter.running_metric), metric(text, adapter.waiting_metric)
    return (None if running is None else int(running), None if waiting is None else int(waiting))


def names_in(models: str) -> frozenset[str]:
    """Every model id and alias in the answer of ``/v1/models``."""
    try:
        document = json.loads(models)
        entries = document["data"]
        return frozenset(str(name) for entry in entries for name in (entry["id"], *entry.get("aliases", ())))
    except (ValueError, KeyError, TypeError):
        return frozenset()


def served_names(placement: Placement) -> frozenset[str]:
    return names_in(ask(placement, "/v1/models").text)
