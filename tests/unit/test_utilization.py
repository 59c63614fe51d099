"""The load of a GPU: examples, and comparison with counting every instant."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fixtures import endpoint_spec, make_controller
from hypothesis import given

from maveriq.control.events import EndpointAdded, EngineUp, ExecutionFinished, RequestArrived
from maveriq.control.utilization import UtilizationWindow, recent_loads, sampling_phases_us
from maveriq.domain.cluster import LoadWindow
from maveriq.domain.requests import Request
from maveriq.errors import InputError

SMALL = LoadWindow(samples=5, sample_us=10, look_us=4, busy_share=0.25)


def recent_load(spans, now_us, window, phase_us=0):
    """Return the load of one GPU, which is the same beside others."""
    beside = [(0, now_us)]
    alone, *_ = recent_loads([spans], now_us, window, [phase_us])
    assert recent_loads([beside, spans, [], spans], now_us, window, [0, phase_us, 3, phase_us])[1::2] == [alone, alone]
    return alone


@pytest.mark.parametrize(
    ("spans", "now_us", "load"),
    [
        ([], 100, 0.0),
        ([(0, 100)], 100, 1.0),
        ([(56, 60)], 100, 0.2),  # seen by the sample at 60
        ([(50, 56)], 100, 0.0),  # between two samples
        ([(59, 60)], 100, 0.0),  # a quarter of the look is not more than the threshold
        ([(58, 60)], 100, 0.2),
        ([(58, 59), (59, 60)], 100, 0.2),  # two together
        ([(46, 50)], 100, 0.0),  # long ago: samples at 60 to 100 count
        ([(96, 105)], 105, 0.2),  # the sample at 110 is still to come
    ],
)
def test_load_by_example(spans, now_us: int, load: float) -> None:
    assert recent_load(spans, now_us, SMALL) == load


@given(
    st.lists(st.integers(0, 200), max_size=12, unique=True), st.integers(0, 220), st.integers(1, 10), st.integers(0, 10)
)
def test_load_equals_counting_instants(edges: list[int], now_us: int, look_us: int, phase_us: int) -> None:
    window = LoadWindow(samples=5, sample_us=10, look_us=look_us, busy_share=0.3)
    edges = sorted(edges)
    spans = [(a, min(b, now_us)) for a, b in zip(edges[::2], edges[1::2], strict=False) if a < now_us]
    working = {at for start, end in spans for at in range(start, end)}
    last = now_us // 10 * 10
    looks = [range(at - phase_us - look_us, at - phase_us) for at in range(last - 40, last + 1, 10)]
    busy = sum(sum(at in working for at in look) > 0.3 * look_us for look in looks)
    assert recent_load(spans, now_us, window, phase_us) == busy / 5


def test_history_keeps_the_window_and_the_total() -> None:
    history = UtilizationWindow(SMALL)
    for start in range(0, 1_000, 10):
        history.add(start, start + 5)
    assert history.total_us == 500
    assert len(list(history.spans)) < 10
    assert recent_load(history.spans, 1_000, SMALL) == recent_load(
        [(s, s + 5) for s in range(0, 1_000, 10)], 1_000, SMALL
    )


def test_history_keeps_the_range_of_the_oldest_reading() -> None:
    history = UtilizationWindow(SMALL)
    spans = [(start, start + 5) for start in range(0, 1_000, 10)]
    for start, end in spans:
        history.add(start, end)
    for phase_us in range(11):
        assert recent_load(history.spans, 1_000, SMALL, phase_us) == recent_load(spans, 1_000, SMALL, phase_us)


def test_readings_depend_on_their_age() -> None:
    assert recent_load([(56, 60)], 100, SMALL) == 0.2
    assert recent_load([(56, 60)], 100, SMALL, 5) == 0.0
    assert recent_load([(51, 55)], 100, SMALL, 5) == 0.2


def test_phases_depend_on_the_seed_and_differ_between_gpus() -> None:
    window = replace(SMALL, sample_us=1_000, max_phase_us=1_000)
    phases = sampling_phases_us(window, 8, seed=1)
    assert phases == sampling_phases_us(window, 8, seed=1) != sampling_phases_us(window, 8, seed=2)
    assert phases[:4] == sampling_phases_us(window, 4, seed=1)  # a larger cluster keeps the phases of the first GPUs
    assert len(set(phases)) > 1
    assert all(0 <= phase <= 1_000 for phase in phases)
    assert sampling_phases_us(replace(window, max_phase_us=0), 8, seed=1) == (0,) * 8


def test_phases_separate_the_loads_of_equally_busy_gpus() -> None:
    def loads(max_phase_us: int) -> list[float]:
        window = replace(SMALL, samples=50, max_phase_us=max_phase_us)
        controller = make_controller({1: [(0, 1, 2)]}, load_window=window)
        controller.handle(0, [EndpointAdded(endpoint_spec(1))])
        controller.handle(1, [EngineUp(1, 1)])
        for number in range(1, 40):
            request = Request(
                request_id=number, endpoint_id=1, arrival_us=13 * number, prompt_tokens=1, output_tokens=1, slo_us=0
            )
            controller.handle(13 * number, [RequestArrived(request)])
            controller.handle(13 * number + 4, [ExecutionFinished(1, number, 13 * number + 4)])
        return controller.manager.loads(520)

    in_step, out_of_step = loads(0), loads(10)
    assert len(set(in_step[:3])) == 1
    assert len(set(out_of_step[:3])) > 1
    assert in_step[3] == out_of_step[3] == 0.0  # idle GPUs stay tied


def test_an_invalid_window_is_refused() -> None:
    with pytest.raises(InputError, match="load window: needs at least one sample"):
        LoadWindow(samples=5, sample_us=10, look_us=11)
    with pytest.raises(InputError, match="largest phase must lie between 0 and the 10 µs"):
        LoadWindow(samples=5, sample_us=10, look_us=5, max_phase_us=11)
