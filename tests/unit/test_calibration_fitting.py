"""`maveriq fit DATA` for other hardware: tables with prompt lengths, another GPU, runs of a live system."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

from maveriq.calibration.fitting import fit_exponents, start_calibration
from maveriq.calibration.measurements import PUBLISHED_COLUMNS, read_measurements
from maveriq.calibration.samples import constants_of, read_samples, without_ground_truth
from maveriq.cli.fit import fit
from maveriq.domain.models import KvType, ModelSpec, WeightType, load_model
from maveriq.domain.parallel import ParallelConfig
from maveriq.errors import InputError
from maveriq.estimate.calibration_file import Calibration, op_counts, read_calibration
from maveriq.estimate.fingerprints import Exponents, ParallelLatency, read_exponents
from maveriq.estimate.measured import COLUMNS
from maveriq.estimate.roofline import latency_s
from maveriq.profiling.folder import Machine, write_profile
from maveriq.profiling.measure import Measured, MeasurementCase
from maveriq.report.run_folder import write_run
from maveriq.scenario.build import build_system
from maveriq.scenario.options import Options
from maveriq.sim.simulator import simulate
from maveriq.streams import generator

MODELS = ("llama-2-7b", "gptj-6b", "falcon-7b")
HEADER = ",".join([*PUBLISHED_COLUMNS, "prompt_tokens"])


def other_gpu() -> Calibration:
    """A GPU with six times the bandwidth and FLOPS of an A6000, and three times the software overhead."""
    start = start_calibration()
    return msgspec.structs.replace(
        start,
        bandwidth_gb_s=6 * start.bandwidth_gb_s,
        host_layer_us=3 * start.host_layer_us,
        token_us=3 * start.token_us,
        weights={
            name: msgspec.structs.replace(
                kind, prefill_tflops=6 * kind.prefill_tflops, decode_tflops=6 * kind.decode_tflops
            )
            for name, kind in start.weights.items()
        },
    )


def row(
    truth: Calibration, model: ModelSpec, requested: ParallelConfig, outputs: int, prompt: int, noise: float
) -> str:
    split = [model.layers // requested.pp + (place < model.layers % requested.pp) for place in range(requested.pp)]
    batch = requested.batch_size
    todo = op_counts(model, requested.kv, tp=requested.tp, pp=requested.pp, batch=batch, prompt_tokens=prompt)
    latency = float(latency_s(todo, truth.roofline(requested.weights, requested.tp), outputs)) * noise
    memory_gib = 1.0 * requested.gpus + model.layers * 0.4 + 0.1 * (batch - 1)
    cells = [model.name, requested.tp, requested.pp, " ".join(map(str, split)), requested.weights, 0, outputs, batch]
    return ",".join(map(str, [*cells, f"{latency:.6f}", f"{memory_gib:.4f}", prompt]))


def rows(truth: Calibration, *, noise: float = 0.01, models: tuple[str, ...] = MODELS) -> list[str]:
    """Fingerprints and whole models, with prompts of two lengths."""
    draw, found = generator(7, "noise of measurements"), []
    for name in models:
        model = load_model(name)
        for weights in (WeightType.FLOAT16, WeightType.INT8):
            for prompt in (64, 1500):
                for tp, pp in ((1, 1), (1, 2), (2, 1)):
                    requested = ParallelConfig(tp=tp, pp=pp, weights=weights, kv=KvType.NATIVE)
                    of = [replace(model, layers=layers) for layers in (pp, pp + 1)]
                    found += [
                        row(truth, model, requested, outputs, prompt, 1.0) for model in of for outputs in (10, 20)
                    ]
                    for batch in (1, 8):
                        for outputs in (20, 200):
                            spread = 1 + noise * draw.uniform(-1, 1)
                            found.append(
                                row(truth, model, replace(requested, batch_size=batch), outputs, prompt, spread)
                            )
    return found


def write(path: Path, lines: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def run_fit(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(fit)
    return CliRunner().invoke(app, arguments)


def test_a_fit_recovers_the_roofline_of_another_gpu(tmp_path: Path) -> None:
    table, out = write(tmp_path / "mine.csv", rows(other_gpu())), tmp_path / "out"
    out.mkdir()
    ended = run_fit(str(table), "--out", str(out), "--json")
    assert ended.exit_code == 0, ended.output
    overall = json.loads(ended.stdout)["groups"][0]
    assert overall["latency"]["n"] == 3 * 2 * 2 * 3 * 2 * 2
    assert overall["latency"]["median"] < 1.5
    fitted = read_calibration(out / "calibrated.toml")
    assert fitted.bandwidth_gb_s == pytest.approx(other_gpu().bandwidth_gb_s, rel=0.05)
    float16 = fitted.weights[WeightType.FLOAT16]
    assert float16.prefill_tflops == pytest.approx(6 * 115, rel=0.05)
    assert set(fitted.memory.gpus_gib) == {"1x1", "1x2", "2x1"}
    assert fitted.memory.gpus_gib["2x1"] == pytest.approx(1.0, abs=0.01)
    assert {weights for weights, _ in read_exponents(out / "exponents.csv")} == {WeightType.FLOAT16, WeightType.INT8}


def test_tables_with_prompt_lengths_may_have_any_name(tmp_path: Path) -> None:
    lines = rows(other_gpu(), models=MODELS[:2])
    write(tmp_path / "a.csv", lines[::2])
    write(tmp_path / "b.csv", lines[1::2])
    (tmp_path / "notes.csv").write_text("what,when\nx,y\n")
    samples = read_samples(tmp_path)
    assert len(samples) == len(lines)
    assert {sample.prompt_tokens for sample in samples} == {64, 1500}
    assert {sample.is_fingerprint for sample in samples} == {True, False}
    assert set(constants_of(samples)) == {64, 1500}


@pytest.mark.heavy
def test_variants_are_left_out_with_their_base_model(tmp_path: Path) -> None:
    lines = rows(other_gpu(), models=MODELS[:2])
    pruned = [line.replace("llama-2-7b,", "llama-2-7b-wanda,") for line in lines if line.startswith("llama-2-7b,")]
    samples = read_samples(write(tmp_path / "t.csv", [*lines, *pruned]))
    left = [
        sample.measured.model_name
        for sample in without_ground_truth(samples, "llama-2-7b")
        if not sample.is_fingerprint
    ]
    assert set(left) == {"gptj-6b"}
    out = tmp_path / "out"
    out.mkdir()
    ended = run_fit(str(tmp_path / "t.csv"), "--out", str(out), "--json")
    assert ended.exit_code == 0, ended.output
    assert {path.name for path in out.glob("calibrated-without-*")} == {
        "calibrated-without-llama-2-7b.toml",
        "calibrated-without-gptj-6b.toml",
    }
    by_model = {
        group["value"]: group["latency"]["n"] for group in json.loads(ended.stdout)["groups"] if group["by"] == "model"
    }
    assert by_model["llama-2-7b-wanda"] == by_model["llama-2-7b"]


def test_prompt_tokens_can_be_given_for_a_table_without_them(tmp_path: Path) -> None:
    lines = [line.rpartition(",")[0] for line in rows(other_gpu()) if line.endswith(",64")]
    table = write(tmp_path / "t.csv", lines, ",".join(PUBLISHED_COLUMNS))
    assert {sample.prompt_tokens for sample in read_samples(table, prompt_tokens=64)} == {64}
    assert {sample.prompt_tokens for sample in read_samples(tmp_path, prompt_tokens=64)} == {64}
    with pytest.raises(InputError, match="no column prompt_tokens; add it, or give --prompt-tokens"):
        read_samples(table)
    with pytest.raises(InputError, match="no table of measurements with a column prompt_tokens"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gptj-6b", "stranger", r"'stranger' is not in the catalogue; put its Hugging Face configuration at"),
        ("gptj-6b,1", "gptj-6b,16", "a calibration knows TP 1, 2, 4 and 8 only"),
    ],
)
def test_unusable_rows_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    table = write(tmp_path / "t.csv", [line.replace(old, new) for line in rows(other_gpu())])
    with pytest.raises(InputError, match=message):
        read_samples(table)


def test_a_custom_model_has_its_config_next_to_the_table(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 28, "hidden_size": 4096, "num_attention_heads": 16,'
        ' "intermediate_size": 16384, "vocab_size": 50400}'
    )
    table = write(tmp_path / "t.csv", [line.replace("gptj-6b", "mine") for line in rows(other_gpu())])
    mine = [
        sample.model
        for sample in read_samples(table)
        if sample.measured.model_name == "mine" and not sample.is_fingerprint
    ]
    assert {(model.name, model.layers, model.feed_forward_matrices) for model in mine} == {("mine", 28, 3)}


def test_without_fingerprints_only_latency_is_fitted(tmp_path: Path) -> None:
    whole = [line for line in rows(other_gpu()) if line.split(",")[3] in ("32", "16 16", "28", "14 14")]
    ended = run_fit(str(write(tmp_path / "t.csv", whole)), "--json")
    assert ended.exit_code == 0, ended.output
    overall = json.loads(ended.stdout)["groups"][0]
    assert overall["latency"]["median"] < 2
    assert overall["memory"] is None
    assert "memory" not in run_fit(str(tmp_path / "t.csv")).stdout


def test_one_model_cannot_be_cross_validated(tmp_path: Path) -> None:
    whole = [line for line in rows(other_gpu(), models=MODELS[:1]) if line.split(",")[3] in ("32", "16 16")]
    ended = run_fit(str(write(tmp_path / "t.csv", whole)))
    assert isinstance(ended.exception, InputError)
    assert "llama-2-7b is the only model measured" in str(ended.exception)


def test_a_fit_recovers_the_exponents_of_a_made_up_gpu(tmp_path: Path) -> None:
    """Whole models follow the paper's formula exactly, with exponents unlike those of the A6000."""
    truth = Exponents(a=0.3, b=0.9, c=0.4, d=0.7)
    samples = read_samples(write(tmp_path / "t.csv", rows(other_gpu(), noise=0)))
    constants = constants_of(samples)
    seen = []
    for sample in samples:
        requested = sample.measured.configuration
        points = constants[sample.prompt_tokens][sample.model.name]
        for tp, pp in ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 2)):
            lines = (points[point].line(sample.model.layers) for point in (requested.at(1, 1), requested.at(2, 1)))
            law = ParallelLatency.scaled(*lines, truth, tp=tp, pp=pp)
            latency_s = law.at(sample.measured.output_tokens)
            measured = replace(sample.measured, configuration=replace(requested, tp=tp, pp=pp), latency_s=latency_s)
            seen.append(replace(sample, measured=measured))
    for found in fit_exponents(seen, constants).values():
        assert (found.a, found.b, found.c, found.d) == pytest.approx((0.3, 0.9, 0.4, 0.7), abs=0.02)


