"""Loads without a trace: arrivals, lengths, shared prefixes, conversations, and closed loops."""

from pathlib import Path

import numpy as np
import pytest

from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError
from maveriq.workload.build import build_workload
from maveriq.workload.options import WorkloadOptions
from maveriq.workload.requests import Workload, requests_of

ENGINE = '[models.engine]\nkind = "vllm"\nnum_gpu_blocks = 4096\n'
ONE = 'name = "one"\n[[models]]\nmodel = "llama-2-7b"\n'
INTENT = Intent(objective=Objective.MIN_COST)


@pytest.fixture
def build(tmp_path: Path):
    """Return what builds a synthetic workload, by default for one model with a continuous engine."""

    def build(models: str = ONE + ENGINE, trace: str = "synthetic", **options) -> Workload:
        (tmp_path / "m.toml").write_text(models)
        chosen = WorkloadOptions(trace=trace, models=str(tmp_path / "m.toml"), **options)
        return build_workload(chosen, intent=INTENT, slo_of=lambda _model, _tokens: None)

    return build


@pytest.mark.parametrize(
    ("arrivals", "cv"), [(None, 1.0), ("poisson", 1.0), ("constant", 0.0), ("gamma:0.5", 0.5), ("gamma:3", 3.0)]
)
@pytest.mark.parametrize("amount", [{"duration_s": 4_000.0}, {"limit": 20_000}], ids=["duration", "number"])
def test_arrivals_have_their_rate_and_their_burstiness(build, arrivals, cv, amount):
    times_us = build(rate=5.0, arrivals=arrivals, prompt_tokens="8", **amount).arrivals.arrival_us
    gaps_s = np.diff(times_us) / 1e6
    rate_error = 4 * max(cv, 0.01) / np.sqrt(20_000)  # four standard errors
    assert len(times_us) == pytest.approx(20_000, rel=rate_error)
    assert gaps_s.mean() == pytest.approx(0.2, rel=rate_error)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1, abs=1e-3)
    assert times_us[-1] <= 4_000_000_000 or "limit" in amount


def test_synthetic_poisson_arrivals_are_those_of_the_trace_poisson(build):
    one, other = build(rate=5.0), build(trace="poisson", rate=5.0)
    assert one.arrivals.arrival_us.tolist() == other.arrivals.arrival_us.tolist()


def test_lengths_follow_their_distributions(build):
    arrivals = build(
        rate=5.0, limit=20_000, prompt_tokens="uniform:512-1536", output_tokens="lognormal:200,0.5"
    ).arrivals
    assert (arrivals.prompt_tokens.min(), arrivals.prompt_tokens.max()) == (512, 1536)
    assert arrivals.prompt_tokens.mean() == pytest.approx(1024, rel=0.01)
    assert np.median(arrivals.output_tokens) == pytest.approx(200, rel=0.02)
    assert np.log(arrivals.output_tokens).std() == pytest.approx(0.5, rel=0.02)
    assert np.corrcoef(arrivals.prompt_tokens, arrivals.output_tokens)[0, 1] == pytest.approx(0, abs=0.03)


def test_the_same_seed_gives_the_same_load_and_another_one_does_not(build):
    options = {
        "rate": 3.0, "limit": 300, "arrivals": "gamma", "turns": "uniform:1-4", "think_s": "exponential:2",
        "prompt_tokens": "gamma:100,1", "prefix_tokens": 64, "prefixes": 3,
    }  # fmt: skip
    one, same, other = (build(**options, seed=seed) for seed in (1, 1, 2))
    for name in ("arrival_us", "prompt_tokens", "output_tokens", "session_id", "think_us"):
        assert np.array_equal(getattr(one.arrivals, name), getattr(same.arrivals, name)), name
    assert not np.array_equal(one.arrivals.arrival_us, other.arrivals.arrival_us)
    assert [list(request.prefix_hashes) for request in requests_of(one.arrivals)] == [
        list(request.prefix_hashes) for request in requests_of(same.arrivals)
    ]


