"""`--gpus local`: the GPUs of this machine as a cluster."""

from __future__ import annotations

from dataclasses import replace

from maveriq.domain.cluster import Cluster
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import HardwareProfile
from maveriq.scenario.build import cluster_for

LOCAL = "local"


def cluster_here(gpus: str, profile: HardwareProfile) -> Cluster:
    """Return the cluster that a user names; `local` is what this machine has, less what is in use there now.

    Raises:
        InputError: not a cluster, no GPU here, or GPUs that the profile was not measured on.
    """
    if gpus != LOCAL:
        return cluster_for(gpus, profile)
    from maveriq.exec.gpus import real_cluster

    try:
        found = real_cluster()
    except InputError as error:
        raise InputError(f"--gpus {LOCAL}: {error}") from None
    for gpu in found.gpus:
        if not _is_kind(gpu.kind, profile.gpu_kind):
            raise InputError(
                f"--gpus {LOCAL}: GPU {gpu.gpu_id} of this machine is a {gpu.kind}, but profile {profile.name!r} was "
                f"measured on {profile.gpu_kind}; measure one with maveriq profile, and name it with --profile"
            )
    return replace(found, gpus=tuple(replace(gpu, kind=profile.gpu_kind) for gpu in found.gpus))


def _is_kind(driver_name: str, kind: str) -> bool:
    """Say whether the driver's name of a GPU ("NVIDIA RTX A6000") is of a kind ("A6000", "RTX-A6000")."""
    name, wanted = ("-".join(text.casefold().split()) for text in (driver_name, kind))
    return f"-{wanted}-" in f"-{name}-"
