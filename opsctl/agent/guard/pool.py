"""May an instance stop? What the load balancers' read-only pages say of the others of its service.

An instance at 1 % does not count: it is as hot as this one and may be about to stop. So two hosts that heat up together
see each other at 1 %, and neither stops.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence

from opsctl.agent.balancer import servers
from opsctl.agent.guard.model import Pool

TIMEOUT_S = 2.0
LEAST_WEIGHT = 1
PAGE_LIMIT = 4 << 20  # bytes
HEADER = "# pxname,"
# A proxy of the site's is not for this.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def others(statistics: str, service: str, own: str) -> int:
    """How many servers of ``service`` but ``own`` are up at more than 1 %, by a page of statistics as CSV. Pure.

    Raises:
        ValueError: no such page, or one that does not know ``own``.
    """
    if not statistics.startswith(HEADER):
        raise ValueError("it is no page of HAProxy's statistics")
    rows = [row for row in servers(statistics) if row["service"] == service]
    if all(row["server"] != own for row in rows):
        raise ValueError(f"it does not know {own}")
    return sum(row["server"] != own and row["status"].startswith("UP") and row["weight"] > LEAST_WEIGHT
               for row in rows)


async def look(pages: Sequence[str], service: str, own: str, min_serving: int) -> Pool:
    """Asks all load balancers at once; the least counts, and one that does not answer makes the number unknown."""
    if not pages:
        return Pool(None, min_serving, "no load balancer's statistics are known here")
    answers = await asyncio.gather(*(asyncio.to_thread(_ask, page, service, own) for page in pages))
    words = "; ".join(answer for answer in answers if isinstance(answer, str))
    if words:
        return Pool(None, min_serving, words)
    return Pool(min(answer for answer in answers if isinstance(answer, int)), min_serving)


def _ask(page: str, service: str, own: str) -> int | str:
    """The number, or why there is none."""
    try:
        with _OPENER.open(page, timeout=TIMEOUT_S) as answer:
            return others(answer.read(PAGE_LIMIT).decode(errors="replace"), service, own)
    except (OSError, ValueError, KeyError) as error:
        return f"{page}: {error}"
