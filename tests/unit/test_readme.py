"""The README tells the truth that the code can check."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from opsctl.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_every_exit_code_is_in_the_table() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert table == {int(code) for code in ExitCode}


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_make_target_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)) - {"installs"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_of_faults_is_what_the_tests_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "conftest", raising=False)  # it wants the lab tests' own
    sys.path.insert(0, str(ROOT / "tests/lab"))
    try:
        module = importlib.import_module("test_faults")
    finally:
        sys.path.pop(0)
    assert module.PAGE.read_text() == module.page(), "python tests/lab/test_faults.py writes it"
