"""Errors of the paper's estimator: the figures of SPEC 3, and `maveriq fit --evaluate`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from maveriq.calibration.evaluation import Evaluation, Group, evaluate
from maveriq.calibration.measurements import PUBLISHED_COLUMNS
from maveriq.cli.fit import fit
from maveriq.errors import InputError
from maveriq.estimate.hardware_profile import load_profile
from maveriq.estimate.registry import make_estimator
from maveriq.files import data_path

ROW = "gptj-6b,1,1,28,float16,0,50,1,0.97,11.86"


def errors_of(table: Path, profile: str) -> Evaluation:
    hardware = load_profile(profile)
    return evaluate(table, make_estimator("paper", hardware), prompt_tokens=hardware.prompt_tokens)


def groups(evaluation: Evaluation, by: str) -> dict[str, Group]:
    return {group.value: group for group in evaluation.groups if group.by == by}


def write(folder: Path, *rows: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join([",".join(PUBLISHED_COLUMNS), *rows]) + "\n")
    return path


@pytest.mark.data
def test_published_quality_with_the_long_prompt(measured_data: Path) -> None:
    found = errors_of(measured_data / "a6000" / "full_model_long_prompt.csv", "a6000-long")
    overall = groups(found, "all")[""]
    assert (found.rows, found.left_out, overall.latency.n) == (1320, (), 1320)
    latency = [round(value, 2) for value in (overall.latency.median, overall.latency.mean, overall.latency.p90)]
    assert latency == [4.29, 9.45, 24.66]
    by_tp = {tp: round(group.latency.median, 2) for tp, group in groups(found, "tp").items()}
    assert by_tp == {"1": 3.04, "2": 5.37, "4": 21.81, "8": 38.96}
    assert round(overall.memory.median, 2) == 3.99
    assert set(groups(found, "model")) == {"falcon-7b", "gptj-6b", "llama-2-7b", "llama-2-70b"}
    assert set(groups(found, "weights")) == {"float16", "int8", "int4", "int4_gptq"}


@pytest.mark.data
def test_batch_rule_with_the_short_prompt(measured_data: Path) -> None:
    found = errors_of(measured_data / "a6000" / "full_model_batched_short_prompt.csv", "a6000-short")
    by_batch = {batch: round(group.latency.median, 2) for batch, group in groups(found, "batch").items()}
    assert found.left_out == ()
    assert list(by_batch) == ["1", "8", "16", "32", "64"]
    assert (by_batch["1"], by_batch["64"]) == (6.74, 53.06)


@pytest.mark.data
def test_the_embedded_data_is_what_the_script_derives(measured_data: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "derive_a6000.py"
    subprocess.run([sys.executable, script, measured_data / "a6000", "--out", tmp_path], check=True)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["fingerprints-long.csv", "fingerprints-short.csv", "full_models.csv", "load_fit.toml"]
    for name in written:
        assert (tmp_path / name).read_bytes() == data_path("a6000", name).read_bytes(), name


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    table = write(
        tmp_path,
        ROW,
        ROW.replace("gptj-6b", "stranger"),
        ROW.replace("float16", "int4_gptq"),
        ROW.replace(",0,", ",1,"),
    )
    found = errors_of(table, "a6000-short")
    assert (found.rows, groups(found, "all")[""].latency.n) == (4, 1)
    assert [reason.rows for reason in found.left_out] == [1, 1, 1]
    assert [reason.first.rpartition(" ")[2] for reason in found.left_out] == ["3", "4", "5"]
    assert "stranger is not in the model catalogue" in found.left_out[0].reason


def test_a_batch_the_profile_cannot_answer_is_left_out(tmp_path: Path) -> None:
    found = errors_of(write(tmp_path, ROW.replace(",50,1,", ",50,8,")), "a6000-long")
    assert (found.groups, found.left_out[0].rows) == ((), 1)
    assert "no fingerprint of batch 2" in found.left_out[0].reason


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.97", "0", "latency_s must be a finite number of at least 1e-09"),
        ("0.97", "nan", "latency_s must be a finite number"),
        (",28,", ",x,", "layer_split must be layers of each stage"),
        ("float16", "float8", "weight_dtype must be one of"),
    ],
)
def test_a_wrong_row_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=f"line 2: {message}"):
        errors_of(write(tmp_path, ROW.replace(old, new)), "a6000-short")


def run_fit(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(fit)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_fit_prints_a_table_that_fits_a_terminal(tmp_path: Path) -> None:
    shown = run_fit("--evaluate", str(write(tmp_path, ROW, ROW.replace("gptj-6b", "stranger"))))
    assert "1 of 2 rows answered by calibrated with profile a6000-short" in shown
    assert "left out 1 rows: stranger is not in the model catalogue" in shown
    assert "…" not in shown


def test_fit_prints_json_alone(tmp_path: Path) -> None:
    read = json.loads(run_fit("--evaluate", str(write(tmp_path, ROW)), "--profile", "a6000-long", "--json"))
    assert (read["estimator"], read["profile"], read["rows"], read["left_out"]) == ("calibrated", "a6000-long", 1, [])
    assert read["groups"][0]["latency"]["n"] == 1
