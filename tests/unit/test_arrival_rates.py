"""The rate of requests over the last minutes."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.control.arrival_rates import WINDOW_US, ArrivalRates
from maveriq.units import MICROS_PER_SECOND


@given(st.lists(st.integers(0, 900_000_000), min_size=1).map(sorted), st.integers(0, 400_000_000))
def test_it_counts_the_requests_of_the_window(times_us, later_us):
    rates = ArrivalRates()
    for at_us in times_us:
        rates.arrived(1, at_us)
    now_us = times_us[-1] + later_us
    surely = sum(at_us > now_us - WINDOW_US for at_us in times_us)
    perhaps = sum(at_us > now_us - WINDOW_US - 10 * MICROS_PER_SECOND for at_us in times_us)
    span_s = min(300, max(10, (now_us - times_us[0]) / MICROS_PER_SECOND))
    rps = rates.rps(1, now_us) or 0.0
    assert surely / span_s - 1e-9 <= rps <= perhaps / span_s + 1e-9


def test_a_constant_rate_is_found_from_the_start_and_a_change_after_the_window():
    rates = ArrivalRates()
    assert rates.rps(1, 0) is None
    for second in range(600):
        for _ in range(2 if second < 300 else 6):
            rates.arrived(1, second * MICROS_PER_SECOND)
        if second in (30, 299):
            assert rates.rps(1, second * MICROS_PER_SECOND) == pytest.approx(2, rel=0.1)
    assert rates.rps(1, 600 * MICROS_PER_SECOND) == pytest.approx(6, rel=0.05)
    assert rates.rps(2, 600 * MICROS_PER_SECOND) is None
    assert rates.rps(1, 2_000 * MICROS_PER_SECOND) is None
