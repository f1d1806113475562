"""The data files of this folder, row by row; what nobody looked up is read as not known.

Each file has a column ``source``. ``general_knowledge`` names the cells of a row that were written from memory: they
are there for people, and no decision sees them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
MARK = "general_knowledge"
Row = dict[str, str]
Read = Callable[[str], Sequence[Row]]


def read_table(name: str) -> list[Row]:
    """All rows of a data file, as they are."""
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def deciding(row: Row) -> Row:
    """A row with nothing in the cells that are general knowledge only."""
    unsure = row.get(MARK, "").split()
    return {key: "" if key in unsure else value for key, value in row.items()}
