"""From the settings of a model set's engine to the arguments of the engine that really runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.engine.other_settings import ExclusiveSettings
from maveriq.engine.reading import read_engine_settings
from maveriq.engine.settings import ResolvedSettings
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError
from maveriq.exec.engines.continuous import CONTINUOUS_BACKENDS
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.messages import BatchingSpec
from maveriq.scenario.continuous_engines import ContinuousEngines, SizedEngine
from maveriq.scenario.live_engines import LiveEngines
from maveriq.workload.model_sets import ContinuousSettings

EMULATED = "emulated"

_OF_CONFIGURATION = (
    "version", "tensor_parallel_size", "pipeline_parallel_size", "quantization", "kv_cache_dtype", "offline",
    "performance_mode",
)  # fmt: skip
"""Settings that are no arguments: the deployment's configuration has them, or they only choose other defaults."""


def check_batching(engines: ContinuousEngines, backend: str) -> None:
    """Check that a backend's engines batch continuously, as the engines of a model set do.

    Raises:
        InputError: they do not, or they are of another kind.
    """
    for endpoint_id, settings in engines.settings.items():
        if reason := why_not_run(settings, backend):
            raise InputError(f"model set: the engine of model {endpoint_id} batches continuously, and {reason}")


def batching_specs(engines: ContinuousEngines) -> Callable[[EndpointSpec, DeploymentPlan], BatchingSpec]:
    """Return what gives the settings of an engine, with the defaults with which it is also simulated."""

    def batching_of(endpoint: EndpointSpec, plan: DeploymentPlan) -> BatchingSpec:
        resolved = engines.sized(endpoint, plan.configuration).resolved
        return batching_spec(engines.settings[endpoint.endpoint_id], resolved)

    return batching_of


def batching_spec(settings: ContinuousSettings, resolved: ResolvedSettings) -> BatchingSpec:
    """Return settings as arguments of the engine itself.

    Defaults that limit steps and sequences are those of the resolved settings, so that a run is comparable with its
    simulation. Other arguments are passed where they differ from their default; the size of a block also where their
    number is given.

    Raises:
        InputError: maveriq does not run engines of this kind.
    """
    if not isinstance(settings, VllmSettings):
        raise InputError(f"maveriq runs no engines of kind {_kind(settings)!r} that batch continuously")
    given = msgspec.structs.asdict(settings)
    usual = msgspec.structs.asdict(VllmSettings())
    arguments = {name: value for name, value in given.items() if value != usual[name] and name not in _OF_CONFIGURATION}
    blocks = arguments.pop("num_gpu_blocks", None)
    if blocks is not None:
        arguments |= {"num_gpu_blocks_override": blocks, "block_size": resolved.block_size}
    return BatchingSpec(
        kind=_kind(settings),
        arguments=arguments
        | {
            "max_num_seqs": resolved.max_num_seqs,
            "max_num_batched_tokens": resolved.max_num_batched_tokens,
            "max_model_len": resolved.max_model_len,
            "gpu_memory_utilization": resolved.memory_share,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "enable_chunked_prefill": settings.enable_chunked_prefill,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """How the engines of a service batch: what a request to deploy may ask for, and what it gets otherwise.

    Args:
        backend: of the service.
        default: settings of engines that batch continuously, None for engines that take one execution at a time.
        whole_command: whether the default is a whole command.
    """

    backend: str = "emulated"
    default: ContinuousSettings | None = None
    whole_command: bool = False

    @classmethod
    def of(cls, backend: str, text: str | None) -> EngineChoice:
        """Return the choice for what the user gave as the default; None leaves it to the backend.

        Raises:
            InputError: it cannot be read, or the backend's engines do not batch so.
        """
        usual = VllmSettings() if backend == "vllm" else None
        if text is None:
            return cls(backend=backend, default=usual)
        default, whole_command = cls(backend=backend).settings(text)
        return cls(backend=backend, default=default, whole_command=whole_command)

    def settings(self, given: Mapping[str, Any] | str | None) -> tuple[ContinuousSettings | None, bool]:
        """Return the settings that a request gets, and whether they are a whole command.

        Args:
            given: as in a model set: a table, a kind, or a command line; None for the default.

        Raises:
            InputError: they cannot be read, or the backend's engines do not batch so.
        """
        if given is None:
            return self.default, self.whole_command
        settings = read_engine_settings(given)
        if isinstance(settings, ExclusiveSettings):
            return None, False
        if reason := why_not_run(settings, self.backend):
            raise InputError(f"engine: {reason}")
        return settings, isinstance(given, str) and len(given.split()) > 1


def settings_table(settings: ContinuousSettings) -> dict[str, Any]:
    """Return settings as a table that `read_engine_settings` reads, without those that are left to defaults."""
    given = msgspec.structs.asdict(settings)
    usual = msgspec.structs.asdict(type(settings)())
    chosen = {name: value for name, value in given.items() if value != usual[name] or name == "version"}
    return {"kind": _kind(settings), **chosen}


def why_not_run(settings: ContinuousSettings, backend: str) -> str | None:
    """Return why a backend does not run engines with these settings, None if it does."""
    if backend not in CONTINUOUS_BACKENDS:
        possible = " or ".join(name for name in BACKENDS if name in CONTINUOUS_BACKENDS)
        return f"maveriq runs {backend} engines one execution at a time; use --backend {possible}"
    kind = _kind(settings)
    if kind != backend and backend != EMULATED:
        return f"--backend {backend} does not run engines of kind {kind!r}; --backend emulated emulates them"
    return None


def live_batching_specs(live: LiveEngines, backend: str) -> Callable[[EndpointSpec, DeploymentPlan], BatchingSpec]:
    """Return what gives the settings of an engine of a service."""
    if backend != EMULATED:
        return batching_specs(live.engines)

    def batching_of(endpoint: EndpointSpec, plan: DeploymentPlan) -> BatchingSpec:
        return _emulated_spec(live.engines.sized(endpoint, plan.configuration), endpoint)

    return batching_of


def _emulated_spec(sized: SizedEngine, endpoint: EndpointSpec) -> BatchingSpec:
    """Return the arguments of an emulated engine: limits as resolved, times of a typical request that is alone."""
    alone = sized.estimator.service(
        endpoint.model,
        sized.configuration,
        prompt_tokens=endpoint.prompt_tokens,
        output_tokens=endpoint.output_tokens,
        batch=1,
        max_step_tokens=sized.resolved.max_num_batched_tokens,
    )
    return BatchingSpec(
        kind=EMULATED,
        arguments={
            "max_num_seqs": sized.resolved.max_num_seqs,
            "max_num_batched_tokens": sized.resolved.max_num_batched_tokens,
            "kv_tokens": sized.kv_tokens,
            "step_ms": 1e3 * alone.tpot_s,
            "prompt_token_us": 1e6 * max(0.0, alone.ttft_s) / endpoint.prompt_tokens,
        },
    )


def _kind(settings: ContinuousSettings) -> str:
    return str(settings.__struct_config__.tag)
