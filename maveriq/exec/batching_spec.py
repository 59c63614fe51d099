"""From the settings of a model set's engine to the arguments of the engine that really runs."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from maveriq.domain.deployments import EndpointSpec
from maveriq.domain.parallel import DeploymentPlan
from maveriq.engine.settings import ResolvedSettings
from maveriq.engine.vllm_settings import VllmSettings
from maveriq.errors import InputError
from maveriq.exec.engines.continuous import CONTINUOUS_BACKENDS
from maveriq.exec.engines.engine import BACKENDS
from maveriq.exec.messages import BatchingSpec
from maveriq.scenario.continuous_engines import ContinuousEngines
from maveriq.workload.model_sets import ContinuousSettings

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
    if backend not in CONTINUOUS_BACKENDS:
        possible = ", ".join(name for name in BACKENDS if name in CONTINUOUS_BACKENDS)
        raise InputError(
            f"model set: its engines batch continuously, and maveriq runs {backend} engines one execution at a time; "
            f"use --backend {possible}, or maveriq sim"
        )
    for endpoint_id, settings in engines.settings.items():
        kind = _kind(settings)
        if kind != backend and backend != "emulated":
            raise InputError(
                f"model set: the engine of model {endpoint_id} is of kind {kind!r}, which --backend {backend} does not "
                f"run; use --backend {kind if kind in CONTINUOUS_BACKENDS else 'emulated'}, or maveriq sim"
            )


def batching_specs(engines: ContinuousEngines) -> Callable[[EndpointSpec, DeploymentPlan], BatchingSpec]:
    """Return what gives the settings of an engine, with the defaults with which it is also simulated."""

    def batching_of(endpoint: EndpointSpec, plan: DeploymentPlan) -> BatchingSpec:
        resolved = engines.sized(endpoint, plan.configuration).resolved
        return batching_spec(engines.settings[endpoint.endpoint_id], resolved)

    return batching_of


def batching_spec(settings: ContinuousSettings, resolved: ResolvedSettings) -> BatchingSpec:
    """Return settings as arguments of the engine itself.

    Defaults that limit steps and sequences are those of the resolved settings, so that a run is comparable with its
    simulation. Other arguments are passed where they differ from their default.

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
        arguments["num_gpu_blocks_override"] = blocks
    return BatchingSpec(
        kind=_kind(settings),
        arguments=arguments
        | {
            "max_num_seqs": resolved.max_num_seqs,
            "max_num_batched_tokens": resolved.max_num_batched_tokens,
            "max_model_len": resolved.max_model_len,
            "block_size": resolved.block_size,
            "gpu_memory_utilization": resolved.memory_share,
            "enable_prefix_caching": settings.enable_prefix_caching,
            "enable_chunked_prefill": settings.enable_chunked_prefill,
        },
    )


def _kind(settings: ContinuousSettings) -> str:
    return str(settings.__struct_config__.tag)