def test_other_think_times_leave_all_else_as_it_is(build):
    one = build(rate=3.0, limit=100, turns="3", think_s="1").arrivals
    other = build(rate=3.0, limit=100, turns="3", think_s="exponential:9").arrivals
    for name in ("arrival_us", "prompt_tokens", "output_tokens", "session_id"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_prompts_of_a_conversation_grow_by_output_and_new_text(build):
    workload = build(
        rate=1.0, limit=500, turns="uniform:2-6", prompt_tokens="uniform:10-90", output_tokens="uniform:5-50",
        prefix_tokens=1_000,
    )  # fmt: skip
    arrivals = workload.arrivals
    previous: dict[int, tuple[int, int]] = {}
    turns: dict[int, int] = {}
    for session, prompt, output in zip(
        arrivals.session_id.tolist(), arrivals.prompt_tokens.tolist(), arrivals.output_tokens.tolist(), strict=True
    ):
        grown = sum(previous[session]) if session in previous else 1_000
        assert 10 <= prompt - grown <= 90
        previous[session] = (prompt, output)
        turns[session] = turns.get(session, 0) + 1
    assert set(list(turns.values())[:-1]) == {2, 3, 4, 5, 6}  # the limit may cut the last one


def test_turns_of_a_conversation_go_to_one_model(build):
    two = ONE + ENGINE + '[[models]]\nmodel = "llama-2-13b"\n' + ENGINE
    arrivals = build(two, rate=1.0, limit=500, turns="3").arrivals
    for session in np.unique(arrivals.session_id):
        assert len(set(arrivals.endpoint_id[arrivals.session_id == session])) == 1
    assert set(arrivals.endpoint_id) == {1, 2}


def test_a_rate_counts_the_conversations_of_a_file_without_times(build, tmp_path):
    sessions = ["a", "b", "a", "", "b", "a", "", "c"]
    rows = "".join(f"{row + 1},9,{session}\n" for row, session in enumerate(sessions))
    (tmp_path / "s.csv").write_text("prompt_tokens,output_tokens,session_id\n" + rows)
    arrivals = build(trace=str(tmp_path / "s.csv"), rate=2.0, arrivals="constant").arrivals
    assert arrivals.prompt_tokens.tolist() == [1, 3, 6, 2, 5, 4, 7, 8]
    assert (arrivals.arrival_us / 1e6).tolist() == [0, 0, 0, 0.5, 0.5, 1, 1.5, 2]
    cut = build(trace=str(tmp_path / "s.csv"), rate=2.0, arrivals="constant", limit=4).arrivals
    assert cut.prompt_tokens.tolist() == [1, 3, 6, 2]
    assert (cut.arrival_us / 1e6).tolist() == [0, 0, 0, 0.5]


def test_turns_of_a_session_of_a_file_go_to_one_model(build, tmp_path):
    two = ONE + ENGINE + '[[models]]\nmodel = "llama-2-13b"\n' + ENGINE
    rows = "".join(f"{row},9,9,{row % 40 or ''}\n" for row in range(400))
    (tmp_path / "s.csv").write_text("arrival_s,prompt_tokens,output_tokens,session_id\n" + rows)
    for loop in ({}, {"concurrency": 3}):
        arrivals = build(two, trace=str(tmp_path / "s.csv"), **loop).arrivals
        for session in range(1, 40):
            assert len(set(arrivals.endpoint_id[arrivals.session_id == session])) == 1
        assert set(arrivals.endpoint_id) == {1, 2}


@pytest.mark.parametrize(("key", "values"), [("share", (3, 1)), ("expected_rps", (0.6, 0.2))])
def test_requests_are_spread_by_share_or_expected_rate(build, key, values):
    two = f"{ONE}{key} = {values[0]}\n{ENGINE}[[models]]\nmodel = 'llama-2-13b'\n{key} = {values[1]}\n{ENGINE}"
    workload = build(two, rate=5.0, limit=20_000)
    assert (workload.arrivals.endpoint_id == 1).mean() == pytest.approx(0.75, abs=0.01)
    assert workload.source is not None
    assert any(key in remark for remark in workload.source.remarks)


def test_a_share_that_only_some_models_have_is_refused(build):
    two = f"{ONE}share = 1\n{ENGINE}[[models]]\nmodel = 'llama-2-13b'\n{ENGINE}"
    with pytest.raises(InputError, match=r"model 2 \(llama-2-13b\) has no share"):
        build(two, rate=5.0)


def test_a_closed_loop_has_its_requests_and_no_times(build):
    workload = build(concurrency=64, limit=640, prompt_tokens="100")
    assert (workload.concurrency, len(workload.arrivals)) == (64, 640)
    assert workload.reacts
    assert not workload.arrivals.arrival_us.any()  # continuous engines are up at 0
    assert len(build(concurrency=8).arrivals) == 80


def test_a_closed_loop_starts_when_all_models_have_loaded(build):
    late = ONE + 'load_at = 0\n[[models]]\nmodel = "llama-2-13b"\nload_at = 4\n'
    workload = build(late, concurrency=2, limit=50)
    assert set(workload.arrivals.arrival_us.tolist()) == {(4 * 30 + 90 + 30 + 90) * 1_000_000}
    assert set(workload.arrivals.endpoint_id) == {1, 2}


REFUSED = [
    ({}, "needs a rate; give --rate with the requests a second, or --concurrency"),
    ({"rate": 1.0, "concurrency": 2}, "leave one of them out"),
    ({"concurrency": 2, "duration_s": 5.0}, "duration-s sets when requests arrive"),
    ({"concurrency": 2, "arrivals": "poisson"}, "arrivals sets when requests arrive"),
    ({"concurrency": 2, "scale": 2.0}, "scale sets when requests arrive"),
    ({"concurrency": 0}, "concurrency must lie between 1 and"),
    ({"trace": "code", "concurrency": 2}, "concurrency applies to --trace synthetic and to files"),
    ({"trace": "poisson", "concurrency": 2}, "concurrency applies to --trace synthetic"),
    ({"rate": 1.0, "arrivals": "published"}, "give poisson, constant, gamma"),
    ({"rate": 1.0, "arrivals": "gamma:0"}, "coefficient of variation must be above 0"),
    ({"rate": 1.0, "arrivals": "gamma:x"}, "as in gamma:2"),
    ({"rate": 1.0, "arrivals": "poisson:2"}, "only gamma takes a number"),
    ({"trace": "code", "arrivals": "gamma"}, "need a rate"),
    ({"trace": "code", "turns": "2"}, "turns applies to loads without a trace, not to 'code'"),
    ({"trace": "code", "prefix_tokens": 2}, "prefix-tokens applies to loads without a trace"),
    ({"trace": "poisson", "turns": "2"}, "turns applies to loads without a trace"),
    ({"rate": 1.0, "prefixes": 2}, "give --prefix-tokens"),
    ({"rate": 1.0, "think_s": "2"}, "give --concurrency or --turns"),
    ({"rate": 1.0, "turns": "0"}, "turns: the numbers of '0' must lie from 1 to 1,000"),
    ({"rate": 1.0, "turns": "2", "think_s": "uniform:5-1"}, "think time: 'uniform:5-1' ends before it starts"),
    ({"rate": 1.0, "prompt_tokens": "uniform:0-5"}, "prompt tokens: the numbers of 'uniform:0-5' must lie from 1"),
    ({"rate": 1.0, "prompt_tokens": "trace"}, "has no lengths of its own"),
    ({"rate": 1e6, "duration_s": 1e6}, "gives more than 100,000,000 requests"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_options_that_do_not_fit_are_refused_with_one_line(build, options, says):
    with pytest.raises(InputError) as refused:
        build(**options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
