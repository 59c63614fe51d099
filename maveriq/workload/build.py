"""The workload of a run, put together: a trace, a model set, lengths and latency objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from maveriq.csv_columns import micros_column
from maveriq.domain.deployments import EndpointSpec, ExpectedLoad, Intent
from maveriq.engine.settings import EngineHost
from maveriq.errors import InputError
from maveriq.streams import generator
from maveriq.units import MICROS_PER_SECOND, Micros, duration_micros
from maveriq.workload.arrivals import (
    LOAD_SHIFT_S,
    Draw,
    constant_offsets,
    deploy_times,
    deployed_per_bin,
    gamma_offsets,
    poisson_offsets,
    published_draw,
    spread_over_models,
    staged_poisson,
    staged_poisson_as_published,
)
from maveriq.workload.conversations import conversation_hashes, grown_prompts, turns_of
from maveriq.workload.distributions import Distribution
from maveriq.workload.lengths import (
    Lengths,
    counted_lengths,
    drawn_lengths,
    lengths_of_minutes,
    own_lengths,
    parse_length,
    recorded_lengths,
    sharegpt_lengths,
)
from maveriq.workload.model_sets import ModelEntry, ModelSet, load_model_set
from maveriq.workload.options import (
    DEFAULT_SCALE,
    WorkloadOptions,
    parse_process,
    resolved_options,
    resolved_scale,
)
from maveriq.workload.prefixes import PrefixHashes
from maveriq.workload.requests import Arrivals, Workload, WorkloadSource
from maveriq.workload.schedules import Schedule
from maveriq.workload.sessions import requests_of_sessions
from maveriq.workload.trace_formats import WHOLE_TRACE, RequestTrace, TracePart, remarks_on
from maveriq.workload.traces import CONSTANT, SYNTHETIC, CountedTrace, SyntheticLoad, Trace, load_trace

_MAX_SLO_S = 1e9  # no request misses it, and its microseconds fit into 64 bits

SloOf: TypeAlias = Callable[[str, int], float | None]
"""Latency in seconds of a model's request with so many output tokens at SLO scale 1; None if unknown."""


def build_workload(
    options: WorkloadOptions,
    *,
    intent: Intent,
    slo_of: SloOf,
    batch_size: int = 1,
    gpu_memory_gib: float = 80.0,
) -> Workload:
    """Put a workload together.

    Args:
        options: the options.
        intent: of every endpoint, unless its model set overrides it; with an SLO scale, each
            endpoint gets the SLO of a typical request.
        slo_of: latency at SLO scale 1, see `SloOf`.
        batch_size: of every endpoint.
        gpu_memory_gib: memory of a GPU, on which the share depends that some engines take of it.

    Returns:
        Endpoints 1, 2, ... in the order of the model set, and the requests.

    Raises:
        InputError: options that do not fit together, a file that cannot be used, no request at all.
    """
    trace = load_trace(options.trace, _needed(options))
    models = load_model_set(options.models)
    resolved = resolved_options(trace, options)
    whole = _draw(trace, resolved, models)
    prompts, outputs = _lengths(trace, resolved, whole)
    draw = whole.first(_kept(whole, trace, resolved))
    prompts, outputs = (replace(column, tokens=column.tokens[: len(draw)]) for column in (prompts, outputs))
    recorded = trace.arrivals if isinstance(trace, Schedule) else None
    content = recorded or (trace if isinstance(trace, RequestTrace) and resolved.arrivals != "published" else None)
    slo_us = _request_slos(options.slo_scale, slo_of, models, draw, outputs)
    arrivals = Arrivals(
        arrival_us=draw.arrival_us,
        endpoint_id=draw.endpoint_id,
        prompt_tokens=prompts.tokens,
        output_tokens=outputs.tokens,
        slo_us=recorded.slo_us[: len(draw)] if recorded and not options.slo_scale else slo_us,
        service_us=_first(recorded.service_us, len(draw)) if recorded else None,
        priority=_first(recorded.priority, len(draw)) if recorded else None,
        prompt_id=_first(content.prompt_id, len(draw)) if content else None,
        session_id=_first(content.session_id, len(draw)) if content else draw.session,
        think_us=_think_times(resolved, content, len(draw)),
        prefix_hashes=_prefix_hashes(resolved, content, draw, prompts, outputs),
    )
    if resolved.is_closed:
        arrivals = arrivals.by_session()
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
                pattern=entry.pattern,
                load=_load(entry, draw.endpoint_id == endpoint_id, prompts, outputs),
                batching=entry.batching,
                replicas=entry.replicas,
                memory_share=memory_share(entry, gpu_memory_gib),
                ready_at_start=entry.load_at is None,
            )
        )
    return Workload(
        name=f"{trace.name} on {models.name}",
        endpoints=tuple(endpoints),
        arrivals=arrivals,
        source=_source(trace, resolved, models, whole, arrivals, endpoints),
        concurrency=resolved.concurrency,
    )


