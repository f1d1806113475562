"""Which instances a provision starts."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from rendering import environment

from opsctl.resources import resource

OMITTED = "omitted"
LOOK, LOOK_FOR_CHANGES, RUN = yaml.safe_load((resource("roles") / "inference/tasks/service.yml").read_text())


def looked(task: dict[str, Any], *there: bool) -> dict[str, Any]:
    """What ``task`` registers for chat.0, chat.1, ..."""
    return {task["register"]: {"results": [
        {"item": {"service": "chat", "index": index, "instance": f"chat.{index}"}, "stat": {"exists": exists}}
        for index, exists in enumerate(there)]}}


@pytest.mark.parametrize(("release", "changing", "state"), [
    (True, False, "started"), (False, False, OMITTED), (True, True, OMITTED), (False, True, OMITTED)])
def test_one_whose_release_is_being_changed_is_not_started_in_between(release: bool, changing: bool, state: str
                                                                      ) -> None:
    made = environment()
    made.filters["zip"] = zip
    items = made.compile_expression(RUN["loop"].strip("{} "))(
        **looked(LOOK, True, release), **looked(LOOK_FOR_CHANGES, False, changing))
    unit = RUN["ansible.builtin.systemd_service"]
    found = [(made.from_string(unit["name"]).render(item=item), made.from_string(unit["state"]).render(
        item=item, omit=OMITTED)) for item in items]
    assert found == [("inference@chat.0.service", "started"), ("inference@chat.1.service", state)]


def test_a_change_is_told_by_its_record() -> None:
    path = environment().from_string(LOOK_FOR_CHANGES["ansible.builtin.stat"]["path"]).render(
        item={"instance": "chat.0"})
    assert path == "/var/lib/opsctl/undo/chat.0.json"
