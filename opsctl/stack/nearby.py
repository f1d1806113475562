"""The questions near one that has no answer, nearest first: what a person would try next. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from opsctl.stack.question import Engine, Question

# How much it asks of an operator: a wish dropped, another version, another distribution, another engine, other hosts.
WISH, VERSION, SYSTEM, ENGINE, HOSTS = 1.0, 1.0, 2.0, 5.0, 6.0
AT_MOST = 2  # changes at once


@dataclass(frozen=True)
class Change:
    cost: float
    fields: tuple[tuple[str, Any], ...] = ()


def neighbours(question: Question) -> Iterator[tuple[str, Question]]:
    """Pairs of what to say of a question and the question, by what it asks of an operator."""
    same = Change(0.0)
    dimensions = [[same, *changes] for changes in (
        _wishes(question), _versions(question), _systems(question), _hosts(question)) if changes]
    combined = [chosen for chosen in product(*dimensions)
                if 0 < sum(change.cost > 0 for change in chosen) <= AT_MOST]
    for chosen in sorted(combined, key=lambda chosen: sum(change.cost for change in chosen)):
        changed = {name: value for change in chosen for name, value in change.fields}
        other = replace(question, **changed)
        yield _said(question, other), other


def _wishes(question: Question) -> list[Change]:
    wishes = [name for name in ("driver", "flavour", "cuda") if getattr(question, name)]
    single = [Change(WISH, ((name, ""),)) for name in wishes]
    return [*single, Change(WISH * 1.5, tuple((name, "") for name in wishes))] if len(wishes) > 1 else single


def _versions(question: Question) -> list[Change]:
    """Other versions of the engine, nearest first, then other engines; of several engines none is changed."""
    if len(question.engines) != 1:
        return []
    wanted, known = question.engines[0], question.known
    lines = known.lines(wanted.name)
    here = lines.index(wanted.line)
    changes = [Change(VERSION + abs(place - here) / 100, (("engines", (Engine(line.engine, line.last, line),)),))
               for place, line in enumerate(lines) if line is not wanted.line]
    others = dict.fromkeys(line.engine for line in known.engines if line.engine != wanted.name)
    changes += [Change(ENGINE, (("engines", (Engine(name, known.lines(name)[-1].last, known.lines(name)[-1]),)),))
                for name in others if name != "tritonserver"]  # its wheel is a binding, no server
    return changes


def _systems(question: Question) -> list[Change]:
    return [Change(SYSTEM + (system.id != question.system.id) / 2, (("system", system),))
            for system in question.known.systems if system != question.system]


def _hosts(question: Question) -> list[Change]:
    if len(question.boards) < 2:
        return []
    return [Change(HOSTS, (("boards", (board,)),)) for board in question.boards]


def _said(question: Question, other: Question) -> str:
    """``vllm 0.10.1.1 on Debian 12``, ``CUDA`` and ``driver`` are said with the answer."""
    words = []
    if other.boards != question.boards:
        words.append(f"{other.boards[0]} alone, the others in another host,")
    if other.engines and (other.engines != question.engines or other.system != question.system):
        words.append(str(other.engines[0]))
    if other.system != question.system:
        words.append(f"on {other.system.name}")
    return " ".join(words)
