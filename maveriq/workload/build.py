"""The workload of a run, put together: a trace, a model set, lengths and latency objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from maveriq.domain.deployments import EndpointSpec, Intent
from maveriq.engine.settings import EngineHost
from maveriq.errors import InputError, InvariantError, UnknownNameError
from maveriq.units import duration_micros
from maveriq.workload.arrivals import (
    MAX_REQUESTS,
    Draw,
    constant_offsets,
    deploy_times,
    poisson_offsets,
    published_draw,
    spread_over_models,
    staged_poisson,
    staged_poisson_as_published,
)
from maveriq.workload.lengths import (
    Lengths,
    counted_lengths,
    fixed_lengths,
    lengths_of_minutes,
    own_lengths,
    parse_length,
    recorded_lengths,
    sharegpt_lengths,
)
from maveriq.workload.model_sets import ModelEntry, ModelSet, load_model_set
from maveriq.workload.requests import Arrivals, Workload, WorkloadSource
from maveriq.workload.trace_formats import WHOLE_TRACE, RequestTrace, TracePart, remarks_on
from maveriq.workload.traces import CONSTANT, POISSON, CountedTrace, Schedule, SyntheticLoad, Trace, load_trace

DEFAULT_SCALE = 0.4
"""Of the traces that are known by name, as in the published runs; a file is replayed at scale 1."""

DEFAULT_DURATION_S = 600.0
"""Of a load with a rate, if neither its duration nor its number of requests is given."""

ARRIVALS = ("trace", "published")
"""Arrivals at the trace's own times, or redrawn as in the published runs: each minute within 30 s."""

_PUBLISHED_PROMPTS = "sharegpt"
_PUBLISHED_OUTPUTS = "20"
_MAX_SLO_S = 1e9  # no request misses it, and its microseconds fit into 64 bits

