"""Times of an engine with continuous batching at a rate of requests, from its times at a number of them in flight.

By Little's law an engine that gets r requests a second, each of which takes t seconds, has r t of them in flight. With
more in flight each takes longer, and the engine ends more of them a second, up to the most that it has KV blocks for.

What most requests do not exceed is estimated from the same curve. With random arrivals and room for all of them, the
number in flight is Poisson (M/G/inf), so the time of a token is taken at a percentile of that. A first token takes its
own prefill, which varies with the prompt, and waiting, for steps and for other prompts. Waiting grows with the variance
of prompts (Pollaczek and Khinchine); it is often nothing and sometimes long, and is taken to vary as in an M/M/1 queue.
The sum is taken to be gamma-distributed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

from scipy.special import gammaincinv

from maveriq.errors import InputError
from maveriq.estimate.estimator import ServiceEstimate

_SECANTS = 6  # of the search for the requests in flight, before it only halves what is left


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

    def at_tail(self, rps: float, share: float, *, prompt_cv: float = 0.0) -> ServiceEstimate:
        """Return the times that such a share of the requests does not exceed at a rate, estimated as described above.

        Args:
            rps: requests a second; with none, one runs alone.
            share: of the requests, between 0.5 and 1.
            prompt_cv: standard deviation of the prompts' lengths over their mean.
        """
        mean = self.at(rps)
        if rps <= 0:
            return mean
        in_flight = self.in_flight(rps)
        crowded = math.ceil(in_flight + NormalDist().inv_cdf(share) * math.sqrt(in_flight))
        tpot_s = self._service(min(crowded, self.max_in_flight)).tpot_s
        own_s = self._service(1).first_token_s
        waited_s = max(0.0, mean.first_token_s - own_s) * (1 + prompt_cv**2)
        busy = min(self._rps(in_flight) * own_s, 1.0)  # the share of the time in which a prompt is computed
        wait_cv = math.sqrt((2 - busy) / busy)
        deviation_s = math.hypot(prompt_cv * own_s, wait_cv * waited_s)
        first_token_s = _gamma_percentile(share, own_s + waited_s, deviation_s)
        return replace(mean, ttft_s=first_token_s - tpot_s, tpot_s=tpot_s)

    def in_flight(self, rps: float) -> int:
        """Return how many are in flight at a rate, at least one and at most as many as there is room for."""
        if self.max_in_flight == 1 or self._rps(1) >= rps:
            return 1
        low, high = 2, self.max_in_flight  # the answer lies between them, both included
        before, before_s = 1, self._service(1).latency_s
        guess: float = rps * before_s
        for tries in itertools.count():
            if low == high:
                break
            tried = min(max(math.ceil(guess), low), high - 1) if tries < _SECANTS else (low + high) // 2
            tried_s = self._service(tried).latency_s
            if self._rps(tried) >= rps:
                high = tried
            else:
                low = tried + 1
            # Little's law, if the latency goes on as it rose from one try to the next.
            slope = (tried_s - before_s) / (tried - before)
            guess = rps * (tried_s - slope * tried) / (1 - rps * slope) if rps * slope < 1 else high
            before, before_s = tried, tried_s
        return low

    def _rps(self, in_flight: int) -> float:
        return in_flight / self._service(in_flight).latency_s

    def _service(self, in_flight: int) -> ServiceEstimate:
        if in_flight not in self._services:
            self._services[in_flight] = self._service_of(in_flight)
        return self._services[in_flight]


def _gamma_percentile(share: float, mean: float, deviation: float) -> float:
    variance = deviation**2
    return float(gammaincinv(mean**2 / variance, share)) * variance / mean if variance else mean
