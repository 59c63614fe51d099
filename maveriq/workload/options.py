"""The options of a workload, and the defaults of those that depend on its trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

from maveriq.errors import InputError, InvariantError, UnknownNameError
from maveriq.workload.arrivals import MAX_REQUESTS
from maveriq.workload.distributions import Distribution, parse_distribution
from maveriq.workload.schedules import Schedule
from maveriq.workload.trace_formats import RequestTrace
from maveriq.workload.traces import CONSTANT, POISSON, SYNTHETIC, CountedTrace, SyntheticLoad, Trace

DEFAULT_SCALE = 0.4
"""Of the traces that are known by name, as in the published runs; a file is replayed at scale 1."""

DEFAULT_DURATION_S = 600.0
"""Of a load with a rate, if neither its duration nor its number of requests is given."""

DEFAULT_ROUNDS = 10
"""Requests for each client of a closed loop, if their number is not given."""

ARRIVALS = ("trace", "published")
"""Arrivals of a file: at its own times, or redrawn as in the published runs, each minute within 30 s."""

PROCESSES = ("poisson", "constant", "gamma")
"""Arrivals at a rate."""

DEFAULT_GAMMA_CV = 2.0
"""How bursty gamma arrivals are, if that is not given."""

MAX_TURNS = 1_000
MAX_PREFIX_TOKENS = 10_000_000
_MAX_THINK_S = 1e7
_MAX_CV = 10.0
_PUBLISHED_PROMPTS = "sharegpt"
_PUBLISHED_OUTPUTS = "20"

Process: TypeAlias = tuple[str, float]
"""One of `PROCESSES`, and the coefficient of variation of its gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """The options of a workload; the defaults are those of the published runs, and a file is replayed as it is.

    Args:
        trace: `code`, `conversation`, `poisson`, `constant`, `synthetic`, or the path of a trace or a schedule.
        scale: factor on the rate; None for 0.4 with a name, 1 with a file.
        arrivals: one of `ARRIVALS` with a file, one of `PROCESSES` with a rate (`gamma:2` sets the coefficient of
            variation); None for `trace` with a file, and for `poisson` with a rate.
        rate: requests a second, of conversations where they have turns; None for the published Poisson stages, for a
            trace's own times, or for a closed loop.
        duration_s: only the requests of so many seconds from the first one; None for all.
        limit: only so many requests; None for all.
        concurrency: clients of a closed loop, each of which sends a request when the one before has ended; None for an
            open loop.
        think_s: distribution of the time from the end of a request to the client's next one; None for 0, or what a
            file says.
        turns: distribution of the number of turns of a conversation; None for requests of their own.
        prefix_tokens: length of a prefix that prompts share, in front of their own tokens; None for none.
        prefixes: how many such prefixes there are; None for 1.
        models: name of a model set, or the path of its TOML file.
        prompt_tokens: `sharegpt`, `trace`, a number or a distribution; None for a file's own, else `sharegpt`.
        output_tokens: `trace`, a number or a distribution; None for a file's own, else 20.
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
    concurrency: int | None = None
    think_s: str | None = None
    turns: str | None = None
    prefix_tokens: int | None = None
    prefixes: int | None = None
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
        for name, maximum in (
            ("limit", MAX_REQUESTS),
            ("concurrency", MAX_REQUESTS),
            ("prefix_tokens", MAX_PREFIX_TOKENS),
            ("prefixes", MAX_REQUESTS),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= maximum:
                raise InputError(f"{name.replace('_', ' ')} must lie between 1 and {maximum:,}, not {value}")
        if not (math.isfinite(self.slo_scale) and self.slo_scale >= 0):
            raise InputError(f"SLO scale must be 0 (no SLO) or a positive number, not {self.slo_scale}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed must lie between 0 and {(1 << 32) - 1}, not {self.seed}")
        if self.arrivals not in (None, *ARRIVALS):
            parse_process(self.arrivals)

    @property
    def is_closed(self) -> bool:
        """Whether clients wait for the end of their requests, instead of sending them at given times."""
        return self.concurrency is not None

    def think_time(self) -> Distribution | None:
        """Return the distribution of think times in seconds, None where none is given."""
        if self.think_s is None:
            return None
        return parse_distribution(self.think_s, "think time", whole=False, minimum=0, maximum=_MAX_THINK_S)

    def turns_of_conversations(self) -> Distribution | None:
        """Return the distribution of turns, None for requests of their own."""
        if self.turns is None:
            return None
        return parse_distribution(self.turns, "turns", whole=True, minimum=1, maximum=MAX_TURNS)


def parse_process(text: str) -> Process:
    """Return the arrivals that `poisson`, `constant`, `gamma` or `gamma:CV` name.

    Raises:
        InputError: another word, or a coefficient out of range.
    """
    name, colon, rest = text.partition(":")
    if name not in PROCESSES:
        raise UnknownNameError("arrivals", text, [*ARRIVALS, *PROCESSES])
    if name != "gamma" or not colon:
        if colon:
            raise InputError(f"arrivals {text!r}: only gamma takes a number; write {name}")
        return name, {"poisson": 1.0, "constant": 0.0, "gamma": DEFAULT_GAMMA_CV}[name]
    try:
        cv = float(rest)
    except ValueError:
        cv = math.nan
    if not 0 < cv <= _MAX_CV:
        raise InputError(
            f"arrivals {text!r}: the coefficient of variation must be above 0 and at most {_MAX_CV:g}, as in gamma:2"
        )
    return name, cv


def resolved_options(trace: Trace, options: WorkloadOptions) -> WorkloadOptions:
    """Return the options with the defaults that depend on the trace; what does not apply stays None.

    Raises:
        InputError: an option does not apply to the trace.
    """
    is_synthetic = isinstance(trace, SyntheticLoad)
    if options.poisson_as_published and trace.name != POISSON:
        raise InputError(f"poisson-as-published applies to the trace 'poisson', not to {trace.name!r}; leave it out")
    _check_generated(trace, options)
    if options.is_closed:
        options = _resolved_closed(trace, options)
    elif options.rate is not None or _is_load(trace, CONSTANT, SYNTHETIC) or not _has_times(trace):
        options = _resolved_load(trace, options)
    else:
        if is_synthetic and options.arrivals is not None:
            raise InputError(
                f"arrivals applies to traces and to loads with a rate, not to {trace.name!r}; leave it out"
            )
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


def _check_generated(trace: Trace, options: WorkloadOptions) -> None:
    """Check options that only loads without a trace have: turns, shared prefixes, think times."""
    generated = isinstance(trace, SyntheticLoad) and (options.rate is not None or options.is_closed)
    for name in ("turns", "prefix_tokens", "prefixes"):
        if getattr(options, name) is not None and not generated:
            raise InputError(
                f"{name.replace('_', '-')} applies to loads without a trace, not to {trace.name!r}; "
                "give --trace synthetic with a rate or a concurrency"
            )
    if options.prefixes is not None and options.prefix_tokens is None:
        raise InputError("prefixes says how many shared prefixes there are; give --prefix-tokens with their length")
    recorded = trace.arrivals if isinstance(trace, Schedule) else trace if isinstance(trace, RequestTrace) else None
    has_turns = options.turns is not None or (recorded is not None and recorded.session_id is not None)
    if options.think_s is not None and not (options.is_closed or has_turns):
        raise InputError(
            "think-s is the time from the end of a request to the client's next one; give --concurrency or --turns too"
        )


def _resolved_load(trace: Trace, options: WorkloadOptions) -> WorkloadOptions:
    """Return the options of a load with a rate."""
    name = trace.name
    if isinstance(trace, (CountedTrace, Schedule)) or (isinstance(trace, RequestTrace) and trace.has_times):
        raise InputError(
            f"rate applies to a load without a trace (poisson, constant, synthetic), not to {name!r}; use scale instead"
        )
    if options.rate is None:
        closed = "" if _is_load(trace, CONSTANT) else ", or --concurrency with the number of clients"
        raise InputError(f"trace {name!r} needs a rate; give --rate with the requests a second{closed}")
    if options.scale is not None or options.poisson_as_published:
        raise InputError("scale and poisson-as-published apply to the published stages, not to a rate; leave them out")
    if options.arrivals in ARRIVALS:
        raise InputError(
            f"arrivals {options.arrivals!r} are those of a trace; with a rate, give {', '.join(PROCESSES)}"
        )
    if _is_load(trace, POISSON, CONSTANT):
        if options.arrivals is not None:
            raise InputError(f"arrivals applies to traces, not to {name!r}; leave it out, or give --trace {SYNTHETIC}")
    elif options.arrivals is None:
        options = replace(options, arrivals=PROCESSES[0])
    if options.duration_s is None and options.limit is None and isinstance(trace, SyntheticLoad):
        return replace(options, duration_s=DEFAULT_DURATION_S)
    return options


def _is_load(trace: Trace, *names: str) -> bool:
    """Return whether a trace is a load of one of some names, and not a file that is called so."""
    return isinstance(trace, SyntheticLoad) and trace.name in names


def _has_times(trace: Trace) -> bool:
    return not isinstance(trace, RequestTrace) or trace.has_times


def _resolved_closed(trace: Trace, options: WorkloadOptions) -> WorkloadOptions:
    """Return the options of a closed loop."""
    if isinstance(trace, CountedTrace) or _is_load(trace, POISSON, CONSTANT):
        raise InputError(f"concurrency applies to --trace {SYNTHETIC} and to files of requests, not to {trace.name!r}")
    for name in ("rate", "scale", "arrivals", "duration_s"):
        if getattr(options, name) is not None:
            raise InputError(
                f"{name.replace('_', '-')} sets when requests arrive, and with --concurrency each arrives when the one "
                "before has ended; leave one of them out"
            )
    if options.limit is None and isinstance(trace, SyntheticLoad):
        return replace(options, limit=DEFAULT_ROUNDS * (options.concurrency or 1))
    return options


def _scale(trace: Trace, options: WorkloadOptions) -> float:
    if isinstance(trace, Schedule) and options.scale not in (None, 1):
        raise InputError(f"schedule {trace.name!r} is replayed as it was recorded; leave out the scale")
    default = DEFAULT_SCALE if isinstance(trace, (CountedTrace, SyntheticLoad)) else 1.0
    return default if options.scale is None else float(options.scale)


def _arrivals(trace: Trace, options: WorkloadOptions) -> str:
    if options.arrivals not in (None, *ARRIVALS):
        raise InputError(f"arrivals {options.arrivals!r} need a rate; give --rate with the requests a second")
    if isinstance(trace, CountedTrace):
        if options.arrivals == "trace":
            raise InputError(f"trace {trace.name!r} has only counts per minute; give its public file for its own times")
        return "published"
    if isinstance(trace, Schedule) and options.arrivals == "published":
        raise InputError(f"schedule {trace.name!r} is replayed as it was recorded; leave out the arrivals")
    return options.arrivals or "trace"


def resolved_scale(options: WorkloadOptions) -> float:
    """Return the scale that `resolved_options` has set.

    Raises:
        InvariantError: it has not.
    """
    if options.scale is None:
        raise InvariantError("the scale of a trace was not resolved")
    return options.scale
