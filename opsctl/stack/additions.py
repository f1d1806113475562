"""The rules that add: packages, kernel modules, what must not be there, and the reasons for all of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from opsctl.stack.fit import Wish, needs_fabric_manager
from opsctl.stack.question import Addition, Candidate, Question
from opsctl.stack.rules import Rule, cuda_premise
from opsctl.stack.versions import order_of


def names(question: Question, part: str, candidate: Candidate) -> tuple[str, ...]:
    """The packages of a part in the question's distribution, for the candidate's branch."""
    branch = candidate.branch.number
    for row in question.known.names:
        there = row.part == part and row.family in (question.system.id, "both")
        if there and row.first <= branch <= (row.last or branch):
            return tuple(name.format(branch=branch, version=candidate.version) for name in row.packages)
    return ()


def pin(question: Question, candidate: Candidate) -> Addition:
    return Addition(packages=names(question, "pin", candidate))


def driver(question: Question, candidate: Candidate) -> Addition:
    must = next((gpu for gpu in question.gpus if gpu.architecture.modules == candidate.module), None)
    why = f"{must.name} takes the {candidate.module} kernel module only" if must else \
        "the open kernel module, which all these GPUs take"
    if candidate.module == question.flavour and not must:
        why = f"the {candidate.module} kernel module is wished for, and all these GPUs take it"
    return Addition(packages=(*names(question, "driver", candidate), *names(question, candidate.module, candidate)),
                    reasons=(why,))


def headers(question: Question, candidate: Candidate) -> Addition:
    arm = any(gpu.cpu == "arm64" for gpu in question.gpus)
    return Addition(own=names(question, "headers-arm64" if arm else "headers", candidate))


def wheels_for_arm(question: Question, candidate: Candidate) -> Addition:
    arm = next((gpu for gpu in question.gpus if gpu.cpu == "arm64"), None)
    if arm is None or not question.engines:
        return Addition()
    return Addition(cautions=(f"{arm.name} has an arm64 processor, and only wheels for x86-64 were looked at",))


def branch_that_was_chosen(question: Question, candidate: Candidate) -> Addition:
    branch = candidate.branch
    how = "as wished" if question.driver else ("the longest" if question.policy == "long" else "the newest") + \
        " of those that fit"
    last = tuple(f"{branch.number} is the last driver branch that knows {gpu.name} ({gpu.architecture.name})"
                 for gpu in question.gpus if gpu.architecture.last_branch == branch.number)[:1]
    unknown = () if candidate.version in branch.versions else (
        f"{candidate.version} is not among the versions known ({', '.join(branch.versions)}): the package source "
        "decides",)
    return Addition(reasons=(*last, f"branch {branch.number} gets fixes until {branch.ends}, {how}"), cautions=unknown)


def cuda_that_was_chosen(question: Question, candidate: Candidate) -> Addition:
    floor = question.known.major(candidate.cuda).driver
    why = cuda_premise(question) or f"CUDA {candidate.cuda} is the newest that GPUs and driver know"
    own = next((kit.driver for kit in question.known.toolkits if kit.cuda == candidate.cuda), "")
    minor = (f"CUDA {candidate.cuda} came with driver {own}: on {candidate.version} it runs by minor-version "
             "compatibility, which covers no code that is compiled at run time (general knowledge, not looked up)",) \
        if own and order_of(own) > order_of(candidate.version) and not candidate.compat else ()
    return Addition(reasons=(f"{why}; CUDA {order_of(candidate.cuda)[0]} begins with driver {floor}",), cautions=minor)


def forward_compatibility(question: Question, candidate: Candidate) -> Addition:
    if not candidate.compat:
        return Addition()
    return Addition(own=(candidate.compat,), reasons=(f"driver {candidate.version} is older than CUDA {candidate.cuda} "
                                                      f"wants: {candidate.compat} bridges that on these GPUs",))


def no_compatibility(question: Question, candidate: Candidate) -> Addition:
    geforce = next((gpu for gpu in question.gpus if gpu.kind == "geforce"), None)
    if geforce is None:
        return Addition()
    gone = tuple(dict.fromkeys(package for package, _, _ in question.known.compatibility))
    return Addition(absent=gone, reasons=(f"cuda-compat must not be on a host with {geforce.name}: CUDA answers 804",))


def distribution_of_engine(question: Question, candidate: Candidate) -> Addition:
    system = question.system
    has = f"Python {system.python} and glibc {system.glibc} of {system.name}"
    return Addition(reasons=tuple(f"{engine} runs with {has}" for engine in question.engines
                                  if engine.line.first_python))


def fabric_manager(question: Question, candidate: Candidate) -> Addition:
    """As the role nvidia_driver decides it: by what is seen or by the GPUs, unless the inventory says it."""
    wish = Wish("", candidate.version, fabric_manager=question.fabric_manager)
    if not needs_fabric_manager(wish, question.gpus, question.switches):
        return Addition()
    board = next((gpu.name for gpu in question.gpus if gpu.fabric), "a board with NVSwitches")
    return Addition(packages=names(question, "fabric", candidate), fabric_manager=True,
                    reasons=(f"{board} wants the fabric manager, in exactly the driver's version",))


def nvlink5(question: Question, candidate: Candidate) -> Addition:
    board = next((gpu for gpu in question.gpus if gpu.fabric == "nvlink5"), None)
    if board is None or question.fabric_manager == "absent":
        return Addition()
    return Addition(own=names(question, "nvlink5", candidate), load=("ib_umad",),
                    reasons=(f"{board.name} wants nvlsm and the kernel module ib_umad beside the fabric manager",))


def own_driver(question: Question, candidate: Candidate) -> Addition:
    system = question.system
    if not system.own_driver:
        return Addition()
    ended = next((branch for branch in question.known.branches if branch.number == order_of(system.own_driver)[0]
                  and not branch.gets_fixes(question.today)), None)
    if ended is None:
        return Addition()
    return Addition(reasons=(f"{system.name}'s own {system.own_package} is {system.own_driver}, of a branch that has "
                             "ended: the vendor's packages instead",))


def vendors_repository(question: Question, candidate: Candidate) -> Addition:
    """What a repository has changes: the index decides later, and this is for the person who would wonder."""
    system, number = question.system, candidate.branch.number
    if number >= system.first_branch:
        return Addition()
    too_new = any(0 < gpu.architecture.last_branch < system.first_branch for gpu in question.gpus)
    way = "" if too_new else f"; if it has not: --driver {system.first_branch}"
    return Addition(cautions=(f"the vendor's repository for {system.name} had no branch {number} when it was last "
                              f"looked at (its first was {system.first_branch}): opsctl bundle build says whether it "
                              f"has by now{way}",))


ADDING: Sequence[Rule] = (
    Rule("pin", adds=pin),
    Rule("driver's packages", adds=driver),
    Rule("branch that was chosen", adds=branch_that_was_chosen),
    Rule("CUDA that was chosen", adds=cuda_that_was_chosen),
    Rule("the engine's distribution", adds=distribution_of_engine),
    Rule("cuda-compat", adds=forward_compatibility),
    Rule("cuda-compat goes from GeForce", adds=no_compatibility),
    Rule("fabric manager", adds=fabric_manager),
    Rule("nvlsm", adds=nvlink5),
    Rule("kernel headers", adds=headers),
    Rule("the distribution's own driver", adds=own_driver),
    Rule("the vendor's repository", adds=vendors_repository),
    Rule("wheels for arm64", adds=wheels_for_arm),
)
