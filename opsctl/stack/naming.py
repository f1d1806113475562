"""What an operator writes, ``8xH200``, ``debian12``, ``vllm==0.33.0``, as what the catalogue knows of it. Pure.

A name that means several products is taken for all of them: the answer is the same, or it is refused with what
differs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import islice, product

from opsctl.errors import UsageError
from opsctl.serving.vllm_versions import version_key
from opsctl.stack.catalogue import Gpu, listed_gpus, products_with
from opsctl.stack.knowledge import Knowledge, System
from opsctl.stack.question import Answer, Board, Engine, Question
from opsctl.stack.resolve import RULES, resolve
from opsctl.stack.rules import Rule

ASKED = re.compile(r"(?:(?P<count>[1-9]\d?)\s*[x*]\s*)?(?P<name>\S.*)")
NVSWITCH_BOARD = 8  # GPUs of the smallest board with NVSwitches: docs/driver.md
MOST_MEANINGS = 64


@dataclass(frozen=True)
class Boards:
    """So many GPUs of what ``name`` may mean. ``as_cards``: those on boards with NVSwitches were left out."""

    count: int
    name: str
    meanings: tuple[Gpu, ...]
    as_cards: bool = False


@dataclass(frozen=True)
class Request:
    """A question in an operator's words. ``boards`` are read already, from words or from PCI ids."""

    boards: tuple[Boards, ...]
    system: str
    engines: tuple[str, ...] = ()
    cuda: str = ""
    policy: str = "long"
    driver: str = ""
    flavour: str = ""
    fabric_manager: str = "auto"
    switches: int = 0


class Unknown(Exception):  # noqa: N818 - an answer on its way, no error
    """A name that nothing here has. ``code`` is stable; the facts are as those of a clash."""

    def __init__(self, code: str, *facts: str) -> None:
        super().__init__("; ".join(facts))
        self.code = code
        self.facts = facts


def split_board(text: str) -> tuple[int, str]:
    """``8xH200`` as 8 and ``H200``; a name alone is one.

    Raises:
        UsageError: ``stack.bad_gpu``.
    """
    match = ASKED.fullmatch(text.strip())
    if match is None:
        raise UsageError("stack.bad_gpu", f"--gpu {text!r} is no GPU.", hint='--gpu "8xH200", or --gpu L40S for one')
    return int(match["count"] or 1), match["name"]


def boards_called(count: int, name: str, known: Knowledge) -> Boards:
    """What a name may mean. Fewer than eight of an unsure one are cards: boards with NVSwitches have eight.

    Raises:
        Unknown: ``stack.unknown_gpu``.
    """
    meanings = meanings_of(name, known)
    if not meanings:
        spelled = {re.sub("^(geforce|tesla) ", "", _plain(one)): one
                   for gpu in known.products for one in (*gpu.official, gpu.name)}
        near = [spelled[one] for one in difflib.get_close_matches(_plain(name), sorted(spelled), 3, 0.4)]
        raise Unknown("stack.unknown_gpu", f"{name} is no GPU of the catalogue",
                      f"near it: {', '.join(near)}" if near else "H200, L40S, RTX 4090 and the like are")
    cards = tuple(gpu for gpu in meanings if not gpu.fabric)
    as_cards = bool(cards) and len(cards) < len(meanings) and count < NVSWITCH_BOARD
    return Boards(count, name, cards if as_cards else meanings, as_cards)


def meanings_of(name: str, known: Knowledge) -> tuple[Gpu, ...]:
    """Exactly so called, else with all its words in the name; NVIDIA's longer list where the catalogue has none."""
    wanted = _plain(name)
    words = set(wanted.split())
    for gpus in (known.products, listed_gpus()):
        exact = tuple(gpu for gpu in gpus if wanted in {_plain(gpu.name), *map(_plain, gpu.official)})
        partly = tuple(gpu for gpu in gpus if words and words <= set(_plain(gpu.name).split()))
        if exact or partly:
            return exact or partly
    return ()


def boards_seen(device_ids: Sequence[str]) -> tuple[Boards, ...]:
    """The GPUs of a host by their PCI device ids.

    Raises:
        Unknown: ``stack.unknown_gpu``.
    """
    found = []
    for device in dict.fromkeys(device_ids):
        gpus = products_with(device) or tuple(gpu for gpu in listed_gpus() if gpu.device_id == device)
        if not gpus:
            raise Unknown("stack.unknown_gpu", f"10de:{device} is no GPU of the catalogue",
                          "it is older than what is known here, or newer")
        found.append(Boards(list(device_ids).count(device), f"10de:{device}", gpus))
    return tuple(found)


def system_called(key: str, known: Knowledge) -> System:
    """A distribution's release, ``debian12``.

    Raises:
        Unknown: ``stack.unknown_os``.
    """
    for system in known.systems:
        if key.lower() in (system.key, system.name.lower()):
            return system
    names = [system.name for system in known.systems]
    raise Unknown("stack.unknown_os", f"{key} is no distribution that hosts may run",
                  f"hosts run {', '.join(names[:-1])} and {names[-1]}")


