"""The profile that matches a table: given, nearest in prompt length, or found from latencies."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from maveriq.calibration.evaluation import benchmarked_estimator
from maveriq.calibration.measurements import PUBLISHED_COLUMNS, Measurement
from maveriq.calibration.profile_matching import match
from maveriq.cli.fit import fit
from maveriq.domain.models import WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.estimator import Estimator
from maveriq.estimate.hardware_profile import HardwareProfile, load_profile

ROW = "gptj-6b,1,1,28,float16,0,50,1,0.97,11.86"


def make(name: str) -> Callable[[HardwareProfile], Estimator]:
    return lambda hardware: benchmarked_estimator(name, hardware)


def imagined(profile: str, *, name: str = "calibrated", noise: float = 1.0, batch: int = 1) -> list[Measurement]:
    """Rows that follow an estimator with the prompt length of a profile, with noise in every other row."""
    hardware, model = load_profile(profile), load_model("llama-2-7b")
    estimator, rows = benchmarked_estimator(name, hardware), []
    for pp in (1, 2, 4):
        requested = ParallelConfig(tp=1, pp=pp, weights=WeightType.INT8, batch_size=batch)
        for place, output_tokens in enumerate((10, 20, 100)):
            size = {"prompt_tokens": hardware.prompt_tokens, "output_tokens": output_tokens, "batch": batch}
            latency_s = estimator.service(model, requested, **size).latency_s
            rows.append(
                Measurement(
                    where=f"row {len(rows)}",
                    model_name=model.name,
                    layers=model.layers,
                    configuration=requested,
                    output_tokens=output_tokens,
                    latency_s=latency_s * (noise if place % 2 else 1 / noise),
                    memory_gib=10.0,
                )
            )
    return rows


@pytest.mark.parametrize("name", ["calibrated", "paper"])
@pytest.mark.parametrize("profile", ["a6000-short", "a6000-long"])
@pytest.mark.parametrize("noise", [1.0, 1.05])
def test_latencies_identify_the_prompt_length(profile: str, name: str, noise: float) -> None:
    matched = match(imagined(profile, name=name, noise=noise), make(name))
    assert [matched_input.profile.name for matched_input in matched.inputs] == [profile]
    assert matched.why.startswith(f"off in latency by {100 * (noise - 1):.1f} % with {profile}, ")
    assert {trial.profile: trial.rows for trial in matched.trials} == {"a6000-short": 9, "a6000-long": 9}


def test_rows_covered_by_one_profile_do_not_count() -> None:
    """The paper's estimator covers batches with only one of the profiles, and its errors are large there."""
    long = imagined("a6000-long", name="paper")
    batches = [replace(row, configuration=replace(row.configuration, batch_size=64)) for row in long]
    matched = match([*batches, *long], make("paper"))
    assert matched.inputs[0].profile.name == "a6000-long"
    assert {trial.rows for trial in matched.trials} == {9}


def test_the_only_covering_profile_is_chosen() -> None:
    batches = imagined("a6000-short", name="paper", batch=8)
    matched = match(batches, make("paper"))
    assert matched.inputs[0].profile.name == "a6000-short"
    assert [trial.median for trial in matched.trials][1] is None


def test_without_a_covering_profile_the_default_is_chosen() -> None:
    strangers = [replace(row, model_name="stranger") for row in imagined("a6000-long")]
    matched = match(strangers, make("calibrated"))
    assert (matched.inputs[0].profile.name, matched.why) == ("a6000-short", "no row tells the profiles apart")


@pytest.mark.parametrize(
    ("tokens", "profile"), [(1, "a6000-short"), (95, "a6000-short"), (97, "a6000-long"), (4000, "a6000-long")]
)
def test_given_prompt_tokens_choose_the_nearest_profile(tokens: int, profile: str) -> None:
    matched = match(imagined("a6000-short"), make("calibrated"), prompt_tokens=tokens)
    assert [matched_input.profile.name for matched_input in matched.inputs] == [profile]
    assert matched.inputs[0].evaluated.prompt_tokens == tokens
    assert matched.trials == ()


def test_prompt_tokens_of_rows_choose_a_profile_each() -> None:
    short, long = imagined("a6000-short")[0], imagined("a6000-long")[0]
    rows = [replace(short, prompt_tokens=12), replace(long, prompt_tokens=900)]
    matched = match(rows, make("calibrated"))
    assert [matched_input.profile.name for matched_input in matched.inputs] == ["a6000-short", "a6000-long"]
    assert [matched.estimator_of(row).prompt_tokens for row in rows] == [10, 923]
    with pytest.raises(InputError, match="column prompt_tokens; leave --prompt-tokens away"):
        match(rows, make("calibrated"), prompt_tokens=10)


def test_a_given_profile_is_used_for_all_rows() -> None:
    matched = match(imagined("a6000-long"), make("calibrated"), profile="a6000-short", prompt_tokens=900)
    assert (matched.inputs[0].profile.name, matched.inputs[0].evaluated.prompt_tokens) == ("a6000-short", 900)


def run_fit(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(fit)
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


@pytest.mark.data
@pytest.mark.parametrize(
    ("table", "profile", "latency", "memory"),
    [
        ("full_model_long_prompt", "a6000-long", 2, 1),
        ("full_model_batched_short_prompt", "a6000-short", 3, 3),
        ("full_model_pruned", "a6000-long", 2, 1),
        ("uneven_pipeline", "a6000-short", 2, 2),
        ("batch_scaling", "a6000-short", 8, 2),
        ("fingerprint_layer_scaling", "a6000-long", 2, 1),
        ("fingerprint_long_prompt", "a6000-long", 6, 1),
        ("fingerprint_short_prompt", "a6000-short", 3, 1),
    ],
)
def test_a_measured_table_needs_no_option(
    measured_data: Path, table: str, profile: str, latency: float, memory: float
) -> None:
    read = json.loads(run_fit("--evaluate", str(measured_data / "a6000" / f"{table}.csv"), "--json"))
    assert (read["estimator"], read["profile"]) == ("calibrated", profile)
    overall = read["groups"][0]
    assert (overall["by"], overall["latency"]["median"] < latency, overall["memory"]["median"] < memory) == (
        "all", True, True,
    )  # fmt: skip


def test_a_column_of_prompt_tokens_is_used_and_reported(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("\n".join([",".join([*PUBLISHED_COLUMNS, "prompt_tokens"]), f"{ROW},10", f"{ROW},923"]) + "\n")
    read = json.loads(run_fit("--evaluate", str(table), "--json"))
    assert (read["profile"], read["prompt_tokens"]) == ("a6000-short, a6000-long", None)
    shown = run_fit("--evaluate", str(table))
    assert "with profile a6000-short and a6000-long (prompts as the table says)" in shown
    assert "profile: its prompts are the nearest; --profile takes another" in shown


def test_the_matched_profile_is_reported(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("\n".join([",".join(PUBLISHED_COLUMNS), ROW]) + "\n")
    shown = run_fit("--evaluate", str(table))
    assert "profile: off in latency by " in shown
    assert "profile:" not in run_fit("--evaluate", str(table), "--profile", "a6000-short")
    read = json.loads(run_fit("--evaluate", str(table), "--json"))
    assert [tried["profile"] for tried in read["profiles_tried"]] == ["a6000-short", "a6000-long"]
