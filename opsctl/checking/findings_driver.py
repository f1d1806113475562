"""The driver that is there: whose it is, whether its layers agree, whether it fits. Pure."""

from __future__ import annotations

import re

from opsctl.checking.model import Captured, Judged, Wanted, fix, good, on, provision, shell, skip, some, warn
from opsctl.checking.reading import (
    devices,
    driver_packages,
    gpus_on_bus,
    key_values,
    known,
    library_version,
    loaded,
    lost,
    module,
    switches_on_bus,
)
from opsctl.errors import ConfigurationError
from opsctl.stack.fit import Wish, check_fit, flavour_of, known_gpus, needs_fabric_manager
from opsctl.stack.versions import driver_in

OWNER = "owner:"
NO_DPKG = "dpkg did not say what is installed"
# Sources of a distribution's own build of the driver: Debian's and Ubuntu's components, and Ubuntu's PPA.
EXACTLY = re.compile(r"([a-z0-9][a-z0-9+.-]*)(?::\w+)? \(= ([^)]+)\)")
OTHERS = re.compile(r"^\s+-?\d+ (\S+ \S*(?:/non-free\S*|/restricted|/multiverse) .*|\S*graphics-drivers\S* .*)$",
                    re.MULTILINE)
MISMATCH = "Driver/library version mismatch"


def wish(wanted: Wanted) -> Wish:
    return Wish(wanted.host, wanted.driver, wanted.flavour, wanted.fabric_manager, wanted.gpu_model)


def run_file(captured: Captured, wanted: Wanted) -> Judged:
    """NVIDIA's installer puts files where packages put theirs; dpkg knows nothing of them, and they stay."""
    marks = {name.removeprefix(OWNER): captured.exit(name) for name in captured.document.get("commands", {})
             if name.startswith(OWNER)}
    if captured.exit("dpkg-list") in (127, None):
        return skip(NO_DPKG)
    foreign = sorted(path for path, status in marks.items() if status == 1)
    if not foreign:
        return good("no driver came from a .run file")
    return fix(f"a driver came from a .run file ({some(foreign)} belongs to no package)", on(
        wanted, "nvidia-uninstall", "--silent"), stops=bool(wanted.driver))


def repository(captured: Captured, wanted: Wanted) -> Judged:
    if captured.exit("dpkg-list") in (127, None):
        return skip(NO_DPKG)
    packages = [name for name, version in driver_packages(captured).items() if driver_in(version)]
    if not packages:
        return good("no package of a driver is installed")
    if captured.exit("apt-policy") != 0:
        return skip("apt-cache did not say where its packages come from")
    foreign = {name: found for name, text in policies(captured.out("apt-policy")).items() if name in packages
               and (found := OTHERS.search(installed_from(text)))}
    if not foreign:
        return good(f"{len(packages)} packages of the driver, none of them the distribution's own")
    found = next(iter(foreign.values()))
    what = f"{some(list(foreign))} came from another repository ({' '.join(found[1].split()[:2])})"
    if not wanted.driver or wanted.driver_source == "debian":
        return good(f"{what}, and " + ("nvidia_driver_source=debian wants them from there" if wanted.driver else
                                       "opsctl is to keep its hands off the driver"))
    return warn(f"{what}: its packages and NVIDIA's replace each other's files",
                on(wanted, "apt-get", "purge", *foreign))


def dependents(captured: Captured, wanted: Wanted) -> Judged:
    """Packages of the site's own that are tied to the driver that is there: with another one apt takes them away."""
    if captured.exit("dpkg-depends") in (127, None):
        return skip(NO_DPKG)
    if not wanted.driver:
        return good("the inventory names no driver")
    family = {name for name, version in driver_packages(captured).items() if driver_in(version)}
    tied = {}
    for line in captured.out("dpkg-depends").splitlines():
        name, state, needs = (*line.split("\t"), "", "")[:3]
        for other, version in EXACTLY.findall(needs):
            if name not in family and other in family and state.strip() in ("ii", "hi") and \
                    driver_in(version) not in ("", wanted.driver):
                tied[name] = f"{other} {version}"
    if tied:
        name, needs = next(iter(tied.items()))
        return fix(f"{some(list(tied))} would be removed with the driver {wanted.driver}: {name} needs exactly {needs}",
                   on(wanted, "apt-get", "remove", *tied) + "   (or a build of it for that driver)", stops=True)
    return good(f"no package of others is tied to a driver other than {wanted.driver}")