def engine_called(requirement: str, known: Knowledge) -> Engine:
    """``vllm==0.33.0``; a name alone is its newest known version.

    Raises:
        Unknown: ``stack.unknown_engine``, ``stack.unknown_version``.
    """
    name, _, version = (part.strip() for part in requirement.partition("=="))
    lines = known.lines(name)
    if not lines:
        raise Unknown("stack.unknown_engine", f"{name} is no engine that is known here",
                      "known are " + ", ".join(dict.fromkeys(line.engine for line in known.engines)))
    version = version or lines[-1].last
    line = known.line(name, version)
    if line is None:
        raise Unknown("stack.unknown_version", f"{name} {version} is not known",
                      f"known are {_lines_near(version, [one.first for one in lines], [one.last for one in lines])}")
    return Engine(name, version, line)


def answer(request: Request, known: Knowledge, today: date, rules: Sequence[Rule] = RULES) -> Answer:
    """The answer to a request. ``today`` is a date: branches end."""
    models = tuple(f"{board.count} x {board.name}" for board in request.boards)
    try:
        system = system_called(request.system, known)
        engines = tuple(engine_called(one, known) for one in dict.fromkeys(request.engines))
    except Unknown as unknown:
        return refused(unknown, models, request)
    question = Question((), system, known, today, engines, request.cuda, request.policy, request.driver,
                        request.flavour, request.fabric_manager, request.switches)
    chosen = product(*(_that_decide(board.meanings) for board in request.boards))
    questions = [replace(question, boards=tuple(Board(board.count, gpu) for board, gpu in
                                                zip(request.boards, gpus, strict=True)))
                 for gpus in islice(chosen, MOST_MEANINGS)]
    answers = [resolve(one, rules, look_around=False) for one in questions]
    first = answers[0]
    other = next((place for place, one in enumerate(answers) if one.stack != first.stack), None)
    if other is not None:
        return replace(first, models=models, stack=None, reasons=(), cautions=(), code="stack.unsure_gpu",
                       clash=(f"{_models(questions[0])}: {_told(first)}", f"{_models(questions[other])}: "
                              f"{_told(answers[other])}, and both are meant by {' + '.join(models)}"),
                       nearest=f"the whole name, such as {questions[0].boards[0].gpu.name}")
    if first.stack is None:
        first = resolve(questions[0], rules)
    assumed = tuple(f"{board.name} is taken for a card: {board.count} are no board with NVSwitches, which have "
                    f"{NVSWITCH_BOARD}" for board in request.boards if board.as_cards)
    return replace(first, models=_meant(request.boards), cautions=(*first.cautions, *assumed))


def refused(unknown: Unknown, models: tuple[str, ...], request: Request) -> Answer:
    """A name that nobody knows as an answer."""
    return Answer(models, request.system, request.policy, clash=unknown.facts, code=unknown.code)


def _that_decide(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """One of each sort: two memory sizes of one product cannot have two answers."""
    sorts = {(gpu.architecture, gpu.capability, gpu.kind, gpu.fabric, gpu.cpu): gpu for gpu in reversed(gpus)}
    return tuple(reversed(sorts.values()))


def _meant(boards: Sequence[Boards]) -> tuple[str, ...]:
    names = [" or ".join(dict.fromkeys(gpu.name for gpu in board.meanings)) for board in boards]
    return tuple(f"{board.count} x {name}" for board, name in zip(boards, names, strict=True))


def _models(question: Question) -> str:
    return " + ".join(map(str, question.boards))


def _told(one: Answer) -> str:
    """What differs between answers, for a sentence."""
    if one.stack is None:
        return "refused"
    fabric = "with the fabric manager" if one.stack.fabric_manager else "without the fabric manager"
    return f"driver {one.stack.version} ({one.stack.module}), CUDA {one.stack.cuda}, {fabric}"


def _plain(name: str) -> str:
    """``NVIDIA A100-SXM4-80GB`` as ``a100 sxm4 80gb``, ``RTX4090`` as ``rtx 4090``."""
    words = re.sub(r"[-_()/]", " ", name.lower()).removeprefix("nvidia ")
    return " ".join(re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", words).split())


def _lines_near(version: str, firsts: Sequence[str], lasts: Sequence[str]) -> str:
    """All known lines, shortened: the gaps between them are versions that nobody looked at."""
    spans = [first if first == last else f"{first} to {last}" for first, last in zip(firsts, lasts, strict=True)]
    try:
        key = version_key(version)
    except ValueError:
        return f"{firsts[0]} to {lasts[-1]}"
    near = sorted(range(len(spans)), key=lambda place: abs(place - sum(version_key(last) < key for last in lasts)))[:3]
    return ", ".join(spans[place] for place in sorted(near))
