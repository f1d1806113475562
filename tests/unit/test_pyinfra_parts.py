"""Facts and operations, by files in pyinfra's own way: ``fixtures/pyinfra/<operation>/<case>.json`` has arguments, what
the facts' commands answer, and the commands that are to come out. Adding a case is adding a file.

They run through the whole of pyinfra but the connection: its ``@fake`` connector answers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.connect import connect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operation import add_op
from pyinfra.api.operations import run_ops
from pyinfra.context import ctx_host, ctx_state

from opsctl.engines import pyinfra_parts as parts
from opsctl.releases.remote import HOST_PROGRAM

FIXTURES = Path(__file__).parent / "fixtures" / "pyinfra"
CASES = sorted(FIXTURES.glob("*/*.json"))


@pytest.fixture(autouse=True)
def _no_context_is_left() -> Iterator[None]:
    """pyinfra leaves its own set when a run fails."""
    yield
    ctx_state.reset()
    ctx_host.reset()


def answers(facts: dict[str, Any]) -> dict[str, Any]:
    """What the fake connector says: a document, or stdout, stderr and success as a file gives them."""
    return {f"{HOST_PROGRAM} {command}": answer if "success" in answer else json.dumps(answer)
            for command, answer in facts.items()}


def fake_state(facts: dict[str, Any], **host_data: Any) -> State:
    data = {"fake_responses": answers(facts), "fake_delay": 0, "fake_delay_jitter": 0, **host_data}
    state = State(Inventory((["@fake/gpu-1"], data)), Config(), check_for_changes=False)
    connect_all(state)
    return state


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_operation(case: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = json.loads(case.read_text())
    operation = getattr(parts, case.parent.name)
    state = fake_state(wanted["facts"])
    (host,) = state.inventory
    caplog.set_level(logging.DEBUG, "pyinfra")
    metas = add_op(state, operation, *wanted["args"], **wanted.get("kwargs", {}))
    run_ops(state)
    facts = set(answers(wanted["facts"]))
    executed = host.connector.executed_commands
    assert [command for command in executed if command not in facts] == wanted["commands"]
    assert facts <= set(executed), "a fact that nobody asked for"
    assert metas[host].did_change() is bool(wanted["commands"])
    noops = [record.message.partition("noop: ")[2] for record in caplog.records if "noop: " in record.message]
    assert noops == ([wanted["noop_description"]] if "noop_description" in wanted else [])
    assert not state.failed_hosts


def test_there_are_cases_of_every_operation() -> None:
    assert {path.parent.name for path in CASES} == {"stage", "cutover", "gc"}


def test_facts_parse_documents_and_nothing_else() -> None:
    assert parts.HostState().process(['{"instances":', "[]}"]) == {"instances": []}
    for output in (["welcome", "{}"], ["[]"], ["null"], [""]):
        with pytest.raises(parts.FactProcessError):
            parts.HostState().process(output)


def test_a_command_that_fails_takes_its_host_out() -> None:
    state = fake_state({"state --json": {"success": False}, "cutover chat.0": {"success": False}})
    metas = add_op(state, parts.cutover, "chat.0", "v2-0123456789ab", "v1-ba9876543210")
    with pytest.raises(PyinfraError, match="No hosts remaining"):
        run_ops(state)
    assert all(meta.did_error() for meta in metas.values())


def test_become_is_what_the_host_says() -> None:
    """``_sudo`` of a host's data reaches commands and facts, which is how the worker sets it."""
    state = fake_state({"state --json": {"instances": []}}, _sudo=True)
    (host,) = state.inventory
    heard: list[bool] = []
    run = host.connector.run_shell_command
    host.connector.run_shell_command = lambda *given, **more: (heard.append(more["_sudo"]), run(*given, **more))[1]
    add_op(state, parts.cutover, "chat.0", "v2-0123456789ab", "")
    run_ops(state)
    assert heard == [True, True]
