"""Replays requests on one continuous engine, with no cluster or controller around it.

`maveriq fit` and `experiments/serving` ask thousands of times how long recorded requests would take. The engine and its
clock are those of `maveriq sim` (`maveriq.scenario.stepped_engine`), so that both answer the same to the microsecond.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from maveriq.domain.requests import Request
from maveriq.errors import InvariantError
from maveriq.scenario.continuous_engines import EngineParts
from maveriq.scenario.stepped_engine import SteppedEngine

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTimes:
    """When requests were sent, got their first token and their last, in µs; a column each, in the requests' order."""

    sent_us: Array
    first_token_us: Array
    finished_us: Array

    @property
    def ttft_s(self) -> Array:
        """Time to the first token, from the sending."""
        return np.asarray((self.first_token_us - self.sent_us) / 1e6)

    @property
    def e2e_s(self) -> Array:
        """Time to the last token, from the sending."""
        return np.asarray((self.finished_us - self.sent_us) / 1e6)


def replay_on_engine(
    parts: EngineParts, requests: Sequence[Request], *, max_in_flight: int | None = None
) -> RequestTimes:
    """Run an engine until all requests have ended.

    Args:
        parts: of an engine without requests.
        requests: ordered by arrival.
        max_in_flight: the client sends a request only when fewer than so many are in flight; None for no limit. With
            all arrivals at 0 it is the concurrency of a closed loop.

    Raises:
        InputError: the engine can never serve a request.
    """
    engine = SteppedEngine(parts, 1, 1)
    position = {request.request_id: index for index, request in enumerate(requests)}
    sent_us, first_token_us, finished_us = np.zeros((3, len(requests)), dtype=np.int64)
    held: deque[Request] = deque()
    arrived = in_flight = ended = 0
    limit = len(requests) if max_in_flight is None else max_in_flight
    while ended < len(requests):
        due_us = requests[arrived].arrival_us if arrived < len(requests) else None
        times = [time_us for time_us in (engine.next_us, due_us) if time_us is not None]
        if not times:
            raise InvariantError(f"the engine waits for nothing while {len(requests) - ended} requests have not ended")
        now_us = min(times)
        progress = engine.finish(now_us)
        for request_id in progress.first_tokens:
            first_token_us[position[request_id]] = now_us
        for end in progress.finished:
            finished_us[position[end.request_id]] = now_us
        ended += len(progress.finished)
        in_flight -= len(progress.finished)
        while arrived < len(requests) and requests[arrived].arrival_us <= now_us:
            held.append(requests[arrived])
            arrived += 1
        while held and in_flight < limit:
            request = held.popleft()
            sent_us[position[request.request_id]] = now_us
            in_flight += 1
            engine.submit(now_us, request)
        engine.compose(now_us)
    return RequestTimes(sent_us=sent_us, first_token_us=first_token_us, finished_us=finished_us)
