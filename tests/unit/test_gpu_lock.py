"""gpus.yml: read strictly, written the same each time, and never renumbered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from opsctl import gpus
from opsctl.engines.session import Completed
from opsctl.errors import ConfigurationError, OpsctlError, RefusedError
from opsctl.fleet import gpu_lock
from opsctl.fleet.gpu_lock import Gpu, listed, read, recorded_in, render, settle
from opsctl.fleet.inventory import fleet_from_ansible
from opsctl.fleet.model import Fleet
from opsctl.fleet.placements import place, undealt, with_gpus

FIRST = Gpu("GPU-a", "00000000:17:00.0", "NVIDIA H200")
SECOND = Gpu("GPU-b", "00000000:65:00.0", "NVIDIA H200")
SAID = "00000000:65:00.0, GPU-b, NVIDIA H200\n00000000:17:00.0, GPU-a, NVIDIA H200\n"
PATH = Path("gpus.yml")
SERVICES = """\
chat:
  group: gpu
  port: 8100
  listen: 8000
  instances_per_host: 2
  gpus_per_instance: 1
"""


def a_fleet(lock: str = "", directory: Path = Path("/fleet"), **variables: object) -> Fleet:
    hosts = {"gpu-1": {"ansible_host": "192.0.2.1", **variables}, "ops": {"ansible_host": "192.0.2.2"}}
    groups = {"all": ["gpu-1", "ops"], "gpu": ["gpu-1"], "lb": ["ops"], "gateway": ["ops"]}
    return fleet_from_ansible(hosts, groups, SERVICES, directory, directory / "inventory.ini", lock)


def test_what_is_written_is_read() -> None:
    lock = {"gpu-2": (SECOND,), "gpu-1": (FIRST,)}
    text = render(lock)
    assert read(text, PATH) == lock
    assert render(read(text, PATH)) == text
    assert text.index("gpu-1") < text.index("gpu-2")
    assert read("", PATH) == {}


@pytest.mark.parametrize(("text", "code", "words"), [
    ("gpu-1: GPU-a\n", "gpus.bad_value", "gpus.yml:1: gpu-1 is 'GPU-a', and its GPUs are expected"),
    ("gpu-1:\n  GPU-a: H200\n", "gpus.bad_value", "gpus.yml:2: GPU-a is 'H200'"),
    ("gpu-1:\n  GPU-a: 7\n", "gpus.bad_value", "gpus.yml:2: GPU-a is 7"),
    ('g1:\n  GPU-a: "0:1:0 H"\ng2:\n  GPU-a: "0:1:0 H"\n', "gpus.twice", "gpus.yml:4: GPU-a stands under g1 and"),
    ("gpu-1:\n  GPU-a: x y\n  GPU-a: x y\n", "gpus.duplicate_key", "gpus.yml:3: GPU-a is given a second time"),
    ("- gpu-1\n", "gpus.not_a_mapping", "gpus.yml:1: a host's name and a colon"),
    ("gpu-1: [\n", "gpus.not_yaml", "gpus.yml:2"),
])
def test_what_cannot_be_right_is_refused_with_its_line(text: str, code: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(text, PATH)
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.hint


def test_gpus_are_listed_in_the_order_of_the_bus() -> None:
    assert listed(SAID) == (FIRST, SECOND)
    assert listed("No devices were found\n") == ()


@pytest.mark.parametrize(("known", "recorded", "found"), [
    (None, (), (FIRST, SECOND)),  # a bare host
    (None, ("GPU-b", "GPU-a"), (FIRST, SECOND)),  # gpus.yml was lost, and nothing has changed since
    (("GPU-a", "GPU-b"), ("GPU-x",), (FIRST, SECOND)),  # accepted meanwhile
    (("GPU-b",), (), (FIRST, SECOND)),  # a new card: dealt to nobody until it is accepted
])
def test_gpus_that_agree_with_what_was_known(known: tuple[str, ...] | None, recorded: tuple[str, ...],
                                             found: tuple[Gpu, ...]) -> None:
    assert settle("gpu-1", known, recorded, SAID) == found


@pytest.mark.parametrize(("known", "recorded", "said", "code", "words"), [
    (("GPU-a", "GPU-c"), (), SAID, "gpus.missing", "gpu-1: 1 of its 2 GPUs are missing: GPU-c"),
    (None, ("GPU-0", "GPU-b"), SAID, "gpus.others", "was given GPU-0, GPU-b by an earlier provision"),
    (None, ("GPU-a",), SAID, "gpus.others", "which of them are right"),
    (None, (), "timeout: failed to run command 'nvidia-smi'", "gpus.none", "nvidia-smi there says: timeout"),
    (("GPU-a",), (), "No devices were found", "gpus.none", "No devices were found"),
])
def test_gpus_that_do_not_agree_are_named_and_never_renumbered(
        known: tuple[str, ...] | None, recorded: tuple[str, ...], said: str, code: str, words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        settle("gpu-1", known, recorded, said)
    assert caught.value.code == code
    assert words in caught.value.message


def test_instances_are_dealt_what_the_file_says_and_nothing_before_it_is_there() -> None:
    bare = a_fleet()
    assert [host.name for host in undealt(bare)] == [host.name for host in with_gpus(bare)] == ["gpu-1"]
    assert [placement.gpus for placement in place(bare)] == [(), ()]
    known = a_fleet(render({"gpu-1": (FIRST, SECOND)}))
    assert undealt(known) == ()
    assert [placement.gpus for placement in place(known)] == [("GPU-a",), ("GPU-b",)]
    written = a_fleet(render({"gpu-1": (FIRST, SECOND)}), gpu_uuids="GPU-x, GPU-y")
    assert [placement.gpus for placement in place(written)] == [("GPU-x",), ("GPU-y",)]


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        place(a_fleet(render({"gpu-1": (FIRST,)})))
    assert caught.value.code == "services.too_few_gpus"
    assert "chat.1 wants gpus_per_instance: 1 on gpu-1, which has 1 GPUs, 0 of them not dealt" in caught.value.message


def test_what_the_agent_was_told() -> None:
    assert recorded_in('host = "gpu-1"\ngpus = ["GPU-a"]\n') == ("GPU-a",)
    assert recorded_in("") == recorded_in("gpus = [") == ()


class Answering:
    """A host's session that answers one thing."""

    said = SAID

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, argv: object, **_: object) -> Completed:
        assert argv == gpu_lock.QUERY
        return Completed(0, self.said, "")


