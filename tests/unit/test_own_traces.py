"""A user's own trace is replayed as it is unless asked otherwise, and that is recorded. Loads without a file."""

import json
from pathlib import Path

import numpy as np
import pytest

from maveriq import Options, load_run, simulate
from maveriq.domain.deployments import Intent, Objective
from maveriq.errors import InputError
from maveriq.workload.build import WorkloadOptions, build_workload

INTENT = Intent(objective=Objective.MIN_COST)
ONE = 'name = "one"\n[[models]]\nmodel = "llama-2-7b"\n'
THREE = ONE + '[[models]]\nmodel = "falcon-7b"\n[[models]]\nmodel = "gptj-6b"\nload_at = 4\n'


@pytest.fixture
def azure(tmp_path: Path) -> str:
    """1,200 requests over 20 minutes, each with tokens of its own."""
    rows = [
        f"2024-05-10 08:{second // 60:02}:{second % 60:02}.25+02:00,{second + 7},{second % 90 + 1}\n"
        for second in range(1_200)
    ]
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    (tmp_path / "one.toml").write_text(ONE)
    (tmp_path / "three.toml").write_text(THREE)
    return str(path)


def build(trace: str = "code", models: str = "one.toml", **options):
    """Build a workload; the model set is next to the trace, or is a path."""
    return build_workload(
        WorkloadOptions(trace=trace, models=str(Path(trace).parent / models), **options),
        intent=INTENT,
        slo_of=lambda _model, _tokens: None,
    )


def test_every_request_is_kept_at_its_time_with_its_tokens(azure: str) -> None:
    workload = build(azure)
    arrivals = workload.arrivals
    assert len(arrivals) == 1_200
    assert (np.diff(arrivals.arrival_us) == 1_000_000).all()
    assert arrivals.prompt_tokens.tolist() == [second + 7 for second in range(1_200)]
    assert arrivals.output_tokens.tolist() == [second % 90 + 1 for second in range(1_200)]
    assert (arrivals.endpoint_id == 1).all()
    assert workload.endpoints[0].requested_us == 0
    assert arrivals.arrival_us[0] == 90_000_000  # the engine has had its time to load


def test_requests_go_to_models_that_have_had_time_to_load(azure: str) -> None:
    workload = build(azure, "three.toml")
    requested_us = {endpoint.endpoint_id: endpoint.requested_us for endpoint in workload.endpoints}
    assert requested_us == {1: 0, 2: 0, 3: (4 * 30 + 30 + 180) * 1_000_000}  # without load_at: up before the first
    arrivals = workload.arrivals
    assert (np.diff(arrivals.arrival_us) == 1_000_000).all()
    assert arrivals.arrival_us[0] == 180_000_000
    for endpoint_id, asked_us in requested_us.items():
        mine = arrivals.arrival_us[arrivals.endpoint_id == endpoint_id]
        assert mine.min() >= asked_us + 90_000_000
        assert len(mine) > 250


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_a_scale_changes_the_rate_and_keeps_every_request(azure: str, scale: float) -> None:
    arrivals = build(azure, scale=scale).arrivals
    assert len(arrivals) == 1_200
    assert (np.diff(arrivals.arrival_us) == round(1_000_000 / scale)).all()
    assert arrivals.prompt_tokens[-1] == 1_206


def test_only_what_is_asked_for_is_changed(azure: str) -> None:
    arrivals = build(azure, output_tokens="20").arrivals
    assert (arrivals.output_tokens == 20).all()
    assert arrivals.prompt_tokens[5] == 12
    published = build(azure, arrivals="published", scale=0.4).arrivals
    assert len(published) == sum(int(count * 0.4) for count in [30, *[60] * 19, 30])
    assert published.arrival_us[-1] < (90 + 21 * 30) * 1_000_000


def test_limit_and_duration_keep_the_first_requests(azure: str) -> None:
    whole = build(azure, "three.toml").arrivals
    for options, kept in (({"limit": 7}, 7), ({"duration_s": 60.0}, 60), ({"duration_s": 60.0, "limit": 100}, 60)):
        cut = build(azure, "three.toml", **options).arrivals
        assert len(cut) == kept
        for name in ("arrival_us", "endpoint_id", "prompt_tokens", "output_tokens"):
            assert np.array_equal(getattr(cut, name), getattr(whole, name)[:kept]), name


