"""`maveriq fit RUN... --models SET` on the command line: a profile that a simulation takes, and what is refused."""

import csv
import json
import statistics
from pathlib import Path

import msgspec
import pytest

from maveriq.estimate.engine_presets import engine_preset
from maveriq.estimate.fitted_profile import fitted_profile_toml

SET = (
    'name = "one"\n[[models]]\nmodel = "llama-3.1-8b"\ntp = 1\nweights = "bfloat16"\n'
    '[models.engine]\nkind = "vllm"\nversion = "0.23.0"\nmax_num_seqs = 8\nmax_model_len = 8192\n'
    "num_gpu_blocks = 4096\n"
)
REQUESTS = "arrival_s,endpoint,prompt_tokens,output_tokens\n" + "".join(
    f"{number / 9:.3f},1,{200 + 40 * (number % 7)},{10 + number % 5}\n" for number in range(40)
)
SIM = "sim --models m.toml --gpus 1xH100-SXM --trace r.csv --service-times physics --quiet --out"
FIT = "fit --models m.toml --gpus 1xH100-SXM"


def mean_latency_s(path: Path) -> float:
    with path.open(newline="") as file:
        return statistics.mean(float(row["finish_s"]) - float(row["arrival_s"]) for row in csv.DictReader(file))


def test_a_fit_to_a_run_folder_writes_a_profile_that_simulates_the_run_again(maveriq, tmp_path: Path):
    (tmp_path / "m.toml").write_text(SET)
    (tmp_path / "r.csv").write_text(REQUESTS)
    assert maveriq(f"{SIM} first").code == 0
    ended = maveriq(f"{FIT} first --out p.toml --json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found["preset"] == "vllm-2026"
    assert abs(found["errors_percent"]["first"]["E2E mean"]) < 0.5
    assert maveriq(f"{SIM} again --profile p.toml").code == 0
    means = [mean_latency_s(tmp_path / name / "requests.csv") for name in ("first", "again")]
    assert means[1] == pytest.approx(means[0], rel=0.01)
    assert maveriq(f"{FIT} first --out p.toml").code != 0  # it is there already


def test_plans_take_the_times_of_a_fitted_profile_for_the_engine_that_it_was_fitted_to(maveriq, tmp_path: Path):
    preset = engine_preset("vllm-2026")
    slow = msgspec.structs.replace(preset.times, step_us=preset.step_us + 2000, api_us=preset.api_us + 30_000)
    text = fitted_profile_toml("slow", "H100-SXM", {"vllm-2026": slow}, source="a test")
    (tmp_path / "slow.toml").write_text(text)

    def planned(options: str) -> dict[str, float]:
        ended = maveriq(f"plan llama-3.1-8b --gpus 1xH100-SXM --prompt-tokens 500 --output-tokens 20 --json {options}")
        assert ended.code == 0
        return json.loads(ended.out)["candidates"][0]

    usual, fitted = (planned(f"--engine vllm-0.23.0{profile}") for profile in ("", " --profile slow.toml"))
    assert fitted["tpot_s"] - usual["tpot_s"] == pytest.approx(0.002, rel=0.1)
    assert fitted["first_token_s"] - usual["first_token_s"] == pytest.approx(0.032, rel=0.1)
    older = [planned(f"--engine vllm-0.11.0{profile}") for profile in ("", " --profile slow.toml")]
    assert older[0]["latency_s"] == older[1]["latency_s"]
    refused = maveriq("plan llama-3.1-8b --gpus 1xL40S --engine vllm --profile slow.toml")
    assert (refused.code, "measured on H100-SXM" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("fit --models m.toml --gpus 1xH100-SXM", "name the recorded requests"),
        ("fit r.csv --models m.toml", "name the GPUs"),
        ("fit r.csv --models m.toml --gpus 1xH100-SXM --estimator paper", "takes --models"),
        ("fit r.csv --models m.toml --gpus 1xH100-SXM", "no column ttft_s"),
        ("fit r.csv --models m.toml --gpus 1xH100-SXM --out folder", "one TOML file"),
        ("fit r.csv --gpus 1xH100-SXM", "add --models"),
        ("fit r.csv --models large --gpus 1xH100-SXM", "a fit is to the requests of one"),
        ("fit a.csv b.csv", "--models SET"),
    ],
)
def test_bad_fits_are_refused_in_one_line(maveriq, tmp_path: Path, command: str, says: str):
    (tmp_path / "m.toml").write_text(SET)
    (tmp_path / "r.csv").write_text(REQUESTS)
    ended = maveriq(command)
    assert ended.code != 0
    assert says in " ".join(ended.err.split())
    assert len(ended.err.strip().splitlines()) == 1
