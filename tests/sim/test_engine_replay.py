"""Replays on one engine, without a cluster, are those of the engine's clock and of `maveriq sim`."""

import csv
from pathlib import Path

import numpy as np
import pytest
from clocked_engines import request, run, stepped
from hypothesis import given, settings
from hypothesis import strategies as st

from maveriq import simulate
from maveriq.calibration.deployment import read_deployment
from maveriq.errors import InputError
from maveriq.scenario.continuous_engines import EngineParts
from maveriq.sim.engine_replay import replay_on_engine

SETTINGS = {"kind": "vllm", "version": "0.23.0", "max_num_seqs": 4, "max_num_batched_tokens": 64}
MODEL_SET = (
    'name = "one"\n[[models]]\nmodel = "llama-2-7b"\ntp = 1\nweights = "bfloat16"\n'
    '[models.engine]\nkind = "vllm"\nversion = "0.23.0"\nmax_num_seqs = 8\nnum_gpu_blocks = 2048\n'
)


def parts() -> EngineParts:
    engine = stepped(SETTINGS, 24, delay_us=300)
    return EngineParts(engine=engine.engine, timer=engine._timer, admission_delay_us=engine._admission_delay_us)


LOADS = st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=12)


@settings(max_examples=25)
@given(LOADS)
def test_a_replay_is_what_the_engine_on_its_clock_does(load):
    requests = [request(number, *each) for number, each in enumerate(sorted(load), start=1)]
    history = run(stepped(SETTINGS, 24, delay_us=300), requests)
    found = replay_on_engine(parts(), requests)
    assert dict(enumerate(found.first_token_us.tolist(), start=1)) == history.first_token
    assert found.finished_us.tolist() == [history.finished[each.request_id][0] for each in requests]


@settings(max_examples=25)
@given(LOADS, st.integers(1, 4))
def test_a_client_has_no_more_in_flight_than_its_limit_and_sends_without_delay(load, limit):
    requests = [request(number, *each) for number, each in enumerate(sorted(load), start=1)]
    found = replay_on_engine(parts(), requests, max_in_flight=limit)
    ends = np.sort(found.finished_us)
    for index, each in enumerate(requests):
        free_us = ends[index - limit] if index >= limit else 0
        assert found.sent_us[index] == max(each.arrival_us, free_us)


def test_a_request_that_never_fits_is_refused():
    with pytest.raises(InputError, match="request 1"):
        replay_on_engine(parts(), [request(1, 0, 400, 5)])


@pytest.mark.parametrize("limit", [None, 3])
def test_a_replay_of_a_deployment_is_a_simulation_of_it_to_the_microsecond(tmp_path: Path, limit):
    (tmp_path / "m.toml").write_text(MODEL_SET)
    requests = [request(number, 9_000 * number - 9_000, 300 + number % 7, 20 + number % 5) for number in range(1, 41)]
    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arrival_s", "endpoint", "prompt_tokens", "output_tokens"))
        writer.writerows((each.arrival_us / 1e6, 1, each.prompt_tokens, each.output_tokens) for each in requests)
    simulated = simulate(
        models=str(tmp_path / "m.toml"), gpus="1xH100-SXM", trace=str(tmp_path / "r.csv"), service_times="physics",
        max_in_flight=limit,
    ).requests  # fmt: skip
    found = read_deployment(str(tmp_path / "m.toml"), "1xH100-SXM").replay(requests, max_in_flight=limit)
    assert np.rint(1e6 * simulated["first_token_s"]).astype(int).tolist() == found.first_token_us.tolist()
    assert np.rint(1e6 * simulated["finish_s"]).astype(int).tolist() == found.finished_us.tolist()
