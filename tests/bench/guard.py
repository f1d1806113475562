"""``python -m tests.bench.guard [FILE.svg]``: the guard against no guard, a power cap and on/off hysteresis.

On the simulated plant, an H200 and then three of them behind a load balancer; a table, and curves of the first case.
No evidence about real GPUs: it compares rules with each other on the same first-order plant. A request counts as lost
that was in flight on a GPU which shut down, or on an engine that was killed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from guard_plant import Guard, Instance, Rule, Trouble, hysteresis, nothing, run
from rich.console import Console
from rich.table import Table

from opsctl.lab.gpu.profiles import Profile, named
from tests.bench.guard_plot import Panel, svg

BEGIN_S, BAD_S, END_S = 60.0, 600.0, 900.0
CAP = 0.7  # of the default power, always
PLOT = Path(__file__).resolve().parents[2] / "build" / "guard.svg"
NOTE = ("Simulated first-order plant with the driver's governor, H200, one GPU; no evidence about real GPUs. "
        "Cooling goes bad at 0 s.")


@dataclass(frozen=True)
class Case:
    words: str
    factor: float
    tau_s: float
    shown_s: float  # of the curves


CASES = (Case("mild, x 1.33, tau 20 s", 1.33, 20.0, 120.0), Case("moderate, x 2, tau 8 s", 2.0, 8.0, 120.0),
         Case("severe, x 3.3, tau 8 s", 3.3, 8.0, 20.0))
FLEETS = {"one GPU, busy": (1, 1.0), "three, at 80 %": (3, 2.4), "three, busy": (3, 3.0)}
RULES: dict[str, tuple[Callable[[], Rule], float]] = {
    "no guard": (lambda: nothing, 1.0),
    "opsctl's guard": (Guard, 1.0),
    "power cap 70 %": (lambda: nothing, CAP),
    "on/off 5 -> 15": (lambda: hysteresis(5, 15), 1.0),
    "on/off 5 -> 30": (lambda: hysteresis(5, 30), 1.0),
}


def profile(case: Case) -> Profile:
    return replace(named("H200"), tau_s=case.tau_s)


def played(case: Case, fleet: str, rule: str, factor: float | None = None) -> list[Instance]:
    instances, demand = FLEETS[fleet]
    make, power = RULES[rule]
    trouble = Trouble(case.factor if factor is None else factor, BEGIN_S, BEGIN_S + BAD_S)
    return run(profile(case), trouble, [make() for _ in range(instances)], demand, END_S, power_share=power, phase=0.1)


def rows(table: Table, fleet: str) -> dict[tuple[str, str], list[Instance]]:
    """A row for each case and rule; throughput is told of what the same fleet does without trouble and rule."""
    found = {}
    for case in CASES:
        whole = work(played(case, fleet, "no guard", factor=1.0))
        for rule in RULES:
            instances = played(case, fleet, rule)
            found[case.words, rule] = instances
            hot = instances[0]
            table.add_row(
                f"{fleet}; {case.words}" if rule == "no guard" else "", rule, f"{100 * work(instances) / whole:.1f} %",
                f"{hot.state.hw_thermal_s:.1f}", f"{sum(one.lost for one in instances):.0f}",
                str(sum(one.moves for one in instances)), "GPU off the bus" if hot.state.shut_down
                else f"{hot.stops} orderly" if hot.stops else "")
        table.add_section()
    return found


def work(instances: list[Instance]) -> float:
    return sum(one.done for one in instances)


def picture(found: dict[tuple[str, str], list[Instance]]) -> str:
    gpu = named("H200")
    marks = ((gpu.max_operating_c, "highest operating"), (gpu.slowdown_c, "slowdown"), (gpu.shutdown_c, "shutdown"))
    above, below = [], []
    for case in CASES:
        seen = {rule: [(at - BEGIN_S, core, share) for at, core, share in found[case.words, rule][0].history]
                for rule in RULES}
        frame = (-case.shown_s / 10, case.shown_s)
        above.append(Panel(f"core, {case.words}", " C", frame, (60, 100),
                           {rule: [(at, core) for at, core, _ in points] for rule, points in seen.items()}, marks))
        below.append(Panel("clock, share of the highest (0: the engine is gone)", " %", frame, (0, 100),
                           {rule: [(at, 100 * share) for at, _, share in points] for rule, points in seen.items()}))
    return svg("Loss of cooling: the guard against what one would do instead", NOTE, (above, below))


def main(plot: Path = PLOT) -> None:
    table = Table("loss of cooling for 600 of 900 s", "rule", "throughput kept", "s in hardware slowdown",
                  "requests lost", "actuator moves", "stops",
                  title="the guard on the simulated plant (H200; no evidence about real GPUs)")
    first = {fleet: rows(table, fleet) for fleet in FLEETS}
    Console().print(table)
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.write_text(picture(first["one GPU, busy"]))
    Console().print(f"curves: {plot}")


if __name__ == "__main__":
    main(*(Path(word) for word in sys.argv[1:2]))
