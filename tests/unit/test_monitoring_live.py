"""Debian's Prometheus and Alertmanager on loopback, with what the role writes: from a hot GPU to a mail on a phone."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from monitoring_kit import (
    MAIL,
    RULES,
    alertmanager_configuration,
    command_of,
    find_programs,
    moved,
    prometheus_configuration,
    write_rules,
)
from monitoring_receivers import Exporter, Inbox, Smtp, Webhook, serving, text_of

from opsctl.fleet import monitoring

# The same templates and rules; only the set times are short.
FAST = {"monitoring_scrape_interval_s": 1, "monitoring_evaluation_interval_s": 1, "monitoring_group_wait_s": 1,
        "monitoring_critical_group_wait_s": 0, "monitoring_group_interval_s": 1, "monitoring_thermal_margin_for_s": 2,
        "monitoring_thermal_margin_keep_s": 1, "monitoring_gpu_idle_alert_s": 3}
HOT, IDLE = "GpuThermalMarginLow", "GpuIdleWhileRequestsWait"


def gpu_page(margin: int, utilisation: int) -> str:
    """Two GPUs: one is cool and drained and does nothing, the other as said."""
    lines = []
    for gpu, instance, its_margin, its_work in (("3", "chat.0", margin, utilisation), ("4", "chat.1", 40, 0)):
        labels = f'gpu="{gpu}",UUID="GPU-000{gpu}",modelName="NVIDIA H200",hostname="gpu-1"'
        lines += [f"opsctl_gpu_thermal_margin_celsius{{{labels}}} {its_margin}",
                  f"DCGM_FI_DEV_GPU_UTIL{{{labels}}} {its_work}",
                  f'opsctl_gpu_instance_info{{{labels},service="chat",inference_instance="{instance}"}} 1']
    return "\n".join([*lines, ""])


def engine_page(waiting: int) -> str:
    return f'# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{model_name="m",engine="0"}} {waiting}\n'


BALANCER_PAGE = ('haproxy_server_weight{proxy="chat",server="gpu-1.chat.0"} 100\n'
                 'haproxy_server_weight{proxy="chat",server="gpu-1.chat.1"} 0\n')


@dataclass
class Site:
    """A monitor host, as far as it is Prometheus, Alertmanager, and what they talk to."""

    prometheus: str
    webhook: Inbox = field(default_factory=Inbox)
    mails: Inbox = field(default_factory=Inbox)
    pages: dict[str, str] = field(default_factory=dict)

    def ask(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api(f"/api/v1/query?{urllib.parse.urlencode({'query': query})}")["result"]
        return found

    def api(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.prometheus}{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def told(self, status: str, alert: str) -> Any:
        return self.webhook.wait_for(
            lambda one: one["status"] == status and one["groupLabels"].get("alertname") == alert)

    def mailed(self, word: str, alert: str) -> Any:
        return self.mails.wait_for(lambda one: one[1]["Subject"].startswith(f"[{word}]") and alert in one[1]["Subject"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    programs, tmp = find_programs(), tmp_path_factory.mktemp("site")
    ports = {name: free_port() for name in ("prometheus", "alertmanager")}
    here = Site(f"http://127.0.0.1:{ports['prometheus']}",
                pages={"/gpu": gpu_page(40, 80), "/engine": engine_page(0), "/lb": BALANCER_PAGE})
    with serving(Exporter, pages=here.pages) as exporter, serving(Webhook, inbox=here.webhook) as webhook, \
            serving(Smtp, inbox=here.mails, password=b"s3cret") as smtp:
        receivers = monitoring.receivers({
            "alert_email_to": "oncall@example.org,ann@example.org", "alert_smtp": f"127.0.0.1:{smtp}",
            "alert_smtp_from": "opsctl@example.org", "alert_smtp_user": "opsctl", "alert_smtp_require_tls": "false",
            "alert_webhook_url": f"http://127.0.0.1:{webhook}/"})
        write_files(tmp, ports, exporter, receivers)
        argvs = (
            [*command_of(programs, "prometheus"), f"--config.file={tmp}/prometheus.yml",
             f"--storage.tsdb.path={tmp}/data", f"--web.listen-address=127.0.0.1:{ports['prometheus']}"],
            [*command_of(programs, "prometheus-alertmanager"), f"--config.file={tmp}/alertmanager.yml",
             f"--storage.path={tmp}/nflog", f"--web.listen-address=127.0.0.1:{ports['alertmanager']}",
             "--cluster.listen-address="])
        running = []
        try:
            for number, argv in enumerate(argvs):
                with (tmp / f"{number}.log").open("wb") as log:
                    running.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            yield here
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(timeout=20)


def write_files(tmp: Path, ports: dict[str, int], exporter: int, receivers: dict[str, Any]) -> None:
    write_rules(tmp / "rules", **FAST)
    (tmp / "password").write_text("s3cret")
    host = {"host": "gpu-1", "instance": "gpu-1"}
    asked = {"gpu": ("/gpu", host), "load_balancer": ("/lb", {"host": "ops-1", "instance": "ops-1"}),
             "inference": ("/engine", {**host, "service": "chat", "inference_instance": "chat.0"})}
    jobs = [{"job": job, "targets": [{"address": f"127.0.0.1:{exporter}",
                                      "labels": {**labels, "__metrics_path__": path}}]}
            for job, (path, labels) in asked.items()]
    texts = {
        "prometheus.yml": prometheus_configuration(
            **FAST, monitoring_host="ops-1", monitoring_jobs=jobs,
            monitoring_alertmanagers=[f"127.0.0.1:{ports['alertmanager']}"]),
        "alertmanager.yml": alertmanager_configuration(**FAST, monitoring_host="ops-1", monitoring_receivers=receivers)}
    for name, text in texts.items():
        (tmp / name).write_text(moved(text, rules=tmp / "rules", mail=MAIL, password=tmp / "password"))


def test_a_hot_gpu_reaches_webhook_and_mail_and_so_does_its_end(site: Site) -> None:
    site.pages["/gpu"] = gpu_page(margin=3, utilisation=80)
    alert = site.told("firing", HOT)["alerts"][0]
    assert alert["labels"].items() >= {"host": "gpu-1", "gpu": "3", "UUID": "GPU-0003", "service": "chat",
                                       "inference_instance": "chat.0", "severity": "critical"}.items()
    assert "monitor" not in alert["labels"]
    assert alert["annotations"]["action"] == 'opsctl drain gpu-1:chat.0 --weight 50 --message "GPU 3 is hot"'
    recipients, mail = site.mailed("CRITICAL", HOT)
    assert recipients == ["oncall@example.org", "ann@example.org"]
    assert mail["Subject"] == f"[CRITICAL] gpu-1 {HOT}"
    assert mail.get_body(("html",)) is None
    text = text_of(mail)
    first, *rest = text.splitlines()
    assert first == "gpu-1: GPU 3 (GPU-0003) has 3 °C left to its limit; it serves chat.0 of chat"
    for line in ("host     gpu-1", "GPU      3  GPU-0003", "service  chat", "instance chat.0", "DO THIS",
                 '  opsctl drain gpu-1:chat.0 --weight 50 --message "GPU 3 is hot"',
                 f"runbook  ops-1:/usr/local/share/opsctl/monitoring/runbooks/{HOT}.md"):
        assert line in rest
    site.pages["/gpu"] = gpu_page(margin=25, utilisation=80)
    assert site.told("resolved", HOT)["alerts"][0]["labels"]["UUID"] == "GPU-0003"
    _, over = site.mailed("over", HOT)
    assert text_of(over).startswith(f"OVER. It was: {first.split(' has ')[0]}")


def test_an_idle_gpu_while_requests_wait_and_not_the_drained_one(site: Site) -> None:
    site.pages |= {"/gpu": gpu_page(margin=40, utilisation=0), "/engine": engine_page(waiting=4)}
    news = site.told("firing", IDLE)
    assert [alert["labels"]["inference_instance"] for alert in news["alerts"]] == ["chat.0"]
    assert news["alerts"][0]["annotations"]["summary"] == (
        "gpu-1: GPU 3 (GPU-0003) of chat.0 is idle, and 4 requests of chat wait")
    _, mail = site.mailed("WARNING", IDLE)
    assert "  opsctl logs --limit gpu-1 --instance chat.0 --since 15m\n" in text_of(mail)
    # The engine answered this Prometheus with underscores; no dashboard in the world knows them.
    assert [one["value"][1] for one in site.ask("vllm:num_requests_waiting")] == ["4"]
    assert site.ask("vllm_num_requests_waiting") == []
    site.pages["/gpu"] = gpu_page(margin=40, utilisation=70)
    assert site.told("resolved", IDLE)["alerts"][0]["labels"]["host"] == "gpu-1"
    assert "OVER" in text_of(site.mailed("over", IDLE)[1])
    check_what_verify_reads(site)
    # Neither the watchdog, which has a route of its own, nor a GPU that was drained.
    assert {news["groupLabels"]["alertname"] for news in site.webhook.got} <= {HOT, IDLE}
    assert not re.search("GPU-0004", json.dumps(site.webhook.got))
    assert [one["metric"]["host"] for one in site.ask('ALERTS{alertname="Watchdog"}')] == ["ops-1"]


def check_what_verify_reads(site: Site) -> None:
    """What Prometheus really says of its targets and rules is what the acceptance tests take it for."""
    targets = site.api("/api/v1/targets?state=active")["activeTargets"]
    jobs = [{"job": one["labels"]["job"], "targets": [{"labels": one["labels"]}]} for one in targets]
    assert len(jobs) == 3
    assert monitoring.wrong_targets(jobs, targets) == []
    assert monitoring.wrong_targets(jobs[1:], targets) != []
    texts = [path.read_text() for path in RULES.iterdir()]
    assert monitoring.wrong_rules(texts, site.api("/api/v1/rules")["groups"]) == []
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/api/v2/alerts",
                        site.api("/api/v1/alertmanagers")["activeAlertmanagers"][0]["url"])


def alert(name: str, host: str, **labels: str) -> dict[str, Any]:
    return {"labels": {"alertname": name, "host": host, "severity": "critical", **labels}}


STALE = "OpsctlTelemetryStale"
TOLD = {  # what fires, and whether it is told all the same
    "gpu-1 is down": (alert(STALE, "gpu-1", cause="host"), True),
    "its node_exporter": (alert(STALE, "gpu-1", cause="silent", job="node"), False),
    "its agent": (alert(STALE, "gpu-1", cause="silent", job="gpu"), False),
    "its engine": (alert(STALE, "gpu-1", cause="engine", severity="warning", inference_instance="chat.0"), False),
    "what it said before": (alert(HOT, "gpu-1", UUID="GPU-1"), True),
    "a dead node_exporter": (alert(STALE, "gpu-2", cause="silent", job="node"), True),
    "a lost GPU beside it": (alert(STALE, "gpu-2", cause="missing_gpus"), True),
    "an old sample beside it": (alert(STALE, "gpu-2", cause="old_sample"), True),
    "a dead agent beside it": (alert(STALE, "gpu-2", cause="silent", job="gpu"), True),
    "a hot GPU beside it": (alert(HOT, "gpu-2", UUID="GPU-2"), True),
    "a dead load balancer": (alert(STALE, "ops-1", cause="silent", job="load_balancer"), True),
    "an idle GPU of the fleet": (alert(IDLE, "gpu-3", severity="warning", UUID="GPU-3"), True),
}


def test_an_alert_mutes_what_it_explains_and_nothing_else(tmp_path: Path) -> None:
    """The real Alertmanager says which alerts it keeps to itself."""
    programs, port = find_programs(), free_port()
    text = alertmanager_configuration(monitoring_host="ops-1", monitoring_receivers=monitoring.receivers({}))
    (tmp_path / "alertmanager.yml").write_text(moved(text, mail=MAIL))
    url = f"http://127.0.0.1:{port}/api/v2/alerts"
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [*command_of(programs, "prometheus-alertmanager"), f"--config.file={tmp_path}/alertmanager.yml",
             f"--storage.path={tmp_path}/nflog", f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address="],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        assert wait_for_port(port), (tmp_path / "log").read_text()
        sent = urllib.request.Request(url, json.dumps([one for one, _ in TOLD.values()]).encode(),
                                      {"Content-Type": "application/json"})
        urllib.request.urlopen(sent, timeout=10).close()
        with urllib.request.urlopen(url, timeout=10) as answer:
            muted = [one["labels"] for one in json.load(answer) if one["status"]["inhibitedBy"]]
    finally:
        running.terminate()
        running.wait(timeout=20)
    assert {what: one["labels"] not in muted for what, (one, _) in TOLD.items()} == {
        what: told for what, (_, told) in TOLD.items()}


def wait_for_port(port: int) -> bool:
    """Until somebody listens there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    return False