def test_the_published_traces_keep_their_defaults() -> None:
    workload = build_workload(WorkloadOptions(), intent=INTENT, slo_of=lambda _model, _tokens: None)
    assert len(workload.arrivals) == 3_508
    assert workload.source is not None
    assert workload.source.to_dict() == {
        "name": "code",
        "format": "counts per minute",
        "scale": 0.4,
        "arrivals": "published",
        "prompt_tokens": "sharegpt",
        "output_tokens": "20",
        "requests_in_trace": 8_819,
        "requests": 3_508,
        "dropped": {"scale 0.4 (whole requests per minute)": 5_311},
        "remarks": [],
    }


def test_what_was_resolved_is_recorded(azure: str, tmp_path: Path) -> None:
    run = simulate(trace=azure, models=str(tmp_path / "one.toml"), limit=50)
    run.save(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert None not in kept["options"].values()
    resolved = {
        name: kept["options"][name] for name in ("scale", "arrivals", "prompt_tokens", "output_tokens", "limit")
    }
    assert resolved == {
        "scale": 1.0, "arrivals": "trace", "prompt_tokens": "trace", "output_tokens": "trace", "limit": 50,
    }  # fmt: skip
    assert {"tick_ms", "after_arrival_ms", "after_release_ms", "registration_delay_s", "drain_s"} < set(kept["options"])
    assert kept["trace"]["format"] == "Azure trace"
    assert (kept["trace"]["requests_in_trace"], kept["trace"]["requests"]) == (1_200, 50)
    assert kept["trace"]["dropped"] == {"limit": 1_150}
    assert any("azure.csv (Azure trace), 50 requests of 1,200" in note for note in kept["notes"])
    again = load_run(tmp_path / "run")
    assert again.options is not None
    assert simulate(again.options).requests.equals(run.requests)


def test_models_that_load_after_the_end_are_named(azure: str) -> None:
    source = build(azure, "three.toml", limit=10).source
    assert source is not None
    assert source.remarks == ("requested after the last arrival: endpoints 3 (gptj-6b)",)


def test_a_model_set_needs_no_load_at_but_one_that_starts(azure: str, tmp_path: Path) -> None:
    (tmp_path / "late.toml").write_text(ONE + "load_at = 1\n")
    with pytest.raises(InputError, match="the first model must load at bin 0"):
        build(azure, "late.toml")


# Loads without a file


def test_a_constant_load_has_equal_gaps(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(ONE)
    options = {"models": "one.toml", "prompt_tokens": "100"}
    by_time = build("constant", **_in(tmp_path, options), rate=4.0, duration_s=30.0)
    assert len(by_time.arrivals) == 120
    assert (np.diff(by_time.arrivals.arrival_us) == 250_000).all()
    by_count = build("constant", **_in(tmp_path, options), rate=4.0, limit=9)
    assert by_count.arrivals.arrival_us.tolist() == by_time.arrivals.arrival_us.tolist()[:9]


def _in(folder: Path, options: dict) -> dict:
    return options | {"models": str(folder / options["models"])}


def test_a_poisson_load_has_its_rate_and_duration(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(ONE)
    options = _in(tmp_path, {"models": "one.toml"})
    arrivals = build("poisson", **options, rate=5.0, duration_s=2_000.0).arrivals
    assert len(arrivals) == pytest.approx(10_000, abs=4 * 100)
    assert arrivals.arrival_us[-1] - arrivals.arrival_us[0] < 2_000_000_000
    gaps_s = np.diff(arrivals.arrival_us) / 1e6
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps_s.std() == pytest.approx(0.2, rel=0.05)
    assert len(build("poisson", **options, rate=5.0, limit=123).arrivals) == 123


def test_a_rate_alone_is_a_poisson_load_of_ten_minutes() -> None:
    assert Options(rate=2.0).trace == "poisson"
    assert Options().trace == "code"
    run = simulate(rate=0.2)
    assert run.options is not None
    assert (run.options.trace, run.options.rate, run.options.duration_s) == ("poisson", 0.2, 600.0)
    assert run.options.scale is None
    assert "scale" not in run.meta["options"]
    assert 80 < len(run.requests) < 160