def test_runs_are_fitted_by_the_command(tmp_path: Path) -> None:
    for scale in (0.03, 0.05):
        write_run(tmp_path / "runs" / f"at-{scale}", simulate(build_system(Options(scale=scale))), {}, {})
    out = tmp_path / "out"
    out.mkdir()
    table = write(tmp_path / "mine.csv", rows(start_calibration(), models=MODELS[:2]))
    ended = run_fit(str(table), "--runs", str(tmp_path / "runs"), "--out", str(out))
    assert ended.exit_code == 0, ended.output
    assert "8 deployments in 2 recorded runs, each by figures without its run: off by" in ended.stdout
    online = read_calibration(out / "calibrated.toml").online
    assert online is not None
    assert set(online.tp) == {"4"}
    assert read_calibration(out / "calibrated.toml", without_run="at-0.03").online != online
    nothing = run_fit(str(table), "--runs", str(out))
    assert "holds no run folder" in str(nothing.exception)


def profiled(truth: Calibration, name: str) -> list[Measured]:
    """What `maveriq profile` would measure of a model on another GPU."""
    model, found = load_model(name), []
    for tp, batch, prompt in product((1, 2), (1, 8), (64, 1500)):
        configuration = ParallelConfig(tp=tp, pp=1, weights=WeightType.FLOAT16)
        todo = op_counts(model, KvType.NATIVE, tp=tp, pp=1, batch=batch, prompt_tokens=prompt)
        times = [float(latency_s(todo, truth.roofline(WeightType.FLOAT16, tp), tokens)) for tokens in (1, 101)]
        tpot_s = (times[1] - times[0]) / 100
        found.append(
            Measured(
                model=model, configuration=configuration, ttft_s=times[0] - tpot_s, tpot_s=tpot_s,
                case=MeasurementCase(batch=batch, prompt_tokens=prompt, output_tokens=100),
                memory_gib=model.layers * 0.4 + batch, start_s=10,
            )
        )  # fmt: skip
    return found


