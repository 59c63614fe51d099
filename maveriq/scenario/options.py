"""What a user can say about a run, simulated or real. Names and defaults are the command line's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from maveriq.errors import InputError
from maveriq.policy.place import DEFAULT_PACKING_THRESHOLD


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every option of `maveriq sim` that shapes the run; defaults are the published main run.

    None leaves a value to what it depends on: the scale and lengths to the trace, the timing to
    the hardware profile. Durations are in the unit their name says.

    Args:
        policy: `hybrid`, `packing`, `llf`, `none`, or a placement rule as `file.py:function`.
        intent: what to minimise for every deployment.
        trace: `code`, `conversation`, `poisson`, or the path of an Azure trace or a schedule.
        scale: factor on the trace's rate.
        models: name of a model set or path of its TOML file.
        slo_scale: latency SLO in multiples of the model's own latency; 0 for none.
        min_accuracy: least accuracy in percent of the float16 model's.
        float16_only: leave out quantised weights.
        packing_threshold: load up to which `hybrid` packs.
        batch_size: requests that an engine serves at once, at most.
        prompt_tokens: `sharegpt`, `trace` or a number.
        output_tokens: `trace` or a number.
        gpus: a cluster as `8xA6000` or the path of a TOML file.
        queue: `fifo`, `fifo-per-model`, `sjf` or `edf`.
        max_wait_s: bound on waiting, for every queue but `fifo`; who waited longer goes next.
        plan_with: estimator that the policy plans with.
        serve_with: estimator that times simulated service, or `recorded`.
        profile: hardware profile by name or path.
        seed: of all random streams.
        fail: faults, each as `gpu=3@600s,for=120s` or `deployment=2@900s`.
        on_failure: `requeue` (once) or `fail` for the request under a failing engine.
        poisson_as_published: draw the Poisson stages as the published generator did.
        tick_ms: the dispatcher's tick.
        after_arrival_ms: least delay from arrival to dispatch.
        after_release_ms: least delay from the release of a GPU to the next dispatch on it.
        pause_s: nothing is dispatched so long after an engine registers.
        load_s: time from the deploy command to registration.
        ideal: a dispatcher without tick, delays and pause; explicit values still count.
        drain_s: the run stops so long after the last arrival.

    Raises:
        InputError: a number that is not finite or is out of range.
    """

    policy: str = "hybrid"
    intent: str = "min-cost"
    trace: str = "code"
    scale: float | None = None
    models: str = "large"
    slo_scale: float = 0.0
    min_accuracy: float = 0.0
    float16_only: bool = False
    packing_threshold: float = DEFAULT_PACKING_THRESHOLD
    batch_size: int = 1
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    gpus: str = "8xA6000"
    queue: str = "fifo"
    max_wait_s: float = 60.0
    plan_with: str = "paper"
    serve_with: str = "paper"
    profile: str = "a6000-short"
    seed: int = 42
    fail: tuple[str, ...] = ()
    on_failure: str = "requeue"
    poisson_as_published: bool = False
    tick_ms: float | None = None
    after_arrival_ms: float | None = None
    after_release_ms: float | None = None
    pause_s: float | None = None
    load_s: float | None = None
    ideal: bool = False
    drain_s: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{field.name.replace('_', '-')} must be a finite number, not {value}")
        for name in ("max_wait_s", "tick_ms", "after_arrival_ms", "after_release_ms", "pause_s", "load_s", "drain_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, not {value:g}")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, not {self.batch_size}")
