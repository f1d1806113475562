"""What a provision would do: hosts that never had a role are told from the role, the others from check mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from opsctl import looking_ahead
from opsctl.cli.plan import plan_view, rows_of, tally
from opsctl.engines.ansible import PlaybookOutcome
from opsctl.engines.events import Event, TaskResult
from opsctl.errors import ExitCode, RefusedError
from opsctl.fleet.model import Fleet, Host, Service
from opsctl.fleet.placements import place
from opsctl.planning import (
    MARKS,
    Change,
    HostPlan,
    Plan,
    Step,
    checked_changes,
    first_changes,
    first_roles,
    marks,
    roles_for,
    steps_of,
    verdict,
)
from opsctl.releases.ledger import Wanted
from opsctl.resources import resource
from opsctl.role_tasks import deeds, holds_of, packages_of

FLEET = Fleet(
    Path("/fleet"), Path("/fleet/inventory.ini"),
    (Host("ops-1", "10.0.0.2", ("gateway", "lb", "monitor"), service_address="10.0.0.2", management_address="10.0.0.2"),
     Host("gpu-1", "10.0.0.11", ("gpu",), service_address="10.0.0.11", management_address="10.0.0.11")),
    (Service("chat", "gpu", port=8100, listen=8000, instances_per_host=2),),
)
OPS, GPU = FLEET.hosts
WANT = Wanted("chat", "v1", "1" * 64, on_gateway=True, lines=0)


def lacking(*roles: str) -> list[str]:
    return [path for role in roles for path in MARKS[role]]


class TestRoles:
    def test_by_groups_and_services(self) -> None:
        assert roles_for(FLEET, OPS) == ("base", "gateway", "agent", "node_exporter", "load_balancer", "monitoring")
        assert roles_for(FLEET, GPU) == ("base", "agent", "node_exporter", "inference")
        assert roles_for(replace(FLEET, load_balancer="hook"), OPS) == (
            "base", "gateway", "agent", "node_exporter", "monitoring")

    def test_without_a_monitor_group_nothing_is_watched(self) -> None:
        ops = replace(OPS, groups=("gateway", "lb"))
        alone = replace(FLEET, hosts=(ops, GPU))
        assert roles_for(alone, ops) == ("base", "gateway", "agent", "load_balancer")
        assert roles_for(alone, GPU) == ("base", "agent", "inference")

    def test_every_role_that_ships_has_a_mark(self) -> None:
        assert set(MARKS) == {path.name for path in resource("roles").iterdir()}

    @pytest.mark.parametrize("role", MARKS)
    def test_a_mark_is_something_the_role_or_its_packages_bring(self, role: str) -> None:
        """A mark that no provision makes would call the host new for ever."""
        text = "".join(path.read_text() for path in (resource("roles") / role / "tasks").iterdir())
        for path in MARKS[role]:
            assert path in text or path.startswith("/usr/sbin/") or Path(path).name in text, path

    @pytest.mark.parametrize(("host", "gone", "first"), [
        (OPS, [], ()),
        (GPU, lacking("base", "agent", "inference"), ("base", "agent", "node_exporter", "inference")),
        (GPU, lacking("agent"), ("base", "agent", "node_exporter", "inference")),
        (GPU, lacking("node_exporter"), ("node_exporter",)),
        (GPU, lacking("inference"), ("inference",)),
        (OPS, lacking("load_balancer"), ("load_balancer",)),
        (OPS, lacking("monitoring"), ("monitoring",)),
        (OPS, ["/etc/opsctl/apt.conf"], roles_for(FLEET, OPS)),
    ])
    def test_a_role_whose_mark_lacks_is_a_first_one(self, host: Host, gone: list[str], first: tuple[str, ...]) -> None:
        assert first_roles(FLEET, host, gone) == first

    def test_apts_files_are_marks_only_where_packages_come_from_the_gateway(self) -> None:
        assert "/etc/opsctl/apt.conf" in marks(FLEET, GPU)["base"]
        assert "/etc/opsctl/apt.conf" not in marks(replace(FLEET, package_source="upstream"), GPU)["base"]


class TestFirstChanges:
    def test_a_bare_host_is_told_all_of_it(self) -> None:
        changes = first_changes(FLEET, GPU, roles_for(FLEET, GPU), "ann")
        assert {change.role for change in changes} == {"base", "agent", "node_exporter", "inference"}
        names = {name for change in changes for name in change.what}
        assert {"python3-venv", "libgomp1", "opsctl-agent", "/etc/opsctl/apt.conf", "/etc/sudoers.d/opsctl",
                "/etc/opsctl/instances/chat.0.toml", "/etc/opsctl/instances/chat.1.toml",
                "/etc/opsctl/guard.toml",
                "opsctl-agent.service", "opsctl-recover.service", "opsctl-setter.service"} <= names
        assert not [name for name in names if "{{" in name]
        tasks = {change.task for change in changes}
        assert "Enable the instances, and start those that have a release and keep it" in tasks
        assert "Drain, stop and forget the instances that left, after their last streams" not in tasks
        assert "Take the gateway's bundle away from apt" not in tasks
        assert "Compare the agent's files with what its wheel recorded" not in tasks  # it looks, and changes nothing

    def test_root_needs_no_sudo_rule_and_upstream_no_source(self) -> None:
        changes = first_changes(replace(FLEET, package_source="upstream"), GPU, ("base",), "root")
        names = {name for change in changes for name in change.what}
        assert "/etc/sudoers.d/opsctl" not in names
        assert "/etc/opsctl/apt.conf" not in names

    def test_the_gateway_gets_the_bundle_first(self) -> None:
        changes = first_changes(FLEET, OPS, roles_for(FLEET, OPS), "root")
        assert changes[0].what[1] == "/srv/opsctl-gateway/bundle"
        names = {name for change in changes for name in change.what}
        assert {"nginx-light", "haproxy", "nginx.service", "haproxy.service", "prometheus-alertmanager.service",
                "/etc/prometheus/opsctl/rules/gpu.yml"} <= names
        assert "/etc/prometheus/opsctl/smtp-password" not in names  # no user, no password

    @pytest.mark.parametrize("role", MARKS)
    def test_every_task_that_changes_something_is_told_or_known_to_be_needless(self, role: str) -> None:
        """A new task with a new module must not be left out in silence."""
        modules = {key for path in (resource("roles") / role / "tasks").iterdir() for key in _modules(path)}
        assert modules <= {f"ansible.builtin.{name}" for name in (
            "apt", "dpkg_selections", "user", "file", "copy", "template", "unarchive", "systemd_service", "command",
            "reboot", "assert", "debug", "fail", "find", "stat", "tempfile", "import_tasks", "import_role",
            "include_role")}
        assert deeds(role, {})

    def test_packages_and_holds_are_the_roles_own(self) -> None:
        assert packages_of("load_balancer") == holds_of("load_balancer") == ("haproxy",)
        assert "nginx-common" in holds_of("gateway")


def _modules(path: Path) -> set[str]:
    found: set[str] = set()

    def walk(tasks: list[dict[str, Any]]) -> None:
        for task in tasks:
            found.update(key for key in task if key.startswith("ansible.builtin."))
            for part in ("block", "rescue", "always"):
                walk(task.get(part, []))

    walk(yaml.safe_load(path.read_text()))
    return found


def test_what_check_mode_found_is_by_host_with_role_kind_and_diff() -> None:
    results = [TaskResult("gpu-1", "base : Install keys.", "changed", detail=("-a", "+b"), item="bundle.asc"),
               TaskResult("gpu-1", "base : Look.", "ok"),
               TaskResult("ops-1", "agent : Install the agent from the gateway.", "changed")]
    found = checked_changes(results, {"base : Install keys.": "ansible.builtin.copy",
                                      "agent : Install the agent from the gateway.": "ansible.builtin.command"})
    assert found == {"gpu-1": (Change("base", "Install keys", "file", ("bundle.asc",), ("-a", "+b")),),
                     "ops-1": (Change("agent", "Install the agent from the gateway", "command"),)}


def state(*instances: tuple[str, str], staged: bool = True) -> dict[str, Any]:
    return {"instances": [{"instance": name, "service": "chat", "release": "v1" if digest else "", "digest": digest}
                          for name, digest in instances],
            "releases": [{"digest": WANT.digest, "complete": True, "engine_built": staged}]}


@pytest.mark.parametrize(("states", "fetches", "expected"), [
    ({}, {}, [("first start", "chat.0", 500), ("first start", "chat.1", 0)]),
    ({"gpu-1": state(("chat.0", WANT.digest), ("chat.1", WANT.digest))}, {"gpu-1": 0}, []),
    ({"gpu-1": state(("chat.0", "2" * 64), ("chat.1", "2" * 64))}, {"gpu-1": 0}, []),
    ({"gpu-1": state(("chat.0", WANT.digest), ("chat.1", ""))}, {"gpu-1": 0}, [("first start", "chat.1", 0)]),
    ({"gpu-1": state(("chat.0", WANT.digest))}, {"gpu-1": 0}, [("first start", "chat.1", 0)]),
    ({"gpu-1": state(("chat.0", "2" * 64), ("chat.1", "2" * 64), staged=False)}, {"gpu-1": 70}, [("stage", "", 70)]),
])
def test_what_comes_after_ansible(states: dict[str, Any], fetches: dict[str, int],
                                  expected: list[tuple[str, str, int]]) -> None:
    """What serves is never moved; what never served is started; a host that lacks the release gets it."""
    found = steps_of(place(FLEET), WANT, states, fetches, 500)
    assert [(step.act, step.instance, step.fetch_bytes) for step in found] == expected


FRESH = HostPlan("gpu-1", "fresh", ("base", "agent", "inference"),
                 first_changes(FLEET, GPU, ("base", "agent", "inference"), "root"))
SAME = HostPlan("ops-1", "provisioned")
SILENT = HostPlan("gpu-2", "unreachable", why="gpu-2: no route to host")
START = Step("first start", "gpu-1", "chat", "v1", "chat.0", 450_900)


def test_bare_hosts_are_asked_the_preflight_alone_and_the_others_all_in_check_mode(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check mode would end at a bare host's first package, and the whole plan with it."""
    fleet = replace(FLEET, directory=tmp_path, hosts=(*FLEET.hosts, Host("gpu-2", "10.0.0.12", ("gpu",))))
    asked: list[tuple[str, tuple[str, ...], Any]] = []

    def play(playbook: Path, **how: Any) -> PlaybookOutcome:
        assert how["check"] is True
        asked.append((playbook.name, how["limit"], how["variables"]["opsctl_roles_to_come"]))
        if playbook.name == "site.yml":
            how["emit"](TaskResult("ops-1", "agent : Write it.", "changed"))
        return PlaybookOutcome(check=True)

    monkeypatch.setattr(looking_ahead, "run_playbook", play)
    monkeypatch.setattr(looking_ahead, "verify_bundle", lambda *_: None)
    monkeypatch.setattr(looking_ahead, "_steps", lambda *_: ())
    monkeypatch.setattr(looking_ahead, "on_each", lambda *_: {
        "ops-1": looking_ahead.Found("ann", ("load_balancer",), True, ()),
        "gpu-1": looking_ahead.Found("ann", roles_for(FLEET, GPU), False, ()),
        "gpu-2": RefusedError("host.unreachable", "gpu-2: no route to host")})
    heard: list[Event] = []
    plan = looking_ahead.plan(looking_ahead.Question(fleet, fleet.hosts, tmp_path), heard.append)
    assert asked == [("preflight.yml", ("gpu-1",), {}),
                     ("site.yml", ("ops-1",), {"ops-1": ["load_balancer"]})]
    assert [(host.host, host.state) for host in plan.hosts] == [
        ("ops-1", "provisioned"), ("gpu-1", "fresh"), ("gpu-2", "unreachable")]
    assert {change.role for change in plan.hosts[0].changes} == {"agent", "load_balancer"}
    assert not [event for event in heard if isinstance(event, TaskResult)], "a plan says of nothing that it was changed"