def policies(text: str) -> dict[str, str]:
    """``apt-cache policy`` by package."""
    parts = re.split(r"^(\S+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=False))


def installed_from(policy: str) -> str:
    """The lines of sources below ``***``, which marks the installed version."""
    lines = policy.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith(" *** ")), None)
    if start is None:
        return ""
    end = next((number for number in range(start + 1, len(lines)) if not lines[number].startswith("       ")),
               len(lines))
    return "\n".join(lines[start + 1:end]) + "\n"


def flavour(captured: Captured, wanted: Wanted) -> Judged:
    """The kernel module that is loaded, against what the GPUs take and what a provision would choose."""
    version, there = loaded(captured)
    strangers = [one["device"] for one in gpus_on_bus(captured)
                 if one["device"].removeprefix("0x") not in {gpu.device_id for gpu in known(captured)}]
    if strangers and not wanted.flavour:
        return skip(f"nobody here knows the GPU 10de:{strangers[0].removeprefix('0x')}")
    must = {gpu.architecture.modules: gpu for gpu in known(captured) if gpu.architecture.modules != "either"}
    wrong = next((gpu for needed, gpu in must.items() if needed != there), None)
    if wrong:
        return fix(f"the {there} module {version} is loaded, and {wrong.name} takes the "
                   f"{wrong.architecture.modules} one only", provision(wanted))
    if wanted.driver:
        try:
            right = flavour_of(wish(wanted), known(captured))
        except ConfigurationError as error:
            return fix(error.message, error.hint, stops=True)
        if right != there:
            return warn(f"the {there} module is loaded; a provision would bring the {right} one",
                        f"opsctl drain {wanted.host} && {provision(wanted)}   (or nvidia_driver_flavour={there})")
    return good(f"the {there} module fits its GPUs")


def version(captured: Captured, wanted: Wanted) -> Judged:
    """The wanted driver against the GPUs, which needs none to be there, and against the one that is."""
    ids = [one["device"].removeprefix("0x") for one in gpus_on_bus(captured)]
    there, _ = loaded(captured)
    if not wanted.driver:
        return good(f"driver {there}, and the inventory names none" if there else "the inventory names no driver")
    try:
        check_fit(wish(wanted), known_gpus(wish(wanted), ids))
    except ConfigurationError as error:
        return fix(error.message, error.hint, stops=True)
    if there and there != wanted.driver:
        return warn(f"driver {there} is loaded, and the inventory names {wanted.driver}", provision(wanted))
    return good(f"driver {wanted.driver} {'is loaded' if there else 'fits its GPUs, and none is there yet'}")


def answers(captured: Captured, wanted: Wanted) -> Judged:
    """A driver that hangs, or one whose library is of another version, answers nobody."""
    codes = [captured.exit("nvidia-smi"), captured.exit("nvidia-smi-csv")]
    said = captured.out("nvidia-smi") + captured.out("nvidia-smi-csv")
    if MISMATCH in said:
        return fix(f"module {loaded(captured)[0]} in the kernel and a library of another version: programs find no GPU",
                   f"opsctl drain {wanted.host}, then {on(wanted, 'systemctl', 'reboot')}")
    if codes == [127, 127]:
        return warn("the driver is loaded, and nvidia-smi is not installed", provision(wanted))
    if devices(captured) or lost(captured):
        return good(f"the driver answers for {len(devices(captured))} GPUs")
    if None in codes:
        return fix("nvidia-smi did not answer within its time: the driver hangs", shell(
            wanted, "journalctl -k -b --grep 'NVRM|Xid' | tail; cat /proc/*/stack | grep -c nvidia")
            + f"   (opsctl drain {wanted.host}, then reboot it)")
    return fix(f"nvidia-smi says: {' '.join(said.split())[:160] or 'nothing'}", on(wanted, "nvidia-smi"))


