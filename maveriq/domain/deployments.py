"""Intents and endpoints: what a developer asks for instead of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from maveriq.domain.models import ModelSpec
from maveriq.domain.parallel import ANY_CONFIGURATION, ConfigurationPattern, ParallelConfig
from maveriq.errors import InputError, UnknownNameError
from maveriq.units import Micros


class Objective(StrEnum):
    """What to minimise (SPEC 4)."""

    MIN_COST = "min-cost"
    MIN_LATENCY = "min-latency"
    MIN_MEMORY = "min-memory"
    MIN_GPU_COST = "min-gpu-cost"

    @classmethod
    def named(cls, text: str) -> Objective:
        """Return the objective of a name; `min_cost` and the paper's `min_lat` and `min_mem` count too.

        Raises:
            UnknownNameError: no such objective.
        """
        name = text.replace("_", "-")
        name = {"min-lat": "min-latency", "min-mem": "min-memory"}.get(name, name)
        try:
            return cls(name)
        except ValueError:
            raise UnknownNameError("intent", text, [objective.value for objective in cls]) from None


class Cost(StrEnum):
    """What the objective `min-cost` counts."""

    MONEY = "money"  # the price of the GPUs that are held; their time where a price is not known
    MEMORY = "memory"  # latency x memory, the published system's rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """An objective and its constraints.

    Args:
        slo_s: the latency of a whole request must be below this; None for no SLO.
        slo_ttft_s: the first token must come within this; None for no SLO.
        slo_tpot_s: further tokens must come within this, on average; None for no SLO.
        min_accuracy: minimum accuracy in percent of the float16 model's MMLU score.
        float16_only: rule out quantised weights (the KV cache may still be int8).

    Raises:
        InputError: an SLO that is not positive, an accuracy outside 0 to 100 or between 0 and 1 (taken for a
            share), NaN.
    """

    objective: Objective
    slo_s: float | None = None
    min_accuracy: float = 0.0
    float16_only: bool = False
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name, slo_s in (("latency", self.slo_s), ("TTFT", self.slo_ttft_s), ("TPOT", self.slo_tpot_s)):
            if slo_s is not None and not (math.isfinite(slo_s) and slo_s > 0):
                raise InputError(f"{name} SLO must be a positive number of seconds, not {slo_s}")
        if not 0 <= self.min_accuracy <= 100:
            raise InputError(f"minimum accuracy must lie between 0 and 100 percent, not {self.min_accuracy}")
        if 0 < self.min_accuracy < 1:
            raise InputError(
                f"minimum accuracy is in percent, and {self.min_accuracy:g} would be {self.min_accuracy:g} %; "
                f"write {100 * self.min_accuracy:g} for {100 * self.min_accuracy:g} %, or 0 for no minimum"
            )


class Batching(StrEnum):
    """How an engine batches requests."""

    EXCLUSIVE = "exclusive"  # a batch is computed to its end before the next starts; the controller holds the queue
    CONTINUOUS = "continuous"  # requests join and leave between steps; the engine holds the queue


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedLoad:
    """The requests that an endpoint is expected to get.

    Args:
        rps: requests a second.
        prompt_tokens: mean length of prompts.
        output_tokens: mean length of outputs.
        prompt_cv: standard deviation of the prompts' lengths over their mean; 0 where it is not known.

    Raises:
        InputError: a rate that is not positive, a length below 1.
    """

    rps: float
    prompt_tokens: int
    output_tokens: int
    prompt_cv: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rps) and self.rps > 0):
            raise InputError(f"expected load must be a positive number of requests a second, not {self.rps}")
        if min(self.prompt_tokens, self.output_tokens) < 1:
            raise InputError(
                f"expected load: lengths must be at least 1, not {self.prompt_tokens} and {self.output_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """A model to be served under an intent.

    `endpoint_id` (from 1) is what requests address; one or more deployments serve it.
    `prompt_tokens` and `output_tokens` are the typical request that latency is estimated for.

    `configuration` is the only one that a policy may choose, None for any that `pattern` allows. `batching` is how its
    engines batch. `load` is what continuous engines are chosen for; None for one request at a time.
    `replicas` is how many deployments serve it; None leaves that to the policy.
    `memory_share` is the share of each GPU's memory that they take, None for what the configuration needs;
    `memory_shares` are those on some kinds of GPU, where they are others.
    `ready_at_start`: its engines are up before the first request of a simulated run arrives.
    `sequence_tokens` is the longest sequence, prompt and output, that its engines take; None for what all engines of
    the system take.

    Raises:
        InputError: a count below 1, a time before the start, a share outside 0 to 1.
    """

    endpoint_id: int
    model: ModelSpec
    intent: Intent
    requested_us: Micros
    prompt_tokens: int
    output_tokens: int
    batch_size: int = 1
    configuration: ParallelConfig | None = None
    pattern: ConfigurationPattern = ANY_CONFIGURATION
    load: ExpectedLoad | None = None
    batching: Batching = Batching.EXCLUSIVE
    replicas: int | None = None
    memory_share: float | None = None
    memory_shares: tuple[tuple[str, float], ...] = ()
    ready_at_start: bool = False
    sequence_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in ("endpoint_id", "prompt_tokens", "output_tokens", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(f"deploy {self.model.name}: {field} must be at least 1, not {getattr(self, field)}")
        if self.replicas is not None and self.replicas < 1:
            raise InputError(f"deploy {self.model.name}: replicas must be at least 1, not {self.replicas}")
        if self.requested_us < 0:
            raise InputError(f"deploy {self.model.name}: requested at {self.requested_us} µs, before the run starts")
        for share in (self.memory_share, *(share for _, share in self.memory_shares)):
            if share is not None and not 0 < share <= 1:
                raise InputError(f"deploy {self.model.name}: memory share must lie in (0, 1], not {share}")

    def memory_share_on(self, kind: str) -> float | None:
        """Return the share of the memory of a GPU of a kind that its engines take; see `memory_share`."""
        return dict(self.memory_shares).get(kind, self.memory_share)
