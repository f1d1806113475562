"""Every variable of a role is declared, typed and described, and its default stands in one place's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsctl.resources import resource

ROLES = sorted(path for path in resource("roles").iterdir() if (path / "tasks").is_dir())
ENTRIES = {"main", "preflight"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def specs(role: Path) -> dict[str, Any]:
    return dict(load(role / "meta" / "argument_specs.yml")["argument_specs"])


def options(role: Path) -> dict[str, Any]:
    return {name: option for entry in specs(role).values() for name, option in entry["options"].items()}


def each_option(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Options and the options inside them."""
    deeper = [pair for option in found.values() for pair in each_option(option.get("options", {}))]
    return [*found.items(), *deeper]


def tasks(role: Path) -> list[dict[str, Any]]:
    def flat(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [task for item in items for task in
                [item, *(inner for part in ("block", "rescue", "always") for inner in flat(item.get(part, [])))]]

    return [task for path in sorted((role / "tasks").glob("*.yml")) for task in flat(load(path))]


def test_the_roles_of_the_first_fleet() -> None:
    assert {"agent", "base", "gateway", "inference", "load_balancer"} <= {role.name for role in ROLES}


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
class TestRole:
    def test_it_can_be_asked_before_it_acts(self, role: Path) -> None:
        assert specs(role).keys() >= ENTRIES
        for entry in specs(role):
            assert (role / "tasks" / f"{entry}.yml").is_file(), entry

    def test_preflight_knows_every_variable_that_main_knows(self, role: Path) -> None:
        assert specs(role)["preflight"]["options"] == specs(role)["main"]["options"]

    def test_every_default_is_declared_with_the_same_value(self, role: Path) -> None:
        declared = {name: option["default"] for name, option in options(role).items() if "default" in option}
        assert declared == load(role / "defaults" / "main.yml")

    def test_what_has_no_default_is_required(self, role: Path) -> None:
        for name, option in options(role).items():
            assert option.get("required", False) != ("default" in option), name

    def test_every_option_says_its_type_and_what_it_is(self, role: Path) -> None:
        for name, option in each_option(options(role)):
            assert option.get("type"), name
            assert option["description"].endswith("."), name
            if option["type"] == "list":
                assert option.get("elements"), name

    def test_its_variables_carry_its_name(self, role: Path) -> None:
        assert [name for name in options(role) if not name.startswith(f"{role.name}_")] == []

    def test_nothing_is_declared_that_nobody_reads(self, role: Path) -> None:
        read = "".join(path.read_text() for folder in ("tasks", "templates", "vars")
                       for path in (role / folder).rglob("*") if path.is_file())
        shared = "".join(path.read_text() for path in resource("templates").iterdir())
        assert [name for name in options(role) if name not in read and name not in shared] == []

    def test_every_task_is_a_sentence(self, role: Path) -> None:
        assert [task["name"] for task in tasks(role) if not re.search(r"[.?]$", task["name"])] == []

    def test_no_task_forgives_or_hides(self, role: Path) -> None:
        for task in tasks(role):
            assert "ignore_errors" not in task, task["name"]
            assert "failed_when" not in task, task["name"]
            if "ansible.builtin.command" in task:
                assert "changed_when" in task, task["name"]

    def test_it_uses_what_ansible_core_alone_has(self, role: Path) -> None:
        modules = {key for task in tasks(role) for key in task if "." in key}
        assert {module for module in modules if not module.startswith("ansible.builtin.")} == set()


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_preflight_touches_nothing(role: Path) -> None:
    looks = {"ansible.builtin.assert", "ansible.builtin.command", "ansible.builtin.include_role"}
    for task in load(role / "tasks" / "preflight.yml"):
        assert looks & task.keys(), task["name"]
        if "ansible.builtin.command" in task:
            assert task["changed_when"] is False, task["name"]


def test_the_site_asks_every_role_before_the_first_change() -> None:
    site = load(resource("playbooks") / "site.yml")
    assert site[0]["ansible.builtin.import_playbook"] == "preflight.yml"
    plays = load(resource("playbooks") / "preflight.yml")
    assert len(plays) == 1
    assert plays[0]["name"] == "Preflight"
    assert plays[0]["any_errors_fatal"] is True
    asked = {task["ansible.builtin.include_role"]["name"]: task["ansible.builtin.include_role"]["tasks_from"]
             for task in plays[0]["tasks"] if "ansible.builtin.include_role" in task}
    assert asked == {role.name: "preflight" for role in ROLES}


def test_the_fleet_gives_every_role_what_it_requires() -> None:
    given = load(resource("playbooks") / "vars" / "fleet.yml")
    required = {name for role in ROLES for name, option in specs(role)["main"]["options"].items()
                if option.get("required")}
    assert required - given.keys() == set()
