"""What a run on engines leaves beside its records: which engines served, and warnings."""

from __future__ import annotations

from dataclasses import dataclass

from maveriq.exec.engine_process import LaunchSpec
from maveriq.exec.messages import Loaded, one_line
from maveriq.units import Micros, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """An engine that served: how it was launched, what it reported, and how long it took to start, in real seconds."""

    launch_spec: LaunchSpec
    loaded: Loaded
    start_s: float


MAX_ENGINES = 10_000
MAX_NOTES = 100
"""Limits of `RunNotes`: a service may run, and its engines may fail, for months."""


class RunNotes:
    """The engines that have served, and warnings for readers of the results."""

    def __init__(self) -> None:
        self.engines: list[EngineRecord] = []
        self.notes: list[str] = []
        self._start_requested_s: dict[int, float] = {}  # by deployment, of its last engine

    def engine_starting(self, deployment_id: int, now_s: float) -> None:
        """Record that an engine is to start; times are on the event loop's clock."""
        self._start_requested_s[deployment_id] = now_s

    def engine_loaded(self, launch_spec: LaunchSpec, loaded: Loaded, now_s: float) -> None:
        """Record that the engine is ready to serve."""
        if len(self.engines) == MAX_ENGINES:
            return
        start_s = now_s - self._start_requested_s[launch_spec.spec.deployment_id]
        self.engines.append(EngineRecord(launch_spec=launch_spec, loaded=loaded, start_s=start_s))

    def add_note(self, deployment: str, now_us: Micros, text: str) -> None:
        """Add a note about a deployment."""
        if len(self.notes) == MAX_NOTES:
            self.notes.append("further events of engines are omitted")
        elif len(self.notes) < MAX_NOTES:
            self.notes.append(f"{deployment}, {seconds(now_us):.1f} s: {one_line(text)}")
