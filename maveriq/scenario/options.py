"""What a user can say about a run, simulated or real.

This is the one place for the names, defaults and explanations of the options; the command line
is made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from maveriq.errors import InputError

_WORKLOAD, _CLUSTER, _POLICY, _WORLD = "Workload", "Cluster", "Policy", "How the world behaves"
_PROFILE = "the profile's"
_LONGEST_S = 1e9  # thirty years; more is a slip of the pen
_LONGEST_MS = 1e12
_PUBLISHED_THRESHOLD = 0.7  # of the published runs (MaverIQ, SC '25)


def _option(
    default: Any,
    explained: str,
    panel: str,
    *,
    shown: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Describe an option.

    Args:
        default: its value when nothing is said; None where it depends on other options.
        explained: one line for the help.
        panel: the group in the help.
        shown: the default in words, where the value would not tell.
        minimum: the smallest number allowed.
        maximum: the largest.
    """
    said = {"help": explained, "panel": panel, "shown": shown, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=said)


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
        None, "sharegpt, trace, or a number; the paper's estimator asks for none.", _WORKLOAD, shown="sharegpt"
    )
    output_tokens: str | None = _option(None, "trace, or a number.", _WORKLOAD, shown="20")
    poisson_as_published: bool = _option(False, "Draw Poisson stages as the published generator did.", _WORKLOAD)  # noqa: FBT003
    seed: int = _option(42, "Seed of all random streams.", _WORKLOAD)

    gpus: str = _option("8xA6000", "The cluster: a number and a kind of GPU, a TOML file, or local.", _CLUSTER)
    profile: str = _option("a6000-short", "Hardware profile: a6000-short, a6000-long, or a TOML file.", _CLUSTER)

    policy: str = _option(
        "hybrid", "hybrid, packing, llf, none, alpaserve, alpaserve-star, or your own FILE.py:FUNCTION.", _POLICY
    )
    intent: str = _option("min-cost", "min-cost, min-latency, min-memory, or min-gpu-cost.", _POLICY)
    slo_scale: float = _option(
        0.0, "Latency SLO in multiples of each model's own latency; 0: none.", _POLICY, minimum=0, maximum=1e6
    )
    min_accuracy: float = _option(0.0, "Least accuracy, in percent of the float16 model's.", _POLICY)
    float16_only: bool = _option(False, "No quantised weights.", _POLICY)  # noqa: FBT003
    packing_threshold: float = _option(_PUBLISHED_THRESHOLD, "Load up to which hybrid packs.", _POLICY)
    batch_size: int = _option(1, "Requests that an engine serves at once, at most.", _POLICY, minimum=1, maximum=10_000)
    queue: str = _option("fifo", "fifo, fifo-per-model, sjf, or edf.", _POLICY)
    max_wait_s: float = _option(
        60.0, "Who has waited longer goes next (not with fifo).", _POLICY, minimum=0, maximum=_LONGEST_S
    )
    router: str = _option("uniform", "Among replicas of a model: uniform or least-work.", _POLICY)
    alpaserve_profile: str = _option("maveriq", "What AlpaServe knows of models: maveriq or published.", _POLICY)
    alpaserve_as_published: bool = _option(False, "AlpaServe with its naming defect and table.", _POLICY)  # noqa: FBT003
    alpaserve_star_rule: str = _option("F", "How AlpaServe* keeps every model: F, A, B or C.", _POLICY)
    estimator: str | None = _option(
        None, "What the policy plans with: calibrated, paper, or measured.", _POLICY, shown="calibrated"
    )

    service_times: str | None = _option(
        None, "What times simulated service: calibrated, paper, measured, or recorded.", _WORLD, shown="calibrated"
    )
    exclude_run: str | None = _option(
        None, "A recorded run that calibrated service times must not have been fitted to.", _WORLD
    )
    fail: tuple[str, ...] = _option((), "A fault: gpu=3@600s,for=120s or deployment=2@900s; repeatable.", _WORLD)
    remove: tuple[str, ...] = _option((), "Take an endpoint away: endpoint=2@900s; repeatable.", _WORLD)
    on_failure: str = _option("requeue", "requeue (once) or fail what a failing engine was running.", _WORLD)
    tick_ms: float | None = _option(
        None, "The dispatcher's tick.", _WORLD, shown=_PROFILE, minimum=0, maximum=_LONGEST_MS
    )
    after_arrival_ms: float | None = _option(
        None, "Least delay from arrival to dispatch.", _WORLD, shown=_PROFILE, minimum=0, maximum=_LONGEST_MS
    )
    after_release_ms: float | None = _option(
        None,
        "Least delay from a GPU's release to its next dispatch.",
        _WORLD,
        shown=_PROFILE,
        minimum=0,
        maximum=_LONGEST_MS,
    )
    registration_delay_s: float | None = _option(
        None,
        "No dispatch for so long after an engine registers.",
        _WORLD,
        shown=_PROFILE,
        minimum=0,
        maximum=_LONGEST_S,
    )
    load_s: float | None = _option(
        None, "Time that an engine takes to load.", _WORLD, shown=_PROFILE, minimum=0, maximum=_LONGEST_S
    )
    no_dispatch_overhead: bool = _option(False, "A dispatcher without tick, delays and pause.", _WORLD)  # noqa: FBT003
    drain_s: float | None = _option(
        None, "Stop so long after the last arrival.", _WORLD, shown=_PROFILE, minimum=0, maximum=_LONGEST_S
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value, minimum, maximum = getattr(self, one.name), one.metadata["minimum"], one.metadata["maximum"]
            name = f"--{one.name.replace('_', '-')}"
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, not {value}")
            if value is not None and minimum is not None and value < minimum:
                raise InputError(f"{name} must be at least {minimum}, not {value}")
            if value is not None and maximum is not None and value > maximum:
                raise InputError(f"{name} must be at most {maximum:,.0f}, not {value}")
