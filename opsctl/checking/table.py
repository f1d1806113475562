"""Every check: its stable id, what it looks at, where it applies. ``findings_for`` is what others call. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opsctl.checking import findings_boot as boot
from opsctl.checking import findings_driver as driver
from opsctl.checking import findings_gpu as gpu
from opsctl.checking import findings_host as host
from opsctl.checking import findings_packages as packages
from opsctl.checking import findings_users as users
from opsctl.checking.model import VERDICTS, Captured, Check, Finding, Judged, Wanted, skip
from opsctl.checking.reading import gpus_on_bus, loaded
from opsctl.errors import OpsctlError

REACHABLE = "reachable"  # told where a host does not answer, and so nothing else of it
CHECKS = (
    Check("ssh-latency", "how long a command over SSH takes", "host", host.latency),
    Check("dpkg-state", "packages that are half way", "host", packages.dpkg_state),
    Check("dpkg-lock", "who works with dpkg or apt", "host", packages.dpkg_lock),
    Check("apt-keys", "signing keys of package sources", "host", packages.apt_keys),
    Check("apt-sources", "package sources", "host", packages.apt_sources),
    Check("gateway-packages", "the gateway's bundle", "host", packages.gateway_packages),
    Check("disk-system", "free space", "host", host.disk_system),
    Check("disk-weights", "free space for the old and the new weights", "gpu", host.disk_weights),
    Check("memory", "memory", "host", host.memory),
    Check("swap", "swap", "host", host.swap),
    Check("overcommit", "address space for CUDA", "gpu", host.overcommit),
    Check("clock", "the clock", "host", host.clock),
    Check("secure-boot", "secure boot and the module's signature", "gpu", boot.secure_boot),
    Check("mok", "the key that modules are signed with", "gpu", boot.mok),
    Check("nouveau-loaded", "nouveau in the kernel", "gpu", boot.nouveau_loaded),
    Check("nouveau-blacklist", "nouveau's blacklist", "gpu", boot.nouveau_blacklist),
    Check("headers-running", "headers of the running kernel", "gpu", boot.headers_running),
    Check("headers-next", "headers of the next kernel", "gpu", boot.headers_next),
    Check("module-next", "the module of the next kernel", "driver", boot.module_next),
    Check("iommu", "the IOMMU between GPUs", "gpu", boot.iommu),
    Check("acs", "PCI bridges between GPUs", "gpu", gpu.acs),
    Check("driver-run-file", "a driver from a .run file", "gpu", driver.run_file),
    Check("driver-repository", "whose packages the driver came from", "gpu", driver.repository),
    Check("driver-dependents", "packages that are tied to this driver", "gpu", driver.dependents),
    Check("driver-version", "the driver of the inventory", "gpu", driver.version),
    Check("driver-flavour", "the flavour of the kernel module", "driver", driver.flavour),
    Check("driver-answers", "whether the driver answers", "driver", driver.answers),
    Check("driver-layers", "module, library and fabric manager", "driver", driver.layers),
    Check("gpu-count", "whether all GPUs are there", "gpu", gpu.count),
    Check("gpu-model", "whether they are those of the inventory", "gpu", gpu.model),
    Check("ecc", "memory errors", "driver", gpu.ecc),
    Check("row-remap", "rows of memory that were replaced", "driver", gpu.row_remap),
    Check("pcie-link", "PCIe lanes and generation", "gpu", gpu.pcie_link),
    Check("rebar", "Resizable BAR", "driver", gpu.rebar),
    Check("nvlink", "NVLinks", "driver", gpu.nvlink),
    Check("fabric", "the fabric manager and the fabric", "driver", driver.fabric),
    Check("persistence", "persistence mode", "driver", gpu.persistence),
    Check("xids", "errors since the boot", "driver", gpu.xids),
    Check("gpu-throttling", "whether GPUs are slowed down", "driver", gpu.throttling),
    Check("gpu-processes", "foreign processes on GPUs", "gpu", users.processes),
    Check("gpu-containers", "foreign containers on GPUs", "gpu", users.containers),
    Check("exporter-port", "who listens on the exporter's port", "gpu", users.exporter),
)


def findings_for(host_name: str, captured: Captured, wanted: Wanted) -> tuple[Finding, ...]:
    """What is to be said of a host, in the table's order; the same captures give the same findings.

    ``captured`` is the probe's document; ``wanted.host`` is ``host_name``. A finding with ``stops_provision`` ought to
    refuse a provision of that host.
    """
    if host_name != wanted.host:
        raise ValueError(f"captures of {host_name} against what is wanted of {wanted.host}")
    return tuple(_finding(check, _judge(check, captured, wanted)) for check in CHECKS
                 if check.scope == "host" or has_gpus(captured, wanted))


def unreachable(error: OpsctlError, host_name: str) -> Finding:
    """The one finding of a host that does not answer. Where sudo wants a password, a provision may still have it."""
    return Finding(REACHABLE, "the way to the host", "fix", error.message.removeprefix(f"{host_name}: "), error.hint,
                   error.code != "host.no_sudo")


def has_gpus(captured: Captured, wanted: Wanted) -> bool:
    """It has some, or is to have: a gateway without is not asked about GPUs."""
    return bool(gpus_on_bus(captured) or wanted.driver or wanted.gpu_uuids or wanted.gpu_model)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """``{"fix": 1, "warn": 2, "skip": 0, "pass": 30}``."""
    said = [one.verdict for one in findings]
    return {verdict: said.count(verdict) for verdict in VERDICTS}


def as_document(found: Mapping[str, tuple[Finding, ...]]) -> dict[str, Any]:
    """For ``--json``: every finding of each host, and how many there are of each verdict."""
    return {"hosts": [{"host": name, "findings": [{
        "id": one.id, "title": one.title, "verdict": one.verdict, "what": one.what, "fix": one.fix,
        "stops_provision": one.stops_provision} for one in findings], "counts": counts(findings)}
        for name, findings in found.items()],
        "counts": counts(one for findings in found.values() for one in findings)}


def _judge(check: Check, captured: Captured, wanted: Wanted) -> Judged:
    if check.scope == "driver" and not loaded(captured)[0]:
        late = captured.exit("driver") is None
        return skip("the driver's own files did not answer: it hangs" if late and check.id != "driver-answers"
                    else "no driver is loaded yet") if not (late and check.id == "driver-answers") \
            else check.judge(captured, wanted)
    return check.judge(captured, wanted)


def _finding(check: Check, judged: Judged) -> Finding:
    return Finding(check.id, check.title, judged.verdict, judged.what, judged.fix, judged.stops)
