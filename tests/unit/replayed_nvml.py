"""An NVML that answers as a capture of ``opsctl.agent.gpu.probe`` says one did; the reader knows no difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    def __init__(self, value: int, words: str) -> None:
        super().__init__(words)
        self.value = value


class Replayed:
    """Takes the place of the module pynvml. Answers come in the captured order; the last one again and again."""

    NVMLError = NVMLError
    NVML_GPM_METRICS_GET_VERSION = 1
    nvmlMemory_v2 = 0x02000028  # noqa: N815

    def __init__(self, capture: dict[str, Any]) -> None:
        self._calls = capture["calls"]
        self._asked: dict[tuple[str, str], int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name not in self._calls:
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, arguments)

    def c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802
        return SimpleNamespace(metrics=[SimpleNamespace(metricId=0) for _ in range(64)], numMetrics=0)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        key = " ".join(str(as_captured(one)) for one in arguments if not hasattr(one, "metrics"))
        answers = self._calls[name][key]
        number = self._asked.get((name, key), 0)
        self._asked[name, key] = number + 1
        answer = answers[min(number, len(answers) - 1)]
        if isinstance(answer, dict) and "error" in answer:
            raise NVMLError(answer["error"], answer["words"])
        return alive(answer)


def as_captured(value: Any) -> Any:
    return [as_captured(one) for one in value] if isinstance(value, list | tuple) else value


def alive(value: Any) -> Any:
    """A table with points again; what stood for a device keeps its name."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: alive(one) for key, one in value.items()})
    if isinstance(value, list):
        return [alive(one) for one in value]
    return value
