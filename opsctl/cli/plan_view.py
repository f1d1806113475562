"""A plan as people read it: a table of instances, then what it costs in bytes and in capacity."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from opsctl.cli.views import human_bytes
from opsctl.releases.plan import HostPart, Plan, Step


def plan_view(plan: Plan) -> RenderableType:
    """The table and its tally."""
    parts = {part.host: part for part in plan.hosts}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("INSTANCE", "left"), ("NOW", "left"), ("", "left"), ("NEXT", "left"), ("WAVE", "right"),
                            ("FETCH", "right"), ("FREE AFTER", "right"), ("NOTE", "left")):
        table.add_column(column, justify=justify, no_wrap=column != "NOTE")  # type: ignore[arg-type]
    for step in sorted(plan.steps, key=lambda step: (step.wave == 0, step.wave, step.name)):
        part = parts.get(step.host)
        moving = step.action == "move"
        table.add_row(step.name, _version(step.now) or "-", "->" if moving else "=", _version(step.next),
                      str(step.wave) if moving else "", _fetch(part) if moving else "",
                      _free(part) if moving else "", _note(step), style="" if moving else "dim")
    return Group(table, tally(plan))


def tally(plan: Plan) -> str:
    """``3 to move in 3 waves; 102 MB to fetch; 3 serve now, 2 at the least meanwhile (min_serving 1)``."""
    count = len(plan.moves)
    if not count:
        return f"nothing to move: every instance is on {plan.target.version}"
    fetch = sum(part.fetch for part in plan.hosts)
    words = [f"{count} to move in {plan.waves} wave{'s' if plan.waves > 1 else ''}",
             f"{human_bytes(fetch)} to fetch" if fetch else "nothing to fetch",
             f"{plan.serving} serve{'s' if plan.serving == 1 else ''} now, {plan.least_serving} at the least meanwhile "
             f"(min_serving {plan.service.min_serving})"]
    if plan.silent:
        words.append(f"not answering: {', '.join(plan.silent)}")
    return "; ".join(words)


def as_document(plan: Plan) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "service": plan.service.name, "to": plan.target.version, "digest": plan.target.digest,
        "instances": [{"host": step.host, "instance": step.instance, "now": step.now, "next": step.next,
                       "action": step.action, "wave": step.wave, "serving": step.serving,
                       "drained_by": list(step.drained_by)} for step in plan.steps],
        "hosts": [{"host": part.host, "staged": part.staged, "fetch_bytes": part.fetch, "link_files": part.links,
                   "free_after_bytes": part.free_after, "fits": part.fits} for part in plan.hosts],
        "serving": plan.serving, "least_serving": plan.least_serving, "min_serving": plan.service.min_serving,
        "outage": plan.outage, "expected_outage_s": plan.expected_outage_s, "silent": list(plan.silent),
    }


def _fetch(part: HostPart | None) -> str:
    if part is None:
        return ""
    return "staged" if part.staged else human_bytes(part.fetch)


def _free(part: HostPart | None) -> str:
    return human_bytes(part.free_after) if part and part.free_after is not None else ""


def _note(step: Step) -> str:
    if step.drained_by:
        return f"drained by {', '.join(step.drained_by)}: stays so"
    if step.action == "nothing":
        return "moved by an unfinished rollout" if step.earlier else ""
    if not step.serving:
        return "serves nobody now" if step.now else "first start"
    return ""


def _version(release: str) -> str:
    return release.rpartition("-")[0]
