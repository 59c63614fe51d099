"""The continuous engines of a model set: their model, how long their steps take, and how many KV blocks they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from maveriq.domain.deployments import Batching, EndpointSpec
from maveriq.domain.gpu_kinds import gpu_sheet
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import DeploymentPlan, ParallelConfig
from maveriq.engine.interface import Engine
from maveriq.engine.settings import EngineHost, ResolvedSettings
from maveriq.errors import InputError
from maveriq.estimate.blended_steps import continuous_estimator, measured_engine
from maveriq.estimate.cluster_profiles import ClusterProfiles
from maveriq.estimate.engine_presets import EnginePreset, engine_preset
from maveriq.estimate.physics import PhysicsEstimator
from maveriq.estimate.pipeline_timer import PipelineTimer
from maveriq.estimate.step_timer import StepTimer
from maveriq.units import Micros
from maveriq.workload.model_sets import ContinuousSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What a continuous engine is made of.

    Args:
        engine: decides what each step computes; it has no request yet.
        timer: how long a step takes, in a pipeline in each of its stages.
        admission_delay_us: time from the arrival of a request with so many prompt tokens to the engine's queue, while
            so many other requests have not ended.
    """

    engine: Engine
    timer: StepTimer | PipelineTimer
    admission_delay_us: Callable[[int, int], Micros]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedEngine:
    """An engine in a configuration, before it starts.

    Args:
        resolved: its settings.
        blocks: KV blocks, those that no sequence gets included.
        estimator: of its times.
        configuration: without what depends on its place, but with the layers of its stages.
    """

    resolved: ResolvedSettings
    blocks: int
    estimator: PhysicsEstimator
    configuration: ParallelConfig

    @property
    def kv_tokens(self) -> int:
        """Tokens that its sequences can hold."""
        return (self.blocks - self.resolved.reserved_blocks) * self.resolved.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ContinuousEngines:
    """Makes the continuous engines of a run.

    Args:
        settings: of the engines, by endpoint.
        profiles: of the GPUs.
        largest_node: GPUs of the largest node with GPUs of a kind.
        blended: kinds of GPU on which step times are corrected by what the profile measured.
    """

    settings: Mapping[int, ContinuousSettings]
    profiles: ClusterProfiles
    largest_node: Callable[[str], int]
    blended: frozenset[str] = frozenset()
    _estimators: dict[tuple[str, str], PhysicsEstimator] = field(default_factory=dict)

    def parts(self, endpoint: EndpointSpec, plan: DeploymentPlan) -> EngineParts:
        """Return a new engine without requests.

        Raises:
            InputError: its settings contradict each other, or its KV blocks do not hold its longest sequence.
        """
        sized = self.sized(endpoint, plan.configuration)
        try:
            engine = sized.resolved.make_engine(sized.blocks)
        except InputError as error:
            raise InputError(f"{_name(endpoint)}: {error}") from None
        return EngineParts(
            engine=engine,
            timer=self._timer(plan, sized),
            admission_delay_us=admission_delay(sized.estimator.engine, max_num_seqs=sized.resolved.max_num_seqs),
        )

    @staticmethod
    def _timer(plan: DeploymentPlan, sized: SizedEngine) -> StepTimer | PipelineTimer:
        if plan.configuration.pp == 1:
            return sized.estimator.step_timer(plan.model, sized.configuration)
        return sized.estimator.pipeline_timer(plan.model, replace(sized.configuration, layer_split=plan.layer_split))

    def sized(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> SizedEngine:
        """Return the settings of an engine in a configuration, and its KV blocks.

        Raises:
            InputError: as `parts`.
        """
        settings = self.settings[endpoint.endpoint_id]
        resolved = self._resolve(settings, endpoint.model, configuration)
        estimator = self.estimator(endpoint, configuration.gpu)
        plain = replace(configuration, gpu="", network_hops=0)
        blocks = resolved.num_gpu_blocks
        if blocks is None:
            blocks = _predicted_blocks(resolved, estimator, endpoint.model, plain)
        return SizedEngine(resolved=resolved, blocks=blocks, estimator=estimator, configuration=plain)

    def notes_on_computed_steps(self) -> list[str]:
        """Return a note for each engine whose steps are computed though the profile measured another one's."""
        found = {}
        for profile in self.profiles.by_kind.values():
            for settings in self.settings.values():
                name = engine_name(settings)
                if profile.gpu_kind in self.blended and not measured_engine(profile, engine_preset(name)):
                    found[name, profile.name] = (
                        f"steps of {name} are computed: profile {profile.name} measured {profile.engine}"
                    )
        return list(found.values())

    def sequence_limit(self, endpoints: Iterable[EndpointSpec]) -> Callable[[ModelSpec], int | None]:
        """Return what tells the longest sequence, prompt and output, that all engines of a model take."""
        limits: dict[ModelSpec, int] = {}
        for endpoint in endpoints:
            if endpoint.batching is Batching.EXCLUSIVE:
                continue
            resolved = self.resolved(endpoint)
            limits[endpoint.model] = min(resolved.max_model_len, limits.get(endpoint.model, resolved.max_model_len))
        return limits.get

    def resolved(self, endpoint: EndpointSpec) -> ResolvedSettings:
        """Return the settings of an endpoint's engines, before their configuration is known.

        Raises:
            InputError: they contradict each other, or the kind of GPU is not known.
        """
        return self._resolve(self.settings[endpoint.endpoint_id], endpoint.model, endpoint.configuration)

    def _resolve(
        self, settings: ContinuousSettings, model: ModelSpec, configuration: ParallelConfig | None
    ) -> ResolvedSettings:
        if configuration is not None and settings.pipeline_parallel_size != configuration.pp:
            settings = msgspec.structs.replace(settings, pipeline_parallel_size=configuration.pp)
        profile = self.profiles.main if configuration is None else self.profiles.of(configuration)
        sheet = profile.sheet or gpu_sheet(profile.gpu_kind)
        context_tokens = model.context_tokens
        if context_tokens is None:
            raise InputError(f"model {model.name!r} does not say how long its context is; set max_model_len")
        return settings.resolve(
            EngineHost(context_tokens=context_tokens, gpu_name=sheet.name, gpu_memory_gib=sheet.usable_gib)
        )

    def estimator(self, endpoint: EndpointSpec, kind: str) -> PhysicsEstimator:
        """Return what estimates the engines of an endpoint on a kind of GPU; "" where the cluster has only one."""
        profile = self.profiles.by_kind[kind] if kind else self.profiles.main
        name = engine_name(self.settings[endpoint.endpoint_id])
        key = (profile.gpu_kind, name)
        if key not in self._estimators:
            self._estimators[key] = continuous_estimator(
                profile,
                engine_preset(name),
                node_gpus=self.largest_node(profile.gpu_kind),
                blended=profile.gpu_kind in self.blended,
            )
        return self._estimators[key]


def _name(endpoint: EndpointSpec) -> str:
    return f"endpoint {endpoint.endpoint_id} ({endpoint.model.name})"


def engine_name(settings: ContinuousSettings) -> str:
    """Return the engine and its version, as presets are looked up: vllm-0.23.0."""
    return f"{settings.__struct_config__.tag}-{settings.version}"


def _predicted_blocks(
    resolved: ResolvedSettings, estimator: PhysicsEstimator, model: ModelSpec, configuration: ParallelConfig
) -> int:
    settings = replace(
        estimator.settings(configuration),
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        block_size=resolved.block_size,
        gpu_memory_utilization=resolved.memory_share,
        is_share_of_free=resolved.is_share_of_free,
    )
    return estimator.kv_blocks(model, configuration, settings)


@dataclass(frozen=True, slots=True)
class AdmissionDelay:
    """Tells the time from a request's arrival to its engine's queue.

    Args:
        preset: of the engine.
        max_num_seqs: requests that run together at most. Where its KV cache holds fewer, the delay is overstated.
    """

    preset: EnginePreset
    max_num_seqs: int

    def __call__(self, prompt_tokens: int, requests: int) -> Micros:
        """Return the time for a prompt of a length, while so many other requests have not ended."""
        running = min(requests, self.max_num_seqs)
        return round(self.preset.first_token_delay_us(prompt_tokens, running=running))


def admission_delay(preset: EnginePreset, *, max_num_seqs: int) -> AdmissionDelay:
    """Return what tells the time from a request's arrival to its engine's queue; see there for the arguments."""
    return AdmissionDelay(preset, max_num_seqs)
