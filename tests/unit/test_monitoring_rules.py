"""Every alert is whole: promtool runs its test, it has a runbook, and its command is one that today's CLI parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_kit import MONITORING, alerts, find_programs, run_tool, write_rules
from typer.exceptions import TyperException
from typer.main import get_command

from opsctl.cli.main import app

SEVERITIES = {"critical", "warning", "info"}
ALERTS = alerts()
TESTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((MONITORING / "tests").glob("*.yml"))}


def test_every_alert_has_a_test_and_a_runbook_and_there_are_no_others() -> None:
    assert set(ALERTS) == set(TESTS) == {path.stem for path in (MONITORING / "runbooks").glob("*.md")}


def cases(alert: str) -> list[list[dict[str, Any]]]:
    """Of each of its tests, what is expected and when."""
    return [test.get("alert_rule_test", []) for test in TESTS[alert]["tests"]]


def expected(alert: str) -> list[dict[str, Any]]:
    return [one for rounds in cases(alert) for case in rounds for one in case["exp_alerts"]]


@pytest.mark.parametrize("alert", ALERTS)
class TestAlert:
    def test_its_test_sees_it_fire_not_fire_and_resolve(self, alert: str) -> None:
        if alert == "Watchdog":
            return  # its test says why
        seen = [[bool(case["exp_alerts"]) for case in rounds] for rounds in cases(alert)]
        assert any(rounds[:1] == [False] and True in rounds and rounds[-1:] == [False] for rounds in seen)

    def test_it_says_how_bad_whose_and_what_to_do(self, alert: str) -> None:
        for rule in ALERTS[alert]:
            assert rule["labels"]["severity"] in SEVERITIES
            assert rule["labels"]["component"]
            assert set(rule["annotations"]) == {"summary", "description", "action", "runbook_url"}
            assert rule["annotations"]["runbook_url"].endswith(f"/monitoring/runbooks/{alert}.md")
            assert rule["annotations"]["runbook_url"].startswith("ops-1:/usr/local/share/opsctl/")
            of_gpus = ("host", "gpu", "UUID", "service", "inference_instance")
            for label in of_gpus if rule["labels"]["component"] == "gpu" else ():
                assert f"$labels.{label} " in rule["annotations"]["summary"], label

    def test_each_rule_is_seen_to_fire_and_its_command_is_one_of_todays(self, alert: str) -> None:
        """With labels filled in by Prometheus itself: promtool compares these annotations with the rule's."""
        causes = {rule["labels"].get("cause", "") for rule in ALERTS[alert]}
        assert {one["exp_labels"].get("cause", "") for one in expected(alert)} == causes
        for one in expected(alert):
            parse(one["exp_annotations"]["action"])

    def test_its_runbooks_commands_are_todays_too(self, alert: str) -> None:
        text = (MONITORING / "runbooks" / f"{alert}.md").read_text()
        lines = [line.strip() for line in text.splitlines() if line.startswith("    opsctl ")]
        for command in [*lines, *re.findall(r"`(opsctl [a-z-]+ [^`]+)`", text)]:
            parse(command.partition("  #")[0])


def parse(line: str) -> None:
    """Raises what the CLI would say, were this typed; nothing is run."""
    program, *words = shlex.split(line)
    assert program == "opsctl"
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    verbs[words[0]].make_context(words[0], words[1:]).close()


@pytest.mark.parametrize("line", ["opsctl drian gpu-1", "opsctl drain", "opsctl logs --since",
                                  "opsctl status --limits x"])
def test_a_command_that_nobody_could_type_is_noticed(line: str) -> None:
    with pytest.raises((KeyError, TyperException)):
        parse(line)


@pytest.fixture(scope="module")
def programs() -> Path:
    return find_programs()


def test_promtool_passes_every_case(programs: Path, tmp_path: Path) -> None:
    write_rules(tmp_path / "rules")
    checked = run_tool(programs / "promtool", "check", "rules", *sorted((tmp_path / "rules").iterdir()))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (tmp_path / "tests").mkdir()
    for path in (MONITORING / "tests").glob("*.yml"):
        (tmp_path / "tests" / path.name).write_text(path.read_text())
    tested = run_tool(programs / "promtool", "test", "rules", *sorted((tmp_path / "tests").iterdir()))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(("before", "after"), [
    ("== 0)", "& 0)"),  # PromQL has no bit operators
    ("opsctl_gpu_thermal_margin_celsius", "opsctl_gpu_thermal_margin"),  # a metric that is gone
    ("<= 5", "< 5"),
    ("unless on (host, service, inference_instance) (opsctl:instance_weight <= 10)", ""),
    ("max_over_time(up{job=\"load_balancer\"}[1m])", "up{job=\"load_balancer\"}"),  # a missed answer begins it anew
    ("opsctl:instance_weight{host=%q", "opsctl:instance_weight{instance=%q"),
    ("opsctl_gpu_time_to_slowdown_seconds{host=%q, UUID=%q} > 0", "opsctl_gpu_time_to_slowdown_seconds{host=%q} > 0"),
    (") == 1 unless on (host, UUID) opsctl_guard_clock_limit_mhz", ") == 1"),  # ours is told as the hardware's
    ('reason="hw_thermal_slowdown"', 'reason=~".+_thermal_slowdown"'),
    ("time() - opsctl_gpu_xid_last_timestamp_seconds{severity", "600 - increase(opsctl_gpu_xid_total[1m]{severity"),
    ("< 600", "< 300"),
    ("opsctl_guard_latched == 1", "opsctl_guard_latched"),
    ("opsctl_guard_stopped == 1", "opsctl_guard_stopped >= 0"),
])
def test_a_rule_that_was_broken_does_not_pass(programs: Path, tmp_path: Path, before: str, after: str) -> None:
    write_rules(tmp_path / "rules")
    rules = tmp_path / "rules" / "gpu.yml"
    assert before in rules.read_text()
    rules.write_text(rules.read_text().replace(before, after))
    (tmp_path / "tests").mkdir()
    for name in (f"{alert}.yml" for alert, of_it in ALERTS.items() if of_it[0]["labels"]["component"] != "telemetry"):
        (tmp_path / "tests" / name).write_text((MONITORING / "tests" / name).read_text())
    assert run_tool(programs / "promtool", "test", "rules", *sorted((tmp_path / "tests").iterdir())).returncode != 0
