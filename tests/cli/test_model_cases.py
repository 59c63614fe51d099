"""Model files that people use or that were made up: every command reads the same model, or refuses it in one line."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_results import Ended, Maveriq

from maveriq.files import data_path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
SCHEDULE = "arrival_s,endpoint,prompt_tokens,output_tokens\n"


def put(folder: Path, config: object, name: str = "config.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / name


def put_set(folder: Path, *models: object) -> Path:
    entries = "".join(f'[[models]]\nmodel = "{model}"\nload_at = 0\n' for model in models)
    (folder / "set.toml").write_text(f'name = "mine"\n{entries}')
    return folder / "set.toml"


def rows_of(folder: Path, table: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / table).read_text().splitlines()))


def answers_of(ended: Ended) -> dict[str, dict[str, object]]:
    assert ended.code == 0, ended.err
    engines: dict[str, dict[str, object]] = json.loads(ended.out)["engines"]
    return engines


@pytest.fixture
def case(measured_data: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a folder of the failing inputs of others; skips where they are absent."""

    def copy(name: str) -> Path:
        folders = sorted((measured_data / "cases").glob(f"{name}-*"))
        if not folders:
            pytest.skip(f"case {name} is absent")
        return Path(shutil.copytree(folders[0], tmp_path / "case"))

    return copy


@pytest.fixture
def own_profile(tmp_path: Path) -> Callable[..., Path]:
    """Make a profile of other models on the A6000, with the rows of llama-2-70b."""

    def make(*models: str) -> Path:
        folder = Path(shutil.copytree(data_path("a6000"), tmp_path / "profile"))
        for name in ("fingerprints-short.csv", "fingerprints-long.csv", "accuracy.csv"):
            rows = [line for line in (folder / name).read_text().splitlines() if line.startswith("llama-2-70b,")]
            with (folder / name).open("a") as file:
                file.writelines(f"{row.replace('llama-2-70b', model, 1)}\n" for model in models for row in rows)
        return folder / "profile-short.toml"

    return make


def test_head_dim_counts_in_plans(
    maveriq: Maveriq, case: Callable[[str], Path], own_profile: Callable[..., Path]
) -> None:
    folder, profile = case("06"), own_profile("qwen3-32b", "qwen-nohd")
    plain_config = folder / "qwen-nohd" / "config.json"  # qwen3 without a head_dim has one of 128, a llama has not
    plain_config.write_text(plain_config.read_text().replace('"qwen3"', '"llama"'))

    def candidates(model: str) -> dict[str, dict[str, float]]:
        asked = f"plan {folder / model} --profile {profile} --float16-only --batch-size 2 --prompt-tokens 2000 --json"
        found = json.loads(maveriq(asked).out)["candidates"]
        return {f"{one['tp']}x{one['pp']}+{one['kv']}": one for one in found}

    wide, plain = candidates("qwen3-32b"), candidates("qwen-nohd")
    assert wide.keys() == plain.keys()
    for key, candidate in wide.items():
        assert candidate["memory_gib"] > plain[key]["memory_gib"] + 3, (
            key
        )  # 25 % more in q and o, 60 % more in the cache
        assert candidate["latency_s"] > plain[key]["latency_s"], key


@pytest.mark.parametrize(
    ("model", "words"),
    [("mixtral", "8 experts in 32 layers"), ("deepseek", "256 experts in 58 layers and latent attention")],
)
def test_experts_are_no_plain_decoder(
    maveriq: Maveriq, case: Callable[[str], Path], own_profile: Callable[..., Path], model: str, words: str
) -> None:
    folder = case("07")
    config = folder / model / "config.json"
    config.write_text(
        config.read_text().replace('"n_shared_experts"', '"first_k_dense_replace": 3, "n_shared_experts"')
    )
    ended = maveriq(f"plan {folder / model} --profile {own_profile(model)} --float16-only")
    assert ended.code == 1
    assert f"it has {words}, which this estimator does not model" in ended.err
    answers = answers_of(maveriq(f"engines --model {folder / model} --json"))
    assert not answers["trtllm-engine"]["can"]
    assert answers["torch"]["can"] == (model == "mixtral")  # by transformers' modules; none cache latent attention