SloOf: TypeAlias = Callable[[str, int], float | None]
"""Latency in seconds of a model's request with so many output tokens at SLO scale 1; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """The options of a workload; the defaults are those of the published runs, and a file is replayed as it is.

    Args:
        trace: `code`, `conversation`, `poisson`, `constant`, or the path of a trace or a schedule.
        scale: factor on the rate; None for 0.4 with a name, 1 with a file.
        arrivals: one of `ARRIVALS`; None for `trace` with a file.
        rate: requests a second of `poisson` or `constant`; None for the published Poisson stages.
        duration_s: only the requests of so many seconds from the first one; None for all.
        limit: only so many requests; None for all.
        models: name of a model set, or the path of its TOML file.
        prompt_tokens: `sharegpt`, `trace` or a number; None for a file's own, else `sharegpt`.
        output_tokens: `trace` or a number; None for a file's own, else 20.
        slo_scale: latency objectives in multiples of the model's own latency; 0 for none but a schedule's own.
        seed: of all random streams.
        poisson_as_published: draw the Poisson stages as the published generator did.

    Raises:
        InputError: a number out of range, or an unknown word.
    """

    trace: str = "code"
    scale: float | None = None
    arrivals: str | None = None
    rate: float | None = None
    duration_s: float | None = None
    limit: int | None = None
    models: str = "large"
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    slo_scale: float = 0.0
    seed: int = 42
    poisson_as_published: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "rate", "duration_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name.removesuffix('_s')} must be a positive number, not {value}")
        if self.limit is not None and not 1 <= self.limit <= MAX_REQUESTS:
            raise InputError(f"limit must lie between 1 and {MAX_REQUESTS:,} requests, not {self.limit}")
        if not (math.isfinite(self.slo_scale) and self.slo_scale >= 0):
            raise InputError(f"SLO scale must be 0 (no SLO) or a positive number, not {self.slo_scale}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must lie between 0 and {(1 << 32) - 1}, not {self.seed}")
        if self.arrivals not in (None, *ARRIVALS):
            raise UnknownNameError("arrivals", self.arrivals, ARRIVALS)


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
    trace = load_trace(options.trace, _needed(options))
    models = load_model_set(options.models)
    resolved = _resolved(trace, options)
    whole = _draw(trace, resolved, models.load_at)
    prompts, outputs = _lengths(trace, resolved, whole)
    draw = whole.first(_kept(whole, resolved))
    prompts, outputs = (replace(column, tokens=column.tokens[: len(draw)]) for column in (prompts, outputs))
    slo_us = _request_slos(options.slo_scale, slo_of, models, draw, outputs)
    recorded = trace.arrivals if isinstance(trace, Schedule) else None
    arrivals = Arrivals(
        arrival_us=draw.arrival_us,
        endpoint_id=draw.endpoint_id,
        prompt_tokens=prompts.tokens,
        output_tokens=outputs.tokens,
        slo_us=recorded.slo_us[: len(draw)] if recorded and not options.slo_scale else slo_us,
        service_us=_first(recorded.service_us, len(draw)) if recorded else None,
        priority=_first(recorded.priority, len(draw)) if recorded else None,
        prompt_id=_first(recorded.prompt_id, len(draw)) if recorded else None,
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
                requested_us=0 if entry.load_at is None else requested_us,
                prompt_tokens=prompts.typical,
                output_tokens=outputs.typical,
                batch_size=batch_size,
                configuration=entry.configuration,
                batching=entry.batching,
                memory_share=_memory_share(entry),
                ready_at_start=entry.load_at is None,
            )
        )
    return Workload(
        name=f"{trace.name} on {models.name}",
        endpoints=tuple(endpoints),
        arrivals=arrivals,
        source=_source(trace, resolved, whole, arrivals, endpoints),
    )


def _memory_share(entry: ModelEntry) -> float | None:
    """Return the share of each GPU's memory that a model's engines take; None for what their configuration needs."""
    if entry.engine is None:
        return None
    # The share of vLLM and TensorRT-LLM depends on the engine alone. That of SGLang is taken for a GPU of 80 GB.
    return entry.engine.resolve(EngineHost(context_tokens=entry.model.context_tokens or 1)).memory_share


def _needed(options: WorkloadOptions) -> TracePart:
    """Return the part of a file that is replayed; published arrivals are redrawn from all of it."""
    if options.arrivals == "published":
        return WHOLE_TRACE
    span_s = None if options.duration_s is None else options.duration_s * (options.scale or 1.0)
    return TracePart(requests=options.limit, span_s=span_s)


def _first(column: np.ndarray[Any, Any] | None, requests: int) -> np.ndarray[Any, Any] | None:
    return None if column is None else column[:requests]


def _resolved(trace: Trace, options: WorkloadOptions) -> WorkloadOptions:
    """Return the options with the defaults that depend on the trace; what does not apply stays None.

    Raises:
        InputError: an option does not apply to the trace.
    """
    is_synthetic = isinstance(trace, SyntheticLoad)
    if options.poisson_as_published and trace.name != POISSON:
        raise InputError(f"poisson-as-published applies to the trace 'poisson', not to {trace.name!r}; leave it out")
    if options.rate is not None and not is_synthetic:
        raise InputError(
            f"rate applies to a load without a trace (poisson, constant), not to {trace.name!r}; use scale instead"
        )
    if options.arrivals is not None and is_synthetic:
        raise InputError(f"arrivals applies to traces, not to {trace.name!r}; leave it out")
    if is_synthetic and (options.rate is not None or trace.name == CONSTANT):
        options = _resolved_load(trace.name, options)
    else:
        options = replace(options, scale=_scale(trace, options))
    if not is_synthetic:
        options = replace(options, arrivals=_arrivals(trace, options))
    own = isinstance(trace, (RequestTrace, Schedule))
    prompts, outputs = ("trace", "trace") if own else (_PUBLISHED_PROMPTS, _PUBLISHED_OUTPUTS)
    return replace(
        options,
        prompt_tokens=prompts if options.prompt_tokens is None else options.prompt_tokens,
        output_tokens=outputs if options.output_tokens is None else options.output_tokens,
    )


def _resolved_load(name: str, options: WorkloadOptions) -> WorkloadOptions:
    """Return the options of a load with a rate."""
    if options.rate is None:
        raise InputError(f"trace {name!r} needs a rate; give --rate with the requests a second")
    if options.scale is not None or options.poisson_as_published:
        raise InputError("scale and poisson-as-published apply to the published stages, not to a rate; leave them out")
    if options.duration_s is None and options.limit is None:
        return replace(options, duration_s=DEFAULT_DURATION_S)
    return options


def _scale(trace: Trace, options: WorkloadOptions) -> float:
    if isinstance(trace, Schedule) and options.scale not in (None, 1):
        raise InputError(f"schedule {trace.name!r} is replayed as it was recorded; leave out the scale")
    default = DEFAULT_SCALE if isinstance(trace, (CountedTrace, SyntheticLoad)) else 1.0
    return default if options.scale is None else float(options.scale)


def _arrivals(trace: Trace, options: WorkloadOptions) -> str:
    if isinstance(trace, CountedTrace):
        if options.arrivals == "trace":
            raise InputError(f"trace {trace.name!r} has only counts per minute; give its public file for its own times")
        return "published"
    if isinstance(trace, Schedule) and options.arrivals == "published":
        raise InputError(f"schedule {trace.name!r} is replayed as it was recorded; leave out the arrivals")
    return options.arrivals or "trace"


def _draw(trace: Trace, options: WorkloadOptions, load_at: tuple[int, ...]) -> Draw:
    if isinstance(trace, Schedule):
        return _recorded_draw(trace, options, len(load_at))
    if isinstance(trace, SyntheticLoad):
        return _synthetic_draw(trace, options, load_at)
    if options.scale is None:
        raise InvariantError("the scale of a trace was not resolved")
    if isinstance(trace, RequestTrace) and options.arrivals == "trace":
        offsets_us = np.rint(trace.arrival_us / options.scale).astype(np.int64)
        return spread_over_models(offsets_us, load_at=load_at, seed=options.seed)
    return published_draw(trace.requests_per_minute, scale=options.scale, load_at=load_at, seed=options.seed)


def _synthetic_draw(trace: SyntheticLoad, options: WorkloadOptions, load_at: tuple[int, ...]) -> Draw:
    if options.rate is None:
        stages = staged_poisson_as_published if options.poisson_as_published else staged_poisson
        return stages(scale=options.scale or DEFAULT_SCALE, load_at=load_at, seed=options.seed)
    if trace.name == CONSTANT:
        offsets_us = constant_offsets(rate_per_s=options.rate, duration_s=options.duration_s, requests=options.limit)
    else:
        offsets_us = poisson_offsets(
            rate_per_s=options.rate, duration_s=options.duration_s, requests=options.limit, seed=options.seed
        )
    return spread_over_models(offsets_us, load_at=load_at, seed=options.seed)


def _recorded_draw(trace: Schedule, options: WorkloadOptions, models: int) -> Draw:
    endpoints = trace.arrivals.endpoint_id
    if endpoints.max() > models:
        raise InputError(
            f"schedule {trace.name!r} has requests for endpoint {endpoints.max()}, but the model set"
            f" {options.models!r} has {models} models; give the model set it was recorded with"
        )
    return Draw(
        arrival_us=trace.arrivals.arrival_us, endpoint_id=endpoints, bin_index=np.zeros(len(endpoints), np.int64)
    )


def _kept(draw: Draw, options: WorkloadOptions) -> int:
    """Return how many requests are left: of the duration, and at most the limit."""
    kept = len(draw)
    if options.duration_s is not None and options.rate is None and kept:
        end_us = int(draw.arrival_us[0]) + duration_micros(min(options.duration_s, _MAX_SLO_S))
        kept = int(np.searchsorted(draw.arrival_us, end_us))
    return kept if options.limit is None else min(kept, options.limit)


_RESOLVED = ("scale", "arrivals", "rate", "duration_s", "limit", "prompt_tokens", "output_tokens")


def _source(
    trace: Trace, options: WorkloadOptions, whole: Draw, arrivals: Arrivals, endpoints: Sequence[EndpointSpec]
) -> WorkloadSource:
    """Return what the workload was made of, with what became of every request of the trace."""
    in_trace = _requests_in(trace)
    dropped = {}
    if in_trace is not None and len(whole) < in_trace:
        dropped[f"scale {options.scale:g} (whole requests per minute)"] = in_trace - len(whole)
    if len(arrivals) < len(whole) and not _is_cut(trace):
        by = "limit" if options.limit == len(arrivals) else "duration"
        dropped[by] = len(whole) - len(arrivals)
    late = [
        f"{endpoint.endpoint_id} ({endpoint.model.name})"
        for endpoint in endpoints
        if endpoint.requested_us > int(arrivals.arrival_us[-1])
    ]
    remarks = [f"requested after the last arrival: endpoints {', '.join(late)}"] if late else []
    if isinstance(trace, RequestTrace):
        remarks += remarks_on(trace)
    return WorkloadSource(
        trace=trace.name,
        format_name=_format_name(trace, options),
        options={name: value for name in _RESOLVED if (value := getattr(options, name)) is not None},
        requests_in_trace=in_trace,
        requests=len(arrivals),
        dropped=dropped,
        remarks=tuple(remarks),
    )


def _is_cut(trace: Trace) -> bool:
    """Return whether the trace goes on behind what was read of it."""
    return isinstance(trace, RequestTrace) and not trace.is_whole


def _requests_in(trace: Trace) -> int | None:
    if isinstance(trace, SyntheticLoad) or _is_cut(trace):
        return None
    if isinstance(trace, CountedTrace):
        return int(trace.requests_per_minute.sum())
    return len(trace.arrivals) if isinstance(trace, Schedule) else len(trace)


def _format_name(trace: Trace, options: WorkloadOptions) -> str:
    if isinstance(trace, RequestTrace):
        return trace.format_name
    if isinstance(trace, SyntheticLoad):
        return "stages of two minutes" if options.rate is None else "load without a trace"
    return "schedule" if isinstance(trace, Schedule) else "counts per minute"


def _lengths(trace: Trace, options: WorkloadOptions, draw: Draw) -> tuple[Lengths, Lengths]:
    """Return prompts and outputs."""
    prompt = parse_length(options.prompt_tokens or "", "prompt tokens", ("sharegpt", "trace"))
    output = parse_length(options.output_tokens or "", "output tokens", ("trace",))
    own = _own_lengths(trace, options, draw) if "trace" in (prompt, output) else None
    return (
        _chosen(prompt, own[0] if own else None, len(draw), options.seed),
        _chosen(output, own[1] if own else None, len(draw), options.seed),
    )


def _own_lengths(trace: Trace, options: WorkloadOptions, draw: Draw) -> tuple[Lengths, Lengths]:
    if isinstance(trace, CountedTrace):
        return counted_lengths(trace, len(draw), options.seed)
    if isinstance(trace, RequestTrace):
        return own_lengths(trace) if options.arrivals == "trace" else lengths_of_minutes(trace, draw, options.seed)
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
