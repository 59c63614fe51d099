"""The request tracker of a long-running service."""

from maveriq.control.request_tracker import MAX_REASONS, RequestTracker
from maveriq.domain.requests import Request


def test_reasons_are_bounded_and_no_request_is_lost() -> None:
    tracker = RequestTracker()
    count = 40_000  # more than a 16-bit number holds
    for number in range(1, count + 1):
        request = Request(request_id=number, endpoint_id=1, arrival_us=number, prompt_tokens=1, output_tokens=1)
        tracker.arrived(request)
        tracker.refused(request, f"reason {number}")
    table = tracker.close()
    assert sum(table.counts().values()) == count
    assert table.reasons[table.reason[0]] == "reason 1"
    assert table.reasons[table.reason[-1]] == "a reason beyond those kept"
    assert len(table.reasons) <= MAX_REASONS + 2
