"""What ``opsctl verify`` asks of a driver, with a host that is played."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opsctl.fleet.model import Host
from opsctl.resources import resource
from opsctl.verifying import Wrong


@pytest.fixture(scope="module")
def tests(request: pytest.FixtureRequest) -> ModuleType:
    """The tests that ship; their mark is known where conftest.py of theirs is at work."""
    request.config.addinivalue_line("markers", "of(kind, sentence): whom the test asks, and what it says of each")
    spec = importlib.util.spec_from_file_location("driver_tests", resource("tests/acceptance") / "test_driver.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = {"version": "580.126.09", "fabric_manager": False, "pin": "nvidia-driver-pinning-580.126.09",
          "packages": {"nvidia-driver-cuda": "580.126.09-1"}}
HELD = "nvidia-driver-pinning-580.126.09 hold installed 1\nnvidia-driver-cuda hold installed 580.126.09-1\n"


@dataclass
class Played:
    """A host as ``conftest.Asked`` is; ``layers`` is what the role's program answers there."""

    variables: dict[str, Any] = field(default_factory=lambda: {"nvidia_driver_version": "580.126.09"})
    record: dict[str, Any] | None = field(default_factory=lambda: dict(RECORD))
    packages: str = HELD
    layers: dict[str, Any] = field(default_factory=lambda: {"wrong": [], "gpus": ["GPU-a", "GPU-b"]})

    @property
    def host(self) -> Host:
        return Host("gpu-1", "192.0.2.11", ("gpu",), variables=self.variables,
                    gpus=tuple(self.variables.get("gpu_uuids", ())) or None)

    @property
    def machine(self) -> Any:
        return SimpleNamespace(file=lambda _: SimpleNamespace(exists=self.record is not None,
                                                              content_string=json.dumps(self.record)))

    def run(self, argv: list[str]) -> Any:
        return SimpleNamespace(rc=0, stdout=self.packages if argv[0] == "dpkg-query" else json.dumps(self.layers))


def test_a_driver_that_preferences_pin(tests: ModuleType) -> None:
    tests.test_holds(Played(record={**RECORD, "pin": ""}, packages=HELD.splitlines(keepends=True)[1]))


def with_uuids(*uuids: str) -> dict[str, Any]:
    return {"nvidia_driver_version": "580.126.09", "gpu_uuids": list(uuids)}


def test_a_host_that_is_well(tests: ModuleType) -> None:
    tests.test_layers(Played())
    tests.test_holds(Played())
    tests.test_gpus(Played(with_uuids("GPU-a", "GPU-b")))


@pytest.mark.parametrize("name", ["test_layers", "test_holds", "test_gpus"])
def test_a_host_without_a_driver_of_ours_is_left_alone(tests: ModuleType, name: str) -> None:
    with pytest.raises(pytest.skip.Exception, match="names no nvidia_driver_version"):
        getattr(tests, name)(Played({}))


@pytest.mark.parametrize(("name", "played", "expected", "found"), [
    ("test_layers", Played(layers={"wrong": ["the library is 595.71.05"], "gpus": []}),
     "driver 580.126.09 in every layer", "the library is 595.71.05"),
    ("test_layers", Played(layers={"wrong": ["the driver 580.126.09 is installed, and no GPU answers"], "gpus": []}),
     "driver 580.126.09 in every layer", "is installed, and no GPU answers"),
    ("test_layers", Played({"nvidia_driver_version": "595.71.05"}), "driver 595.71.05", "580.126.09, of the last"),
    ("test_layers", Played(record=None), "driver 580.126.09", "never given a driver"),
    ("test_holds", Played(packages=HELD.replace("cuda hold", "cuda install")), "on hold", "not so: nvidia-driver-cuda"),
    ("test_holds", Played(packages=HELD.splitlines()[0]), "on hold", "not so: nvidia-driver-cuda"),
    ("test_holds", Played(packages=HELD.replace("580.126.09-1", "595.71.05-1")), "packages of 580.126.09",
     "nvidia-driver-cuda 595.71.05-1"),
    ("test_gpus", Played(with_uuids("GPU-a", "GPU-b", "GPU-c")), "3 GPUs", "2; missing: GPU-c"),
    ("test_gpus", Played(with_uuids("GPU-b", "GPU-a")), "in PCI order: GPU-a, GPU-b", "GPU-b, GPU-a"),
])
def test_what_is_wrong_is_told(tests: ModuleType, name: str, played: Played, expected: str, found: str) -> None:
    with pytest.raises(Wrong) as caught:
        getattr(tests, name)(played)
    assert expected in caught.value.expected
    assert found in caught.value.found
    assert caught.value.hint


@pytest.mark.parametrize(("agent", "record", "asked"),
                         [(True, None, True), (False, RECORD, True), (False, None, False)])
def test_a_provision_that_ended_with_the_driver_is_asked_too(
        tests: ModuleType, agent: bool, record: dict[str, Any] | None, asked: bool) -> None:
    """No GPU answered, so the agent never came: what is wrong with the driver is what a person wants to know."""
    host = Played(record=record)
    host.provisioned = agent  # type: ignore[attr-defined]
    fixture = tests.driven._get_wrapped_function()
    if asked:
        assert fixture(host) is host
    else:
        with pytest.raises(pytest.skip.Exception):
            fixture(host)
