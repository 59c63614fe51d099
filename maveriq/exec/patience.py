"""Judging an engine by the clock: whether it starts, answers, and gets on."""

from __future__ import annotations

from maveriq.exec.orders import SupervisionSettings
from maveriq.exec.underway import UnderWay


class Patience:
    """What is left of it with one engine. Times are the event loop's, in seconds.

    Args:
        settings: how much there is.
        now_s: when the engine is launched.
    """

    def __init__(self, settings: SupervisionSettings, now_s: float) -> None:
        self._settings = settings
        self._launched_s = self._heard_s = now_s

    def heard(self, now_s: float) -> None:
        """Note a sign of life."""
        self._heard_s = now_s

    def excuse(self, late_s: float, now_s: float, under_way: UnderWay | None) -> None:
        """Hold nothing against the engine: it was the executor that stood still (stopped, or short of a processor)."""
        self._launched_s += late_s
        self._heard_s = min(now_s, self._heard_s + late_s)
        if under_way is not None:
            under_way.excuse(late_s, now_s)

    def complaint(self, now_s: float, *, loaded: bool, under_way: UnderWay | None) -> str:
        """Return why there is no patience left; empty while there is."""
        if not loaded:
            return self.too_slow() if now_s - self._launched_s > self._settings.start_s else ""
        if now_s - self._heard_s > self._settings.hang_s:
            return f"its engine was not heard for {self._settings.hang_s:g} s"
        if under_way is not None and under_way.stands_still(now_s):
            return "its engine did not get on with an execution"
        return ""

    def too_slow(self) -> str:
        """Return what to say of an engine that takes too long to start."""
        return f"its engine did not start within {self._settings.start_s:g} s"
