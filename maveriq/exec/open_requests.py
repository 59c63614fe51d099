"""The requests that a continuous engine has, as its executor knows them; the counterpart of `CurrentExecution`."""

from __future__ import annotations

from maveriq.exec.messages import AbortRequest, Pong, PromptSequence, StepReport, SubmitRequest
from maveriq.exec.numbered_messages import Inbox, Outbox


class OpenRequests:
    """What one engine was asked for, how far its reports have got, and when it last made progress (mutable).

    Reports may still mention requests that were aborted.

    Args:
        timeout_s: how long a step may take while there are requests.
        now_s: when the engine is launched, on the event loop's clock.
    """

    hang_reason = "its engine hangs: its requests make no progress"

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._progress_s = now_s
        self._outbox: Outbox[SubmitRequest | AbortRequest] = Outbox()
        self._tokens_left: dict[int, int] = {}
        self._highest_id = 0  # of the requests submitted so far
        self._steps_done = 0  # also counts steps whose report was lost
        self._reports: Inbox[StepReport] = Inbox()

    @property
    def received(self) -> int:
        """The number of the last report that was taken."""
        return self._reports.received

    # To the engine

    def submit(self, sequence: PromptSequence, now_s: float, *, is_urgent: bool) -> SubmitRequest:
        """Return the message that submits a request."""
        if not self._tokens_left:
            self._progress_s = now_s
        self._tokens_left[sequence.request_id] = sequence.output_tokens
        self._highest_id = max(self._highest_id, sequence.request_id)
        message = SubmitRequest(number=self._outbox.next_number, sequence=sequence, is_urgent=is_urgent)
        self._outbox.add(message)
        return message

    def abort(self, request_id: int) -> AbortRequest | None:
        """Return the message that ends a request; None if the engine does not have it."""
        if self._tokens_left.pop(request_id, None) is None:
            return None
        message = AbortRequest(number=self._outbox.next_number, request_id=request_id)
        self._outbox.add(message)
        return message

    def on_pong(self, pong: Pong, now_s: float) -> list[SubmitRequest | AbortRequest]:
        """Record how far the engine has got, and return the messages that were lost on the way."""
        if pong.steps > self._steps_done:
            self._steps_done = pong.steps
            self._progress_s = now_s
        return self._outbox.on_heartbeat(pong.accepted)

    # From the engine

    def take(self, report: StepReport, now_s: float) -> list[StepReport]:
        """Take a report; return those whose turn it now is."""
        due = self._reports.take(report)
        if due:
            self._steps_done = max(self._steps_done, self.received)
            self._progress_s = now_s
        return due

    def check(self, report: StepReport) -> str:
        """Return what is wrong with a report, or "" if nothing is; its requests that have ended are closed."""
        error = self._error(report)
        for ended in report.ended:
            self._tokens_left.pop(ended.request_id, None)
        return error

    def _error(self, report: StepReport) -> str:
        left = self._tokens_left
        for given in report.tokens:
            if given.request_id not in left:
                if given.request_id > self._highest_id:
                    return "tokens for a request that it does not have"
                continue  # it was aborted
            left[given.request_id] -= len(given.tokens)
            if left[given.request_id] < 0:
                return "more tokens than were asked for"
        for ended in report.ended:
            if ended.request_id > self._highest_id:
                return "the end of a request that it does not have"
        return ""

    def pong_error(self, pong: Pong) -> str:
        """Return what is wrong with an answer to a heartbeat, or "" if nothing is."""
        return "an answer to messages that were not sent" if pong.accepted >= self._outbox.next_number else ""

    # For the watchdog

    def discount_stall(self, stall_s: float, now_s: float) -> None:
        """Do not count a time in which the executor itself did not run."""
        self._progress_s = min(now_s, self._progress_s + stall_s)

    def has_stalled(self, now_s: float) -> bool:
        """Return whether requests wait for a step that takes longer than allowed."""
        return bool(self._tokens_left) and now_s - self._progress_s > self._timeout_s
