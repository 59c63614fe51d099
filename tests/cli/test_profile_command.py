"""`maveriq profile`: refusals. tests/exec/test_profiling.py tests the measurements."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from fixtures import MODEL
from typer.testing import CliRunner

from maveriq.cli.app import app
from maveriq.errors import InputError, MaveriqError
from maveriq.exec.model_files import hf_config_json


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments])


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, MaveriqError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(hf_config_json(replace(MODEL, context_tokens=1024)))
    return folder


def test_a_dry_run_shows_the_plan_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    result = run(str(model), "--layers", "1,2", "--dry-run", "--json", "--out", str(tmp_path / "out"))
    plan = json.loads(result.stdout)
    assert [run["layers"] for run in plan["runs"]] == [[0], [0, 1]]
    assert plan["expected_s"] > 0
    assert plan["error_after"] < plan["error_before"]
    assert not (tmp_path / "out").exists()
    assert run(str(model), "--layers", "1,2", "--dry-run", "--json").stdout == result.stdout


def test_a_budget_cuts_the_plan(model: Path) -> None:
    whole, cut = (
        json.loads(run(str(model), "--dry-run", "--json", *more).stdout) for more in ([], ["--budget-s", "5"])
    )
    assert cut["expected_s"] <= 5 < whole["expected_s"]


def test_what_cannot_be_measured_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "does not exist" in refusal(str(tmp_path / "none" / "config.json"), *out)
    assert "nothing is downloaded" in refusal("meta-llama/Llama-3.1-8B", *out)
    assert "--out FOLDER" in refusal(str(model))
    assert "int9" in refusal(str(model), "--formats", "int9", *out)
    assert "stores llama weights as float16, int8 or int4, not fp8" in refusal(str(model), "--formats", "fp8", *out)
    assert "leave them out with -c" in refusal(str(model), "-c", "1x1", "--dry-run", *out)
    assert "GiB on each GPU, which has 0.001 GiB" in refusal(str(model), "--memory-gib", "0.001", *out)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_the_engine_lacks_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    other = {**config, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "num_hidden_layers": 2}
    (model / "config.json").write_text(json.dumps({**other, "hidden_act": "none of these"}))
    assert "cannot" in refusal(str(model), "--out", str(tmp_path / "out"))


def test_missing_shards_are_refused(model: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(str(model), "--out", str(tmp_path / "out"))
    assert "2 of 2 files of weights are missing" in message
    assert "model-1.safetensors" in message


def test_a_full_disk_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 20))
    assert "1 MiB are free" in refusal(str(model), "--out", str(tmp_path / "out"))


def test_a_profile_and_other_folders_are_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "profile.json").write_text("{}")
    assert "exists already" in refusal(str(model), "--out", str(out))
    (out / "precious").write_text("mine")
    assert "holds files that are no profile" in refusal(str(model), "--out", str(out), "--overwrite")
    assert (out / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2-7b", "-c", "2*1"], "write TPxPP"),
        (["llama-2-7b", "-c", "2x1:fp7"], "weights must be one of float16"),
        (["llama-2-7b", "-c", "falcon-7b=2x1"], "'falcon-7b' is not among the models"),
        (["llama-2-7b", "-c", "1x40"], "too few for 40 stages"),
        (["llama-2-7b", "-c", "0x1"], "tp must be at least 1"),
        (["llama-2-7b", "-c", "3x1"], "torch cannot run llama-2-7b"),
        (["falcon-7b", "-c", "2x1"], "torch cannot run falcon-7b"),
        (["llama-2-7c", "-c", "1x1"], "unknown model 'llama-2-7c'; did you mean"),
        (["llama-2-7b", "-c", "1x1", "--prompt-tokens", "16,x"], "--prompt-tokens must be whole numbers"),
        (["llama-2-7b", "-c", "1x1", "--batch-size", "0"], "--batch-size must be whole numbers"),
        (["llama-2-7b", "-c", "1x1", "--memory-gib", "nan"], "--memory-gib must be a positive number"),
        (["llama-2-7b", "-c", "1x1", "--backend", "emulated"], "there is nothing to measure"),
        (["llama-2-7b", "-c", "1x1", "--backend", "torhc"], "torhc"),
        (["llama-2-7b", "-c", "1x1", "--backend", "trtllm"], "cannot run here"),
        (["llama-2-7b", "-c", "1x1", "--engine-python", "torch=/no/python"], "there is no file /no/python"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
