"""What Prometheus asks of whom, and whom Alertmanager tells: from the fleet, as plain data for templates. Pure.

Every target has the labels ``host`` and ``instance``, both the inventory's name of the machine, whatever its addresses;
engines also ``service`` and ``inference_instance``. Rules and dashboards rest on these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from opsctl.errors import ConfigurationError
from opsctl.fleet.model import (
    ALERTMANAGER_CLUSTER_PORT,
    ALERTMANAGER_PORT,
    EXPORTER_PORT,
    NODE_EXPORTER_PORT,
    PROMETHEUS_PORT,
    STATISTICS_PORT,
    Fleet,
    Host,
)
from opsctl.fleet.placements import place

RULE = re.compile(r"^\s*- (?:alert|record): (\S+)", re.MULTILINE)
MAIL = re.compile(r"[^@\s,]+@[^@\s,]+")
# The inventory's variables that say whom alerts reach.
RECEIVERS = ("alert_email_to", "alert_smtp", "alert_smtp_from", "alert_smtp_user", "alert_smtp_require_tls",
             "alert_webhook_url", "alert_watchdog_url")


def scrape_jobs(fleet: Fleet) -> list[dict[str, Any]]:
    """Every job with its targets, ``{"job": "node", "targets": [{"address": "192.0.2.11:9100", "labels": {...}}]}``.

    A job without targets is left out. Without a monitor group there is nobody to ask, and no job.
    """
    monitors = fleet.group("monitor")
    if not monitors:
        return []
    balancers = fleet.group("lb") if fleet.load_balancer == "haproxy" else ()
    jobs = {
        "node": [_target(host, NODE_EXPORTER_PORT) for host in fleet.hosts],
        "gpu": [_target(host, EXPORTER_PORT) for host in exporters(fleet)],
        "inference": [
            {"address": _join(one.address, one.port),
             "labels": {"host": one.host, "instance": one.host, "service": one.service,
                        "inference_instance": one.instance}} for one in place(fleet)],
        "load_balancer": [_target(host, STATISTICS_PORT) for host in balancers],
        "prometheus": [_target(host, PROMETHEUS_PORT) for host in monitors],
        "alertmanager": [_target(host, ALERTMANAGER_PORT) for host in monitors],
    }
    return [{"job": job, "targets": targets} for job, targets in jobs.items() if targets]


def exporters(fleet: Fleet) -> tuple[Host, ...]:
    """Hosts whose agent tells of GPUs: those of the group gpu, and those that serve."""
    serving = {placement.host for placement in place(fleet)}
    return tuple(host for host in fleet.hosts if "gpu" in host.groups or host.name in serving)


def alertmanagers(fleet: Fleet) -> list[str]:
    """``192.0.2.10:9093`` of each monitor host."""
    return [_join(host.management_address, ALERTMANAGER_PORT) for host in fleet.group("monitor")]


def cluster_peers(fleet: Fleet) -> list[str]:
    """``192.0.2.10:9094`` of each monitor host, so that two of them send one mail; empty when there is one only."""
    monitors = fleet.group("monitor")
    return [_join(host.management_address, ALERTMANAGER_CLUSTER_PORT) for host in monitors] if len(monitors) > 1 else []


def receivers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whom alerts reach, from the inventory's variables (``RECEIVERS``; those that are not set are left out or empty).

    ``{"emails": [...], "smarthost": "host:25", "from": ..., "user": ..., "require_tls": True, "webhooks": [...],
    "watchdog": ...}``; several addresses may stand in a list or in one text with commas. The password is not here: it
    goes from Ansible Vault into its file and nowhere else.

    Raises:
        ConfigurationError: ``alerts.*``: an address that is none, or mail without a server.
    """
    emails, webhooks = _several(given.get("alert_email_to")), _several(given.get("alert_webhook_url"))
    smarthost = str(given.get("alert_smtp") or "").strip()
    sender = str(given.get("alert_smtp_from") or "").strip()
    watchdog = str(given.get("alert_watchdog_url") or "").strip()
    for key, address in [("alert_email_to", email) for email in emails] + [("alert_smtp_from", sender)] * bool(sender):
        if not MAIL.fullmatch(address):
            raise ConfigurationError("alerts.bad_address", f"{key}: {address} is no mail address.",
                                     hint="ann@example.org, or several with commas")
    urls = [("alert_webhook_url", url) for url in webhooks] + [("alert_watchdog_url", watchdog)] * bool(watchdog)
    for key, url in urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            # not the URL itself: there may be a token in it
            raise ConfigurationError("alerts.bad_url", f"{key} is no http:// or https:// address.",
                                     hint=f"{key}=http://HOST:PORT/PATH")
    if emails and not smarthost:
        raise ConfigurationError("alerts.no_smtp", "alert_email_to is set, and alert_smtp does not say which server "
                                 "takes the mail.", hint="alert_smtp=mail.example.org:587")
    if smarthost and not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):\d{1,5}", smarthost):
        raise ConfigurationError("alerts.bad_smtp", f"alert_smtp={smarthost} is not host:port.",
                                 hint="alert_smtp=mail.example.org:587")
    if emails and not sender:
        raise ConfigurationError("alerts.no_sender", "alert_email_to is set, and alert_smtp_from does not say from "
                                 "whom the mail comes.", hint="alert_smtp_from=opsctl@example.org")
    return {"emails": emails, "smarthost": smarthost, "from": sender, "user": str(given.get("alert_smtp_user") or ""),
            "require_tls": _truth(given.get("alert_smtp_require_tls", True)), "webhooks": webhooks,
            "watchdog": watchdog}


