"""Requests and their statuses, and the demand forecast that a static placement policy gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from maveriq.errors import InputError
from maveriq.units import Micros

if TYPE_CHECKING:
    import numpy as np


class RequestStatus(IntEnum):
    """The status of a request; each ends in exactly one of the last four."""

    WAITING = 0
    RUNNING = 1
    COMPLETED = 2
    REFUSED = 3
    FAILED = 4
    UNFINISHED = 5

    @property
    def label(self) -> str:
        """The name in records and tables."""
        return self.name.lower()


FINAL_STATUSES = (
    RequestStatus.COMPLETED,
    RequestStatus.REFUSED,
    RequestStatus.FAILED,
    RequestStatus.UNFINISHED,
)


PREFIX_HASH_TOKENS = 512
"""Tokens that a prefix hash stands for by default, as in Mooncake's traces."""


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt to one endpoint.

    Nothing changes a request once it is made. It is not frozen because a frozen one takes three times
    as long to make, and a run makes millions. Counts are checked once per workload, where it is read.

    Args:
        request_id: position in the workload, from 1.
        output_tokens: tokens to generate. A policy never sees it.
        slo_us: latency objective, 0 for none.
        priority: goes to the head of the queue (`prior_inference`).
        prompt_id: equal for equal prompts, from 1; 0 where that is unknown.
        session_id: of the conversation that it is a turn of, from 1; 0 for none.
        prefix_hashes: the i-th stands for the first `(i + 1) * prefix_hash_tokens` tokens: equal ones, equal tokens.
            They may go on beyond the prompt, into the output, where later prompts repeat it. Empty where it is unknown.
        prefix_hash_tokens: tokens for each of `prefix_hashes`.
    """

    request_id: int
    endpoint_id: int
    arrival_us: Micros
    prompt_tokens: int
    output_tokens: int
    slo_us: Micros = 0
    priority: bool = False
    prompt_id: int = 0
    session_id: int = 0
    prefix_hashes: Sequence[int] = ()
    prefix_hash_tokens: int = PREFIX_HASH_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemandForecast:
    """Requests that are expected, in the order of arrival, a column each (NumPy, equal lengths).

    Args:
        models: what requests are addressed to, by names that differ.
        arrival_s: times in seconds, not decreasing.
        model_index: position in `models`; -1 for a request to a model that is not among them.
        slo_s: latency objective in seconds, infinite for none.

    Raises:
        InputError: no request, columns that do not belong together, times that go back.
    """

    models: tuple[str, ...]
    arrival_s: np.ndarray[Any, Any]
    model_index: np.ndarray[Any, Any]
    slo_s: np.ndarray[Any, Any]

    def __post_init__(self) -> None:
        if len(set(self.models)) != len(self.models):
            raise InputError(f"demand forecast: a model stands twice among {', '.join(self.models)}")
        lengths = {len(self.arrival_s), len(self.model_index), len(self.slo_s)}
        if len(lengths) != 1:
            raise InputError(f"demand forecast: columns have different lengths {sorted(lengths)}")
        if lengths == {0}:
            raise InputError("demand forecast: no request is expected; there is nothing to plan for")
        # Asked this way round, a NaN fails too.
        if not (self.arrival_s[1:] >= self.arrival_s[:-1]).all():
            raise InputError("demand forecast: arrivals must be in order of time")
        if not (self.slo_s > 0).all():
            raise InputError("demand forecast: every SLO must be positive")
        if self.model_index.min() < -1 or self.model_index.max() >= len(self.models):
            raise InputError(f"demand forecast: model_index must lie between -1 and {len(self.models) - 1}")

    def __len__(self) -> int:
        return len(self.arrival_s)