def test_a_fit_reads_what_maveriq_profile_writes(tmp_path: Path) -> None:
    measured = [found for name in MODELS[:2] for found in profiled(other_gpu(), name)]
    folder = write_profile(tmp_path / "mine", Machine(kind="other", memory_gib=80, idle_gib=0.5), measured)
    rows = list(read_measurements(folder / "measured.csv"))
    for read, found in zip(rows, measured, strict=True):
        assert read.latency_s == pytest.approx(found.ttft_s + 100 * found.tpot_s, rel=1e-3)
        assert read.memory_gib == pytest.approx(found.memory_gib)
        assert (read.layers, read.configuration.batch_size) == (found.model.layers, found.case.batch)
    compared = run_fit(
        "--evaluate", str(folder / "measured.csv"), "--profile", str(folder / "profile.toml"),
        "--estimator", "measured", "--json",
    )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.stdout)["groups"][0]["latency"]["worst"] < 0.1
    fitted = run_fit(str(folder), "--json")
    assert fitted.exit_code == 0, fitted.output
    overall = json.loads(fitted.stdout)["groups"][0]["latency"]
    assert (overall["n"], overall["median"] < 2) == (2 * len(measured), True)  # first tokens are latencies, too


def test_a_profile_without_its_output_tokens_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "measured.csv"
    table.write_text(",".join(COLUMNS) + "\nllama-2-7b,float16,native,1,1,1,64,0.01,0.01,14\n")
    with pytest.raises(InputError, match=r"line 2: no column output_tokens"):
        list(read_measurements(table))


def test_models_of_a_profile_are_known_from_its_folder(tmp_path: Path) -> None:
    model = replace(load_model("llama-2-7b"), name="my-model", layers=8)
    configuration = ParallelConfig(tp=1, pp=1, weights=WeightType.FLOAT16)
    case = MeasurementCase(batch=1, prompt_tokens=64, output_tokens=20)
    measured = Measured(model=model, configuration=configuration, case=case, ttft_s=0.1, tpot_s=0.01, memory_gib=4,
                        start_s=1)  # fmt: skip
    folder = write_profile(tmp_path / "mine", Machine(kind="other", memory_gib=80, idle_gib=0.5), [measured])
    whole, first = read_samples(folder)
    assert (whole.model.name, whole.model.layers, whole.is_fingerprint) == ("my-model", 8, False)
    assert (whole.measured.latency_s, first.measured.latency_s) == pytest.approx((0.3, 0.11))
