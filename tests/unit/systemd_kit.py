"""A systemd that is played."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Systemd:
    """Plays systemd: units are active or not; ``on`` reacts to an order."""

    units: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    about: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    orders: list[list[str]] = field(default_factory=list)
    on: Callable[[list[str]], None] = lambda _: None

    def __call__(self, argv: Sequence[str], timeout_s: float = 0) -> subprocess.CompletedProcess[str]:
        self.orders.append(list(argv))
        text = ""
        if argv[:2] == ["systemctl", "show"]:
            text = "\n\n".join(
                f"Id={unit}\nLoadState=loaded\nActiveState={self.units.get(unit, 'inactive')}\nSubState=running\n"
                f"NRestarts={self.restarts}\nActiveEnterTimestamp=n/a\n"
                f"Description={self.about.get(unit, '')}" for unit in argv[argv.index("--") + 1:])
        elif argv[:2] == ["systemctl", "start"]:
            self.units[argv[-1]] = "active"
        elif argv[:2] == ["systemctl", "stop"]:
            self.units[argv[-1]] = "inactive"
        elif argv[0] == "systemd-run":
            given = dict(word.partition("=")[::2] for word in argv if word.startswith("--"))
            self.units[given["--unit"]], self.about[given["--unit"]] = "active", given["--description"]
        elif argv[0] == "journalctl":
            text = "\n".join(self.log)
        self.on(list(argv))
        return subprocess.CompletedProcess(argv, 0, text, "")

    def ordered(self, verb: str) -> bool:
        return any(argv[:2] == ["systemctl", verb] for argv in self.orders)
