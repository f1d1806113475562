"""Inference engines: a release and a placement in, an argument vector, probes and metric names out.

``adapter.py`` says what an adapter is; ``llamacpp.py`` and ``vllm.py`` are two; ``llamacpp_server.py`` and ``front.py``
are the processes they start. Runs on hosts: standard library only, Python 3.10+. How to add one: docs/serving.md.
"""

from __future__ import annotations

from opsctl.errors import ConfigurationError
from opsctl.serving.adapter import Adapter


def adapters() -> dict[str, Adapter]:
    """Every engine that this version of opsctl can run, by the name that stands in a manifest."""
    from opsctl.serving.llamacpp import LLAMACPP  # noqa: PLC0415 - adapters import this package
    from opsctl.serving.vllm import VLLM  # noqa: PLC0415

    return {adapter.name: adapter for adapter in (LLAMACPP, VLLM)}


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