def remarks(fleet: Fleet) -> tuple[str, ...]:
    """What an operator should hear of the fleet's monitoring when nothing is wrong with it: a sentence each."""
    said = []
    for host in fleet.group("monitor"):
        if not any(host.variables.get(key) for key in ("alert_email_to", "alert_webhook_url")):
            said.append(f"{host.name}: alerts reach nobody: they are shown in Alertmanager only "
                        f"(http://{_join(host.management_address, ALERTMANAGER_PORT)}); set alert_email_to and "
                        "alert_smtp, or alert_webhook_url, in the inventory")
    return tuple(said)


def wrong_targets(jobs: Sequence[Mapping[str, Any]], active: Sequence[Mapping[str, Any]], quiet: Collection[str] = ()
                  ) -> list[str]:
    """What is wrong with Prometheus' targets, a few words each; empty: nothing.

    ``jobs``: of ``scrape_jobs``; ``active``: ``activeTargets`` of Prometheus' API; ``quiet``: services whose engines
    may be down, as they have no release yet. A target that was not asked yet is no wrong one.
    """
    wanted = {_key({"job": job["job"], **target["labels"]}) for job in jobs for target in job["targets"]}
    found = {_key(target["labels"]): target for target in active}
    words = [f"{_words(key)} is not asked" for key in sorted(wanted - set(found))]
    words += [f"{_words(key)} is asked and not of the fleet" for key in sorted(set(found) - wanted)]
    for key in sorted(wanted & set(found)):
        target = found[key]
        if target["health"] == "down" and target["labels"].get("service") not in quiet:
            words.append(f"{_words(key)} does not answer ({target.get('lastError') or 'no reason given'})")
    return words


def asked_since(before: Sequence[Mapping[str, Any]], active: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all targets that do not answer were asked again since ``before``, the same API's earlier word.

    An engine that came up a moment ago is down for Prometheus until that asks the next time.
    """
    asked = {target["scrapeUrl"]: target["lastScrape"] for target in before}
    return all(target["lastScrape"] != asked.get(target["scrapeUrl"]) for target in active
               if target["health"] == "down")


def wrong_rules(texts: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with Prometheus' rules, a few words each. ``texts``: of files of rules; ``groups``: of its API."""
    wanted = {name for text in texts for name in RULE.findall(text)}
    loaded = [rule for group in groups for rule in group["rules"]]
    words = [f"{name} is not loaded" for name in sorted(wanted - {rule["name"] for rule in loaded})]
    return words + [f"{rule['name']} fails ({rule.get('lastError', '')})" for rule in loaded if rule["health"] == "err"]


def _key(labels: Mapping[str, str]) -> tuple[str, str, str]:
    return labels.get("job", ""), labels.get("host", ""), labels.get("inference_instance", "")


def _words(key: tuple[str, str, str]) -> str:
    return " ".join(part for part in key if part)


def _target(host: Host, port: int) -> dict[str, Any]:
    return {"address": _join(host.management_address, port), "labels": {"host": host.name, "instance": host.name}}


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _several(value: Any) -> list[str]:
    parts: Sequence[Any] = value.split(",") if isinstance(value, str) else value or ()
    return [str(part).strip() for part in parts if str(part).strip()]


def _truth(value: Any) -> bool:
    """INI files make ``false`` a text."""
    return str(value).strip().lower() not in ("false", "no", "0", "off")