@pytest.mark.skipif(not Path("/usr/sbin/haproxy").exists(), reason="haproxy is not on this machine")
def test_haproxy_knows_every_name_that_rules_take_from_it(tmp_path: Path) -> None:
    """Names and labels, from the real one: a rule on a metric that is gone would be silent for ever."""
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(f"""\
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
frontend management
    bind 127.0.0.1:{port}
    http-request use-service prometheus-exporter
backend chat
    server gpu-1.chat.0 127.0.0.1:1 weight 30
""")
    haproxy = subprocess.Popen(["/usr/sbin/haproxy", "-W", "-db", "-f", tmp_path / "haproxy.cfg"],
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert haproxy.stderr is not None
        assert any("Loading success" in line for line in haproxy.stderr)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            shown = answer.read().decode()
    finally:
        haproxy.terminate()
        haproxy.communicate(timeout=10)
    for series in ('haproxy_server_weight{proxy="chat",server="gpu-1.chat.0"} 30',
                   'haproxy_server_status{proxy="chat",server="gpu-1.chat.0",state="UP"} 1',
                   'haproxy_server_status{proxy="chat",server="gpu-1.chat.0",state="DRAIN"} 0',
                   'haproxy_server_status{proxy="chat",server="gpu-1.chat.0",state="MAINT"} 0',
                   'haproxy_backend_current_queue{proxy="chat"} 0'):
        assert series in shown.splitlines()
    used = set(re.findall(r"haproxy_\w+", "".join(path.read_text() for path in RULES.iterdir())))
    assert used == {series.partition("{")[0] for series in shown.splitlines()} & used
