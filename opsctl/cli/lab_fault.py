"""``opsctl lab fault``: break the simulated GPUs of a machine, to see what notices."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from opsctl.cli.speak import AsJson, Debug, speaking
from opsctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from opsctl.lab.gpu.faults import Faults

TIME = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|)")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def fault(
    host: Annotated[str, typer.Argument(help="GPU host of the lab.")],
    kind: Annotated[str, typer.Argument(help="cooling, xid NUMBER, nvml-hang TIME, lost, or clear, which mends all.",
                                        metavar="FAULT")],
    value: Annotated[str | None, typer.Argument(help="The XID's number, or how long NVML hangs: 60s, 5m.",
                                                show_default=False)] = None,
    gpu: Annotated[int | None, typer.Option("--gpu", min=0, show_default="all; xid and lost: 0",
                                            help="Which GPU of the host.")] = None,
    factor: Annotated[float | None, typer.Option("--factor", show_default="2",
                                                 help="cooling: so many times worse; 1 mends it.")] = None,
    tau: Annotated[float | None, typer.Option("--tau", show_default="the GPU's own", metavar="SECONDS",
                                              help="cooling: how fast it shows.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Which lab. Default: lab, or the only one there is.",
                                             show_default=False)] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Break the simulated GPUs of a host: bad cooling, an XID, a hanging driver, a lost GPU.

    Faults are shown by opsctl lab status, and last through reboots until they are cleared.
    """
    with speaking("lab fault", as_json=as_json, debug=debug) as speaker:
        from opsctl.lab import laboratory

        act = _act(kind, value, factor, tau)
        which = 0 if gpu is None and kind in ("xid", "lost") else gpu
        lab = laboratory.fault(name, host, which, act)
        described = laboratory.describe(lab)
        now = next(machine["faults"] for machine in described["machines"] if machine["name"] == host)
        speaker.result(described, f"{host}: {'; '.join(now) if now else 'nothing is broken'}")


def _act(kind: str, value: str | None, factor: float | None, tau_s: float | None
         ) -> Callable[[Faults, tuple[int, ...]], Faults]:
    """The change that the words ask for.

    Raises:
        UsageError: no such fault, or a word too many or too few.
    """
    from opsctl.lab.gpu import faults

    if kind not in faults.KINDS:
        raise UsageError("lab.no_such_fault", f"the lab knows no fault {kind!r}.",
                         hint=f"faults: {', '.join(faults.KINDS)}")
    if (value is not None) != (kind in ("xid", "nvml-hang")):
        raise UsageError("lab.fault_value", f"{kind} takes {'no value' if value else 'a value'}.",
                         hint="xid 79, nvml-hang 60s, cooling --factor 2, lost, clear")
    if (factor is not None or tau_s is not None) and kind != "cooling":
        raise UsageError("lab.fault_value", f"--factor and --tau are for cooling, not for {kind}.")
    if kind == "cooling":
        worse = 2.0 if factor is None else factor
        return lambda there, gpus: faults.cool(there, gpus, worse, tau_s)
    if kind == "lost":
        return faults.lose
    if kind == "clear":
        return lambda there, _: faults.clear(there)
    if kind == "xid":
        return lambda there, gpus: faults.happen(there, gpus, int(value) if value and value.isdigit() else 0)
    seconds = _seconds(value or "")
    return lambda there, gpus: faults.hang(there, gpus, seconds, faults.monotonic_ns())


def _seconds(text: str) -> float:
    """Raises:
        UsageError: no time.
    """
    match = TIME.fullmatch(text)
    if not match:
        raise UsageError("lab.hang_time", f"{text!r} is no time.", hint="like 60s or 5m")
    return float(match[1]) * SECONDS[match[2]]
