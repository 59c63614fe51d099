"""A cluster for a service: the policy that knows single endpoints, and the body it decides for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from maveriq.domain.cluster import Cluster
from maveriq.domain.models import ModelSpec
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile
from maveriq.exec.engine_process import SupervisionSettings
from maveriq.exec.executor import Executor
from maveriq.exec.gpu_memory_gate import MemoryWatch
from maveriq.exec.gpu_sampling import GpuSampler
from maveriq.exec.gpus import Devices
from maveriq.exec.launcher import ProcessLauncher
from maveriq.exec.model_files import ModelFiles
from maveriq.exec.world import World
from maveriq.policy.pinned import PinnedPlacementPolicy
from maveriq.policy.policy import Policy
from maveriq.policy.registry import RULES, make_policy
from maveriq.scenario.build import (
    cluster_for,
    controller_settings,
    estimators_for,
    load_time_for,
    service_time_predictor,
)
from maveriq.scenario.options import Options
from maveriq.scenario.service_times import EstimatedServiceTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """Everything that is known of a service's cluster before it is up."""

    options: Options
    profile: HardwareProfile
    cluster: Cluster
    planner: Estimator
    service_estimator: Estimator
    placements: PinnedPlacementPolicy


def plan_cluster(
    options: Options,
    *,
    planning: Callable[[Estimator], Estimator] = lambda one: one,
    clusters: Callable[[str, HardwareProfile], Cluster] = cluster_for,
) -> ClusterPlan:
    """Turn options into a cluster's plan, reading every file that they name.

    Requests go at once, without the delays of the testbed that the profile was measured on.

    Args:
        options: what the user says.
        planning: turns the estimator that the options name for planning into the one that is planned with.
        clusters: turns what the options say of GPUs into a cluster.

    Raises:
        InputError: an option or a file that cannot be used.
    """
    options = replace(options, no_dispatch_overhead=True)
    profile = load_profile(options.profile)
    estimators = estimators_for(options, profile)
    if estimators.serve is None:
        raise InputError("--service-times recorded is for replaying recordings; a service has none")
    planner = planning(estimators.plan)

    def policy(name: str) -> Policy:
        return make_policy(
            name, estimator=planner, accuracy=profile.accuracy, packing_threshold=options.packing_threshold
        )

    return ClusterPlan(
        options=options,
        profile=profile,
        cluster=clusters(options.gpus, profile),
        planner=planner,
        service_estimator=estimators.serve,
        placements=PinnedPlacementPolicy(
            default=policy(options.policy), by_name={name: policy(name) for name in RULES}
        ),
    )


@contextlib.asynccontextmanager
async def open_cluster(
    plan: ClusterPlan,
    *,
    backend: str,
    time_scale: float,
    supervision: SupervisionSettings,
    logs: Path,
    folder_of: Callable[[ModelSpec], Path | None],
    devices: Devices | None = None,
    watch: MemoryWatch | None = None,
    sampler: GpuSampler | None = None,
) -> AsyncIterator[Executor]:
    """Give a cluster that is up, and close it at the end.

    Args:
        plan: from `plan_cluster`.
        backend: which engines serve.
        time_scale: real seconds per second of the cluster's clock, for emulated engines.
        supervision: how long to be patient with engines.
        logs: folder for what engines print; made if it is absent.
        folder_of: says where the files of a model lie, None for one that is known by its shape alone.
        devices: what stands behind the cluster's GPUs; None where engines run on the CPU, or only pretend.
        watch: who sees the memory of real GPUs.
        sampler: who sees how busy they are.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {str(logs)!r} for logs cannot be made: {error.strerror}; name another") from None
    world = World(
        cluster=plan.cluster,
        policy=plan.placements,
        settings=controller_settings(plan.options, plan.profile),
        predict_service_time=service_time_predictor(plan.planner),
        service=EstimatedServiceTimes(plan.service_estimator),
        load_time=load_time_for(plan.options, plan.profile),
        devices=devices or Devices(),
        measured_loads=sampler.loads if sampler else None,
        files=ModelFiles(lambda model: (folder := folder_of(model)) and folder / "config.json"),
        typical_prompt_tokens=plan.profile.prompt_tokens,
    )
    with ProcessLauncher(backend, logs=logs, devices=world.devices) as launcher:
        body = Executor(world, launcher, time_scale=time_scale, supervision=supervision, watch=watch)
        sampling = asyncio.create_task(sampler.run()) if sampler else None
        try:
            yield body
        finally:
            if sampling is not None:
                sampling.cancel()
            await body.close()
