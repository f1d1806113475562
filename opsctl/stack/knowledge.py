"""What is known of drivers, CUDA, engines and distributions, as frozen data from the data files of this folder.

vLLM's lines are those of ``opsctl/serving/vllm_versions.csv``, which its adapter has too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache

from opsctl.serving import vllm_versions
from opsctl.serving.vllm_versions import version_key
from opsctl.stack.catalogue import Capability, Gpu, make_products
from opsctl.stack.tables import Read, Row, deciding, read_table
from opsctl.stack.versions import branch_of, order_of


@dataclass(frozen=True)
class Branch:
    """A driver branch. ``ends``: the last month with fixes, ``2028-06``; ``versions``: the known ones, oldest first."""

    number: int
    kind: str
    state: str
    ends: str
    versions: tuple[str, ...]

    def gets_fixes(self, today: date) -> bool:
        return self.state == "supported" and bool(self.ends) and f"{today:%Y-%m}" <= self.ends


@dataclass(frozen=True)
class Toolkit:
    """A release of CUDA, ``12.8``, and the driver that it came with; empty: not written down."""

    cuda: str
    driver: str

    @property
    def major(self) -> int:
        return order_of(self.cuda)[0]


@dataclass(frozen=True)
class CudaMajor:
    """``driver``: the oldest that runs any release of this major; ``first_capability``: the oldest GPUs it knows."""

    major: int
    driver: str
    first_capability: Capability


@dataclass(frozen=True)
class System:
    """A distribution's release. ``own_driver``: what it ships itself; ``first_branch``: of the vendor's repository.

    ``key``: ``debian12``; ``codename``: what apt's sources call it, ``bookworm``.
    """

    key: str
    id: str
    version_id: str
    name: str
    codename: str
    glibc: str
    python: str
    own_driver: str
    own_package: str
    first_branch: int


@dataclass(frozen=True)
class EngineLine:
    """Versions of an engine from ``first`` to ``last``, and what they need. Empty: nothing, or not written down.

    ``kernels``: the compute capabilities for which its torch has machine code.
    """

    engine: str
    first: str
    last: str
    torch: str
    cuda: str
    first_capability: Capability
    first_python: str
    last_python: str
    glibc: str
    kernels: tuple[Capability, ...]


@dataclass(frozen=True)
class Names:
    """The packages of a part in a family of distributions, for branches from ``first`` to ``last``; 0: any."""

    family: str
    part: str
    first: int
    last: int
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Knowledge:
    """``compatibility``: package, CUDA release and driver branch of each forward compatibility that works."""

    products: tuple[Gpu, ...]
    branches: tuple[Branch, ...]
    toolkits: tuple[Toolkit, ...]
    majors: tuple[CudaMajor, ...]
    systems: tuple[System, ...]
    engines: tuple[EngineLine, ...]
    names: tuple[Names, ...]
    compatibility: tuple[tuple[str, str, int], ...]

    def major(self, cuda: str) -> CudaMajor:
        """The major of ``12.8``."""
        return next(major for major in self.majors if major.major == order_of(cuda)[0])

    def lines(self, engine: str) -> tuple[EngineLine, ...]:
        """An engine's lines, oldest first."""
        return tuple(line for line in self.engines if line.engine == engine)

    def line(self, engine: str, version: str) -> EngineLine | None:
        """The line of a version; a post release is of the line of what it repairs. None: not known."""
        for line in self.lines(engine):
            if not line.first:
                return line
            try:
                key = version_key(version)
            except ValueError:
                return None
            if key >= version_key(line.first) and key[0] <= version_key(line.last)[0]:
                return line
        return None


@cache
def knowledge() -> Knowledge:
    """All that is shipped."""
    return make_knowledge(read_table)


def make_knowledge(read: Read) -> Knowledge:
    """What the data files say that ``read`` reads."""
    def rows(name: str) -> list[Row]:
        return [deciding(row) for row in read(name)]

    torch = {row["torch"]: _capabilities(row["capabilities"]) for row in rows("torch.csv")}
    versions = sorted((row["version"] for row in rows("drivers.csv")), key=order_of)
    return Knowledge(
        make_products(read),
        tuple(Branch(int(row["branch"]), row["kind"], row["state"], row["ends"],
                     tuple(version for version in versions if branch_of(version) == int(row["branch"])))
              for row in rows("branches.csv")),
        tuple(Toolkit(row["cuda"], row["driver"]) for row in rows("cuda_toolkits.csv")),
        tuple(CudaMajor(int(row["major"]), row["driver"], order_of(row["first_capability"]))
              for row in rows("cuda_majors.csv")),
        tuple(System(row["system"], row["id"], row["version_id"], row["name"], row["codename"], row["glibc"],
                     row["python"], row["own_driver"], row["own_package"], int(row["first_branch"] or 0))
              for row in rows("systems.csv")),
        (*_vllm(torch), *(_line(row["engine"], row, torch) for row in rows("engines.csv"))),
        tuple(Names(row["family"], row["part"], int(row["first_branch"] or 0), int(row["last_branch"] or 0),
                    tuple(row["packages"].split())) for row in rows("packages.csv")),
        tuple((row["package"], row["cuda"], int(row["base"])) for row in rows("compatibility.csv")),
    )


def _vllm(torch: dict[str, tuple[Capability, ...]]) -> Sequence[EngineLine]:
    return [EngineLine("vllm", line.first, line.last, line.torch, line.cuda, order_of(line.first_capability),
                       line.first_python, line.last_python, line.glibc, torch.get(line.torch, ()))
            for line in vllm_versions.lines()]


def _line(engine: str, row: Row, torch: dict[str, tuple[Capability, ...]]) -> EngineLine:
    return EngineLine(engine, row["first"], row["last"], row["torch"], row["cuda"], order_of(row["first_capability"]),
                      row["first_python"], row["last_python"], row["glibc"], torch.get(row["torch"], ()))


def _capabilities(text: str) -> tuple[Capability, ...]:
    return tuple(order_of(one) for one in text.split())
