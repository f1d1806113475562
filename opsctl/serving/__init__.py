"""Inference engines: a release and a placement in, an argument vector, probes and metric names out.

``adapter.py`` says what an adapter is; ``llamacpp.py`` is one; ``llamacpp_server.py`` is the process it starts. Runs on
hosts: standard library only, Python 3.10+. A new engine is a new adapter in ``adapters()`` and a ``<name>.lock``.
"""

from __future__ import annotations

from opsctl.errors import ConfigurationError
from opsctl.serving.adapter import Adapter


def adapters() -> dict[str, Adapter]:
    """Every engine that this version of opsctl can run, by the name that stands in a manifest."""
    from opsctl.serving.llamacpp import LLAMACPP  # noqa: PLC0415 - adapters import this package

    return {adapter.name: adapter for adapter in (LLAMACPP,)}


def adapter(engine: str) -> Adapter:
    """The adapter of one engine.

    Raises:
        ConfigurationError: nobody knows that engine here.
    """
    known = adapters()
    if engine not in known:
        raise ConfigurationError("engine.unknown", f"there is no inference engine {engine} in this version of opsctl.",
                                 hint=f"engines: {', '.join(sorted(known))}; a newer agent: opsctl provision")
    return known[engine]
