"""Workloads: lengths, SLOs, recorded schedules, and invalid options."""

import numpy as np
import pytest

from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError, UnknownNameError
from maveriq.workload.build import WorkloadOptions, build_workload

INTENT = Intent(objective=Objective.MIN_MEMORY, min_accuracy=90)
SLO_BASE_S = {"llama-2-70b": 1.0, "falcon-40b": 0.5, "llama-2-7b": 0.125}


def slo_of(model, output_tokens):
    return SLO_BASE_S[model] + 0.01 * output_tokens if model in SLO_BASE_S else None


def build(batch_size=1, **options):
    return build_workload(WorkloadOptions(**options), intent=INTENT, slo_of=slo_of, batch_size=batch_size)


def test_the_defaults_are_the_published_run():
    workload = build()
    assert len(workload.arrivals) == 3508
    assert [endpoint.requested_us / 1e6 for endpoint in workload.endpoints] == [0, 270, 510, 750]
    assert all(endpoint.intent == INTENT and endpoint.batch_size == 1 for endpoint in workload.endpoints)
    assert (workload.arrivals.output_tokens == 20).all()
    assert not workload.arrivals.slo_us.any()
    assert workload.arrivals.service_us is None


def test_sharegpt_prompts_have_the_measured_mean_and_median():
    # SPEC 7: a median of about 110 and a mean of about 190 characters, four a token.
    tokens = build(trace="conversation", scale=2.0).arrivals.prompt_tokens
    assert np.median(tokens) == pytest.approx(110 / 4, abs=1.5)
    assert tokens.mean() == pytest.approx(190 / 4, rel=0.03)
    assert tokens.min() == 1


def test_fixed_lengths_are_also_the_planned_lengths():
    workload = build(prompt_tokens="128", output_tokens="7", batch_size=4)
    assert {
        (endpoint.prompt_tokens, endpoint.output_tokens, endpoint.batch_size) for endpoint in workload.endpoints
    } == {(128, 7, 4)}
    assert (workload.arrivals.prompt_tokens == 128).all()
    assert (workload.arrivals.output_tokens == 7).all()


def test_trace_lengths_from_the_embedded_quantiles():
    workload = build(trace="code", prompt_tokens="trace", output_tokens="trace", scale=1.0)
    assert workload.endpoints[0].prompt_tokens == 1469
    assert workload.endpoints[0].output_tokens == 13
    assert workload.arrivals.prompt_tokens.mean() == pytest.approx(2048, rel=0.03)
    assert workload.arrivals.output_tokens.mean() == pytest.approx(27.9, rel=0.15)


@pytest.fixture
def small_trace(tmp_path):
    """Three minutes with 4, 2 and 1 rows; context tokens identify the minute, generated tokens the row."""
    path = tmp_path / "small.csv"
    rows = [(minute, row) for minute, count in enumerate((4, 2, 1)) for row in range(1, count + 1)]
    lines = [f"2023-11-16 18:0{minute}:0{row},{minute * 100 + row},{minute * 100 + row}\n" for minute, row in rows]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
    (tmp_path / "one.toml").write_text('name = "one"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n')
    return {"trace": str(path), "models": str(tmp_path / "one.toml"), "arrivals": "published"}


