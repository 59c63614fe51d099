"""The load of a GPU, by example and against counting instant by instant."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from maveriq.control.load import BusyHistory, recent_load
from maveriq.domain.hardware import LoadWindow
from maveriq.errors import InputError

SMALL = LoadWindow(samples=5, sample_us=10, look_us=4, busy_share=0.25)


@pytest.mark.parametrize(
    ("spans", "now_us", "load"),
    [
        ([], 100, 0.0),
        ([(0, 100)], 100, 1.0),
        ([(56, 60)], 100, 0.2),  # seen by the sample at 60
        ([(50, 56)], 100, 0.0),  # between two looks
        ([(59, 60)], 100, 0.0),  # a quarter of the look is not more than a quarter
        ([(58, 60)], 100, 0.2),
        ([(58, 59), (59, 60)], 100, 0.2),  # two together
        ([(46, 50)], 100, 0.0),  # long ago: samples at 60 to 100 count
        ([(96, 105)], 105, 0.2),  # the sample at 110 is still to come
    ],
)
def test_load_by_example(spans, now_us: int, load: float) -> None:
    assert recent_load(spans, now_us, SMALL) == load


@given(st.lists(st.integers(0, 200), max_size=12, unique=True), st.integers(0, 220), st.integers(1, 10))
def test_load_is_what_counting_gives(edges: list[int], now_us: int, look_us: int) -> None:
    window = LoadWindow(samples=5, sample_us=10, look_us=look_us, busy_share=0.3)
    edges = sorted(edges)
    spans = [(a, min(b, now_us)) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < now_us]
    working = {at for start, end in spans for at in range(start, end)}
    last = now_us // 10 * 10
    looks = [range(at - look_us, at) for at in range(last - 40, last + 1, 10)]
    busy = sum(sum(at in working for at in look) > 0.3 * look_us for look in looks)
    assert recent_load(spans, now_us, window) == busy / 5


def test_history_keeps_what_the_window_can_see_and_the_whole_sum() -> None:
    history = BusyHistory(SMALL)
    for start in range(0, 1_000, 10):
        history.add(start, start + 5)
    assert history.total_us == 500
    assert len(list(history.spans)) < 10
    assert recent_load(history.spans, 1_000, SMALL) == recent_load(
        [(s, s + 5) for s in range(0, 1_000, 10)], 1_000, SMALL
    )


def test_a_window_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="load window: needs at least one sample"):
        LoadWindow(samples=5, sample_us=10, look_us=11)
