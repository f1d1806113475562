"""The page that Prometheus reads: its text format, and OpenMetrics where it asks for that. Pure.

Written here, and not by prometheus_client, because that builds an object for each value and throws it away again. The
tests read it with prometheus_client's own parsers and compare it with what prometheus_client would have written.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import parse_qs

from opsctl.agent.gpu.series import Series

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
GZIP_LEVEL = 6  # 110 kB of 8 GPUs become 6.5 kB in 0.5 ms; level 9 leaves as much and takes 19

Value = tuple[str, float]  # labels as they stand in the page, without braces
Found = Sequence[tuple[Series, Sequence[Value]]]


def render(found: Found, query: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, in the format and compression that ``headers`` ask for.

    ``query`` may name families, as for any exporter: ``name[]=opsctl_gpus``.
    """
    wanted = set(parse_qs(query).get("name[]", ()))
    if wanted:
        found = [(one, values) for one, values in found if one.name in wanted or sample_name(one) in wanted]
    openmetrics = asks_for_openmetrics(headers.get("accept", ""))
    body = text(found, openmetrics).encode()
    answer = {"Content-Type": OPENMETRICS if openmetrics else TEXT}
    if takes_gzip(headers.get("accept-encoding", "")):
        answer["Content-Encoding"] = "gzip"
        body = gzip.compress(body, GZIP_LEVEL, mtime=0)
    return 200, answer, body


def asks_for_openmetrics(accept: str) -> bool:
    """Whether an Accept header names it; what has q=0 is refused."""
    return any(kind == "application/openmetrics-text" and wanted for kind, wanted in _weighed(accept))


def takes_gzip(accept_encoding: str) -> bool:
    return any(kind == "gzip" and wanted for kind, wanted in _weighed(accept_encoding))


def _weighed(header: str) -> Iterable[tuple[str, bool]]:
    """``a;q=0, b`` -> a False, b True."""
    for part in header.split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        weights = [word[2:] for word in parameters if word.startswith("q=")]
        yield kind, not weights or weights[0].strip("0.") != ""


def text(found: Found, openmetrics: bool) -> str:
    """The families of ``found`` in one of the two formats."""
    lines: list[str] = []
    for one, values in found:
        name = sample_name(one)
        family = one.name if openmetrics else name
        kind = "untyped" if one.kind == "unknown" and not openmetrics else one.kind
        lines.append(f"# HELP {family} {_help(one, openmetrics)}\n# TYPE {family} {kind}")
        lines += [f"{name}{{{labels}}} {number(value)}" for labels, value in values]
    return "\n".join([*lines, "# EOF\n" if openmetrics else ""])


def sample_name(one: Series) -> str:
    """As it stands in the page: a counter ends in _total."""
    return one.name + "_total" if one.kind == "counter" else one.name


def _help(one: Series, openmetrics: bool) -> str:
    words = f"{one.help} [{one.unit}]" if one.unit else one.help
    words = words.replace("\\", r"\\").replace("\n", r"\n")
    return words.replace('"', r"\"") if openmetrics else words


def label(name: str, value: str) -> str:
    """``gpu="0"``, with what must be escaped escaped."""
    if "\\" in value or "\n" in value or '"' in value:
        value = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{value}"'


def label_text(labels: Mapping[str, str]) -> str:
    return ",".join(label(name, value) for name, value in labels.items())


def number(value: float) -> str:
    """As Go reads it; whole numbers without a point, as dcgm-exporter writes them."""
    if abs(value) < 2**53 and value == int(value):
        return str(int(value))
    if value != value:  # noqa: PLR0124 - what is not equal to itself is no number
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
