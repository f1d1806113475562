"""Which stack for which GPUs: a table of cases, each rule of which some case needs, and data that names its sources.

A case's ``says`` are texts that must stand in its reasons; ``packages`` must be there and ``absent`` must not.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from opsctl.stack import tables
from opsctl.stack.knowledge import Knowledge, knowledge, make_knowledge
from opsctl.stack.naming import Request, Unknown, answer, boards_called, boards_seen, refused, split_board
from opsctl.stack.question import Answer
from opsctl.stack.resolve import RULES, smallest_clash
from opsctl.stack.rules import Rule

Case = dict[str, str]
CASES: list[Case] = list(csv.DictReader((Path(__file__).parent / "fixtures" / "stack" / "cases.csv").open()))
DATA = sorted(path.name for path in tables.HERE.glob("*.csv"))


def name_of(case: Case) -> str:
    return " ".join(case[key] for key in ("gpus", "system", "engine", "cuda", "policy", "driver", "today") if case[key])


def asked(case: Case, rules: Sequence[Rule] = RULES, known: Knowledge | None = None) -> Answer:
    known = known or knowledge()
    request = Request((), case["system"], tuple(case["engine"].split()), case["cuda"], case["policy"], case["driver"],
                      case["flavour"], case["fabric_wish"] or "auto")
    try:
        boards = tuple(boards_called(*split_board(one), known) for one in case["gpus"].split(" + "))
    except Unknown as unknown:
        return refused(unknown, (), request)
    return answer(replace(request, boards=boards), known, date.fromisoformat(case["today"]), rules)


def differences(case: Case, got: Answer) -> list[str]:
    """What is not as the case says."""
    document = got.as_document()
    found = {"verdict": document["verdict"], "branch": str(document["driver"]["branch"] or ""),
             "module": document["driver"]["module"], "cuda_out": document["cuda"],
             "fabric": "yes" if document["fabric_manager"] else "no"}
    wrong = [f"{key} is {value}, not {case[key]}" for key, value in found.items() if case[key] and case[key] != value]
    wrong += [f"no {name}" for name in case["packages"].split() if name not in document["packages"]]
    wrong += [f"{name} is there" for name in case["absent"].split() if name in document["packages"]]
    said = " | ".join((*document["reasons"], *document["cautions"]))
    return wrong + [f"nothing says {text!r}: {said}" for text in case["says"].split(" | ") if text and text not in said]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_answer_is_the_tables(case: Case) -> None:
    assert differences(case, asked(case)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_decides_some_case(rule: Rule) -> None:
    others = tuple(one for one in RULES if one is not rule)
    assert any(differences(case, asked(case, others)) for case in CASES)


def test_the_table_is_large_and_half_of_it_has_sources() -> None:
    assert len(CASES) >= 60
    assert sum(bool(case["source"]) for case in CASES) * 2 >= len(CASES)


def test_a_refusal_names_two_facts() -> None:
    for case in CASES:
        if case["verdict"] == "refused":
            assert len(asked(case).clash) == 2, name_of(case)


@pytest.mark.parametrize("name", DATA)
def test_every_row_names_its_source(name: str) -> None:
    rows = tables.read_table(name)
    assert rows
    assert [row for row in rows if not (row.get("source") or "").strip()] == []


@pytest.mark.parametrize("name", DATA)
def test_marks_of_general_knowledge_name_columns(name: str) -> None:
    for row in tables.read_table(name):
        assert set(row.get(tables.MARK, "").split()) <= set(row)


def test_general_knowledge_decides_nothing() -> None:
    """Whatever stands in a cell that nobody looked up, no answer changes."""
    def corrupted(name: str) -> list[tables.Row]:
        rows = tables.read_table(name)
        for row in rows:
            row.update(dict.fromkeys(row.get(tables.MARK, "").split(), "1"))
        return rows

    known = make_knowledge(corrupted)
    assert known == knowledge()
    assert [name_of(case) for case in CASES if differences(case, asked(case, known=known))] == []


def test_a_marked_cell_would_decide_if_it_were_read() -> None:
    """The mark is what keeps it out: without marks the same nonsense is believed."""
    def unmarked(name: str) -> list[tables.Row]:
        rows = tables.read_table(name)
        for row in rows:
            row.update({column: "5.0" for column in row.get(tables.MARK, "").split() if column == "capabilities"})
            row[tables.MARK] = ""
        return rows if name == "torch.csv" else tables.read_table(name)

    case = next(case for case in CASES if case["gpus"] == "8xH200" and case["engine"] == "vllm==0.33.0")
    assert differences(case, asked(case, known=make_knowledge(unmarked)))


def test_the_smallest_clash() -> None:
    a, b, c = ("a",), ("b",), ("c1", "c2")
    assert smallest_clash([[a], [b, c], [a, c]]) == ("a", "b")
    assert smallest_clash([[a, c], [b, c]]) == ("c1", "c2")


def test_gpus_that_share_a_pci_id_are_one_question() -> None:
    boards = boards_seen(["25b6", "25b6"])
    assert [(board.count, len(board.meanings)) for board in boards] == [(2, 2)]
    got = answer(Request(boards, "debian12"), knowledge(), date(2026, 11, 22))
    assert got.stack is not None
    assert got.models == ("2 x A16 (each of 4 GPUs) or A2",)


def test_a_gpu_that_nobody_knows_is_named_by_its_pci_id() -> None:
    with pytest.raises(Unknown, match="10de:ffff"):
        boards_seen(["ffff"])
