"""The requests of a workload, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maveriq.domain.requests import Request
from maveriq.workload.base import Arrivals

_CHUNK = 1 << 14


def requests_of(arrivals: Arrivals) -> Iterator[Request]:
    """Yield the requests one by one; a chunk of the columns at a time keeps memory small."""
    columns = (
        arrivals.arrival_us,
        arrivals.endpoint_id,
        arrivals.prompt_tokens,
        arrivals.output_tokens,
        arrivals.slo_us,
        np.zeros(len(arrivals), dtype=bool) if arrivals.priority is None else arrivals.priority.astype(bool),
    )
    for start in range(0, len(arrivals), _CHUNK):
        chunk = (column[start : start + _CHUNK].tolist() for column in columns)
        for request_id, (arrival_us, endpoint_id, prompt_tokens, output_tokens, slo_us, priority) in enumerate(
            zip(*chunk, strict=True), start + 1
        ):
            yield Request(
                request_id=request_id,
                endpoint_id=endpoint_id,
                arrival_us=arrival_us,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                slo_us=slo_us,
                priority=priority,
            )
