"""Which release an instance serves, from what it said of itself now and then. Pure.

An instance is out of rotation while its release changes, so what it said during a stream is what answered that stream.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field


@dataclass
class Spoken:
    """What one instance said, in the order of time: seconds of one clock, and a release ("v2-0123456789ab")."""

    times: list[float] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)

    def add(self, at: float, release: str) -> None:
        """Notes an answer. No answer is not noted: a busy engine is silent too."""
        self.times.append(at)
        self.releases.append(release)

    @property
    def last(self) -> str:
        return self.releases[-1] if self.releases else ""

    def during(self, since: float, until: float) -> str:
        """The release that answered a stream; empty when that is not known.

        Said during the stream counts; when it was silent then, what it said before and after, if they agree.
        """
        first, end = bisect_left(self.times, since), bisect_right(self.times, until)
        said = set(self.releases[first:end]) or set(self.releases[max(first - 1, 0):end + 1])
        return said.pop() if len(said) == 1 else ""


def release_of(models: bytes, service: str) -> str:
    """``v2-0123456789ab`` of the entry ``chat@v2-0123456789ab`` in an answer to ``/v1/models``; empty without one."""
    prefix = f"{service}@"
    for model in json.loads(models).get("data", []):
        for name in (model.get("id", ""), *model.get("aliases", [])):
            if name.startswith(prefix):
                return str(name[len(prefix):])
    return ""


def longest(models: bytes) -> int:
    """How many tokens a request may have, prompt and answer; 0 when the engine does not say."""
    found = [int(length) for model in json.loads(models).get("data", [])
             for length in (model.get("max_model_len"), (model.get("meta") or {}).get("n_ctx")) if length]
    return min(found, default=0)