def _load(entry: ModelEntry, own: np.ndarray[Any, Any], prompts: Lengths, outputs: Lengths) -> ExpectedLoad | None:
    """Return the load that an entry expects, with the lengths of its requests; None where it names none."""
    if entry.expected_rps is None:
        return None
    prompt, output = (column.tokens[own] if own.any() else column.tokens for column in (prompts, outputs))
    return ExpectedLoad(
        rps=entry.expected_rps,
        prompt_tokens=max(1, round(float(prompt.mean()))),
        output_tokens=max(1, round(float(output.mean()))),
        prompt_cv=float(prompt.std() / max(1.0, prompt.mean())),
    )


def memory_share(entry: ModelEntry, gpu_memory_gib: float) -> float | None:
    """Return the share of a GPU's memory that a model's engines take; None for what their configuration needs.

    Args:
        entry: the model and its engine.
        gpu_memory_gib: memory of the GPU.
    """
    if entry.engine is None:
        return None
    host = EngineHost(context_tokens=entry.model.context_tokens or 1, gpu_memory_gib=gpu_memory_gib)
    return entry.engine.resolve(host).memory_share


def _needed(options: WorkloadOptions) -> TracePart:
    """Return the part of a file that is replayed; published arrivals are redrawn from all of it."""
    if options.arrivals == "published":
        return WHOLE_TRACE
    span_s = None if options.duration_s is None else options.duration_s * (options.scale or 1.0)
    return TracePart(requests=options.limit, span_s=span_s)


def _first(column: np.ndarray[Any, Any] | None, requests: int) -> np.ndarray[Any, Any] | None:
    return None if column is None else column[:requests]


def _think_times(
    options: WorkloadOptions, content: Arrivals | RequestTrace | None, requests: int
) -> np.ndarray[Any, Any] | None:
    """Return the think time before each request in µs, None for none."""
    think_s = options.think_time()
    if think_s is None:
        return _first(content.think_us, requests) if content else None
    return micros_column(think_s.draw(generator(options.seed, "think-times"), requests))


def _prefix_hashes(
    options: WorkloadOptions, content: Arrivals | RequestTrace | None, draw: Draw, prompts: Lengths, outputs: Lengths
) -> PrefixHashes | None:
    """Return the hashes of a file, or those of generated conversations and shared prefixes."""
    if content is not None:
        hashes = content.prefix_hashes
        return None if hashes is None else hashes.rows(np.arange(len(draw)))
    if draw.session is None and options.prefix_tokens is None:
        return None
    return conversation_hashes(
        draw, prompts.tokens, outputs.tokens,
        prefix_tokens=options.prefix_tokens or 0, prefixes=options.prefixes or 1, seed=options.seed,
    )  # fmt: skip


def _draw(trace: Trace, options: WorkloadOptions, models: ModelSet) -> Draw:
    weights = models.weights() if not isinstance(trace, Schedule) else None
    if isinstance(trace, Schedule):
        return _recorded_draw(trace, options, models)
    if isinstance(trace, SyntheticLoad):
        return _synthetic_draw(trace, options, models, weights)
    if isinstance(trace, RequestTrace) and options.arrivals != "published":
        draw = _spread(_offsets_of(trace, options), options, models, weights)
        return draw if trace.session_id is None else _one_model_a_session(draw, trace.session_id)
    return published_draw(
        trace.requests_per_minute,
        scale=resolved_scale(options),
        load_at=models.load_at,
        seed=options.seed,
        weights=weights,
    )