def test_a_repaired_host_is_accepted_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "Session", Answering)
    other = Gpu("GPU-z", "00000000:01:00.0", "NVIDIA L40S")
    (tmp_path / "gpus.yml").write_text(render({"gpu-1": (FIRST, dataclasses.replace(SECOND, uuid="GPU-old")),
                                               "gpu-2": (other,)}))
    fleet = a_fleet((tmp_path / "gpus.yml").read_text(), tmp_path)
    change = gpus.look(fleet, fleet.host("gpu-1"))
    assert gpus.words(change) == ["- GPU-old (00000000:65:00.0 NVIDIA H200)", "+ GPU-b (00000000:65:00.0 NVIDIA H200)"]
    gpus.accept(fleet, change)
    assert read((tmp_path / "gpus.yml").read_text(), PATH) == {"gpu-1": (FIRST, SECOND), "gpu-2": (other,)}


def test_a_host_that_shows_no_gpu_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "Session", type("Silent", (Answering,), {"said": "No devices were found"}))
    fleet = a_fleet("", tmp_path)
    with pytest.raises(OpsctlError) as caught:
        gpus.look(fleet, fleet.host("gpu-1"))
    assert caught.value.code == "gpus.none"
    assert not (tmp_path / "gpus.yml").exists()


def test_gpus_of_the_inventory_are_not_accepted_over_it(tmp_path: Path) -> None:
    fleet = a_fleet("", tmp_path, gpu_uuids="GPU-a,GPU-b")
    with pytest.raises(RefusedError) as caught:
        gpus.look(fleet, fleet.host("gpu-1"))
    assert caught.value.code == "gpus.in_inventory"
