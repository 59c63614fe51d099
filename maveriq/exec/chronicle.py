"""What a run leaves of its engines, beside the records of requests."""

from __future__ import annotations

from maveriq.exec.messages import Loaded
from maveriq.exec.orders import Order
from maveriq.exec.wording import one_line
from maveriq.exec.world import EngineRecord
from maveriq.units import Micros, seconds

MOST_ENGINES = 10_000
MOST_NOTES = 100
"""What comes after so many is left out: a service may run for months, and its engines fail as long."""


class Chronicle:
    """The engines that served, and what a reader of the results must know."""

    def __init__(self) -> None:
        self.engines: list[EngineRecord] = []
        self.notes: list[str] = []
        self._asked_s: dict[int, float] = {}  # by deployment: when its last engine was to start

    def asked(self, deployment_id: int, now_s: float) -> None:
        """Note that an engine is to start; times are the event loop's."""
        self._asked_s[deployment_id] = now_s

    def served(self, order: Order, loaded: Loaded, now_s: float) -> None:
        """Note that it serves."""
        if len(self.engines) == MOST_ENGINES:
            return
        start_s = now_s - self._asked_s[order.spec.deployment_id]
        self.engines.append(EngineRecord(order=order, loaded=loaded, start_s=start_s))

    def note(self, name: str, now_us: Micros, what: str) -> None:
        """Note what happened to a deployment."""
        if len(self.notes) == MOST_NOTES:
            self.notes.append("what else happened to engines is left out here")
        elif len(self.notes) < MOST_NOTES:
            self.notes.append(f"{name}, {seconds(now_us):.1f} s: {one_line(what)}")
