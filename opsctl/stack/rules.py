"""The rules that say no: each by a name, each a pure function from a question and a stack that might do to facts.

One fact is one side of a clash (``V100 takes the proprietary kernel module only``): another fact has to exclude all
that it leaves. Two facts are a clash by themselves (``vllm wants Python 3.11``, ``Ubuntu 22.04 has Python 3.10``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from opsctl.stack.catalogue import Capability
from opsctl.stack.knowledge import Branch
from opsctl.stack.question import Addition, Candidate, Question
from opsctl.stack.versions import order_of

Facts = tuple[str, ...]
NONE: Facts = ()


def no_objection(question: Question, candidate: Candidate) -> Facts:
    return NONE


def no_narrowing(question: Question) -> tuple[str, Callable[[str], bool]] | None:
    return None


def nothing(question: Question, candidate: Candidate) -> Addition:
    return Addition()


@dataclass(frozen=True)
class Rule:
    """``objects``: why a stack does not do; ``narrows``: which CUDA alone does, and why; ``adds``: what comes along."""

    name: str
    objects: Callable[[Question, Candidate], Facts] = no_objection
    narrows: Callable[[Question], tuple[str, Callable[[str], bool]] | None] = no_narrowing
    adds: Callable[[Question, Candidate], Addition] = nothing


def python_of_engine(question: Question, candidate: Candidate) -> Facts:
    mine = order_of(question.system.python)
    for engine in question.engines:
        first, last = engine.line.first_python, engine.line.last_python
        if (first and mine < order_of(first)) or (last and mine > order_of(last)):
            wanted = f"Python {first} to {last}" if last else f"Python {first} or newer"
            return f"{engine} wants {wanted}", f"{question.system.name} has Python {question.system.python}"
    return NONE


def glibc_of_engine(question: Question, candidate: Candidate) -> Facts:
    for engine in question.engines:
        if engine.line.glibc and order_of(engine.line.glibc) > order_of(question.system.glibc):
            return (f"{engine} wants glibc {engine.line.glibc} or newer",
                    f"{question.system.name} has glibc {question.system.glibc}")
    return NONE


def kernels_of_engine(question: Question, candidate: Candidate) -> Facts:
    """Machine code of a capability runs on later ones of the same major only."""
    for engine in question.engines:
        line = engine.line
        for gpu in question.gpus:
            since = f"{engine} has kernels from compute capability {_text(line.first_capability)} on"
            if not gpu.capability:
                return since, f"the compute capability of {gpu.name} is not written down"
            mine = f"{gpu.name} has compute capability {_text(gpu.capability)}"
            if gpu.capability < line.first_capability:
                return since, mine
            if line.kernels and not any(one[0] == gpu.capability[0] and one <= gpu.capability for one in line.kernels):
                return (f"{engine} brings torch {line.torch}, which has kernels for "
                        f"{', '.join(_text(one) for one in line.kernels)}", mine)
    return NONE


def module_of_gpus(question: Question, candidate: Candidate) -> Facts:
    for gpu in question.gpus:
        if gpu.architecture.modules not in ("either", candidate.module):
            return (f"{gpu.name} takes the {gpu.architecture.modules} kernel module only",)
    return NONE


def wished_module(question: Question, candidate: Candidate) -> Facts:
    if question.flavour and candidate.module != question.flavour:
        return (f"the {question.flavour} kernel module is wished for",)
    return NONE


def branch_of_gpus(question: Question, candidate: Candidate) -> Facts:
    for gpu in question.gpus:
        chip = gpu.architecture
        if chip.last_branch and candidate.branch.number > chip.last_branch:
            return (f"{chip.last_branch} is the last driver branch that knows {gpu.name} ({chip.name})",)
        too_old = (order_of(candidate.version) < order_of(chip.first_driver) if chip.first_driver
                   else candidate.branch.number < chip.first_branch)
        if too_old:
            return (f"{gpu.name} ({chip.name}) begins with driver {chip.first_driver or chip.first_branch}",)
    return NONE


def cuda_of_gpus(question: Question, candidate: Candidate) -> Facts:
    for gpu in question.gpus:
        major = question.known.major(candidate.cuda)
        fact = ""
        if gpu.capability and gpu.capability < major.first_capability:
            fact = f"{gpu.name} has compute capability {_text(gpu.capability)}, which CUDA {major.major} has dropped"
        elif gpu.architecture.first_cuda and order_of(candidate.cuda) < order_of(gpu.architecture.first_cuda):
            fact = f"{gpu.name} ({gpu.architecture.name}) begins with CUDA {gpu.architecture.first_cuda}"
        if fact:
            premise = cuda_premise(question)
            return (premise, fact) if premise else (fact,)
    return NONE


def driver_of_cuda(question: Question, candidate: Candidate) -> Facts:
    floor = question.known.major(candidate.cuda).driver
    if order_of(candidate.version) < order_of(floor) and not candidate.compat:
        return (_begins(question, candidate, floor),)
    return NONE


def no_compatibility_on_geforce(question: Question, candidate: Candidate) -> Facts:
    others = [gpu for gpu in question.gpus if gpu.kind != "datacentre"]
    if candidate.compat and others:
        floor = question.known.major(candidate.cuda).driver
        return (f"{_begins(question, candidate, floor)}, and cuda-compat, which would do with an older one, gives "
                f"error 804 on {others[0].name}",)
    return NONE


def branch_gets_fixes(question: Question, candidate: Candidate) -> Facts:
    if candidate.branch.gets_fixes(question.today):
        return NONE
    return _alive(question.known.branches, question.today)


@lru_cache(maxsize=8)
def _alive(branches: tuple[Branch, ...], today: date) -> Facts:
    """What to say of the branches that get fixes; said of every stack that has another."""
    alive = [branch for branch in branches if branch.gets_fixes(today)]
    said = f"on {today} the driver branches that still get fixes are "
    if not alive:
        last = max(branches, key=lambda branch: branch.ends)
        return f"{said}none", f"the last that is known is {last.number} (until {last.ends})"
    return (said + " and ".join(f"{branch.number} (until {branch.ends})" for branch in alive),)


def wished_driver(question: Question, candidate: Candidate) -> Facts:
    if not question.driver:
        return NONE
    branches = [branch.number for branch in question.known.branches]
    said = f"driver {question.driver} is wished for"
    if question.system.own_driver == question.driver:
        said += f", which is {question.system.name}'s own"
    wanted = order_of(question.driver)[0]
    if wanted not in branches:
        return said, f"the driver branches known are {', '.join(map(str, branches))}"
    return NONE if wanted == candidate.branch.number else (said,)


def cuda_of_engine(question: Question) -> tuple[str, Callable[[str], bool]] | None:
    """The newest CUDA of all engines: what runs that runs older ones too."""
    built = [engine for engine in question.engines if engine.line.cuda]
    if not built:
        return None
    newest = max(built, key=lambda engine: order_of(engine.line.cuda))
    return f"{newest} is built for CUDA {newest.line.cuda}", lambda cuda: cuda == newest.line.cuda


def wished_cuda(question: Question) -> tuple[str, Callable[[str], bool]] | None:
    if not question.cuda:
        return None
    wanted = order_of(question.cuda)
    return f"CUDA {question.cuda} is wished for", lambda cuda: order_of(cuda)[:len(wanted)] == wanted


def cuda_premise(question: Question) -> str:
    """Why it is this CUDA; empty when any would do."""
    found = cuda_of_engine(question) or wished_cuda(question)
    return found[0] if found else ""


def _begins(question: Question, candidate: Candidate, floor: str) -> str:
    fact = f"CUDA {order_of(candidate.cuda)[0]} begins with driver {floor}"
    premise = cuda_premise(question)
    return f"{premise}, and {fact}" if premise else fact


def _text(capability: Capability) -> str:
    return ".".join(map(str, capability))


REFUSING: Sequence[Rule] = (
    Rule("glibc of the engine", objects=glibc_of_engine),
    Rule("python of the engine", objects=python_of_engine),
    Rule("kernels of the engine", objects=kernels_of_engine),
    Rule("CUDA of the engine", narrows=cuda_of_engine),
    Rule("CUDA that is wished for", narrows=wished_cuda),
    Rule("CUDA of the GPUs", objects=cuda_of_gpus),
    Rule("kernel module of the GPUs", objects=module_of_gpus),
    Rule("kernel module that is wished for", objects=wished_module),
    Rule("driver branches of the GPUs", objects=branch_of_gpus),
    Rule("oldest driver of CUDA", objects=driver_of_cuda),
    Rule("no cuda-compat on GeForce", objects=no_compatibility_on_geforce),
    Rule("branches that get fixes", objects=branch_gets_fixes),
    Rule("driver that is wished for", objects=wished_driver),
)
