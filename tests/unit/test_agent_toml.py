"""The reader for hosts without tomllib says what tomllib says, or refuses."""

from __future__ import annotations

import pytest
import tomllib

from opsctl.agent import flat_toml

PLACEMENT = '''# Managed by opsctl.
instance = "chat.0"
service = "chat"
index = 0
address = "10.0.0.11"   # of the engine
port = 8100
gpus = ["GPU-3f1a", "GPU-77aa",]
tensor_parallel = 2
'''


@pytest.mark.parametrize("text", [
    PLACEMENT,
    "",
    "a = true\nb = false\n",
    "a = -3\nb = +4\nc = 1_000\nd = 0\n",
    "a = []\nb = [ 1, 2 ]\nc = [[1], ['x']]\n",
    "a = 'C:\\raw # no comment'\n",
    'a = "quote \\" backslash \\\\ tab \\t unicode \\u00e4 # no comment"\n',
    'a = "tab\there"',
    "a-b_c = 1 # comment\n\n  \t\n# last",
    "a = 'x'\r\nb = 2\r\n",
])
def test_it_reads_as_tomllib_does(text: str) -> None:
    assert flat_toml.read_flat(text) == tomllib.loads(text)


@pytest.mark.parametrize("text", [
    "a", "a = ", "= 1", "a = 1 2", "a = 1.5", "a = 2026-01-01", "a = 01", "[table]\na = 1", "a.b = 1", 'a = """x"""',
    "a = 1\na = 2", "a = [1", "a = [1 2]", 'a = "x', 'a = "\\x"', "a = truex",
])
def test_what_it_does_not_know_it_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        flat_toml.read_flat(text)


def test_an_error_names_the_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        flat_toml.read_flat("a = 1\nb = 1.5\n")