def layers(captured: Captured, wanted: Wanted) -> Judged:
    """Module in the kernel, module on disk, library, fabric manager: after an upgrade behind one's back they differ."""
    disk = module(captured, "modinfo").get("version", "") or (captured.file("/lib/modules/lab/nvidia.version") or ""
                                                             ).partition(" ")[0].strip()
    found = {"in the kernel": loaded(captured)[0], "on disk": disk, "library": library_version(captured)}
    fabric = fabric_manager(captured)
    if fabric:
        found["fabric manager"] = fabric
    there = {name: value for name, value in found.items() if value}
    words = ", ".join(f"{name} {value}" for name, value in there.items())
    if len(set(there.values())) > 1:
        return fix(f"the driver's layers differ: {words}", f"opsctl drain {wanted.host}, then " + (
            provision(wanted) if wanted.driver else on(wanted, "systemctl", "reboot")))
    if not disk:
        return warn(f"no nvidia module of the running kernel is on disk ({words}): it will not load again",
                    provision(wanted))
    return good(f"its layers agree: {words}")


def fabric_manager(captured: Captured) -> str:
    """The version of the fabric manager's package, whose name ends in the branch before 590; empty: none."""
    return next((driver_in(version) for name, version in driver_packages(captured).items()
                 if re.fullmatch(r"nvidia-fabricmanager(-\d+)?", name)), "")


def fabric(captured: Captured, wanted: Wanted) -> Judged:
    """Boards with NVSwitches compute only while the fabric manager, of exactly the driver's version, runs."""
    unit = key_values(captured.out("fabric-unit"))
    there = fabric_manager(captured)
    if not needs_fabric_manager(wish(wanted), known(captured), switches_on_bus(captured)):
        if unit.get("ActiveState") == "failed" or unit.get("UnitFileState") == "enabled":
            return warn("a fabric manager is enabled, and there are no NVSwitches for it: it fails at each boot",
                        on(wanted, "systemctl", "disable", "--now", "nvidia-fabricmanager"))
        return good("no NVSwitches, no fabric manager")
    start = on(wanted, "systemctl", "enable", "--now", "nvidia-fabricmanager")
    if there and there != loaded(captured)[0]:
        return fix(f"the fabric manager is {there} and the driver {loaded(captured)[0]}: it does not start",
                   provision(wanted) if wanted.driver else on(wanted, "apt-get", "install", "nvidia-fabricmanager="
                                                              f"{loaded(captured)[0]}-1"))
    if unit.get("ActiveState") != "active":
        state = unit.get("ActiveState", "unknown") if unit.get("LoadState") != "not-found" else "not installed"
        return fix(f"the board has NVSwitches, and the fabric manager is {state}: CUDA says error 802",
                   provision(wanted) if state == "not installed" and wanted.driver else start)
    bad = {one.bus: f"{one.text('fabric/state')}, {one.text('fabric/status') or 'no status'}"
           for one in devices(captured) if one.node is not None
           and (one.text("fabric/state"), one.text("fabric/status")) != ("Completed", "Success")}
    if bad:
        bus, state = next(iter(bad.items()))
        return fix(f"the fabric manager runs, and the fabric of {len(bad)} GPUs is not up ({bus}: {state})", shell(
            wanted, "journalctl -u nvidia-fabricmanager -n 50; systemctl restart nvidia-fabricmanager"))
    return good("the fabric manager runs, and every GPU's fabric is up" if any(
        one.node is not None for one in devices(captured)) else "the fabric manager runs")