def _one_model_a_session(draw: Draw, session_id: np.ndarray[Any, Any]) -> Draw:
    """Return the requests with all turns of a session at the endpoint of its first one."""
    _, first, which = np.unique(session_id, return_index=True, return_inverse=True)
    endpoints = np.where(session_id > 0, draw.endpoint_id[first[which]], draw.endpoint_id)
    return replace(draw, endpoint_id=endpoints)


def _offsets_of(trace: RequestTrace, options: WorkloadOptions) -> np.ndarray[Any, Any]:
    """Return when each request of a file arrives after the start."""
    if options.is_closed:
        return np.zeros(len(trace), np.int64)
    if options.rate is not None:
        session_id = np.zeros(len(trace), np.int64) if trace.session_id is None else trace.session_id
        turns = requests_of_sessions(session_id)
        return np.repeat(_at_rate(options, duration_s=None, requests=len(turns)), turns)
    offsets: np.ndarray[Any, Any] = np.rint(trace.arrival_us / resolved_scale(options)).astype(np.int64)
    return offsets


def _synthetic_draw(
    trace: SyntheticLoad, options: WorkloadOptions, models: ModelSet, weights: Sequence[float] | None
) -> Draw:
    if options.is_closed:
        offsets_us = np.zeros(options.limit or 0, np.int64)
    elif options.rate is None:
        stages = staged_poisson_as_published if options.poisson_as_published else staged_poisson
        return stages(scale=options.scale or DEFAULT_SCALE, load_at=models.load_at, seed=options.seed, weights=weights)
    else:
        named = options if trace.name == SYNTHETIC else replace(options, arrivals=trace.name)
        offsets_us = _at_rate(named, duration_s=options.duration_s, requests=options.limit)
    draw = _spread(offsets_us, options, models, weights)
    turns = options.turns_of_conversations()
    if turns is not None:
        draw = draw.with_turns(turns_of(len(draw), turns, options.seed))
    return draw if options.limit is None else draw.first(options.limit)


def _at_rate(options: WorkloadOptions, *, duration_s: float | None, requests: int | None) -> np.ndarray[Any, Any]:
    """Return the times of an arrival process in µs, for a duration or else so many requests."""
    process, cv = parse_process(options.arrivals or CONSTANT)
    rate_per_s = options.rate or 0.0
    if process == CONSTANT:
        return constant_offsets(rate_per_s=rate_per_s, duration_s=duration_s, requests=requests)
    if process == "gamma":
        return gamma_offsets(rate_per_s=rate_per_s, cv=cv, duration_s=duration_s, requests=requests, seed=options.seed)
    return poisson_offsets(rate_per_s=rate_per_s, duration_s=duration_s, requests=requests, seed=options.seed)


def _spread(
    offsets_us: np.ndarray[Any, Any], options: WorkloadOptions, models: ModelSet, weights: Sequence[float] | None
) -> Draw:
    """Give requests at given times their endpoints; a closed loop starts when all models have loaded."""
    loaded_us = _loaded_us(models)
    start_us = max(loaded_us) if options.is_closed else _start_us(models)
    return spread_over_models(offsets_us, loaded_us=loaded_us, start_us=start_us, seed=options.seed, weights=weights)


def _loaded_us(models: ModelSet) -> list[Micros]:
    """Return when each model takes requests: 90 s after it is asked for.

    Continuous engines that are up when the run starts take them at once.
    """
    deployed_per_bin(models.load_at[:1], 1)  # checks that a model loads at bin 0
    return [
        0 if entry.load_at is None and entry.engine is not None else asked_us + LOAD_SHIFT_S * MICROS_PER_SECOND
        for entry, asked_us in zip(models.entries, deploy_times(models.load_at), strict=True)
    ]


