"""The options of a run, simulated or real: names, defaults, ranges and help texts.

The command line and the Python API are generated from this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from maveriq.errors import InputError

_WORKLOAD, _CLUSTER, _POLICY, _RUN = "Workload", "Cluster", "Policy", "Service times and faults"
_PROFILE = "the profile's"
_MAX_S = 1e9  # thirty years; rejected beyond: longer than any real run
_MAX_MS = 1e12
_PUBLISHED_THRESHOLD = 0.7  # of the published runs (MaverIQ, SC '25)


def _option(
    default: Any,
    help_text: str,
    panel: str,
    *,
    shown: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Describe an option.

    Args:
        default: its default; None where it depends on other options.
        help_text: one line for the help.
        panel: the group in the help.
        shown: the default as the help shows it, if not the value itself.
        minimum: the smallest number allowed.
        maximum: the largest.
    """
    metadata = {"help": help_text, "panel": panel, "shown": shown, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every option that shapes a run; the defaults are the published main run.

    Names become options of the command line (`slo_scale` is `--slo-scale`), the metadata of a
    field its help. Durations are in the unit their name says.

    Raises:
        InputError: a number that is not finite, or outside its range.
    """

    trace: str = _option("code", "code, conversation, poisson, or a CSV file (Azure trace or schedule).", _WORKLOAD)
    scale: float | None = _option(None, "Factor on the trace's rate.", _WORKLOAD, shown="0.4")
    models: str = _option("large", "Model set: large, regular, twentyone, or a TOML file.", _WORKLOAD)
    prompt_tokens: str | None = _option(
        None, "Length of prompts: sharegpt, trace, or a number of tokens.", _WORKLOAD, shown="sharegpt"
    )
    output_tokens: str | None = _option(None, "Length of outputs: trace, or a number of tokens.", _WORKLOAD, shown="20")
    poisson_as_published: bool = _option(False, "Draw Poisson stages as the published generator did.", _WORKLOAD)  # noqa: FBT003
    seed: int = _option(42, "Seed of all random streams.", _WORKLOAD)

    gpus: str = _option("8xA6000", "The cluster: count and kind of GPU (8xA6000), a TOML file, or local.", _CLUSTER)
    profile: str = _option("a6000-short", "Hardware profile: a6000-short, a6000-long, or a TOML file.", _CLUSTER)

    policy: str = _option(
        "hybrid", "hybrid, packing, llf, none, alpaserve, alpaserve-star, or your own FILE.py:FUNCTION.", _POLICY
    )
    intent: str = _option("min-cost", "min-cost, min-latency, min-memory, or min-gpu-cost.", _POLICY)
    slo_scale: float = _option(
        0.0, "Latency SLO in multiples of each model's own latency; 0: none.", _POLICY, minimum=0, maximum=1e6
    )
    min_accuracy: float = _option(0.0, "Minimum accuracy, in percent of the float16 model's.", _POLICY)
    float16_only: bool = _option(False, "No quantised weights.", _POLICY)  # noqa: FBT003
    packing_threshold: float = _option(_PUBLISHED_THRESHOLD, "Load up to which hybrid packs.", _POLICY)
    batch_size: int = _option(1, "Maximum requests in a batch.", _POLICY, minimum=1, maximum=10_000)
    queue: str = _option("fifo", "fifo, fifo-per-model, sjf, or edf.", _POLICY)
    max_wait_s: float = _option(
        60.0, "Requests that have waited longer go next (except with fifo).", _POLICY, minimum=0, maximum=_MAX_S
    )
    router: str = _option("uniform", "How a request picks a replica: uniform or least-work.", _POLICY)
    alpaserve_profile: str = _option(
        "maveriq", "Model profiles that AlpaServe plans with: maveriq or published.", _POLICY
    )
    alpaserve_as_published: bool = _option(False, "AlpaServe as published, with its naming defect.", _POLICY)  # noqa: FBT003
    alpaserve_star_rule: str = _option("F", "How AlpaServe* keeps every model: F, A, B or C.", _POLICY)
    estimator: str | None = _option(
        None, "Estimator that the policy plans with: calibrated, paper, or measured.", _POLICY, shown="calibrated"
    )

    service_times: str | None = _option(
        None, "How long simulated requests take: calibrated, paper, measured, or recorded.", _RUN, shown="calibrated"
    )
    exclude_run: str | None = _option(None, "Fit calibrated service times without this recorded run.", _RUN)
    fail: tuple[str, ...] = _option((), "A fault: gpu=3@600s,for=120s or deployment=2@900s; repeatable.", _RUN)
    remove: tuple[str, ...] = _option((), "Remove an endpoint: endpoint=2@900s; repeatable.", _RUN)
    on_failure: str = _option("requeue", "Requests of a failed engine: requeue (once) or fail.", _RUN)
    tick_ms: float | None = _option(None, "Tick of the dispatcher.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_MS)
    after_arrival_ms: float | None = _option(
        None, "Minimum delay from arrival to dispatch.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_MS
    )
    after_release_ms: float | None = _option(
        None,
        "Minimum delay from a GPU's release to its next dispatch.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_MS,
    )
    registration_delay_s: float | None = _option(
        None,
        "Pause of the dispatcher after an engine registers.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_S,
    )
    load_s: float | None = _option(None, "Load time of an engine.", _RUN, shown=_PROFILE, minimum=0, maximum=_MAX_S)
    no_dispatch_overhead: bool = _option(False, "Dispatch at once: no tick, delays or pause.", _RUN)  # noqa: FBT003
    drain_s: float | None = _option(
        None,
        "Maximum time from the last arrival to the end of the run.",
        _RUN,
        shown=_PROFILE,
        minimum=0,
        maximum=_MAX_S,
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            minimum, maximum = option.metadata["minimum"], option.metadata["maximum"]
            name = f"--{option.name.replace('_', '-')}"
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value}")
            if value is not None and minimum is not None and value < minimum:
                raise InputError(f"{name} must be at least {minimum}, not {value}")
            if value is not None and maximum is not None and value > maximum:
                raise InputError(f"{name} must be at most {maximum:,.0f}, not {value}")
