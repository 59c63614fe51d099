"""Recent load of GPUs, as placement policies see it (SPEC 5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
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


def recent_load(
    spans: Iterable[tuple[Micros, Micros]], now_us: Micros, window: LoadWindow, phase_us: Micros = 0
) -> float:
    """Return the share of the last samples before `now_us` in which a GPU was busy.

    Args:
        spans: when the GPU was executing; spans must not overlap, their order plays no part.
        now_us: the present; an execution under way ends here.
        window: how far to look back, and what counts as busy.
        phase_us: how old a reading of this GPU is when it is sampled.
    """
    last = now_us // window.sample_us
    first = last - window.samples
    busy_us = [0] * window.samples  # of samples first + 1 to last
    for start_us, end_us in spans:
        # Sample k is taken at k * sample_us; its reading is phase_us old and sees the look_us before that.
        for sample in range(max((start_us + phase_us) // window.sample_us, first) + 1, last + 1):
            read_us = sample * window.sample_us - phase_us
            seen_from_us = read_us - window.look_us
            if seen_from_us >= end_us:
                break
            busy_us[sample - first - 1] += max(0, min(end_us, read_us) - max(start_us, seen_from_us))
    threshold_us = window.busy_share * window.look_us
    return sum(amount > threshold_us for amount in busy_us) / window.samples
