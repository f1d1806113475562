"""What a stack is asked for, and what comes out: plain data. ``resolve.py`` goes from one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Any

from opsctl.stack.catalogue import Gpu
from opsctl.stack.fit import Flavour
from opsctl.stack.knowledge import Branch, EngineLine, Knowledge, System

SCHEMA = "opsctl.stack/v1"
POLICIES = ("long", "new")  # the branch that gets fixes longest; the newest one


@dataclass(frozen=True)
class Board:
    """So many GPUs of one product in a host."""

    count: int
    gpu: Gpu

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


@dataclass(frozen=True)
class Engine:
    """``vllm==0.33.0`` and what its versions need; the version is empty where any will do."""

    name: str
    version: str
    line: EngineLine

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name


@dataclass(frozen=True)
class Question:
    """``cuda``: ``13`` or ``12.8``, empty: whatever fits. ``driver``: a branch or a whole version that is wished for.

    ``fabric_manager``: auto, present, absent; ``switches``: NVSwitches seen on the PCI bus; ``today``: whose branches
    have ended.
    """

    boards: tuple[Board, ...]
    system: System
    known: Knowledge
    today: date
    engines: tuple[Engine, ...] = ()
    cuda: str = ""
    policy: str = POLICIES[0]
    driver: str = ""
    flavour: str = ""
    fabric_manager: str = "auto"
    switches: int = 0

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(board.gpu for board in self.boards)


@dataclass(frozen=True)
class Candidate:
    """A stack that might do. ``compat``: the package of forward compatibility that it would need."""

    branch: Branch
    version: str
    module: Flavour
    cuda: str
    compat: str = ""


@dataclass(frozen=True)
class Addition:
    """What a rule adds to the stack that was chosen. ``own``: packages with versions of their own.

    ``absent``: must not be installed; ``load``: kernel modules; ``cautions``: what did not decide and should be known.
    """

    packages: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    fabric_manager: bool = False
    reasons: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """A stack that fits, whole."""

    branch: int
    version: str
    module: Flavour
    cuda: str
    fabric_manager: bool
    packages: tuple[str, ...]
    own: tuple[str, ...]
    absent: tuple[str, ...]
    load: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """Without a ``stack``, ``clash`` says which facts exclude each other, and ``nearest`` what would do.

    ``models``: how the GPUs are called, ``8 x H200 SXM 141GB``.
    """

    models: tuple[str, ...]
    system: str
    policy: str
    engines: tuple[Engine, ...] = ()
    stack: Stack | None = None
    reasons: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    clash: tuple[str, ...] = ()
    nearest: str = ""
    code: str = ""

    @property
    def refusal(self) -> str:
        """What clashes, and what would do, in one line."""
        return "; ".join((*self.clash, *([f"nearest: {self.nearest}"] if self.nearest else [])))

    def as_document(self) -> dict[str, Any]:
        """``opsctl.stack/v1``."""
        stack, engine = self.stack, self.engines[0] if self.engines else None
        refused = [*self.clash, *([f"nearest: {self.nearest}"] if self.nearest else [])]
        return {
            "schema": SCHEMA, "verdict": "ok" if stack else "refused", "gpus": list(self.models), "os": self.system,
            "policy": self.policy,
            "driver": {"branch": stack.branch if stack else None, "version": stack.version if stack else "",
                       "module": stack.module if stack else ""},
            "fabric_manager": stack.version if stack and stack.fabric_manager else "",
            "cuda": stack.cuda if stack else "",
            "packages": [*stack.packages, *stack.own] if stack else [],
            "own_packages": list(stack.own) if stack else [], "absent_packages": list(stack.absent) if stack else [],
            "kernel_modules": list(stack.load) if stack else [],
            "engine": {"name": engine.name, "version": engine.version, "cuda": engine.line.cuda,
                       "torch": engine.line.torch} if engine else {},
            "reasons": list(self.reasons) if stack else refused, "cautions": list(self.cautions),
            "clash": list(self.clash), "nearest": self.nearest, "code": self.code,
        }
