"""`--gpus local`: the GPUs of this machine, as its driver reports them."""

import pytest

from maveriq.domain.cluster import Cluster, Gpu
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import profiles_for
from maveriq.exec import gpus
from maveriq.exec.local_machine import local_cluster
from maveriq.units import BYTES_PER_GIB

PROFILES = profiles_for("a6000-short", "local")


def here(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    here = tuple(
        Gpu(gpu_id=k, node=0, kind=name, capacity_bytes=48 * BYTES_PER_GIB, idle_bytes=k * BYTES_PER_GIB)
        for k, name in enumerate(names)
    )
    monkeypatch.setattr(gpus, "real_cluster", lambda: Cluster(name="local", gpus=here))


def test_local_gpus_become_a_cluster_of_the_profile(monkeypatch) -> None:
    here(monkeypatch, "NVIDIA RTX A6000", "NVIDIA RTX A6000")
    cluster = local_cluster("local", PROFILES)
    assert [(gpu.kind, gpu.idle_bytes) for gpu in cluster.gpus] == [("A6000", 0), ("A6000", BYTES_PER_GIB)]
    assert len(local_cluster("8xA6000", PROFILES).gpus) == 8


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A60001", "NVIDIA A600"])
def test_gpus_of_another_kind_than_the_profile_are_refused(monkeypatch, name: str) -> None:
    here(monkeypatch, "NVIDIA RTX A6000", name)
    with pytest.raises(InputError, match=f"GPU 1 of this machine is a {name}, but profile 'a6000-short'"):
        local_cluster("local", PROFILES)
