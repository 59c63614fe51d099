"""Recent load of GPUs, as placement policies see it (SPEC 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from maveriq.domain.cluster import LoadWindow
from maveriq.streams import pick
from maveriq.units import Micros

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers: TypeAlias = npt.NDArray[np.int64]


class UtilizationWindow:
    """The recent executions of a deployment, within the window, and its total execution time."""

    __slots__ = ("_horizon_us", "_spans", "_total_us")

    def __init__(self, window: LoadWindow) -> None:
        self._horizon_us = (window.samples + 2) * window.sample_us
        self._spans: deque[tuple[Micros, Micros]] = deque()
        self._total_us = 0

    def add(self, start_us: Micros, end_us: Micros) -> None:
        """Add an execution that just ended; ends must not decrease."""
        spans = self._spans
        spans.append((start_us, end_us))
        self._total_us += end_us - start_us
        while spans[0][1] < end_us - self._horizon_us:
            spans.popleft()

    def add_together(self, start_us: Integers, end_us: Integers) -> None:
        """Add executions that ended, in order."""
        import numpy as np

        self._total_us += int((end_us - start_us).sum())
        recent = slice(int(np.searchsorted(end_us, end_us[-1] - self._horizon_us)), None)
        self._spans.extend(zip(start_us[recent].tolist(), end_us[recent].tolist(), strict=True))
        while self._spans[0][1] < end_us[-1] - self._horizon_us:
            self._spans.popleft()

    @property
    def total_us(self) -> Micros:
        """Total time spent executing."""
        return self._total_us

    @property
    def spans(self) -> Iterable[tuple[Micros, Micros]]:
        """Recent executions (start, end), oldest first; some may lie before the window."""
        return self._spans


def sampling_phases_us(window: LoadWindow, gpus: int, seed: int) -> tuple[Micros, ...]:
    """Return how old each GPU's readings are when they are sampled, in the order of ids.

    Drawn once per run, evenly from 0 to `max_phase_us`; a GPU keeps its phase, since its counter ticks evenly.
    """
    return tuple(pick(seed, "load sampling", gpu_id, window.max_phase_us + 1) for gpu_id in range(gpus))


def recent_loads(
    spans: Sequence[Sequence[tuple[Micros, Micros]]], now_us: Micros, window: LoadWindow, phases_us: Sequence[Micros]
) -> list[float]:
    """Return for each GPU the share of the last samples before `now_us` in which it was busy.

    Args:
        spans: when each GPU was executing; spans of one must not overlap, their order plays no part.
        now_us: the present; an execution under way ends here.
        window: how far to look back, and what counts as busy.
        phases_us: how old a reading of each GPU is when it is sampled.
    """
    import numpy as np

    counts = [len(of_gpu) for of_gpu in spans]
    if not any(counts):
        return [0.0] * len(spans)
    numbers = chain.from_iterable(chain.from_iterable(spans))
    start_us, end_us = np.fromiter(numbers, dtype=np.int64, count=2 * sum(counts)).reshape(-1, 2).T
    phase_us, gpu = np.repeat(phases_us, counts), np.repeat(np.arange(len(spans)), counts)
    last = now_us // window.sample_us
    first = last - window.samples  # samples first + 1 to last count
    # Sample k is taken at k * sample_us; its reading is phase_us old and sees the look_us before that.
    from_sample = np.maximum((start_us + phase_us) // window.sample_us, first) + 1
    to_sample = np.minimum((end_us + phase_us + window.look_us - 1) // window.sample_us, last)
    seen = np.maximum(to_sample - from_sample + 1, 0)  # samples that see each span
    span = np.repeat(np.arange(len(seen)), seen)
    sample = from_sample[span] + np.arange(len(span)) - np.repeat(np.cumsum(seen) - seen, seen)
    read_us = sample * window.sample_us - phase_us[span]
    busy_us = np.minimum(end_us[span], read_us) - np.maximum(start_us[span], read_us - window.look_us)
    place = gpu[span] * window.samples + sample - first - 1
    of_samples = np.bincount(place, np.maximum(busy_us, 0), minlength=len(spans) * window.samples)
    is_busy = of_samples.reshape(len(spans), window.samples) > window.busy_share * window.look_us
    loads: list[float] = (is_busy.sum(axis=1) / window.samples).tolist()
    return loads
