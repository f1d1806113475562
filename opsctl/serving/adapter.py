"""What opsctl must know of an inference engine. Plain data and pure functions; nothing here does I/O but ``lock``."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opsctl.errors import UsageError

Value = bool | int | float | str
Kind = Literal["integer", "number", "boolean", "text"]

# The engine's unit has one TimeoutStopSec for all releases, so no release may drain for longer than this.
MAXIMUM_DRAIN_S = 600


@dataclass(frozen=True)
class Option:
    """One engine argument of a release, as ``opsctl model import --set name=value`` takes it."""

    name: str
    kind: Kind
    default: Value
    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    pattern: str = ""  # what a text must match as a whole; said to people as ``form``
    form: str = ""

    def check(self, value: object) -> Value:
        """``value`` if it is of the right kind and in range; an integer is a good number.

        Raises:
            UsageError: it is not.
        """
        if self.kind == "boolean" and isinstance(value, bool):
            return value
        if self.kind == "text" and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise self._wrong(value, "one of " + ", ".join(self.choices))
            if self.pattern and not re.fullmatch(self.pattern, value):
                raise self._wrong(value, self.form)
            return value
        numeric = isinstance(value, int if self.kind == "integer" else (int, float)) and not isinstance(value, bool)
        if self.kind in ("integer", "number") and numeric:
            assert isinstance(value, (int, float))  # noqa: S101 - for the type checker
            if not self.minimum <= value <= self.maximum:
                raise self._wrong(value, f"between {self.minimum:g} and {self.maximum:g}")
            return value
        raise self._wrong(value, {"integer": "a whole number", "number": "a number", "boolean": "true or false",
                                  "text": "text"}[self.kind])

    def parse(self, text: str) -> Value:
        """The value that a person wrote on the command line.

        Raises:
            UsageError: it cannot be read as this kind.
        """
        if self.kind == "text":
            return self.check(text)
        if self.kind == "boolean":
            return self.check({"true": True, "false": False}.get(text.lower(), text))
        try:
            return self.check(int(text) if self.kind == "integer" else float(text))
        except ValueError:
            raise self._wrong(text, "a whole number" if self.kind == "integer" else "a number") from None

    def _wrong(self, value: object, wanted: str) -> UsageError:
        return UsageError("release.bad_argument", f"engine argument {self.name}={value} must be {wanted}.",
                          hint=f"{self.name}: {self.help} (default {self.default})")


@dataclass(frozen=True)
class Launch:
    """All that an argument vector is made of: one release on one instance of one host."""

    service: str
    release: str  # "v1-0123456789ab"
    files: Path  # the release's files/ directory
    paths: tuple[str, ...]  # of the files in it, relative
    arguments: Mapping[str, Value]
    address: str
    port: int
    environment: Path  # the engine's virtual environment
    gpus: tuple[str, ...] = ()  # UUIDs
    tensor_parallel: int = 1
    version: str = ""  # of the engine
    agent_python: Path = Path(sys.executable)  # can import opsctl.serving


@dataclass(frozen=True)
class Command:
    """What is executed: an argument vector and what is added to the environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """One inference engine. ``check`` and ``command`` are pure.

    ``check(paths, arguments, version)`` raises RefusedError when this version of the engine cannot serve these files
    with these arguments; ``check_version(version, python)`` when the version is not known or has nothing for that
    Python. ``module`` is what must import in the engine's environment, ``packages`` are those that bring it.
    A metric is the sum of its series; None: the engine does not say.
    """

    name: str
    module: str
    options: tuple[Option, ...]
    check: Callable[[Sequence[str], Mapping[str, Value], str], None]
    command: Callable[[Launch], Command]
    health_path: str
    metrics_path: str
    running_metric: str
    waiting_metric: str
    packages: tuple[str, ...] = ()
    check_version: Callable[[str, str], None] = lambda _version, _python: None

    def arguments(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All arguments, checked, defaults filled in.

        Raises:
            UsageError: unknown name, wrong kind, out of range.
        """
        known = {option.name: option for option in self.options}
        self._known(given)
        return {name: option.check(given.get(name, option.default)) for name, option in known.items()}

    def parse_settings(self, settings: Sequence[str]) -> dict[str, Value]:
        """``["parallel=4"]`` -> ``{"parallel": 4}``; only what was given.

        Raises:
            UsageError: no ``=``, unknown name, wrong kind, out of range.
        """
        known = {option.name: option for option in self.options}
        values: dict[str, Value] = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise UsageError("release.bad_argument", f"--set {setting} is not key=value.",
                                 hint="for example --set max_model_len=8192")
            self._known({name: text})
            values[name] = known[name].parse(text)
        return values

    def lock(self) -> Lock:
        """The engine's pinned environment that ships with this version of opsctl.

        Raises:
            UsageError: none does: which one fits depends on the hosts' GPUs and drivers.
        """
        path = Path(__file__).parent / f"{self.name}.lock"
        if not path.exists():
            raise UsageError("engine.no_lock", f"opsctl ships no environment for the engine {self.name}.",
                             hint="pin one: uv pip compile --generate-hashes, then --engine-lock requirements.txt")
        text = path.read_text(encoding="utf-8")
        return Lock(self.name, locked_version(text, self.module), ">=3.10", text)

    def _known(self, given: Mapping[str, object]) -> None:
        names = [option.name for option in self.options]
        for name in given:
            if name not in names:
                raise UsageError("release.unknown_argument", f"the engine {self.name} has no argument {name}.",
                                 hint="arguments: " + ", ".join(names))


@dataclass(frozen=True)
class Lock:
    """A pinned environment: requirement lines with hashes. ``python`` is ``>=3.10`` or ``3.12``."""

    engine: str
    version: str
    python: str
    text: str


def locked_version(text: str, package: str) -> str:
    """The version that ``package`` is pinned to in requirement lines."""
    found = re.search(rf"^{re.escape(package)}==([^\s;\\]+)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the lock does not pin {package}")
    return found.group(1)


def served_names(service: str, release: str) -> tuple[str, str]:
    """The names under ``/v1/models``: what clients ask for, and what proves which release answers."""
    return service, f"{service}@{release}"


def metric(exposition: str, name: str) -> float | None:
    """The sum over all series of ``name`` in Prometheus text; None when there is none.

    Some client libraries answer with ``_`` for ``:``; both are the same metric.
    """
    wanted = name.replace(":", "_")
    found = None
    for line in exposition.splitlines():
        series, _, rest = line.partition(" ")
        base, brace, _labels = series.partition("{")
        if base.replace(":", "_") != wanted:
            continue
        if brace and not series.endswith("}"):  # a label value with a blank
            rest = line.rpartition("} ")[2]
        try:
            found = (found or 0.0) + float(rest.split()[0])
        except (ValueError, IndexError):
            continue
    return found
