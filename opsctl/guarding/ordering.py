"""``opsctl guard mode`` and ``unlatch``: what an order would change (pure), and sending it.

No lock and no hold is asked: it is the on-call's lever, and often pulled while a run is under way or on a held host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opsctl.engines.session import Session, on_each
from opsctl.errors import ConfigurationError, OpsctlError
from opsctl.fleet.model import Fleet, Host
from opsctl.guarding.looking import Answer
from opsctl.guarding.rows import hours, mode_words
from opsctl.releases.remote import ask


@dataclass(frozen=True)
class Change:
    """What a mode means for one host. ``changed`` False: it was the last order there."""

    host: str
    before: str
    after: str
    effect: str
    changed: bool


def changes(answers: Mapping[str, Answer], mode: str) -> list[Change]:
    """One for each host that answers. Pure."""
    return [_change(host, answer, mode) for host, answer in answers.items() if not isinstance(answer, OpsctlError)]


def _change(host: str, answer: Mapping[str, Any], mode: str) -> Change:
    left_s = max(0.0, (answer["observe_s"] or 0.0) - answer["observed_s"])
    enforces = mode == "enforce" or (mode == "auto" and answer["observe_s"] is not None and left_s == 0)
    after = {"observe": "observes", "enforce": "enforces"}.get(mode, "enforces (auto)" if enforces else
                                                               f"observes (auto, {hours(left_s)} more)")
    ordered = answer.get("ordered")  # an agent of before does not tell
    now = mode_words(answer) + (f", {ordered} is ordered" if ordered not in (None, answer["mode"]) else "")
    if ordered == mode:  # not the mode it goes by: it reads its orders a few seconds late
        return Change(host, now, now, "", changed=False)
    return Change(host, now, after, _effect(answer, enforces=enforces), changed=True)


def _effect(answer: Mapping[str, Any], *, enforces: bool) -> str:
    """What happens at once to instances that are below normal."""
    if answer["enforcing"] == enforces:
        return "nothing for now"
    held = [one for one in answer["instances"] if one["clock_percent"] is not None]
    if not enforces:
        words = [f"{one['instance']}: clocks free again" for one in held]
        words += [f"{one['instance']}: stays stopped until you start it there (systemctl start "
                  f"inference@{one['instance']}) or order enforce" for one in answer["instances"] if one["stopped"]]
        return "; ".join(words) or "from now on clocks and units are left alone"
    words = [f"{one['instance']}: clocks at most {one['clock_percent']} %" for one in held]
    words += [f"{one['instance']}: stopped ({one['stop']})" for one in answer["instances"] if one["stop"]]
    return "; ".join(words) or "from now on it may lower clocks and stop instances"


def send_mode(fleet: Fleet, hosts: Sequence[Host], mode: str, by: str) -> dict[str, Answer]:
    return on_each(fleet, hosts, lambda session: ask(session, ["guard-mode", mode, "--by", by], host=session.host.name))


def latched(answer: Mapping[str, Any], host: str, instance: str) -> list[str]:
    """The instances to unlatch: the one that is named if it is latched, else all that are. Pure.

    Raises:
        ConfigurationError: no such instance there.
    """
    names = [one["instance"] for one in answer["instances"]]
    if instance and instance not in names:
        raise ConfigurationError("guard.no_such_instance", f"the guard of {host} knows no instance {instance}.",
                                 hint=f"instances there: {', '.join(names) or 'none'}")
    return [one["instance"] for one in answer["instances"] if one["latched"] and instance in ("", one["instance"])]


def send_unlatch(session: Session, instances: Sequence[str], by: str) -> None:
    """Raises OpsctlError: what the host says."""
    for instance in instances:
        ask(session, ["guard-unlatch", instance, "--by", by], host=session.host.name)
