"""Times of an engine with continuous batching at a rate of requests, from its times at a number of them in flight.

By Little's law an engine that gets r requests a second, each of which takes t seconds, has r t of them in flight. With
more in flight each takes longer, and the engine ends more of them a second, up to the most that it has KV blocks for.
"""

from __future__ import annotations

from collections.abc import Callable

from maveriq.errors import InputError
from maveriq.estimate.estimator import ServiceEstimate


class LoadCurve:
    """One engine, from idle to full.

    Args:
        service_of: the times of a request while so many are in flight, itself included.
        max_in_flight: the most that run together; others wait.

    Raises:
        InputError: not even one runs.
    """

    def __init__(self, service_of: Callable[[int], ServiceEstimate], max_in_flight: int) -> None:
        if max_in_flight < 1:
            raise InputError(f"load curve: an engine must have room for a request, not for {max_in_flight}")
        self.max_in_flight = max_in_flight
        self._service_of = service_of
        self._services: dict[int, ServiceEstimate] = {}

    @property
    def capacity_rps(self) -> float:
        """Requests that it ends in a second, with as many in flight as it has room for."""
        return self._rps(self.max_in_flight)

    def at(self, rps: float) -> ServiceEstimate:
        """Return the times of a request at a rate; where it is beyond the capacity, those of a full engine."""
        return self._service(self.in_flight(rps))

    def in_flight(self, rps: float) -> int:
        """Return how many are in flight at a rate, at least one and at most as many as there is room for."""
        low, high = 1, self.max_in_flight  # the answer lies between them, both included
        while low < high:
            middle = (low + high) // 2
            if self._rps(middle) >= rps:
                high = middle
            else:
                low = middle + 1
        return low

    def _rps(self, in_flight: int) -> float:
        return in_flight / self._service(in_flight).latency_s

    def _service(self, in_flight: int) -> ServiceEstimate:
        if in_flight not in self._services:
            self._services[in_flight] = self._service_of(in_flight)
        return self._services[in_flight]