def _start_us(models: ModelSet) -> Micros:
    """Return when the models of bin 0 have loaded."""
    at_start = zip(_loaded_us(models), models.load_at, strict=True)
    return max(loaded_us for loaded_us, load_at in at_start if not load_at)


def _recorded_draw(trace: Schedule, options: WorkloadOptions, models: ModelSet) -> Draw:
    endpoints = trace.endpoint_ids([entry.model.name for entry in models.entries])
    arrival_us = trace.arrivals.arrival_us
    if options.is_closed:
        arrival_us = np.full(len(endpoints), max(_loaded_us(models)), np.int64)
    return Draw(arrival_us=arrival_us, endpoint_id=endpoints, bin_index=np.zeros(len(endpoints), np.int64))


def _kept(draw: Draw, trace: Trace, options: WorkloadOptions) -> int:
    """Return how many requests are left: of the duration, and at most the limit."""
    kept = len(draw)
    generated = isinstance(trace, SyntheticLoad) and options.rate is not None  # for the duration alone
    if options.duration_s is not None and not generated and kept:
        end_us = int(draw.arrival_us[0]) + duration_micros(min(options.duration_s, _MAX_SLO_S))
        kept = int(np.searchsorted(draw.arrival_us, end_us))
    return kept if options.limit is None else min(kept, options.limit)


_RESOLVED = (
    "scale", "arrivals", "rate", "concurrency", "duration_s", "limit", "think_s", "turns", "prompt_tokens",
    "output_tokens", "prefix_tokens", "prefixes",
)  # fmt: skip


def _source(
    trace: Trace,
    options: WorkloadOptions,
    models: ModelSet,
    whole: Draw,
    arrivals: Arrivals,
    endpoints: Sequence[EndpointSpec],
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
    if not isinstance(trace, Schedule) and (key := models.weighted_by()):
        remarks.append(f"requests are spread over the models by {key}")
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
        if options.is_closed:
            return "closed loop without a trace"
        return "stages of two minutes" if options.rate is None else "load without a trace"
    return "schedule" if isinstance(trace, Schedule) else "counts per minute"


def _lengths(trace: Trace, options: WorkloadOptions, draw: Draw) -> tuple[Lengths, Lengths]:
    """Return prompts and outputs."""
    prompt = parse_length(options.prompt_tokens or "", "prompt tokens", ("sharegpt", "trace"))
    output = parse_length(options.output_tokens or "", "output tokens", ("trace",))
    own = _own_lengths(trace, options, draw) if "trace" in (prompt, output) else None
    prompts = _chosen(prompt, own[0] if own else None, len(draw), options.seed, "prompt-lengths")
    outputs = _chosen(output, own[1] if own else None, len(draw), options.seed, "output-lengths")
    if draw.session is not None:
        prompts = recorded_lengths(grown_prompts(draw.session, prompts.tokens, outputs.tokens))
    if options.prefix_tokens is not None:
        added = options.prefix_tokens
        prompts = Lengths(tokens=prompts.tokens + added, typical=prompts.typical + added)
    return prompts, outputs


def _own_lengths(trace: Trace, options: WorkloadOptions, draw: Draw) -> tuple[Lengths, Lengths]:
    if isinstance(trace, CountedTrace):
        return counted_lengths(trace, len(draw), options.seed)
    if isinstance(trace, RequestTrace):
        redrawn = options.arrivals == "published"
        return lengths_of_minutes(trace, draw, options.seed) if redrawn else own_lengths(trace)
    if isinstance(trace, Schedule):
        return recorded_lengths(trace.arrivals.prompt_tokens), recorded_lengths(trace.arrivals.output_tokens)
    raise InputError(f"trace {trace.name!r} has no lengths of its own; give a number of tokens instead of 'trace'")


def _chosen(spec: Distribution | str, own: Lengths | None, requests: int, seed: int, stream: str) -> Lengths:
    if spec == "trace" and own:
        return own
    return sharegpt_lengths(requests, seed) if isinstance(spec, str) else drawn_lengths(spec, requests, seed, stream)


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