def test_lengths_of_the_file_are_pairs_of_the_same_minute(small_trace):
    once = build(**small_trace).arrivals
    assert sorted(once.prompt_tokens.tolist()) == [1, 2, 3, 4, 101, 102, 201]
    assert (once.prompt_tokens == once.output_tokens).all()
    assert ((once.arrival_us - 90_000_000) // 30_000_000 == once.prompt_tokens // 100).all()


def test_each_row_is_used_once_before_any_is_used_twice(small_trace):
    half = build(**small_trace, scale=0.5).arrivals
    assert sorted(half.prompt_tokens // 100) == [0, 0, 1]
    assert len(set(half.prompt_tokens.tolist())) == 3
    more = build(**small_trace, scale=2.5).arrivals
    repeated = np.unique(more.prompt_tokens, return_counts=True)
    assert dict(zip(*(column.tolist() for column in repeated), strict=True))[201] == 2
    assert all(2 <= count <= 3 for count in repeated[1])
    assert len(more) == 10 + 5 + 2


def test_slos_depend_on_the_model_and_the_output_tokens():
    workload = build(trace="conversation", output_tokens="trace", slo_scale=2.5)
    models = {endpoint.endpoint_id: endpoint.model.name for endpoint in workload.endpoints}
    arrivals = workload.arrivals
    columns = (arrivals.endpoint_id, arrivals.output_tokens, arrivals.slo_us)
    for endpoint, tokens, slo_us in zip(*(column[:500].tolist() for column in columns), strict=True):
        assert slo_us == pytest.approx(2.5 * slo_of(models[endpoint], tokens) * 1e6, abs=1)
    assert [endpoint.intent.slo_s for endpoint in workload.endpoints] == [
        pytest.approx(2.5 * slo_of(endpoint.model.name, 129)) for endpoint in workload.endpoints
    ]


def test_a_model_without_slo_constants_is_refused_by_name():
    with pytest.raises(InputError, match="'gptj-6b' has no measured latency"):
        build(models="regular", slo_scale=1.0)


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "recording.csv"
    path.write_text(
        "arrival_s,endpoint,prompt_tokens,output_tokens,service_s,slo_s\n1,4,9,30,0.5,2\n2,1,11,10,0.25,0\n3,1,90,20,1,3\n"
    )
    return str(path)


def test_a_schedule_is_replayed_unchanged(recording):
    workload = build(trace=recording)
    arrivals = workload.arrivals
    assert arrivals.arrival_us.tolist() == [1_000_000, 2_000_000, 3_000_000]
    assert arrivals.endpoint_id.tolist() == [4, 1, 1]
    assert arrivals.prompt_tokens.tolist() == [9, 11, 90]
    assert arrivals.output_tokens.tolist() == [30, 10, 20]
    assert arrivals.slo_us.tolist() == [2_000_000, 0, 3_000_000]
    assert arrivals.service_us.tolist() == [500_000, 250_000, 1_000_000]
    assert (workload.endpoints[0].prompt_tokens, workload.endpoints[0].output_tokens) == (11, 20)


def test_options_override_a_schedule(recording):
    arrivals = build(trace=recording, prompt_tokens="5", slo_scale=1.0).arrivals
    assert arrivals.prompt_tokens.tolist() == [5, 5, 5]
    assert arrivals.output_tokens.tolist() == [30, 10, 20]
    assert arrivals.slo_us.tolist() == [800_000, 1_100_000, 1_200_000]


def test_poisson_stages_last_two_minutes_or_as_long_as_their_gaps():
    plain, published = build(trace="poisson", scale=0.2), build(trace="poisson", scale=0.2, poisson_as_published=True)
    # Eight low stages of 120 gaps and seven high ones of 240.
    assert len(published.arrivals) == 8 * 120 + 7 * 240
    assert len(plain.arrivals) == pytest.approx(3060, abs=4 * 3060**0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": 0.0}, "scale must be a positive number, not 0"),
        ({"scale": -1.0}, "scale must be a positive number"),
        ({"scale": float("nan")}, "scale must be a positive number, not nan"),
        ({"scale": 1e300}, "give a lower scale"),
        ({"trace": "poisson", "scale": 1e300}, "give a lower scale"),
        ({"scale": 0.00001}, "no request arrives"),
        ({"trace": "poisson", "scale": 1e-6, "poisson_as_published": True}, "no request arrives"),
        ({"slo_scale": -1.0}, "SLO scale"),
        ({"slo_scale": float("inf")}, "SLO scale"),
        ({"seed": -1}, "seed must lie between"),
        ({"seed": 1 << 32}, "seed must lie between"),
        ({"prompt_tokens": "0"}, "prompt tokens must be sharegpt, trace or a whole number"),
        ({"prompt_tokens": "1e3"}, "prompt tokens must be"),
        ({"prompt_tokens": ""}, "prompt tokens must be"),
        ({"output_tokens": "sharegpt"}, "output tokens must be trace or a whole number"),
        ({"trace": "poisson", "output_tokens": "trace"}, "has no lengths of its own"),
        ({"poisson_as_published": True}, "applies to the trace 'poisson'"),
        ({"trace": "nowhere.csv"}, "does not exist"),
    ],
)
def test_invalid_options(options, says):
    with pytest.raises(InputError) as refused:
        build(**options)
    assert says in str(refused.value)


def test_unknown_traces_are_refused_with_a_suggestion():
    with pytest.raises(UnknownNameError, match="did you mean 'conversation'"):
        build(trace="conversations")


def test_a_schedule_refuses_a_scale_and_unknown_endpoints(recording, tmp_path):
    with pytest.raises(InputError, match="leave out the scale"):
        build(trace=recording, scale=0.4)
    (tmp_path / "one.toml").write_text('name = "one"\n[[models]]\nmodel = "llama-2-7b"\nload_at = 0\n')
    with pytest.raises(InputError, match=r"endpoint 4, but the model set has 1 models"):
        build(trace=recording, models=str(tmp_path / "one.toml"))


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", "\n", "x" * 200_000])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(InputError, match=r"neither an Azure trace nor a schedule|is empty|not a valid CSV file"):
        build(trace=str(tmp_path / "other.csv"))


@pytest.mark.parametrize(("load_at", "says"), [(1, "must load at bin 0"), (0, "last bin of the trace is 57")])
def test_models_that_load_outside_the_trace_are_refused(tmp_path, load_at, says):
    entry = '[[models]]\nmodel = "llama-2-7b"\nload_at = {}\n'
    (tmp_path / "late.toml").write_text('name = "late"\n' + entry.format(load_at) + entry.format(58))
    with pytest.raises(InputError, match=says):
        build(models=str(tmp_path / "late.toml"))


def test_embedded_prompt_and_output_lengths_are_independent_of_each_other_and_of_time():
    arrivals = build(trace="poisson", scale=1.0).arrivals
    gaps = np.diff(arrivals.arrival_us)
    assert abs(np.corrcoef(gaps, arrivals.prompt_tokens[1:])[0, 1]) < 0.05
    own = build(trace="conversation", scale=1.0, prompt_tokens="trace", output_tokens="trace").arrivals
    assert abs(np.corrcoef(own.prompt_tokens, own.output_tokens)[0, 1]) < 0.05
