"""Laws of every workload, for any counts, scale, model set and seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maveriq.domain.deployments import Intent, Objective
from maveriq.workload.arrivals import deployed_per_bin, published_draw, staged_poisson, staged_poisson_as_published
from maveriq.workload.build import WorkloadOptions, build_workload
from maveriq.workload.requests import Arrivals
from maveriq.workload.schedules import read_schedule, write_schedule

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(0.01, 3.0)


@st.composite
def traces(draw):
    """Counts per minute and the bins at which models load, the first at 0."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20))
    later = draw(st.lists(st.integers(0, len(counts) - 1), max_size=5))
    return np.array(counts), (0, *sorted(later))


def assert_lawful(draw, load_at, bins):
    assert (np.diff(draw.arrival_us) >= 0).all()
    deployed = deployed_per_bin(load_at, bins)[draw.bin_index]
    assert ((draw.endpoint_id >= 1) & (draw.endpoint_id <= deployed)).all()
    # No request arrives before the models of its bin are requested, 90 s apart.
    assert (draw.arrival_us >= (30 * draw.bin_index + 90 * deployed) * 1_000_000).all()


@given(trace=traces(), scale=SCALES, seed=SEEDS)
@settings(deadline=None, max_examples=60)
def test_published_draws_obey_the_laws(trace, scale, seed):
    counts, load_at = trace
    draw = published_draw(counts, scale=scale, load_at=load_at, seed=seed)
    assert len(draw) == sum(int(count * scale) for count in counts.tolist())
    assert np.bincount(draw.bin_index, minlength=len(counts)).tolist() == [int(c * scale) for c in counts.tolist()]
    assert_lawful(draw, load_at, len(counts))
    again = published_draw(counts, scale=scale, load_at=load_at, seed=seed)
    assert np.array_equal(draw.arrival_us, again.arrival_us)
    assert np.array_equal(draw.endpoint_id, again.endpoint_id)


@pytest.mark.parametrize("stages", [staged_poisson, staged_poisson_as_published])
@given(later=st.lists(st.integers(0, 59), max_size=5), scale=st.floats(0.02, 1.0), seed=SEEDS)
@settings(deadline=None, max_examples=30)
def test_poisson_draws_obey_the_laws(stages, later, scale, seed):
    load_at = (0, *sorted(later))
    draw = stages(scale=scale, load_at=load_at, seed=seed)
    assert_lawful(draw, load_at, 60)
    assert np.array_equal(draw.arrival_us, stages(scale=scale, load_at=load_at, seed=seed).arrival_us)


@given(
    trace=st.sampled_from(["code", "conversation", "poisson"]),
    lengths=st.sampled_from([("sharegpt", "20"), ("7", "9"), ("sharegpt", "1")]),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=15)
def test_lengths_never_move_arrivals(trace, lengths, seed):
    def built(prompt_tokens, output_tokens):
        options = WorkloadOptions(
            trace=trace, scale=0.1, seed=seed, prompt_tokens=prompt_tokens, output_tokens=output_tokens
        )
        intent = Intent(objective=Objective.MIN_COST)
        return build_workload(options, intent=intent, slo_of=lambda _model, _tokens: None).arrivals

    plain, other = built("30", "20"), built(*lengths)
    assert np.array_equal(plain.arrival_us, other.arrival_us)
    assert np.array_equal(plain.endpoint_id, other.endpoint_id)


@given(data=st.data(), times=st.lists(st.integers(0, 10**15), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_schedules_are_read_back_to_the_microsecond(data, times, tmp_path_factory):
    def column(minimum, maximum):
        return np.array(data.draw(st.lists(st.integers(minimum, maximum), min_size=len(times), max_size=len(times))))

    written = Arrivals(
        arrival_us=np.array(sorted(times)),
        endpoint_id=column(1, 100),
        prompt_tokens=column(1, 10**6),
        output_tokens=column(1, 10**6),
        slo_us=column(0, 10**12),
        service_us=column(1, 10**12),
    )
    path = tmp_path_factory.getbasetemp() / "law.csv"
    write_schedule(written, path, overwrite=True)
    read = read_schedule(path).arrivals
    for name in ("arrival_us", "endpoint_id", "prompt_tokens", "output_tokens", "slo_us", "service_us"):
        assert np.array_equal(getattr(read, name), getattr(written, name)), name
