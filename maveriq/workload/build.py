"""The workload of a run, put together: a trace, a model set, lengths and latency objectives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from maveriq.domain.deployments import EndpointSpec, Intent
from maveriq.errors import InputError
from maveriq.units import duration_micros
from maveriq.workload.arrivals import Draw, deploy_times, published_draw, staged_poisson, staged_poisson_as_published
from maveriq.workload.lengths import (
    Lengths,
    azure_lengths,
    fixed_lengths,
    parse_length,
    recorded_lengths,
    sharegpt_lengths,
)
from maveriq.workload.model_sets import ModelSet, load_model_set
from maveriq.workload.requests import Arrivals, Workload
from maveriq.workload.traces import AzureTrace, PoissonTrace, Schedule, Trace, load_trace

DEFAULT_SCALE = 0.4
DEFAULT_PROMPTS = "sharegpt"
DEFAULT_OUTPUTS = "20"

_MAX_SLO_S = 1e9  # no request misses it, and its microseconds fit into 64 bits

SloOf: TypeAlias = Callable[[str, int], float | None]
"""Latency in seconds of a model's request with so many output tokens at SLO scale 1; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """The options of a workload; the defaults are those of the published runs.

    Args:
        trace: `code`, `conversation`, `poisson`, or the path of an Azure trace or a schedule.
        scale: factor on the rate; None for 0.4, and the only choice for a schedule.
        models: name of a model set, or the path of its TOML file.
        prompt_tokens: `sharegpt`, `trace` or a number; None for a schedule's own, else `sharegpt`.
        output_tokens: `trace` or a number; None for a schedule's own, else 20.
        slo_scale: latency objectives in multiples of the model's own latency; 0 for none but a schedule's own.
        seed: of all random streams.
        poisson_as_published: draw the Poisson stages as the published generator did.

    Raises:
        InputError: a number out of range.
    """

    trace: str = "code"
    scale: float | None = None
    models: str = "large"
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    slo_scale: float = 0.0
    seed: int = 42
    poisson_as_published: bool = False

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"scale must be a positive number, not {self.scale}")
        if not (math.isfinite(self.slo_scale) and self.slo_scale >= 0):
            raise InputError(f"SLO scale must be 0 (no SLO) or a positive number, not {self.slo_scale}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must lie between 0 and {(1 << 32) - 1}, not {self.seed}")


def build_workload(options: WorkloadOptions, *, intent: Intent, slo_of: SloOf, batch_size: int = 1) -> Workload:
    """Put a workload together.

    Args:
        options: the options.
        intent: of every endpoint, unless its model set overrides it; with an SLO scale, each
            endpoint gets the SLO of a typical request.
        slo_of: latency at SLO scale 1, see `SloOf`.
        batch_size: of every endpoint.

    Returns:
        Endpoints 1, 2, ... in the order of the model set, and the requests.

    Raises:
        InputError: options that do not fit together, a file that cannot be used, no request at all.
    """
    trace = load_trace(options.trace)
    models = load_model_set(options.models)
    draw = _draw(trace, options, models.load_at)
    prompts, outputs = _lengths(trace, options, draw)
    slo_us = _request_slos(options.slo_scale, slo_of, models, draw, outputs)
    recorded = trace.arrivals if isinstance(trace, Schedule) else None
    arrivals = Arrivals(
        arrival_us=draw.arrival_us,
        endpoint_id=draw.endpoint_id,
        prompt_tokens=prompts.tokens,
        output_tokens=outputs.tokens,
        slo_us=recorded.slo_us if recorded and not options.slo_scale else slo_us,
        service_us=recorded.service_us if recorded else None,
        priority=recorded.priority if recorded else None,
    )
    endpoints = []
    for endpoint_id, (entry, requested_us) in enumerate(
        zip(models.entries, deploy_times(models.load_at), strict=True), start=1
    ):
        wanted = entry.intent(intent)
        if options.slo_scale:
            wanted = replace(wanted, slo_s=options.slo_scale * _slo_s(slo_of, entry.model.name, outputs.typical))
        endpoints.append(
            EndpointSpec(
                endpoint_id=endpoint_id,
                model=entry.model,
                intent=wanted,
                requested_us=requested_us,
                prompt_tokens=prompts.typical,
                output_tokens=outputs.typical,
                batch_size=batch_size,
            )
        )
    return Workload(name=f"{trace.name} on {models.name}", endpoints=tuple(endpoints), arrivals=arrivals)


def _draw(trace: Trace, options: WorkloadOptions, load_at: tuple[int, ...]) -> Draw:
    if options.poisson_as_published and not isinstance(trace, PoissonTrace):
        raise InputError(f"poisson-as-published applies to the trace 'poisson', not to {trace.name!r}; leave it out")
    if isinstance(trace, Schedule):
        return _recorded_draw(trace, options, len(load_at))
    scale = DEFAULT_SCALE if options.scale is None else options.scale
    if isinstance(trace, AzureTrace):
        return published_draw(trace.requests_per_minute, scale=scale, load_at=load_at, seed=options.seed)
    stages = staged_poisson_as_published if options.poisson_as_published else staged_poisson
    return stages(scale=scale, load_at=load_at, seed=options.seed)


def _recorded_draw(trace: Schedule, options: WorkloadOptions, models: int) -> Draw:
    if options.scale is not None:
        raise InputError(f"schedule {trace.name!r} is replayed as it was recorded; leave out the scale")
    endpoints = trace.arrivals.endpoint_id
    if endpoints.max() > models:
        raise InputError(
            f"schedule {trace.name!r} has requests for endpoint {endpoints.max()}, but the model set"
            f" {options.models!r} has {models} models; give the model set it was recorded with"
        )
    return Draw(
        arrival_us=trace.arrivals.arrival_us, endpoint_id=endpoints, bin_index=np.zeros(len(endpoints), np.int64)
    )


def _lengths(trace: Trace, options: WorkloadOptions, draw: Draw) -> tuple[Lengths, Lengths]:
    """Return prompts and outputs."""
    default = ("trace", "trace") if isinstance(trace, Schedule) else (DEFAULT_PROMPTS, DEFAULT_OUTPUTS)
    prompt_spec = default[0] if options.prompt_tokens is None else options.prompt_tokens
    output_spec = default[1] if options.output_tokens is None else options.output_tokens
    prompt = parse_length(prompt_spec, "prompt tokens", ("sharegpt", "trace"))
    output = parse_length(output_spec, "output tokens", ("trace",))
    own = _own_lengths(trace, draw, options.seed) if "trace" in (prompt, output) else None
    return (
        _chosen(prompt, own[0] if own else None, len(draw), options.seed),
        _chosen(output, own[1] if own else None, len(draw), options.seed),
    )


def _own_lengths(trace: Trace, draw: Draw, seed: int) -> tuple[Lengths, Lengths]:
    if isinstance(trace, AzureTrace):
        return azure_lengths(trace, draw, seed)
    if isinstance(trace, Schedule):
        return recorded_lengths(trace.arrivals.prompt_tokens), recorded_lengths(trace.arrivals.output_tokens)
    raise InputError(f"trace {trace.name!r} has no lengths of its own; give a number of tokens instead of 'trace'")


def _chosen(spec: int | str, own: Lengths | None, requests: int, seed: int) -> Lengths:
    if isinstance(spec, int):
        return fixed_lengths(spec, requests)
    if spec == "trace" and own:
        return own
    return sharegpt_lengths(requests, seed)


def _request_slos(
    slo_scale: float, slo_of: SloOf, models: ModelSet, draw: Draw, outputs: Lengths
) -> np.ndarray[Any, Any]:
    """Return every request's SLO for its own output tokens, in µs; 0 for none."""
    slo_us = np.zeros(len(draw), np.int64)
    if not slo_scale:
        return slo_us
    for endpoint_id, entry in enumerate(models.entries, start=1):
        mine = draw.endpoint_id == endpoint_id
        lengths, which = np.unique(outputs.tokens[mine], return_inverse=True)
        slos_s = (slo_scale * _slo_s(slo_of, entry.model.name, tokens) for tokens in lengths.tolist())
        slos = [duration_micros(min(slo_s, _MAX_SLO_S)) for slo_s in slos_s]
        slo_us[mine] = np.array(slos, np.int64)[which]
    return slo_us


def _slo_s(slo_of: SloOf, model: str, output_tokens: int) -> float:
    slo_s = slo_of(model, output_tokens)
    if slo_s is None:
        raise InputError(f"model {model!r} has no measured latency to scale an SLO from; give SLO scale 0")
    return slo_s
