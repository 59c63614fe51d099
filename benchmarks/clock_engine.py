"""An engine for `executor.py` that answers with the time at which it received a request."""

from __future__ import annotations

import time
from collections.abc import Iterator

from maveriq.exec.engines.emulated import EmulatedEngine
from maveriq.exec.engines.engine import Step
from maveriq.exec.messages import Generate

TOKEN_LIMIT = 1 << 30
"""Tokens are less than this."""


class ClockEngine(EmulatedEngine):
    """Generates two tokens: the high and the low part of the monotonic clock in microseconds."""

    def generate(self, batch: Generate) -> Iterator[Step]:
        """Yield both parts."""
        requested_us = int(time.monotonic() * 1e6)
        for token in divmod(requested_us, TOKEN_LIMIT):
            yield [token] * len(batch.sequences)
