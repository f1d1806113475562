"""A change of driver as people read it: a table of hosts, then what it costs in capacity; and how it ended."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from opsctl.driver_upgrade.plan import Plan, Step


def plan_view(plan: Plan) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, justify in (("HOST", "left"), ("NOW", "left"), ("", "left"), ("NEXT", "left"), ("WAVE", "right"),
                            ("INSTANCES", "left"), ("NOTE", "left")):
        table.add_column(column, justify=justify, no_wrap=column not in ("INSTANCES", "NOTE"))  # type: ignore[arg-type]
    for step in sorted(plan.steps, key=lambda step: (step.wave == 0, step.wave)):
        moving = step.action != "nothing"
        table.add_row(step.host, " and ".join(step.now) or "-", "->" if moving else "=", plan.to,
                      str(step.wave) if moving else "", ", ".join(one.instance for one in step.takes),
                      note(step, plan.to), style="" if moving else "dim")
    return Group(table, tally(plan))


def tally(plan: Plan) -> str:
    """``3 hosts in 3 waves; chat: 3 serve now (min_serving 1)``."""
    count = len(plan.moves)
    if not count:
        return f"nothing to do: every host is on driver {plan.to}"
    words = [f"{count} host{'s' if count > 1 else ''} in {plan.waves} wave{'s' if plan.waves > 1 else ''}"]
    words += [f"{service.name}: {len(plan.serving.get(service.name, ()))} serve now (min_serving {service.min_serving})"
              for service in plan.services]
    if plan.silent:
        words.append(f"not answering: {', '.join(plan.silent)}")
    return "; ".join(words)


def note(step: Step, to: str) -> str:
    """What is worth knowing of a host before it is touched."""
    words = []
    if step.phase:
        words.append({"finish": "its own boot ended the change", "back": f"on its way back to {step.before}"}.get(
            step.action, "a change that did not end"))
    if step.now == (to,) and step.loaded != to:
        words.append(f"the kernel has {step.loaded or 'no driver'}")
    drained = sorted({owner for instance in step.instances for owner in instance.drained_by})
    if drained:
        words.append(f"drained by {', '.join(drained)}")
    elif step.action != "nothing" and not step.serving:
        words.append("serves nobody now")
    if step.local and step.action != "nothing":
        words.append("this machine: comes last")
    return "; ".join(words)


def as_document(plan: Plan) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "to": plan.to,
        "hosts": [{"host": step.host, "now": list(step.now), "loaded": step.loaded, "action": step.action,
                   "wave": step.wave, "local": step.local, "phase": step.phase,
                   "instances": [{"instance": one.instance, "service": one.service, "serving": one.serving,
                                  "stops": one.active, "drained_by": list(one.drained_by)} for one in step.instances]}
                  for step in plan.steps],
        "services": [{"service": service.name, "serving": len(plan.serving.get(service.name, ())),
                      "min_serving": service.min_serving, "outage": service.name in plan.short}
                     for service in plan.services],
        "silent": list(plan.silent),
    }


def summary(document: dict[str, Any]) -> str:
    """The last lines a person reads."""
    if not document["changed"]:
        return f"nothing to do: every host is on driver {document['to']}"
    lines = [f"driver {document['to']} on {document['changed']} hosts"]
    for row in document["hosts"]:
        out = [seconds for seconds in row["instances"].values() if seconds]
        facts = [f"{row['from']} -> {row['driver']}" if row["state"] == "changed" else row["state"],
                 f"out of rotation {max(out):.1f} s" if out else ""]
        lines.append(f"  {row['host']:<10} " + ", ".join(fact for fact in facts if fact))
    if document["skipped"]:
        lines.append(f"left out, not answering: {', '.join(document['skipped'])}")
    if document["on_hold"]:
        lines.append(f"left alone, on hold: {', '.join(document['on_hold'])}")
    lines.append("next: opsctl verify")
    return "\n".join(lines)
