"""Our page against prometheus_client: what its parsers read from it, and what it would have written itself."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from test_exporter import known, two_xids

from opsctl.agent.gpu import page
from opsctl.agent.gpu.metrics import values
from opsctl.agent.gpu.series import Series

NASTY = 'a "quoted" back\\slash\nand a line, {braces} = é'
# As a server of each kind asks. Prometheus 2.42 and 3.x, VictoriaMetrics, curl.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75," \
               "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;" \
               "version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,*/*;q=0.1"
Found = list[tuple[Series, list[tuple[dict[str, str], float]]]]


class Theirs:
    """What prometheus_client collects: the same values."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for one, several in self._found:
            family = Metric(one.name, f"{one.help}{f' [{one.unit}]' if one.unit else ''}", one.kind)
            for labels, value in several:
                family.add_sample(page.sample_name(one), labels, value)
            yield family


def both(found: Found, openmetrics: bool) -> tuple[list[Any], list[Any]]:
    """Families of our page and of theirs, as the parser of that format reads them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Theirs(found))  # type: ignore[arg-type]
    theirs = (generate_openmetrics if openmetrics else generate_latest)(registry).decode()
    ours = page.text([(one, [(page.label_text(labels), value) for labels, value in several])
                      for one, several in found], openmetrics)
    parse = parse_openmetrics if openmetrics else parse_text
    return [plain(family) for family in parse(ours)], [plain(family) for family in parse(theirs)]


def plain(family: Any) -> Any:
    return (family.name, family.type, family.documentation,
            [(one.name, sorted(one.labels.items()), "NaN" if math.isnan(one.value) else one.value)
             for one in family.samples])


def unlabelled(found: Any) -> Found:
    """Values with their labels as a table again, read by prometheus_client itself."""
    tables: Found = []
    for one, several in found:
        lines = [f"x{{{labels}}} {value!r}\n" for labels, value in several]
        (family,) = parse_text("# TYPE x gauge\n" + "".join(lines))
        tables.append((one, [(sample.labels, sample.value) for sample in family.samples]))
    return tables


@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_whole_page_is_what_prometheus_client_writes(openmetrics: bool) -> None:
    ours, theirs = both(unlabelled(values(known(xids=two_xids()))), openmetrics)
    assert len(ours) > 70
    assert ours == theirs


@pytest.mark.parametrize("openmetrics", [False, True])
@pytest.mark.parametrize("kind", ["gauge", "counter", "unknown"])
@pytest.mark.parametrize("value", [0.0, -3.0, 0.1, 1e-9, 123456789012345.0, 2.0**53, 1.5e300, math.inf, -math.inf,
                                   math.nan])
def test_whatever_stands_in_it(openmetrics: bool, kind: Any, value: float) -> None:
    if kind == "counter" and not value >= 0 and openmetrics:
        pytest.skip("no counter")
    one = Series("opsctl_x", kind, "C", "", "", NASTY)
    ours, theirs = both([(one, [({"a": NASTY, "b": "", "c": "\\n"}, value), ({"a": "2", "b": "x", "c": ""}, 1.0)])],
                        openmetrics)
    assert ours == theirs


@pytest.mark.parametrize(("accept", "openmetrics"), [
    ("", False), ("*/*", False), ("text/plain", False), (PROMETHEUS_2, True), (PROMETHEUS_3, True),
    ("application/openmetrics-text;q=0,text/plain", False), ("application/openmetrics-text;q=0.0,*/*", False),
    ("Application/OpenMetrics-Text; version=1.0.0", True), (";;,,q=", False)])
def test_the_format_is_the_one_that_was_asked_for(accept: str, openmetrics: bool) -> None:
    status, headers, body = page.render(list(values(known())), "", {"accept": accept})
    assert (status, headers["Content-Type"].split(";")[0]) == (
        200, "application/openmetrics-text" if openmetrics else "text/plain")
    assert body.decode().endswith("# EOF\n") is openmetrics
    parse: Callable[[str], Any] = parse_openmetrics if openmetrics else parse_text
    assert list(parse(body.decode()))


@pytest.mark.parametrize(("encoding", "packed"), [
    ("gzip", True), ("gzip;q=1.0, identity", True), ("", False), ("identity", False), ("gzip;q=0", False),
    ("br, deflate", False)])
def test_it_is_packed_for_whoever_takes_that(encoding: str, packed: bool) -> None:
    found = list(values(known()))
    _, headers, body = page.render(found, "", {"accept-encoding": encoding})
    assert ("Content-Encoding" in headers) is packed
    assert (gzip.decompress(body) if packed else body) == page.render(found, "", {})[2]


def test_families_can_be_asked_for_by_name() -> None:
    query = "name[]=opsctl_gpus&name[]=opsctl_guard_moves_total&name%5B%5D=none"
    _, _, body = page.render(list(values(known())), query, {})
    assert {family.name for family in parse_text(body.decode())} == {"opsctl_gpus", "opsctl_guard_moves"}
