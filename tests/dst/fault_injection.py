"""The faults of a simulated run, drawn from its seed: equal seeds give equal faults."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.streams import generator


class RandomDraws:
    """Random draws from a seed. Time is simulated, so the order of draws repeats, and so does the run."""

    def __init__(self, seed: int) -> None:
        self._draw = generator(seed, "simulation test")

    def happens(self, probability: float) -> bool:
        return probability > 0 and float(self._draw.random()) < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._draw.random())

    def wait_s(self, mean_s: float) -> float:
        """Return an exponentially distributed time in seconds."""
        return float(self._draw.exponential(mean_s))

    def integer(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return int(self._draw.integers(low, high + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """How likely each kind of fault is; none occurs after `until_s`, so that every request can end.

    Rates are per second of an engine process, probabilities per message or per launch.
    """

    until_s: float
    lost: float = 0.0
    repeated: float = 0.0
    mean_delay_s: float = 0.001
    crash_rate: float = 0.0
    hang_rate: float = 0.0
    no_process: float = 0.0
    never_connects: float = 0.0
    too_large: float = 0.0
    cannot_execute: float = 0.0
    garbled: float = 0.0
    stall_rate: float = 0.0
    ignores_sigterm: float = 0.5
    break_engines: bool = True

    @classmethod
    def drawn(cls, draws: RandomDraws) -> FaultRates:
        """Draw rates of each kind of fault; half of the runs have no fault of a kind."""

        def perhaps(maximum: float) -> float:
            return draws.between(0, maximum) if draws.happens(0.5) else 0.0

        return cls(
            until_s=draws.between(20, 200),
            lost=perhaps(0.3),
            repeated=perhaps(0.3),
            mean_delay_s=draws.between(0.0005, 0.2),
            crash_rate=perhaps(0.1),
            hang_rate=perhaps(0.05),
            no_process=perhaps(0.2),
            never_connects=perhaps(0.1),
            too_large=perhaps(0.1),
            cannot_execute=perhaps(0.1),
            garbled=perhaps(0.01),
            stall_rate=perhaps(0.05),
        )
