"""The options of a run, simulated or real: names, defaults, ranges and help texts.

The command line and the Python API are generated from this table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Number
from pathlib import PurePath
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from maveriq.errors import InputError, UnknownNameError

_WORKLOAD, _CLUSTER, _POLICY, _RUN = "Workload", "Cluster", "Policy", "Service times and faults"
_PROFILE = "the profile's"
_MAX_S = 1e9  # thirty years; rejected beyond: longer than any real run
_MAX_MS = 1e12
INTENTS = ("min-cost", "min-latency", "min-memory", "min-gpu-cost")
_PUBLISHED_THRESHOLD = 0.7  # of the published runs (MaverIQ, SC '25)

_Options = TypeVar("_Options")


def option(
    default: Any,
    help_text: str,
    panel: str,
    *,
    shown: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
) -> Any:
    """Describe an option.

    Args:
        default: its default; None where it depends on other options.
        help_text: one line for the help.
        panel: the group in the help.
        shown: the default as the help shows it, if not the value itself.
        minimum: the smallest number allowed.
        maximum: the largest.
        flags: how the command line spells the option; () derives `--slo-scale` from `slo_scale`.
        choices: values that shells complete; others may be allowed too.
    """
    metadata = {
        "help": help_text, "panel": panel, "shown": shown, "minimum": minimum, "maximum": maximum, "flags": flags,
        "choices": choices,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def with_suggestions(shape: type[_Options]) -> type[_Options]:
    """Let a dataclass of options answer a wrong name with the nearest right one, where Python has a TypeError."""
    create: Callable[..., None] = shape.__init__

    @functools.wraps(create)
    def check_and_create(self: _Options, *values: object, **named: object) -> None:
        if values:
            raise InputError(f"options have names; write NAME={values[0]!r:.60}")
        _check_names(shape, named)
        create(self, **named)

    shape.__init__ = check_and_create  # type: ignore[assignment]
    return shape


def _check_names(shape: type[Any], names: Iterable[str]) -> None:
    known = [field.name for field in fields(shape)]
    for name in names:
        if name not in known:
            raise UnknownNameError("option", name, known)


@with_suggestions
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every option that shapes a run; the defaults are the published main run.

    None stands for a default that depends on the profile or the cluster (`maveriq.scenario.defaults`).

    Names become options of the command line (`slo_scale` is `--slo-scale`), the metadata of a
    field its help. Durations are in the unit their name says.

    Raises:
        UnknownNameError: an option is unknown.
        InputError: a value of another type, a number that is not finite, or outside its range.
    """

    trace: str = option(
        "",  # resolved at once
        "code, conversation, poisson, constant, synthetic, or a file of requests (traces/README.md).",
        _WORKLOAD,
        shown="code; poisson with --rate; synthetic with --concurrency",
        choices=("code", "conversation", "poisson", "constant", "synthetic"),
    )
    scale: float | None = option(None, "Factor on the trace's rate.", _WORKLOAD, shown="0.4; 1 for a file")
    arrivals: str | None = option(
        None,
        "Of a file: trace (its own times) or published (each minute redrawn within 30 s). With a rate: poisson, "
        "constant, or gamma:CV, whose gaps have this coefficient of variation.",
        _WORKLOAD,
        shown="trace; poisson with --rate",
        choices=("trace", "published", "poisson", "constant", "gamma"),
    )
    rate: float | None = option(None, "Requests a second of a load without a trace.", _WORKLOAD)
    duration_s: float | None = option(
        None, "Only the requests of so many seconds.", _WORKLOAD, shown="all; 600 with --rate", maximum=_MAX_S
    )
    limit: int | None = option(None, "Only the first so many requests.", _WORKLOAD, shown="all")
    num_prompts: int | None = option(
        None, "The same as --limit.", _WORKLOAD, shown="10 for each client with --concurrency"
    )
    concurrency: int | None = option(
        None, "Closed loop: clients, each of which sends its next request when the one before has ended.", _WORKLOAD,
        shown="open loop", minimum=1,
    )  # fmt: skip
    think_s: str | None = option(
        None, "Time from the end of a request to its client's next one: seconds, or a distribution.", _WORKLOAD,
        shown="0",
    )  # fmt: skip
    turns: str | None = option(
        None, "Turns of a conversation, whose prompts grow: a number, or a distribution.", _WORKLOAD, shown="1"
    )
    prefix_tokens: int | None = option(
        None, "Tokens that prompts share at their beginning, in addition to their own.", _WORKLOAD, shown="none"
    )
    prefixes: int | None = option(None, "How many different shared beginnings there are.", _WORKLOAD, shown="1")
    max_in_flight: int | None = option(
        None, "Requests that the client has in flight at most; others wait until one has ended.", _WORKLOAD,
        shown="any number", minimum=1,
    )  # fmt: skip
    models: str = option(
        "large",
        "Model set: large, regular, twentyone, or a TOML file.",
        _WORKLOAD,
        choices=("large", "regular", "twentyone"),
    )
    prompt_tokens: str | None = option(
        None,
        "Length of prompts: sharegpt, trace, a number of tokens, or a distribution such as uniform:512-1536.",
        _WORKLOAD,
        shown="sharegpt; trace for a file",
        choices=("sharegpt", "trace"),
    )
    output_tokens: str | None = option(
        None,
        "Length of outputs: trace, a number of tokens, or a distribution such as lognormal:200,0.5.",
        _WORKLOAD,
        shown="20; trace for a file",
        choices=("trace",),
    )
    poisson_as_published: bool = option(False, "Draw Poisson stages as the published generator did.", _WORKLOAD)  # noqa: FBT003
    seed: int = option(42, "Seed of all random streams.", _WORKLOAD)

    gpus: str = option(
        "8xA6000",
        "The cluster: count and kind of GPU (8xA6000), a TOML file, or local.",
        _CLUSTER,
        choices=("8xA6000", "local"),
    )
    profile: str = option(
        "a6000-short",
        "Hardware profile: a6000-short, a6000-long, a TOML file, or what maveriq profile wrote.",
        _CLUSTER,
        choices=("a6000-short", "a6000-long"),
    )

    policy: str | None = option(
        None,
        "hybrid, packing, llf, none, alpaserve, alpaserve-star, balanced, replicas, or your own FILE.py:FUNCTION.",
        _POLICY,
        shown="llf; hybrid on the published testbed",
        choices=("hybrid", "packing", "llf", "none", "alpaserve", "alpaserve-star", "balanced", "replicas"),
    )
    intent: str = option("min-cost", "min-cost, min-latency, min-memory, or min-gpu-cost.", _POLICY, choices=INTENTS)
    slo_scale: float = option(
        0.0, "Latency SLO in multiples of each model's own latency; 0: none.", _POLICY, minimum=0, maximum=1e6
    )
    min_accuracy: float = option(0.0, "Minimum accuracy, in percent of the float16 model's.", _POLICY)
    accuracy: str | None = option(
        None,
        "Accuracy of models whose profile does not know it: a CSV file of model, weights, kv, percent.",
        _POLICY,
        shown=_PROFILE,
    )
    float16_only: bool = option(False, "No quantised weights.", _POLICY)  # noqa: FBT003
    packing_threshold: float = option(_PUBLISHED_THRESHOLD, "Load up to which hybrid packs.", _POLICY)
    batch_size: int = option(1, "Maximum requests in a batch.", _POLICY, minimum=1, maximum=10_000)
    tie_break: str | None = option(
        None,
        "Which of equally loaded GPUs a model goes to: free-memory (the emptiest) or gpu-id.",
        _POLICY,
        shown="free-memory; gpu-id on the published testbed",
        choices=("free-memory", "gpu-id"),
    )
    queue: str | None = option(
        None,
        "fifo, fifo-per-model, sjf, or edf.",
        _POLICY,
        shown="fifo-per-model; fifo on the published testbed",
        choices=("fifo", "fifo-per-model", "sjf", "edf"),
    )
    max_wait_s: float = option(
        60.0, "Requests that have waited longer go next (except with fifo).", _POLICY, minimum=0, maximum=_MAX_S
    )
    router: str | None = option(
        None,
        "How a request picks a replica: round-robin, random, least-outstanding, power-of-two, least-kv, prefix-aware, "
        "session, or least-work.",
        _POLICY,
        shown="least-outstanding; random for exclusive engines",
        choices=(
            "round-robin", "random", "least-outstanding", "power-of-two", "least-kv", "prefix-aware", "session",
            "least-work",
        ),
    )  # fmt: skip
    alpaserve_profile: str = option(
        "maveriq",
        "Model profiles that AlpaServe plans with: maveriq or published.",
        _POLICY,
        choices=("maveriq", "published"),
    )
    alpaserve_as_published: bool = option(False, "AlpaServe as published, with its naming defect.", _POLICY)  # noqa: FBT003
    alpaserve_requests_as_published: bool = option(
        False,  # noqa: FBT003
        "Requests as the published driver drew them for AlpaServe: for a replica, not for a model.",
        _POLICY,
    )
    alpaserve_star_rule: str = option(
        "F", "How AlpaServe* keeps every model: F, A, B or C.", _POLICY, choices=("F", "A", "B", "C")
    )
    estimator: str | None = option(
        None,
        "Estimator that the policy plans with: calibrated, paper, measured, blended, or physics.",
        _POLICY,
        shown="calibrated",
        choices=("calibrated", "paper", "measured", "blended", "physics"),
    )

    service_times: str | None = option(
        None,
        "How long simulated requests take: calibrated, paper, measured, blended, physics, or recorded.",
        _RUN,
        shown="calibrated",
        choices=("calibrated", "paper", "measured", "blended", "physics", "recorded"),
    )
    exclude_run: str | None = option(None, "Fit calibrated service times without this recorded run.", _RUN)
    fail: tuple[str, ...] = option((), "A fault: gpu=3@600s,for=120s or deployment=2@900s; repeatable.", _RUN)
    remove: tuple[str, ...] = option((), "Remove an endpoint: endpoint=2@900s; repeatable.", _RUN)
    on_failure: str = option(
        "requeue", "Requests of a failed engine: requeue (once) or fail.", _RUN, choices=("requeue", "fail")
    )
    on_loss: str | None = option(
        None,
        "Deployments lost for good: keep (they stay down) or replace (elsewhere, where they fit).",
        _RUN,
        shown="replace in serve, else keep",
        choices=("keep", "replace"),
    )
    tick_ms: float | None = option(None, "Tick of the dispatcher.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_MS)
    after_arrival_ms: float | None = option(
        None, "Minimum delay from arrival to dispatch.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_MS
    )
    after_release_ms: float | None = option(
        None,
        "Minimum delay from a GPU's release to its next dispatch.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_MS,
    )
    registration_delay_s: float | None = option(
        None,
        "Pause of the dispatcher after an engine registers.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_S,
    )
    beyond_context: str | None = option(
        None,
        "Requests longer than their model's context: refuse or serve.",
        _RUN,
        shown="refuse; serve for published traces",
        choices=("refuse", "serve"),
    )
    load_s: float | None = option(None, "Load time of an engine.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_S)
    no_dispatch_overhead: bool = option(False, "Dispatch at once: no tick, delays or pause.", _RUN)  # noqa: FBT003
    drain_s: float | None = option(
        None,
        "Maximum time from the last arrival to the end of the run.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_S,
    )

    def __post_init__(self) -> None:
        convert_types(self)
        if not self.trace:
            object.__setattr__(self, "trace", self._default_trace())
        check_ranges(self)

    def _default_trace(self) -> str:
        """Return the trace where none is named."""
        shaped = (self.arrivals, self.turns, self.prefix_tokens)
        if self.concurrency is not None or (self.rate is not None and any(value is not None for value in shaped)):
            return "synthetic"
        return "code" if self.rate is None else "poisson"

    def to_dict(self) -> dict[str, Any]:
        """Return the options by name; one that is None, since it does not apply or is the profile's, is missing."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def convert_types(options: Any) -> None:
    """Convert the values of a dataclass of options to their own types, as `options_from` does.

    A choice may be written with underscores; it is stored with hyphens, so that records of equal options are equal.

    Raises:
        InputError: a value of another type.
    """
    hints = get_type_hints(type(options))
    for option in fields(options):
        value = _converted(option.name, getattr(options, option.name), hints[option.name])
        if isinstance(value, str) and value.replace("_", "-") in option.metadata.get("choices", ()):
            value = value.replace("_", "-")
        object.__setattr__(options, option.name, value)


def check_ranges(options: Any) -> None:
    """Check the numbers of a dataclass of options against their limits.

    Raises:
        InputError: a number is not finite, or outside its range.
    """
    for option in fields(options):
        value, minimum, maximum = getattr(options, option.name), option.metadata["minimum"], option.metadata["maximum"]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag(option.name)} must be a finite number, not {value}")
        if value is not None and minimum is not None and value < minimum:
            raise InputError(f"{flag(option.name)} must be at least {minimum}, not {value}")
        if value is not None and maximum is not None and value > maximum:
            raise InputError(f"{flag(option.name)} must be at most {maximum:,.0f}, not {value}")


def flag(name: str) -> str:
    """Return how the command line spells an option: `slo_scale` is `--slo-scale`."""
    return f"--{name.replace('_', '-')}"


def options_from(shape: type[_Options], values: Mapping[str, object], *, base: _Options | None = None) -> _Options:
    """Return options from Python values: numbers and paths may stand for text, lists and dicts for tuples.

    Args:
        shape: the dataclass of options.
        values: the values by name.
        base: gives the options that `values` does not name; None takes the defaults.

    Raises:
        UnknownNameError: an option is unknown.
        InputError: a value of another type, or out of range.
    """
    types = get_type_hints(shape)
    _check_names(shape, values)
    converted = {name: _converted(name, value, types[name]) for name, value in values.items()}
    return shape(**converted) if base is None else replace(base, **converted)  # type: ignore[type-var]


def _converted(name: str, value: object, hint: Any) -> object:
    """Return the value of an option in its own type."""
    allowed = set(get_args(hint)) if isinstance(hint, UnionType) else {get_origin(hint) or hint}
    if type(value) in allowed or (isinstance(value, tuple(allowed)) and not isinstance(value, bool)):
        return value
    if str in allowed and isinstance(value, (int, PurePath)) and not isinstance(value, bool):
        return str(value)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if tuple in allowed and isinstance(value, (list, str)):
        return (value,) if isinstance(value, str) else tuple(map(str, value))
    if tuple in allowed and isinstance(value, Mapping):
        return tuple(f"{key}={entry}" for key, entry in value.items())
    if isinstance(value, Number) and hasattr(value, "item"):  # a NumPy scalar
        return _converted(name, value.item(), hint)
    wanted = " or ".join(sorted(kind.__name__.replace("NoneType", "None") for kind in allowed))
    raise InputError(f"{name} must be {wanted}, not {value!r:.60}")
