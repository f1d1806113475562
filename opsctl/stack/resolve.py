"""From GPUs, distribution, engine or CUDA, and policy to a stack, or to the facts that clash. Pure.

Every branch, kernel module and CUDA release is a stack that might do. The rules of ``rules.py`` say no to some; the
policy takes one of the others; the rules of ``additions.py`` say what comes with it. When none is left, the smallest
set of facts that excludes all is the clash, and the nearest question that has an answer is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations, product
from operator import or_

from opsctl.stack.additions import ADDING
from opsctl.stack.fit import FLAVOURS
from opsctl.stack.knowledge import Branch
from opsctl.stack.nearby import neighbours
from opsctl.stack.question import Answer, Candidate, Question, Stack
from opsctl.stack.rules import NONE, REFUSING, Facts, Rule
from opsctl.stack.versions import is_driver_version, order_of

RULES: tuple[Rule, ...] = (*REFUSING, *ADDING)


def resolve(question: Question, rules: Sequence[Rule] = RULES, *, look_around: bool = True) -> Answer:
    """The stack for a question; ``look_around``: whether a refusal comes with the nearest one that would do."""
    clash = _narrowed(question, rules)[1]
    there = candidates(question, rules)
    fitting = [one for one in there if not any(rule.objects(question, one) for rule in rules)]
    if fitting and not clash:
        return _chosen(question, min(fitting, key=lambda one: _rank(question, one)), rules)
    if not clash:
        objections = [[said for rule in rules if (said := rule.objects(question, one))] for one in there]
        clash = smallest_clash(objections)
    nearest = _nearest(question, rules) if look_around else ""
    return Answer(_models(question), question.system.key, question.policy, question.engines, clash=clash,
                  nearest=nearest, code="stack.clash")


def candidates(question: Question, rules: Sequence[Rule]) -> list[Candidate]:
    """Every stack that might do, with the CUDA releases that the question leaves."""
    cudas = _narrowed(question, rules)[0]
    found = []
    for branch, module, cuda in product(question.known.branches, FLAVOURS, cudas):
        version = version_of(question, branch)
        if version:
            found.append(Candidate(branch, version, module, cuda, _compat(question, branch, version, cuda)))
    return found


def version_of(question: Question, branch: Branch) -> str:
    """The version that is wished for, if it is of this branch, else the newest known; empty when none is."""
    if is_driver_version(question.driver) and order_of(question.driver)[0] == branch.number:
        return question.driver
    return branch.versions[-1] if branch.versions else ""


def smallest_clash(objections: Sequence[Sequence[Facts]]) -> Facts:
    """The fewest objections that exclude every stack, as facts. ``objections``: for each stack, all against it."""
    every = tuple(dict.fromkeys(one for against in objections for one in against))
    excluded = [sum(1 << place for place, against in enumerate(objections) if one in against) for one in every]
    all_of_them = (1 << len(objections)) - 1
    for size in (1, 2, 3):
        for chosen in combinations(range(len(every)), size):
            if reduce(or_, (excluded[one] for one in chosen)) == all_of_them:
                return tuple(dict.fromkeys(fact for one in chosen for fact in every[one]))
    return tuple(dict.fromkeys(fact for against in objections for fact in against[0]))


def _narrowed(question: Question, rules: Sequence[Rule]) -> tuple[tuple[str, ...], Facts]:
    """The CUDA releases that are left, and the facts that leave none."""
    cudas = tuple(toolkit.cuda for toolkit in question.known.toolkits)
    said = f"the CUDA releases known are {cudas[0]} to {cudas[-1]}"
    for rule in rules:
        narrowing = rule.narrows(question)
        if narrowing is None:
            continue
        fact, fits = narrowing
        left = tuple(cuda for cuda in cudas if fits(cuda))
        if not left:
            return cudas, (said, fact)
        cudas, said = left, fact
    return cudas, NONE


def _compat(question: Question, branch: Branch, version: str, cuda: str) -> str:
    if order_of(version) >= order_of(question.known.major(cuda).driver):
        return ""
    return next((package for package, of, base in question.known.compatibility
                 if of == cuda and base == branch.number), "")


def _rank(question: Question, one: Candidate) -> tuple[object, ...]:
    """The least is the best: by the policy; then the open module; then a CUDA that the driver came with or after."""
    last_month = -int(one.branch.ends.replace("-", "") or 0)
    policy = (last_month, -one.branch.number) if question.policy == "long" else (-one.branch.number, last_month)
    own = next(kit.driver for kit in question.known.toolkits if kit.cuda == one.cuda)
    native = bool(own) and order_of(own) <= order_of(one.version)
    return bool(one.compat), *policy, one.module != "open", not native, tuple(-part for part in order_of(one.cuda))


def _chosen(question: Question, one: Candidate, rules: Sequence[Rule]) -> Answer:
    added = [rule.adds(question, one) for rule in rules]

    def all_of(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for addition in added for part in getattr(addition, name)))

    stack = Stack(one.branch.number, one.version, one.module, one.cuda, any(one.fabric_manager for one in added),
                  all_of("packages"), all_of("own"), all_of("absent"), all_of("load"))
    return Answer(_models(question), question.system.key, question.policy, question.engines, stack, all_of("reasons"),
                  all_of("cautions"))


def _nearest(question: Question, rules: Sequence[Rule]) -> str:
    for said, other in neighbours(question):
        stack = resolve(other, rules, look_around=False).stack
        if stack:
            with_driver = f"driver {stack.version} ({stack.module}), CUDA {stack.cuda}"
            return f"{said} with {with_driver}" if said else with_driver
    return ""


def _models(question: Question) -> tuple[str, ...]:
    return tuple(str(board) for board in question.boards)
