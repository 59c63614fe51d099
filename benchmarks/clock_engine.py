"""An engine for `executor.py` that answers with the instant at which it was asked."""

from __future__ import annotations

import time
from collections.abc import Iterator

from maveriq.exec.engines.emulated import EmulatedEngine
from maveriq.exec.engines.engine import Step
from maveriq.exec.messages import Generate

WORD = 1 << 30
"""A token holds less than this."""


class ClockEngine(EmulatedEngine):
    """Gives two tokens: the high and the low part of the monotonic clock, in microseconds."""

    def generate(self, work: Generate) -> Iterator[Step]:
        """Yield the parts."""
        requested_us = int(time.monotonic() * 1e6)
        for token in divmod(requested_us, WORD):
            yield [token] * len(work.sequences)
