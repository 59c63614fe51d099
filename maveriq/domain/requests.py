"""Requests: the users' work, and the one status each ends in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from maveriq.units import Micros


class RequestStatus(IntEnum):
    """Where a request is; every one that arrives ends in exactly one of the last four."""

    WAITING = 0
    RUNNING = 1
    COMPLETED = 2
    REFUSED = 3
    FAILED = 4
    UNFINISHED = 5

    @property
    def label(self) -> str:
        """The word that records and tables use."""
        return self.name.lower()


FINAL_STATUSES = (
    RequestStatus.COMPLETED,
    RequestStatus.REFUSED,
    RequestStatus.FAILED,
    RequestStatus.UNFINISHED,
)


@dataclass(slots=True, kw_only=True)
class Request:
    """One prompt to one endpoint.

    Not frozen, for speed alone (a frozen one takes three times as long to make, and a run makes
    millions); nothing changes a request once it is made. Counts are checked where a workload
    is read, once for all its requests.

    Args:
        request_id: position in the workload, from 1.
        output_tokens: tokens to generate. A policy never sees it.
        slo_us: latency objective, 0 for none.
        priority: goes to the head of the queue (`prior_inference`).
    """

    request_id: int
    endpoint_id: int
    arrival_us: Micros
    prompt_tokens: int
    output_tokens: int
    slo_us: Micros = 0
    priority: bool = False
