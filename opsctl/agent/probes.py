"""Asks an engine on this host: is it well, what is in flight, what are its names, what does it complete."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsctl.agent.settings import Placement
from opsctl.serving.adapter import Adapter, metric

TIMEOUT_S = 2.0
LIMIT_BYTES = 4 * 1024 * 1024


READ_BYTES = 65536


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; status 0 when there was none."""

    status: int
    text: str = ""


@dataclass(frozen=True)
class Patience:
    """Seconds: how long an engine may say nothing, and how long a whole answer may take."""

    silence_s: float
    total_s: float


@dataclass(frozen=True)
class Exchange:
    """A request and its answer as it arrived: (seconds since the request, bytes) of each read.

    ``status`` is 0 when there was no answer; ``problem`` says why there was none, or why it broke off.
    """

    status: int
    batches: tuple[tuple[float, bytes], ...] = ()
    problem: str = ""

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.batches)


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


def post(placement: Placement, path: str, body: Mapping[str, Any], patience: Patience) -> Exchange:
    """POSTs a JSON document to the engine of an instance and takes the answer as it comes; never raises.

    Ends at ``patience`` whatever the engine does: one that trickles is as ill as one that hangs.
    """
    began = time.monotonic()
    status = 0
    batches: list[tuple[float, bytes]] = []
    connection = http.client.HTTPConnection(placement.address, placement.port, timeout=patience.silence_s)
    try:
        connection.connect()
        channel = connection.sock  # http.client forgets it when the answer will end with the connection
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, size = response.status, 0
        while not response.isclosed():
            left = began + patience.total_s - time.monotonic()
            if left <= 0:
                raise TimeoutError
            channel.settimeout(min(patience.silence_s, left))
            data = response.read1(READ_BYTES)
            if not data:
                break
            size += len(data)
            if size > LIMIT_BYTES:
                return Exchange(status, tuple(batches), f"more than {LIMIT_BYTES} bytes")
            batches.append((time.monotonic() - began, data))
    except TimeoutError:
        over = time.monotonic() - began >= patience.total_s
        return Exchange(status, tuple(batches), f"not done after {patience.total_s:.0f} s" if over else
                        f"silent for {patience.silence_s:.0f} s")
    except (OSError, http.client.HTTPException) as error:
        return Exchange(status, tuple(batches), f"the connection failed: {error or type(error).__name__}")
    finally:
        connection.close()
    return Exchange(status, tuple(batches))
