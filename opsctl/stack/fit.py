"""Does a driver fit the GPUs of a host: kernel module, branch, fabric manager, by PCI device ids alone. Pure.

Asked before there is a driver, so nothing here can come from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opsctl.errors import ConfigurationError
from opsctl.stack.catalogue import Gpu, catalogue, is_called
from opsctl.stack.versions import branch_of, is_driver_version

Flavour = Literal["open", "proprietary"]
FLAVOURS: tuple[Flavour, ...] = ("open", "proprietary")
Source = Literal["vendor", "debian"]
SOURCES: tuple[Source, ...] = ("vendor", "debian")


@dataclass(frozen=True)
class Wish:
    """What the inventory says of a host's driver. Empty: it says nothing. ``fabric_manager``: auto, present, absent.

    ``source``: whose packages they are, NVIDIA's repository's (``vendor``) or those of Debian's non-free (``debian``).
    """

    host: str
    version: str
    flavour: str = ""
    fabric_manager: str = "auto"
    gpu_model: str = ""
    source: Source = "vendor"


def known_gpus(wish: Wish, device_ids: Sequence[str]) -> tuple[Gpu, ...]:
    """The GPUs with these PCI device ids; one that nobody knows is refused unless the flavour is written.

    Raises:
        ConfigurationError: ``driver.no_gpu``, ``driver.unknown_gpu``, ``driver.another_gpu``.
    """
    if not device_ids:
        raise _wrong("no_gpu", wish, "nvidia_driver_version", wish.version, "and there is no NVIDIA GPU on its PCI bus",
                     "remove nvidia_driver_version from that host, or look why lspci shows no GPU")
    strangers = sorted({device for device in device_ids if device not in catalogue()})
    if strangers and not wish.flavour:
        raise _wrong("unknown_gpu", wish, "nvidia_driver_version", wish.version,
                     f"and nobody here knows the GPU 10de:{strangers[0]}",
                     "write nvidia_driver_flavour=open, or proprietary for what is older than Turing")
    gpus = tuple(catalogue()[device] for device in device_ids if device in catalogue())
    others = [gpu for gpu in gpus if wish.gpu_model and not is_called(gpu, wish.gpu_model)]
    if others:
        raise _wrong("another_gpu", wish, "gpu_model", wish.gpu_model, f"and it has a {others[0].name} "
                     f"(10de:{others[0].device_id})", "correct gpu_model, or look what was built in there")
    return gpus


def flavour_of(wish: Wish, gpus: Sequence[Gpu]) -> Flavour:
    """The kernel module for these GPUs: open from Turing on, proprietary for what is older, or as it is written.

    Raises:
        ConfigurationError: ``driver.bad_flavour``, or ``driver.wrong_flavour``: a GPU does not take it.
    """
    if wish.flavour and wish.flavour not in FLAVOURS:
        raise _wrong("bad_flavour", wish, "nvidia_driver_flavour", wish.flavour, "and that is no flavour",
                     "nvidia_driver_flavour=open or proprietary")
    must = {gpu.architecture.modules: gpu for gpu in gpus if gpu.architecture.modules != "either"}
    if "open" in must and "proprietary" in must:
        raise _wrong("no_common_module", wish, "nvidia_driver_version", wish.version,
                     f"and no kernel module drives both {must['open'].name} and {must['proprietary'].name}",
                     "they belong into different hosts")
    flavour = next((known for known in FLAVOURS if known == wish.flavour),
                   "proprietary" if "proprietary" in must else "open")
    for needed, gpu in must.items():
        if needed != flavour:
            raise _wrong("wrong_flavour", wish, "nvidia_driver_flavour", wish.flavour,
                         f"and {gpu.name} takes the {needed} kernel module only",
                         f"nvidia_driver_flavour={needed}, or leave it out")
    return flavour


def check_fit(wish: Wish, gpus: Sequence[Gpu]) -> None:
    """Whether the branch of the wanted version knows all these GPUs.

    Raises:
        ConfigurationError: ``driver.not_exact``, ``driver.too_new``, ``driver.too_old``.
    """
    if not is_driver_version(wish.version):
        raise _wrong("not_exact", wish, "nvidia_driver_version", wish.version, "and that is no exact version",
                     'nvidia_driver_version="580.126.09": the whole version, as text')
    branch = branch_of(wish.version)
    for gpu in gpus:
        first, last = gpu.architecture.first_branch, gpu.architecture.last_branch
        if last and branch > last:
            raise _wrong("too_new", wish, "nvidia_driver_version", wish.version,
                         f"and {last} is the last branch that knows {gpu.name} ({gpu.architecture.name})",
                         f"a version {last}.x")
        if branch < first:
            raise _wrong("too_old", wish, "nvidia_driver_version", wish.version,
                         f"and {gpu.name} ({gpu.architecture.name}) needs branch {first} or newer",
                         f"a version {first}.x or newer")


def needs_fabric_manager(wish: Wish, gpus: Sequence[Gpu], switches: int) -> bool:
    """Whether the board has NVSwitches. ``switches``: how many of them are seen on the PCI bus.

    Switches of Blackwell boards are not seen there, so the GPU's own id counts too. A board of the same GPUs without
    switches is told by ``nvidia_driver_fabric_manager=absent``: there the service would fail.
    """
    if wish.fabric_manager != "auto":
        return wish.fabric_manager == "present"
    return switches > 0 or any(gpu.fabric for gpu in gpus)


def _wrong(code: str, wish: Wish, key: str, value: str, problem: str, hint: str) -> ConfigurationError:
    return ConfigurationError(f"driver.{code}", f"{wish.host} has {key}={value}, {problem}.", hint=hint)
