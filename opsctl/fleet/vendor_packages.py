"""What an inventory says of the container toolkit and of CUDA, checked before anybody asks the host. Pure.

Versions are the vendor's own, whole and as text: packages of the newest version are nobody's wish.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsctl.fleet.gpus import Wrong, listed

CONTAINER_TOOLKIT = "nvidia_container_toolkit_version"
CUDA, CUDNN, NCCL = "cuda_toolkit_version", "cudnn_version", "nccl_version"
# By role, the variables that name its packages' versions; the first one makes that a host has the role.
VARIABLES: Mapping[str, tuple[str, ...]] = {"container_toolkit": (CONTAINER_TOOLKIT,), "cuda": (CUDA, CUDNN, NCCL)}
# Further versions for the bundle, the way back. cuDNN and NCCL come along for each CUDA, where the source has them.
BUNDLE_VERSIONS = {CONTAINER_TOOLKIT: "nvidia_container_toolkit_bundle_versions", CUDA: "cuda_toolkit_bundle_versions"}
FORMS = {
    CONTAINER_TOOLKIT: (re.compile(r"\d+\.\d+\.\d+"), "1.19.0"),
    CUDA: (re.compile(r"\d+\.\d+\.\d+"), "13.0.2"),
    CUDNN: (re.compile(r"\d+\.\d+\.\d+\.\d+"), "9.20.0.48"),
    # Built for a CUDA: that of the toolkit, or another one that is written out.
    NCCL: (re.compile(r"\d+\.\d+\.\d+(?:\+cuda\d+\.\d+)?"), "2.28.9"),
}
# Everything that is read here, so that a caller with lazy variables can fetch these only.
READ = (*FORMS, *BUNDLE_VERSIONS.values())


def first_wrong(variables: Mapping[str, Any]) -> Wrong | None:
    """The first of a host's variables of these packages that cannot be right."""
    for key, (form, example) in FORMS.items():
        more = BUNDLE_VERSIONS.get(key, "")
        for name in (key, more) if more else (key,):
            for version in listed(variables.get(name)):
                if not form.fullmatch(version):
                    wanted = f'{name}=["{example}"]' if name == more else f'{name}="{example}"'
                    return Wrong(name, version, "is no exact version", f"{wanted}: the whole version, as text")
        if len(listed(variables.get(key))) > 1:
            return Wrong(key, str(variables[key]), "is more than one version",
                         f"others go into {more}" if more else "one of them")
    for key in (CUDNN, NCCL):
        if listed(variables.get(key)) and not listed(variables.get(CUDA)):
            return Wrong(key, str(variables[key]), "is built for a CUDA, and none is named",
                         f'{CUDA}="13.0.2" beside it')
    return None


def versions_of(role: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """By variable, the versions that a host names; empty when the role leaves it alone."""
    named = {key: listed(variables.get(key)) for key in VARIABLES[role]}
    return {key: found[0] for key, found in named.items() if found} if named[VARIABLES[role][0]] else {}


def wanted_versions(role: str, hostvars: Mapping[str, Mapping[str, Any]]
                    ) -> tuple[tuple[dict[str, str], tuple[str, ...]], ...]:
    """Every set of versions that hosts name, and those that are to be kept for the way back; with the hosts of each."""
    first, *others = VARIABLES[role]
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for host, variables in hostvars.items():
        own = versions_of(role, variables)
        sets = [own] if own else []
        for version in listed(variables.get(BUNDLE_VERSIONS[first])):
            sets.append({first: version, **{key: own[key].partition("+")[0] for key in others if key in own}})
        for one in sets:
            found.setdefault(tuple(one.items()), []).append(host)
    return tuple((dict(one), tuple(dict.fromkeys(hosts))) for one, hosts in found.items())


def is_way_back(versions: Mapping[str, str], hostvars: Mapping[str, Mapping[str, Any]], role: str,
                hosts: Sequence[str]) -> bool:
    """Whether nobody has these versions now: what the source lacks beside the first of them is told, not refused."""
    return all(versions_of(role, hostvars[host]) != versions for host in hosts)