@pytest.mark.parametrize(("plan", "skip", "code"), [
    (Plan((SAME,), ()), 0, ExitCode.DONE),
    (Plan((SAME, FRESH), ()), 0, ExitCode.PENDING),
    (Plan((SAME,), (START,)), 0, ExitCode.PENDING),
    (Plan((SAME, SILENT), ()), 0, ExitCode.REFUSED),
    (Plan((SAME, SILENT), ()), 1, ExitCode.DONE),
])
def test_the_exit_code(plan: Plan, skip: int, code: ExitCode) -> None:
    assert verdict(plan, skip) is code


def shown(plan: Plan, *, every: bool = False) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(plan_view(plan, every=every))
    return console.export_text()


def test_a_person_reads_one_row_a_role_of_a_first_provision_and_what_to_type() -> None:
    text = shown(Plan((SAME, FRESH), (START,)))
    assert "first provision of gpu-1: 3 roles (base, agent, inference)" in text
    assert "packages: libgomp1" in text
    assert "units: opsctl-recover.service, opsctl-setter.service, opsctl-agent.service" in text
    assert "first start on chat v1, 450.9 kB to fetch" in text
    assert "opsctl provision" in text
    assert len(rows_of(FRESH, every=False)) == 3
    assert len(rows_of(FRESH, every=True)) == len(FRESH.changes)


def test_what_differs_is_named_with_its_diff_when_asked() -> None:
    plan = Plan((HostPlan("gpu-1", "provisioned", (), (
        Change("base", "Install keys", "file", ("bundle.asc",), ("-a [x]", "+b")),)),), ())
    assert "Install keys: bundle.asc" in shown(plan)
    assert "-a [x]" not in shown(plan)
    assert "-a [x]" in shown(plan, every=True)


def test_silence_and_nothing_to_do_are_said() -> None:
    assert tally(Plan((SAME,), ())) == "nothing to do: zero changes"
    assert "--skip-unreachable 1" in tally(Plan((SAME, SILENT), ()))
    assert "no route to host" in shown(Plan((SILENT,), ()))


def test_the_document_counts_as_the_plan_does() -> None:
    document = Plan((FRESH, SAME), (START,)).as_document()
    assert document["changed"] == len(FRESH.changes) + 1
    assert document["hosts"][0]["state"] == "fresh"
    assert {"task", "kind"} <= document["hosts"][0]["changes"][0].keys()
    assert document["instances"] == [{"act": "first start", "host": "gpu-1", "service": "chat", "version": "v1",
                                      "instance": "chat.0", "fetch_bytes": 450_900}]
