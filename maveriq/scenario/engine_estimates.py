"""What a policy knows beforehand of continuous engines: the configurations that run, and their times at a load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ParallelConfig
from maveriq.engine.vllm_settings import vllm_layers_of_stages
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator, ServiceEstimate
from maveriq.estimate.load_curve import LoadCurve
from maveriq.policy.configuration import NO_ROOM, RejectedConfig
from maveriq.scenario.continuous_engines import ContinuousEngines, SizedEngine
from maveriq.workload.model_sets import ContinuousSettings

_EngineKey: TypeAlias = tuple[ContinuousSettings, ModelSpec]
"""What engines of a kind have in common, whichever endpoint they serve."""

_LoadKey: TypeAlias = tuple[_EngineKey, int, int]
"""The same with the lengths of prompts and outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEngines:
    """The estimates of a run's engines, from the same physics as their simulated steps.

    They know the typical request of an endpoint, or the mean one of its load, but neither what a prefix cache will find
    nor how uneven arrivals are.

    Args:
        engines: makes them.
        restrict: wraps an estimator in one that rejects what the engines of a backend do not support; None where any
            configuration can be simulated.
    """

    engines: ContinuousEngines
    restrict: Callable[[Estimator], Estimator] | None = None
    _sized: dict[_EngineKey, dict[ParallelConfig, SizedEngine]] = field(default_factory=dict)
    _curves: dict[_LoadKey, dict[ParallelConfig, LoadCurve]] = field(default_factory=dict)

    def configurations(self, endpoint: EndpointSpec, *, kind: str, gpus: int) -> Iterable[ParallelConfig]:
        """Return the configurations to consider on up to so many GPUs of a kind, in the order that breaks ties.

        Whole experts are dealt to all GPUs of a stage or to none. Pipelines are considered only where the user names
        their stages: estimates have them evenly filled, and in the simulation long prompts hold up short steps.
        """
        considered: Iterable[ParallelConfig]
        if endpoint.configuration is not None:
            considered = [endpoint.configuration]
        else:
            estimator = self.engines.estimator(endpoint, kind)
            considered = (
                configuration
                for configuration in estimator.configurations(
                    endpoint.model, gpus=gpus, batch_size=1, stages=endpoint.pattern.pp or 1
                )
                if configuration.ep in (1, configuration.tp) and endpoint.pattern.allows(configuration)
            )
        return [self._on_kind(endpoint.model, configuration, kind) for configuration in considered]

    @staticmethod
    def _on_kind(model: ModelSpec, configuration: ParallelConfig, kind: str) -> ParallelConfig:
        """Return a configuration on a kind of GPU, with the layers that the engine gives each stage."""
        split = configuration.layer_split
        if not split and 1 < configuration.pp <= model.layers:
            split = vllm_layers_of_stages(model.layers, configuration.pp)  # no other engine has stages here
        return replace(configuration, gpu=kind, layer_split=split)

    def why_not(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> RejectedConfig | None:
        """Return why an engine cannot run so, None if it can."""
        estimator: Estimator = self.engines.estimator(endpoint, configuration.gpu)
        if self.restrict is not None:
            estimator = self.restrict(estimator)
        if reason := estimator.why_not(endpoint.model, replace(configuration, gpu="")):
            return RejectedConfig(configuration=configuration, reason=reason)
        if endpoint.configuration is not None:
            return None  # if its engine does not start, it says itself why
        try:
            sized = self._sized_engine(endpoint, configuration)
        except InputError as error:
            return RejectedConfig(configuration=configuration, reason=str(error))
        if (reason := sized.resolved.why_too_few_blocks(sized.blocks)) is not None:
            return RejectedConfig(configuration=configuration, reason=NO_ROOM, detail=reason)
        return None

    def load_curve(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> LoadCurve:
        """Return the times of an engine's requests, from idle to full."""
        mean = endpoint.load or endpoint  # both have lengths
        key = (self._engine_key(endpoint), mean.prompt_tokens, mean.output_tokens)
        curves = self._curves.setdefault(key, {})
        if configuration not in curves:
            curves[configuration] = _load_curve(
                endpoint.model,
                self._sized_engine(endpoint, configuration),
                prompt_tokens=mean.prompt_tokens,
                output_tokens=mean.output_tokens,
            )
        return curves[configuration]

    def _engine_key(self, endpoint: EndpointSpec) -> _EngineKey:
        return self.engines.settings[endpoint.endpoint_id], endpoint.model

    def _sized_engine(self, endpoint: EndpointSpec, configuration: ParallelConfig) -> SizedEngine:
        """Return an engine before it starts; the same for all endpoints with equal models and settings."""
        sized = self._sized.setdefault(self._engine_key(endpoint), {})
        if configuration not in sized:
            sized[configuration] = self.engines.sized(endpoint, configuration)
        return sized[configuration]


def _load_curve(model: ModelSpec, sized: SizedEngine, *, prompt_tokens: int, output_tokens: int) -> LoadCurve:
    # A sequence holds its prompt, and on average half of its output.
    room = sized.kv_tokens // (prompt_tokens + output_tokens // 2)

    def service_of(in_flight: int) -> ServiceEstimate:
        return sized.estimator.service(
            model,
            sized.configuration,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            batch=in_flight,
            max_step_tokens=sized.resolved.max_num_batched_tokens,
        )

    return LoadCurve(service_of, max(1, min(sized.resolved.max_num_seqs, room)))
