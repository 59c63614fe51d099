"""The requests of the published AlpaServe and AlpaServe* runs, which were drawn in another way than MaverIQ's.

The published driver numbers every replica of a model as an entry of its own. Each entry that is loaded shifts all that
follows by 90 s, also an entry that the placement leaves out. NumPy's legacy generator draws the times alone. Python's
generator, from the same seed, draws for each request first a model, then one of its replicas; before, it has shuffled a
list of prompts. So the draws depend on how many numbers that took, which one recorded run tells. With it, all 11
recorded runs (31,548 requests) come out in every time and replica (tests/published/test_recorded_runs.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np

from maveriq.csv_columns import micros_column
from maveriq.workload.arrivals import BIN_S, DRAW_WIDTH_S, LOAD_SHIFT_S, Draw, scaled_counts

_WORDS_OF_SHUFFLE = 73_691  # 32-bit numbers that the shuffle took with seed 42
_BLOCK = 1 << 14
_WORD_BITS = 32


def replica_draw(
    requests_per_minute: np.ndarray, *, scale: float, load_at: Sequence[int], replicas: Sequence[int], seed: int = 42
) -> Draw:
    """Draw requests for the replicas of a static placement as the published driver did.

    Args:
        requests_per_minute: of the trace.
        scale: factor on the rate.
        load_at: the bin at which each model loads, ascending; the first is 0.
        replicas: of each model, 0 for one that the placement leaves out: it has an entry, too.
        seed: of both generators; recorded runs have 42.

    Returns:
        The requests; `endpoint_id` counts entries, from 1: the replicas of the first model, then those of the next.

    Raises:
        InputError: as `scaled_counts`.
    """
    sizes = [max(1, count) for count in replicas]
    first = [1, *(1 + total for total in accumulate(sizes))]
    legacy, below = np.random.RandomState(seed), _NumbersBelow(seed)
    times, entries, bins = [], [], []
    for index, count in enumerate(scaled_counts(requests_per_minute, scale).tolist()):
        loaded = sum(start <= index for start in load_at)
        # The driver lists models with several replicas after the others.
        order = sorted(range(loaded), key=lambda model: sizes[model] > 1)
        start_s = BIN_S * index
        shift_s = LOAD_SHIFT_S * (first[loaded] - 1)
        times.append(np.sort(legacy.uniform(start_s, start_s + DRAW_WIDTH_S, count)) + shift_s)
        for _ in range(count):
            model = order[below.draw(loaded)]
            entries.append(first[model] + below.draw(sizes[model]))
        bins.append(count)
    return Draw(
        arrival_us=micros_column(np.concatenate(times)),
        endpoint_id=np.array(entries, dtype=np.int64),
        bin_index=np.repeat(np.arange(len(bins)), bins),
    )


class _NumbersBelow:
    """Whole numbers below a limit from the Mersenne Twister, as Python's `random.choice` takes them (mutable)."""

    def __init__(self, seed: int) -> None:
        self._words = self._stream(seed)
        for _ in range(_WORDS_OF_SHUFFLE):
            next(self._words)

    @staticmethod
    def _stream(seed: int) -> Iterator[int]:
        legacy = np.random.RandomState()
        legacy.seed([seed])  # a list seeds the twister as Python does, a number does not
        twister = np.random.MT19937()
        twister.state = cast(Any, legacy.get_state(legacy=False))
        while True:
            yield from twister.random_raw(_BLOCK).tolist()

    def draw(self, limit: int) -> int:
        """Return a number from 0 to `limit` - 1: the highest bits of each word, until they are one."""
        bits = limit.bit_length()
        while (found := next(self._words) >> (_WORD_BITS - bits)) >= limit:
            pass
        return found
