"""Requests of the published AlpaServe runs: drawn for replicas, from two generators."""

import numpy as np
import pytest

from maveriq.domain.requests import RequestStatus
from maveriq.errors import InputError
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.workload.arrivals import deployed_per_bin, published_draw
from maveriq.workload.replica_draw import replica_draw

PER_MINUTE = np.full(12, 40)
LOAD_AT = (0, 2, 5)
PUBLISHED = {"alpaserve_as_published": True, "alpaserve_requests_as_published": True}


def draw(replicas, seed=42):
    return replica_draw(PER_MINUTE, scale=0.5, load_at=LOAD_AT, replicas=replicas, seed=seed)


def test_a_model_left_out_has_an_entry_and_every_entry_shifts_what_follows():
    one, two = draw((0, 1, 1)), draw((1, 2, 1))
    shift_us = two.arrival_us - one.arrival_us
    loaded = deployed_per_bin(LOAD_AT, len(PER_MINUTE))[one.bin_index]
    assert np.array_equal(shift_us, np.where(loaded >= 2, 90_000_000, 0))
    assert set(one.endpoint_id.tolist()) == {1, 2, 3}
    assert set(two.endpoint_id.tolist()) == {1, 2, 3, 4}


def test_a_request_goes_to_an_entry_that_is_loaded():
    found = draw((1, 2, 3))
    entries = np.array([1, 3, 6])[deployed_per_bin(LOAD_AT, len(PER_MINUTE))[found.bin_index] - 1]
    assert (found.endpoint_id <= entries).all()
    assert (np.diff(found.arrival_us) >= 0).all()


def test_models_are_equally_likely_and_so_are_the_replicas_of_each():
    found = replica_draw(np.full(400, 100), scale=1.0, load_at=(0, 0), replicas=(1, 4), seed=7)
    shares = np.bincount(found.endpoint_id, minlength=6)[1:] / len(found)
    assert shares == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.125], abs=0.01)


def test_seeds_differ_and_equal_seeds_do_not():
    assert np.array_equal(draw((1, 2, 1)).endpoint_id, draw((1, 2, 1)).endpoint_id)
    assert not np.array_equal(draw((1, 2, 1)).endpoint_id, draw((1, 2, 1), seed=1).endpoint_id)


def test_each_bin_has_as_many_requests_as_in_the_draw_of_maveriq():
    ours = published_draw(PER_MINUTE, scale=0.5, load_at=LOAD_AT)
    assert np.array_equal(ours.bin_index, draw((1, 1, 1)).bin_index)


def test_the_recorded_run_comes_out_that_lost_a_model():
    """AlpaServe, large, code 0.1: 590 of 861 requests were completed, the others addressed the model left out."""
    run = simulate(build_system(Options(policy="alpaserve", scale=0.1, slo_scale=5.0, **PUBLISHED)))
    counts = run.requests.counts()
    assert (counts[RequestStatus.COMPLETED], counts[RequestStatus.REFUSED]) == (590, 271)
    assert len(run.deployments) == 5  # the second model of 7 billion parameters is a replica


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "hybrid"}, "applies to alpaserve and alpaserve-star, not to 'hybrid'"),
        ({"policy": "alpaserve", "limit": 5}, "leave --limit and --duration-s out"),
        ({"policy": "alpaserve", "trace": "poisson"}, "needs published arrivals"),
        ({"policy": "alpaserve", "output_tokens": "uniform:5-9"}, "needs outputs of one length"),
    ],
)
def test_what_was_not_published_is_refused(options, says):
    with pytest.raises(InputError, match=says):
        build_system(Options(scale=0.1, alpaserve_requests_as_published=True, **options))
