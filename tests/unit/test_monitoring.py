"""Targets and receivers from the fleet, and what the role writes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_kit import (
    DEFAULTS,
    MAIL,
    RULES,
    alertmanager_configuration,
    alerts,
    find_programs,
    moved,
    prometheus_configuration,
    run_tool,
    write_rules,
)
from rendering import render

from opsctl.errors import ConfigurationError
from opsctl.fleet import monitoring
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.resources import resource
from opsctl.serving import adapters

FLEET = Fleet(
    Path("/fleet"), Path("/fleet/inventory.ini"),
    (Host("ops-1", "10.0.0.2", ("gateway", "lb", "monitor"), service_address="10.0.0.2", management_address="10.9.0.2"),
     Host("gpu-1", "10.0.0.11", ("gpu",), service_address="10.0.0.11", management_address="10.9.0.11"),
     Host("gpu-2", "10.0.0.12", ("gpu",), service_address="fd00::12", management_address="fd01::12")),
    (Service("chat", "gpu", port=8100, listen=8000, instances_per_host=2),),
)
NOBODY = monitoring.receivers({})
EVERYBODY = monitoring.receivers({
    "alert_email_to": "ann@example.org, bob@example.org", "alert_smtp": "mail.example.org:587",
    "alert_smtp_from": "opsctl@example.org", "alert_smtp_user": "opsctl",
    "alert_webhook_url": ["http://hooks.example.org/a?t=1", "https://hooks.example.org/b"],
    "alert_watchdog_url": "https://deadman.example.org/x"})


def targets(fleet: Fleet) -> dict[str, list[tuple[str, dict[str, str]]]]:
    return {job["job"]: [(target["address"], target["labels"]) for target in job["targets"]]
            for job in monitoring.scrape_jobs(fleet)}


class TestTargets:
    def test_each_job_asks_the_right_port_and_names_the_host_as_the_inventory_does(self) -> None:
        found = targets(FLEET)
        gpu_2 = {"host": "gpu-2", "instance": "gpu-2"}
        assert {job: [address for address, _ in mine] for job, mine in found.items()} == {
            "node": ["10.9.0.2:9100", "10.9.0.11:9100", "[fd01::12]:9100"],
            "gpu": ["10.9.0.11:9400", "[fd01::12]:9400"],
            "inference": ["10.0.0.11:8100", "10.0.0.11:8101", "[fd00::12]:8100", "[fd00::12]:8101"],
            "load_balancer": ["10.9.0.2:8404"], "prometheus": ["10.9.0.2:9090"], "alertmanager": ["10.9.0.2:9093"]}
        assert found["gpu"][1] == ("[fd01::12]:9400", gpu_2)
        chat_1 = {"service": "chat", "inference_instance": "chat.1"}
        assert found["inference"][3] == ("[fd00::12]:8101", {**gpu_2, **chat_1})

    def test_without_a_monitor_group_there_is_nothing(self) -> None:
        alone = replace(FLEET, hosts=(replace(FLEET.hosts[0], groups=("gateway", "lb")), *FLEET.hosts[1:]))
        assert targets(alone) == {}
        assert monitoring.remarks(alone) == ()

    def test_a_balancer_that_is_not_ours_is_not_asked(self) -> None:
        assert "load_balancer" not in targets(replace(FLEET, load_balancer="hook"))

    def test_two_monitors_watch_each_other_and_agree_on_who_tells(self) -> None:
        second = Host("ops-2", "10.0.0.3", ("monitor",), service_address="10.0.0.3", management_address="10.9.0.3")
        two = replace(FLEET, hosts=(*FLEET.hosts, second))
        assert [labels["host"] for _, labels in targets(two)["alertmanager"]] == ["ops-1", "ops-2"]
        assert monitoring.cluster_peers(two) == ["10.9.0.2:9094", "10.9.0.3:9094"]
        assert monitoring.cluster_peers(FLEET) == []


class TestReceivers:
    def test_several_may_be_a_list_or_one_text(self) -> None:
        assert EVERYBODY["emails"] == ["ann@example.org", "bob@example.org"]
        assert len(EVERYBODY["webhooks"]) == 2
        assert EVERYBODY["require_tls"] is True

    def test_what_an_ini_file_calls_false_is_false(self) -> None:
        assert monitoring.receivers({"alert_smtp_require_tls": "false"})["require_tls"] is False

    @pytest.mark.parametrize(("given", "code"), [
        ({"alert_email_to": "ann", "alert_smtp": "m:25", "alert_smtp_from": "a@b"}, "alerts.bad_address"),
        ({"alert_email_to": "ann@example.org"}, "alerts.no_smtp"),
        ({"alert_email_to": "ann@example.org", "alert_smtp": "m:25"}, "alerts.no_sender"),
        ({"alert_smtp": "mail.example.org"}, "alerts.bad_smtp"),
        ({"alert_webhook_url": "hooks.example.org/secret"}, "alerts.bad_url"),
    ])
    def test_what_would_reach_nobody_is_refused(self, given: dict[str, Any], code: str) -> None:
        with pytest.raises(ConfigurationError) as refused:
            monitoring.receivers(given)
        assert refused.value.code == code
        assert "secret" not in refused.value.message + refused.value.hint

    def test_nobody_to_tell_is_said_with_the_address_where_alerts_are_shown(self) -> None:
        assert "http://10.9.0.2:9093" in monitoring.remarks(FLEET)[0]
        told = replace(FLEET.hosts[0], variables={"alert_webhook_url": {"__ansible_vault": "..."}})
        assert monitoring.remarks(replace(FLEET, hosts=(told, *FLEET.hosts[1:]))) == ()


JOBS = monitoring.scrape_jobs(FLEET)
ACTIVE = [{"labels": {"job": job["job"], **target["labels"]}, "health": "up", "lastError": ""}
          for job in JOBS for target in job["targets"]]


class TestWhatPrometheusSays:
    def changed(self, job: str, **what: Any) -> list[dict[str, Any]]:
        return [{**one, **what} if one["labels"]["job"] == job else one for one in ACTIVE]

    def test_all_is_well(self) -> None:
        assert monitoring.wrong_targets(JOBS, ACTIVE) == []
        assert monitoring.wrong_targets(JOBS, self.changed("node", health="unknown")) == []

    def test_who_is_silent_forgotten_or_foreign(self) -> None:
        down = self.changed("load_balancer", health="down", lastError="connection refused")
        assert monitoring.wrong_targets(JOBS, down) == ["load_balancer ops-1 does not answer (connection refused)"]
        assert monitoring.wrong_targets(JOBS, ACTIVE[1:]) == ["node ops-1 is not asked"]
        assert monitoring.wrong_targets(JOBS[1:], ACTIVE)[0] == "node gpu-1 is asked and not of the fleet"

    def test_engines_without_a_release_may_be_silent(self) -> None:
        down = self.changed("inference", health="down")
        assert len(monitoring.wrong_targets(JOBS, down)) == 4
        assert monitoring.wrong_targets(JOBS, down, {"chat"}) == []

    def test_who_was_down_is_asked_again_before_it_counts(self) -> None:
        """Right after provision Prometheus still tells of its last question, before the engine was there."""
        before = [{**one, "scrapeUrl": str(number), "lastScrape": "10:00:01"}
                  for number, one in enumerate(self.changed("inference", health="down"))]
        assert not monitoring.asked_since(before, before)
        later = [{**one, "lastScrape": "10:00:11"} for one in before]
        assert not monitoring.asked_since(before, [*later[:5], *before[5:]])  # one of the engines
        assert monitoring.asked_since(before, later)
        assert monitoring.asked_since(before, [{**one, "health": "up"} for one in before])

    def test_rules_that_are_not_loaded_or_fail(self) -> None:
        texts = [path.read_text() for path in RULES.glob("*.yml")]
        names = [name for text in texts for name in monitoring.RULE.findall(text)]
        assert set(alerts()) < set(names)
        loaded = [{"name": name, "health": "ok"} for name in names]
        assert monitoring.wrong_rules(texts, [{"rules": loaded}]) == []
        broken = [{"rules": [one for one in loaded if one["name"] != "Watchdog"]},
                  {"rules": [{"name": "x", "health": "err", "lastError": "many-to-many"}]}]
        assert monitoring.wrong_rules(texts, broken) == ["Watchdog is not loaded", "x fails (many-to-many)"]


@pytest.fixture(scope="module")
def programs() -> Path:
    return find_programs()


@pytest.mark.parametrize("receivers", [NOBODY, EVERYBODY, monitoring.receivers({"alert_webhook_url": "http://h/x"})],
                         ids=["nobody", "everybody", "webhook"])
def test_what_the_role_writes_is_a_configuration(programs: Path, tmp_path: Path, receivers: dict[str, Any]) -> None:
    """Promtool and amtool read it, as they do on the host before it is put in its place."""
    write_rules(tmp_path / "rules")
    texts = {"prometheus.yml": prometheus_configuration(
        monitoring_host="ops-1", monitoring_jobs=monitoring.scrape_jobs(FLEET),
        monitoring_alertmanagers=monitoring.alertmanagers(FLEET)),
        "alertmanager.yml": alertmanager_configuration(monitoring_host="ops-1", monitoring_receivers=receivers)}
    for name, text in texts.items():
        (tmp_path / name).write_text(moved(text, rules=tmp_path / "rules", mail=MAIL))
    checked = run_tool(programs / "promtool", "check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    checked = run_tool(programs / "amtool", "check-config", tmp_path / "alertmanager.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr

    def route(*labels: str) -> str:
        of = f"--config.file={tmp_path}/alertmanager.yml"
        return run_tool(programs / "amtool", "config", "routes", "test", of, *labels).stdout.strip()

    told = "operators" if receivers["webhooks"] else "nobody"
    assert route("alertname=GpuThermalMarginLow", "severity=critical") == told
    assert route("alertname=GpuIdleWhileRequestsWait", "severity=warning") == told
    assert route("alertname=Watchdog", "severity=info") == ("watchdog" if receivers["watchdog"] else "nobody")


def test_news_come_within_two_minutes() -> None:
    """Condition to message, and its end to message: scrape, evaluation, the set time, what Alertmanager waits."""
    of = {key.removeprefix("monitoring_"): value for key, value in DEFAULTS.items()}
    seen = 1 + of["scrape_interval_s"] + of["evaluation_interval_s"]
    message = 10  # a mail server that takes its time
    assert seen + of["thermal_margin_for_s"] + of["critical_group_wait_s"] + message <= 90
    assert seen + of["group_wait_s"] + message <= 90  # after gpu_idle_alert_s
    assert seen + of["thermal_margin_keep_s"] + of["group_interval_s"] + message <= 120


def test_nothing_listens_on_any_address() -> None:
    ports = {"prometheus": 9090, "alertmanager": 9093, "cluster": 9094}
    for name in ("prometheus", "alertmanager"):
        text = render(f"roles/monitoring/templates/{name}.conf.j2", **{
            **DEFAULTS, "monitoring_listen": "fd01::2", "monitoring_ports": ports, "monitoring_cluster_peers": []})
        assert re.findall(r"--\S*listen-address=(\S*)", text) in (["[fd01::2]:9090"], ["[fd01::2]:9093", ""])
        assert re.search(r"listen-address=\S*\nRestart=|external-url=\S+\nRestart=", text)
    text = render("roles/node_exporter/templates/node-exporter.conf.j2", node_exporter_listen="10.9.0.2",
                  node_exporter_port=9100)
    assert "--web.listen-address=10.9.0.2:9100\n" in text
    clustered = render("roles/monitoring/templates/alertmanager.conf.j2", **{
        **DEFAULTS, "monitoring_listen": "10.9.0.2", "monitoring_ports": ports,
        "monitoring_cluster_peers": ["a:9094", "b:9094"]})
    assert "--cluster.listen-address=10.9.0.2:9094 --cluster.peer=a:9094 --cluster.peer=b:9094\n" in clustered


def test_the_role_installs_the_rules_that_ship() -> None:
    assert sorted(DEFAULTS["monitoring_rules"]) == sorted(path.name for path in RULES.glob("*"))


def test_every_engine_is_counted() -> None:
    text = (RULES / "recording.yml").read_text()
    for adapter in adapters().values():
        assert adapter.running_metric in text
        assert adapter.waiting_metric in text
        assert adapter.metrics_path == "/metrics"  # Prometheus' default


def test_secrets_are_in_no_task_that_shows_them() -> None:
    tasks = yaml.safe_load((resource("roles/monitoring") / "tasks" / "configure.yml").read_text())
    for task in tasks:
        text = yaml.safe_dump(task)
        if "monitoring_smtp_password" in text:
            assert task["no_log"] is True
            assert task["ansible.builtin.copy"]["mode"] == "0640"
        if "alertmanager.yml.j2" in text:  # a webhook's token
            assert task["diff"] is False
            assert task["ansible.builtin.template"]["mode"] == "0640"