def test_a_known_name_with_another_shape_is_refused(maveriq: Maveriq, case: Callable[[str], Path]) -> None:
    folder = case("08")
    wider = maveriq(f"plan {folder / 'wider'} --float16-only")
    assert wider.code == 2
    assert "layers 40, not 32, hidden_size 5120, not 4096" in wider.err
    assert "experts (num_local_experts)" in maveriq(f"plan {folder / 'upcycled'}").err
    (folder / "schedule.csv").write_text(f"{SCHEDULE}300,1,10,10\n")
    models = put_set(folder, "wider/config.json")
    ended = maveriq(f"sim --models {models} --trace {folder}/schedule.csv --out {folder}/out --quiet")
    assert ended.code == 1
    assert "it is not the llama-2-7b" in ended.err
    [deployment] = rows_of(folder / "out", "deployments.csv")
    assert deployment["status"] == "rejected"


def test_old_names_of_keys_and_families(maveriq: Maveriq, case: Callable[[str], Path]) -> None:
    folder = case("09")
    can = {
        model: {
            engine: answer["can"]
            for engine, answer in answers_of(maveriq(f"engines --model {folder / model} --json")).items()
        }
        for model in ("bloom", "mpt", "falcon-old", "refinedweb", "opt")
    }
    assert can["bloom"]["vllm"]
    assert can["opt"]["vllm"]
    assert not can["mpt"]["vllm"]
    assert can["falcon-old"] == can["refinedweb"]
    assert can["falcon-old"]["torch"]


def test_a_multimodal_model_is_not_the_family_of_its_decoder_to_engines(
    maveriq: Maveriq, case: Callable[[str], Path]
) -> None:
    answers = answers_of(maveriq(f"engines --model {case('10') / 'qwen3-vl'} --json"))
    assert [engine for engine, answer in answers.items() if answer["can"]] == ["emulated"]


@pytest.mark.heavy
@pytest.mark.parametrize("model", ["head-dim", "falcon-old"])
def test_what_torch_loads_is_what_is_profiled_and_run(
    maveriq: Maveriq, case: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    pytest.importorskip("torch")
    config = case("11") / model / "config.json"
    assert answers_of(maveriq(f"engines --model {config} --device cpu --json"))["torch"]["can"]
    measure = "--configuration 1x1 --prompt-tokens 8 --output-tokens 4 --repeats 1"
    profiled = maveriq(f"profile {config} {measure} --out {tmp_path}/p")
    assert profiled.code == 0, profiled.err
    (tmp_path / "trace.csv").write_text(f"{SCHEDULE}20,1,8,4\n")
    common = f"--profile {tmp_path}/p/profile.toml --gpus 2xcpu --models {put_set(tmp_path, config)} --load-s 5 --quiet"
    for command in ("sim", "run --backend torch"):
        out = tmp_path / command[:3]
        ended = maveriq(f"{command} {common} --trace {tmp_path}/trace.csv --out {out}")
        [request] = rows_of(out, "requests.csv")
        # On a busy machine the engine may still load when the request comes; torch refuses nothing.
        assert request["status"] == "completed" or "loading" in request["reason"], (request, ended.err)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gptq", "quantization_config"),
        ("moe", "experts (num_local_experts)"),
        ("window", "a sliding window (sliding_window 16)"),
    ],
)
def test_what_torch_refuses_is_refused_everywhere(
    maveriq: Maveriq, case: Callable[[str], Path], tmp_path: Path, model: str, words: str
) -> None:
    config = case("11") / model / "config.json"
    asked = maveriq(f"engines --model {config} --device cpu --json")
    if asked.code == 0:
        answer = answers_of(asked)["torch"]
        assert not answer["can"]
        assert words in str(answer["reason"])
    else:
        assert words in asked.err
    profiled = maveriq(f"profile {config} --configuration 1x1 --out {tmp_path}/p")
    assert profiled.code == 2
    assert words in profiled.err
    assert not (tmp_path / "p").exists()


