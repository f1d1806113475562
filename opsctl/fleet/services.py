"""services.yml to ``Service``: its schema is ``services.example``, whose keys, types and comments are used here."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opsctl.errors import ConfigurationError
from opsctl.fleet.model import Service
from opsctl.fleet.strict_yaml import Block, read_blocks
from opsctl.resources import resource

# A service's name becomes part of paths, units and HAProxy's names; a release's of paths.
SERVICE_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
RELEASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}")
GROUP_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# Lowest and highest value; below 1024 an unprivileged unit cannot listen.
RANGES = {
    "port": (1024, 65535),
    "listen": (1, 65535),
    "instances_per_host": (1, 64),
    "gpus_per_instance": (0, 64),
    "tensor_parallel": (1, 64),
    "min_serving": (0, 100_000),
    "drain_timeout_s": (1, 86_400),
    "min_speed_percent": (0, 1000),
}
REQUIRED = tuple(field.name for field in dataclasses.fields(Service)
                 if field.default is dataclasses.MISSING and field.name != "name")
TYPE_WORDS = {int: "a whole number", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key of a service, as the example has it."""

    name: str
    kind: type
    line: str  # the example's own line, comment included


@cache
def schema() -> Mapping[str, Key]:
    """The keys of a service in the example's order."""
    text = resource("services.example").read_text(encoding="utf-8")
    example = read_blocks(text, "services.example")
    first = next(iter(example.values.values()))
    source = text.splitlines()
    return {name: Key(name, type(value), " ".join(source[first.lines[name] - 1].split()))
            for name, value in first.values.items()}


def read_services(text: str, path: Path) -> tuple[Service, ...]:
    """The services of a services.yml in its order; ``path`` is what errors call it.

    Raises:
        ConfigurationError: ``services.*``; the message names file, line, key and value.
    """
    blocks = read_blocks(text, str(path))
    if not blocks.values:
        raise ConfigurationError("services.empty", f"{path}: there is no service in it.",
                                 hint="opsctl init DIR in a new folder shows a complete one")
    return tuple(_service(name, block, f"{path}:{blocks.lines[name]}", path) for name, block in blocks.values.items())


def _service(name: str, block: object, where: str, path: Path) -> Service:
    if not SERVICE_NAME.fullmatch(name):
        raise ConfigurationError("services.bad_name", f"{where}: {name} cannot be a service's name.",
                                 hint="small letters, digits and dashes, a letter first, at most 31 characters")
    if not isinstance(block, Block):
        found = "has no keys" if block is None else f"is {block!r}; its keys are expected"
        raise ConfigurationError("services.not_a_mapping", f"{where}: {name} {found}.",
                                 hint=f"indent them below {name}: - they are " + ", ".join(schema()))
    for key, value in block.values.items():
        _check_key(name, key, value, f"{path}:{block.lines[key]}")
    for key in REQUIRED:
        if key not in block.values:
            raise ConfigurationError("services.missing_key", f"{where}: {name} has no {key}.",
                                     hint=f"write it below {name}: as in the example: {schema()[key].line}")
    service = Service(name=name, **block.values)
    _check_parallelism(service, block, path)
    return service


def _check_key(service: str, key: str, value: Any, where: str) -> None:
    known = schema().get(key)
    if known is None:
        near = difflib.get_close_matches(key, schema(), n=1, cutoff=0.6)
        raise ConfigurationError("services.unknown_key", f"{where}: {service} has a key {key}, which opsctl does not "
                                 "know.", hint=f"did you mean {near[0]}?" if near else "keys: " + ", ".join(schema()))
    wanted = known.kind
    if type(value) is not wanted:  # and not isinstance: True is no number here
        shown = "empty" if value is None else "a mapping" if isinstance(value, Block) else repr(value)
        hint = f'put it in quotes: {key}: "{value}"' if wanted is str and isinstance(value, int | float) else \
            f"as in the example: {known.line}"
        raise ConfigurationError("services.wrong_type", f"{where}: {key} of {service} is {shown}; it must be "
                                 f"{TYPE_WORDS[wanted]}.", hint=hint)
    if key in RANGES and isinstance(value, int):
        lowest, highest = RANGES[key]
        if not lowest <= value <= highest:
            raise ConfigurationError("services.out_of_range", f"{where}: {key} of {service} is {value}; it must be "
                                     f"between {lowest} and {highest}.", hint=f"as in the example: {known.line}")
    pattern = {"first_release": RELEASE_NAME, "group": GROUP_NAME}.get(key)
    if pattern and not pattern.fullmatch(str(value)):
        raise ConfigurationError("services.bad_value", f"{where}: {key} of {service} is {value!r}, which is no name.",
                                 hint=f"as in the example: {known.line}")


def _check_parallelism(service: Service, block: Block, path: Path) -> None:
    """An instance splits its model over all or an equal part of the GPUs that it has; a CPU splits nothing."""
    gpus, split = service.gpus_per_instance, service.tensor_parallel
    line = block.lines.get("tensor_parallel", block.lines.get("gpus_per_instance", block.line))
    if (gpus == 0 and split != 1) or (gpus and gpus % split):
        raise ConfigurationError(
            "services.inconsistent", f"{path}:{line}: {service.name} splits its model over tensor_parallel: {split} "
            f"GPUs, and gpus_per_instance: {gpus} cannot be dealt that way.",
            hint="tensor_parallel: 1 without GPUs; else gpus_per_instance is tensor_parallel or a multiple of it")
