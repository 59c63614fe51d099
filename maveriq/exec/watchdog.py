"""Timeouts of engines: what one was asked to do, when it last made progress, and whether it hangs.

An engine hangs if it sends nothing for `hang_timeout_s` (it answers pings even while it computes), or if its current
execution makes no progress for that plus a multiple of its estimated service time. A continuous engine with requests
hangs if it ends no step for `hang_timeout_s` (`maveriq.exec.open_requests`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from maveriq.exec.messages import Finished, Generate, StepProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionSettings:
    """Timeouts and restarts of engines, in real seconds.

    Args:
        start_timeout_s: for launch, handshake and load together.
        heartbeat_interval_s: between pings.
        hang_timeout_s: how long an engine may send nothing.
        service_time_factor: an execution may take `hang_timeout_s` plus this many times its estimated service time
            from one step to the next.
        grace_period_s: between `Stop`, SIGTERM and SIGKILL when an engine is terminated.
        initial_backoff_s: restart delay after the first failure; it doubles with each failure in a row.
        max_backoff_s: the longest restart delay.
        max_restarts: the deployment is given up at this many failures in a row.
        memory_timeout_s: how long a start waits for GPU memory of stopped engines to become free.
    """

    start_timeout_s: float = 900.0
    heartbeat_interval_s: float = 1.0
    hang_timeout_s: float = 30.0
    service_time_factor: float = 3.0
    grace_period_s: float = 5.0
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    max_restarts: int = 5
    memory_timeout_s: float = 60.0


class WatchedWork(Protocol):
    """What an engine was asked to do, for the watchdog."""

    @property
    def hang_reason(self) -> str:
        """The reason for an engine that does not get on with it."""

    def discount_stall(self, stall_s: float, now_s: float) -> None:
        """Do not count a time in which the executor itself did not run."""

    def has_stalled(self, now_s: float) -> bool:
        """Return whether it takes longer than allowed."""


class CurrentExecution:
    """The execution that an engine runs: which steps have arrived, and when it last made progress.

    Args:
        batch: the execution.
        now_s: when it was sent, on the event loop's clock.
        step_timeout_s: how long it may take from one step to the next.
        pings: how many pings had been sent by then.
    """

    hang_reason = "its engine hangs: the current execution makes no progress"

    def __init__(self, batch: Generate, *, now_s: float, step_timeout_s: float, pings: int) -> None:
        self.batch = batch
        self._step_timeout_s = step_timeout_s
        self._pings = pings
        self._steps_delivered = 0
        self._steps_done = 0  # also counts steps whose message was lost
        self._progress_s = now_s

    def matches(self, execution_id: int) -> bool:
        """Return whether a message is about this execution."""
        return execution_id == self.batch.execution_id

    def accept_step(self, progress: StepProgress, now_s: float) -> bool:
        """Record a step; return whether it is the next one to deliver, not a duplicate and not after a lost one."""
        if progress.step != self._steps_delivered + 1:
            return False
        self._steps_delivered = progress.step
        self.record_progress(progress.step, now_s)
        return True

    def record_progress(self, steps: int, now_s: float) -> None:
        """Record how many steps the engine has done, which may be more than have arrived."""
        if steps > self._steps_done:
            self._steps_done = steps
            self._progress_s = now_s

    def must_resend(self, ping: int) -> bool:
        """Return whether the `Generate` was lost: the engine is idle and answers a ping that was sent after it."""
        return ping > self._pings

    def discount_stall(self, stall_s: float, now_s: float) -> None:
        """Do not count a time in which the executor itself did not run."""
        self._progress_s = min(now_s, self._progress_s + stall_s)

    def has_stalled(self, now_s: float) -> bool:
        """Return whether the current step takes longer than allowed."""
        return now_s - self._progress_s > self._step_timeout_s

    def output_error(self, message: StepProgress | Finished) -> str:
        """Return what is wrong with the engine's output, or "" if nothing is."""
        outputs = message.tokens if isinstance(message, StepProgress) else message.outputs
        if len(outputs) != len(self.batch.sequences):
            return "tokens for another number of sequences"
        limits = [sequence.output_tokens for sequence in self.batch.sequences]
        if isinstance(message, StepProgress):
            tokens_and_limits = zip(message.tokens, limits, strict=True)
            too_many = any(message.step > limit and token >= 0 for token, limit in tokens_and_limits)
        else:
            too_many = any(len(output) > limit for output, limit in zip(message.outputs, limits, strict=True))
        return "more tokens than were asked for" if too_many else ""


class Watchdog:
    """Decides whether an engine hangs. Times are on the event loop's clock.

    Args:
        settings: the timeouts.
        now_s: when the engine is launched.
    """

    def __init__(self, settings: SupervisionSettings, now_s: float) -> None:
        self._settings = settings
        self._launched_s = self._last_message_s = now_s

    def message_received(self, now_s: float) -> None:
        """Record that the engine has sent a message."""
        self._last_message_s = now_s

    def discount_stall(self, stall_s: float, now_s: float, work: WatchedWork | None) -> None:
        """Do not count a time in which the executor itself did not run (stopped, or short of CPU)."""
        self._launched_s += stall_s
        self._last_message_s = min(now_s, self._last_message_s + stall_s)
        if work is not None:
            work.discount_stall(stall_s, now_s)

    def hang_reason(self, now_s: float, *, loaded: bool, work: WatchedWork | None) -> str:
        """Return which timeout the engine has exceeded, or "" if none."""
        if not loaded:
            return self.start_timeout_reason() if now_s - self._launched_s > self._settings.start_timeout_s else ""
        if now_s - self._last_message_s > self._settings.hang_timeout_s:
            return f"heartbeat timeout: its engine sent nothing for {self._settings.hang_timeout_s:g} s"
        if work is not None and work.has_stalled(now_s):
            return work.hang_reason
        return ""

    def start_timeout_reason(self) -> str:
        """Return the reason for an engine that takes too long to start."""
        return f"its engine did not start within {self._settings.start_timeout_s:g} s"