def test_a_quantised_checkpoint_has_one_weight_type_everywhere(maveriq: Maveriq, tmp_path: Path) -> None:
    config = put(tmp_path / "gptq", LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    for answer in answers_of(maveriq(f"engines --model {config} --json")).values():
        assert not answer["can"]
    emulated = answers_of(maveriq(f"engines --model {config} --json"))["emulated"]
    assert "its checkpoint holds int4_gptq weights (quantization_config), not float16" in str(emulated["reason"])
    emulated = answers_of(maveriq(f"engines --model {config} --weights int4_gptq --json"))["emulated"]
    assert emulated["can"]


def test_two_models_of_one_name_are_refused(maveriq: Maveriq, case: Callable[[str], Path]) -> None:
    folder = case("23")
    small, big = folder / "cfgs" / "small.json", folder / "cfgs" / "big.json"
    ended = maveriq(f"profile {small} {big} --configuration 1x1 --out {folder}/both")
    assert ended.code == 2
    assert "two models are called cfgs; set _name_or_path to tell them apart" in ended.err
    (folder / "trace.csv").write_text(f"{SCHEDULE}200,1,8,4\n201,2,8,4\n")
    for command in ("sim", "run --backend emulated"):
        models = put_set(folder, small, big)
        ended = maveriq(f"{command} --models {models} --trace {folder}/trace.csv --out {folder}/out --quiet")
        assert ended.code == 2
        assert "two models are called cfgs" in ended.err


def test_a_known_model_and_a_file_of_its_name_are_two_models(maveriq: Maveriq, tmp_path: Path) -> None:
    put(tmp_path / "llama-2-7b", LLAMA)
    ended = maveriq(f"sim --models {put_set(tmp_path, 'llama-2-7b', tmp_path / 'llama-2-7b')} --out out --quiet")
    assert ended.code == 2
    assert "two models are called llama-2-7b: the known one and" in ended.err


@pytest.mark.heavy
def test_a_profile_knows_which_model_it_measured(maveriq: Maveriq, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = put(tmp_path / "mine", LLAMA)
    measure = "--configuration 1x1 --prompt-tokens 8 --output-tokens 4 --repeats 1"
    assert maveriq(f"profile {config} {measure} --out {tmp_path}/p").code == 0
    put(tmp_path / "mine", LLAMA | {"num_hidden_layers": 8, "hidden_size": 256})
    ended = maveriq(f"plan {config} --profile {tmp_path}/p/profile.toml --gpus 2xcpu")
    assert ended.code == 2
    assert "layers 8, not 2, hidden_size 256, not 64" in ended.err


@pytest.mark.heavy
def test_requests_longer_than_the_model_are_refused_alike(maveriq: Maveriq, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(f"{SCHEDULE}300,1,5000,20\n310,1,200000,20\n320,1,3000,4000\n330,1,4000,96\n")
    models = put_set(tmp_path, "llama-2-7b")
    reason = "a sequence of 5020 tokens is longer than the 4096 positions of llama-2-7b"
    assert reason in maveriq("plan llama-2-7b --prompt-tokens 5000 --output-tokens 20").err
    for command in ("sim", "run --backend emulated --time-scale 0.01 --load-s 5"):
        out = tmp_path / command[:3]
        ended = maveriq(f"{command} --models {models} --trace {tmp_path}/trace.csv --out {out} --quiet")
        assert ended.code == 0, ended.err
        rows = rows_of(out, "requests.csv")
        assert [row["status"] for row in rows] == ["refused", "refused", "refused", "completed"]
        assert [row["reason"] for row in rows][:3] == [
            f"a sequence of {tokens} tokens is longer than the 4096 positions of llama-2-7b"
            for tokens in (5020, 200_020, 7000)
        ]
        assert "3 of 4 requests are longer than their model's context" in str(
            json.loads((out / "run.json").read_text())
        )


def test_long_requests_are_served_where_the_user_or_the_published_testbed_says_so(
    maveriq: Maveriq, tmp_path: Path
) -> None:
    (tmp_path / "trace.csv").write_text(f"{SCHEDULE}300,1,5000,20\n")
    common = f"--models {put_set(tmp_path, 'llama-2-7b')} --trace {tmp_path}/trace.csv --quiet"
    assert maveriq(f"sim {common} --beyond-context serve --out {tmp_path}/served").code == 0
    [row] = rows_of(tmp_path / "served", "requests.csv")
    assert row["status"] == "completed"
    assert "unknown --beyond-context 'maybe'" in maveriq(f"sim {common} --beyond-context maybe").err
    published = "sim --scale 0.05 --prompt-tokens trace --output-tokens trace --quiet"
    assert maveriq(f"{published} --out {tmp_path}/published").code == 0
    assert "and are served" in (tmp_path / "published" / "run.json").read_text()
    refused = [row for row in rows_of(tmp_path / "published", "requests.csv") if "longer" in row["reason"]]
    assert refused == []
