"""What a body is told of the world, and how an engine is ordered from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from maveriq.control.controller import ControllerSettings, ServiceTimePredictor
from maveriq.control.events import StartEngine
from maveriq.domain.cluster import Cluster
from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.gpus import Devices
from maveriq.exec.messages import EngineSpec, Loaded
from maveriq.exec.model_files import ModelFiles
from maveriq.policy.policy import Policy
from maveriq.scenario.service_times import ServiceTimes, service_times_for
from maveriq.scenario.system import LoadTime, ServingSystem
from maveriq.units import seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a body needs to know: the cluster, who decides, and what is believed about the hardware.

    `service` and `load_time` are estimates: by them hangs are told from long executions, and emulated engines
    take these times. `typical_prompt_tokens` is what latency is estimated for where nobody says.
    `measured_loads` tells how busy each GPU was of late, where that is measured.
    """

    cluster: Cluster
    policy: Policy
    settings: ControllerSettings
    predict_service_time: ServiceTimePredictor
    service: ServiceTimes
    load_time: LoadTime
    devices: Devices = field(default_factory=Devices)
    files: ModelFiles = field(default_factory=ModelFiles)
    typical_prompt_tokens: int = 1
    measured_loads: Callable[[], Sequence[float]] | None = None

    def order(self, action: StartEngine, time_scale: float) -> LaunchSpec:
        """Return the order for an engine that is to start; it takes `time_scale` real seconds per second of the run."""
        plan, configuration = action.plan, action.plan.configuration
        spec = EngineSpec(
            deployment_id=action.deployment_id,
            generation=action.generation,
            model=plan.model.name,
            config_json=self.files.config(plan.model),
            tp=configuration.tp,
            pp=configuration.pp,
            layer_split=plan.layer_split,
            weights=configuration.weights.value,
            kv=configuration.kv.value,
            batch_size=configuration.batch_size,
            devices=self.devices.names(plan.gpu_ids),
            seed=self.settings.seed,
            weights_folder=self.files.weights_folder(plan.model),
            time_scale=time_scale,
        )
        needed = dict(zip(plan.gpu_ids, plan.gpu_bytes, strict=True))
        return LaunchSpec(spec=spec, needed=needed, load_s=seconds(self.load_time(plan)))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """An engine that served: what it says of itself, and how long it took to start, in real seconds."""

    order: LaunchSpec
    loaded: Loaded
    start_s: float


def world_of(
    scenario: ServingSystem, devices: Devices, files: ModelFiles, measured_loads: Callable[[], Sequence[float]] | None
) -> World:
    """Return what a body needs to know of a scenario.

    Raises:
        InputError: recorded service times are wanted, but the workload has none.
    """
    return World(
        cluster=scenario.cluster,
        policy=scenario.policy,
        settings=scenario.settings,
        predict_service_time=scenario.predict_service_time,
        service=service_times_for(scenario),
        load_time=scenario.load_time,
        devices=devices,
        files=files,
        measured_loads=measured_loads,
    )
