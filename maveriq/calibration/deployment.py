"""A deployment of a continuous engine whose requests were recorded, and that replays them with other times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from maveriq.domain.deployments import Batching, EndpointSpec, Intent, Objective
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.domain.requests import Request
from maveriq.errors import InputError
from maveriq.estimate.cluster_profiles import ClusterProfiles, profiles_for
from maveriq.estimate.cluster_spec import gpu_kinds_in
from maveriq.estimate.engine_presets import EnginePreset, EngineTimes, engine_preset
from maveriq.estimate.hardware_profile import DEFAULT_PROFILE, HardwareProfile
from maveriq.scenario.continuous_engines import ContinuousEngines, engine_name
from maveriq.sim.engine_replay import RequestTimes, replay_on_engine
from maveriq.units import bytes_from_gib
from maveriq.workload.model_sets import ContinuousSettings, load_model_set

_ENDPOINT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One engine: a model, how it is parallelised and stored, the engine's settings, and the kind of its GPUs."""

    model: ModelSpec
    configuration: ParallelConfig
    settings: ContinuousSettings
    profile: HardwareProfile

    @property
    def preset(self) -> EnginePreset:
        """The preset of its engine's version, with the times of the profile where it has any."""
        return self.profile.engine_preset(engine_preset(engine_name(self.settings)))

    def replay(
        self, requests: Sequence[Request], times: EngineTimes | None = None, *, max_in_flight: int | None = None
    ) -> RequestTimes:
        """Replay requests on the engine, alone.

        Args:
            requests: ordered by arrival.
            times: of the engine; None for those of its preset.
            max_in_flight: of the client, as for `replay_on_engine`.

        Raises:
            InputError: the engine's settings contradict each other, or it can never serve a request.
        """
        fitted = {} if times is None else {self.preset.name: times}
        profile = replace(self.profile, engine_times={**self.profile.engine_times, **fitted})
        profiles = ClusterProfiles(by_kind={profile.gpu_kind: profile})
        tp = self.configuration.tp  # it ran, so that a node has as many GPUs
        engines = ContinuousEngines(
            settings={_ENDPOINT: self.settings}, profiles=profiles, largest_node=lambda _kind: tp
        )
        return replay_on_engine(engines.parts(self._endpoint(), self._plan()), requests, max_in_flight=max_in_flight)

    def _endpoint(self) -> EndpointSpec:
        return EndpointSpec(
            endpoint_id=_ENDPOINT, model=self.model, intent=Intent(objective=Objective.MIN_COST), requested_us=0,
            prompt_tokens=1, output_tokens=1, configuration=self.configuration, batching=Batching.CONTINUOUS,
        )  # fmt: skip

    def _plan(self) -> DeploymentPlan:
        gpus = self.configuration.gpus
        return DeploymentPlan(
            model=self.model, configuration=self.configuration, gpu_ids=tuple(range(gpus)),
            gpu_bytes=(bytes_from_gib(1.0),) * gpus, est_latency_s=0.0, est_memory_bytes=0,
        )  # fmt: skip


def read_deployment(models: str, gpus: str, profile: str = DEFAULT_PROFILE) -> Deployment:
    """Return the deployment of a model set with one model on a continuous engine.

    Args:
        models: the model set, as `--models` takes it.
        gpus: the cluster, as `--gpus` takes it: of one kind.
        profile: as `--profile` takes it.

    Raises:
        InputError: a file is missing or invalid, or there are several models, kinds of GPU, or no continuous engine.
    """
    entries, kinds = load_model_set(models).entries, gpu_kinds_in(gpus)
    if len(entries) != 1:
        raise InputError(f"model set {models!r} has {len(entries)} models; a fit is to the requests of one")
    if len(kinds) > 1:
        raise InputError(f"cluster {gpus!r} has GPUs of {len(kinds)} kinds; a fit is to a deployment on one kind")
    entry = entries[0]
    if entry.engine is None or entry.configuration is None:
        what, add = ("engine that batches continuously", "[models.engine] with a kind and a version")
        if entry.engine is not None:
            what, add = "configuration", "the tp that the deployment had"
        raise InputError(f"model set {models!r} names no {what}; add {add}")
    return Deployment(
        model=entry.model, configuration=entry.configuration, settings=entry.engine,
        profile=profiles_for(profile, gpus).main,
    )  # fmt: skip
